"""Runs the tool and kills it, as kill -9 does, at the n-th time that it comes to a place.

    python tools/killer.py PLACE N ARGUMENT...
    python tools/killer.py count FILE ARGUMENT...

The second form kills nothing and writes how often each place was come to, as JSON. With IMPATIENT in the environment
the tool waits a hundredth as long for a server as it else does.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from velora_pretrain import checkpoint, cli, trainer, validation
from velora_pretrain.data import c4, remote
from velora_pretrain.display import LogDisplay
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim.adamw import AdamW

PLACES: dict[str, tuple[Any, str]] = {
    "reading a block": (c4, "_read_block"),  # in the thread that reads ahead
    "reading": (trainer.TrainLoader, "__next__"),
    "forward": (Llama, "forward"),
    "backward": (torch.Tensor, "backward"),
    "between micro-batches": (LogDisplay, "micro_batch"),
    "optimizer": (AdamW, "_move"),
    "recording": (trainer.RunFolder, "append"),
    "evaluation": (validation, "evaluate"),
    "writing weights": (checkpoint, "save_file"),
    "bringing to disk": (checkpoint, "_to_disk"),
    "removing old": (checkpoint.RunFolder, "checkpoints_newest_first"),
    "removed": (checkpoint.shutil, "rmtree"),
}
"""Where a run can be killed; the call is not made."""


def watch(called: Callable[[str], None]) -> None:
    """Calls `called` with the name of each place whenever the tool comes to it."""
    for place, (owner, name) in PLACES.items():
        setattr(owner, name, _watched(getattr(owner, name), lambda place=place: called(place)))


def _watched(original: Callable[..., Any], called: Callable[[], None]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        called()
        return original(*args, **kwargs)

    return watched


def main(arguments: list[str]) -> None:
    """Runs the tool with what stands behind the first two arguments."""
    place, number, *rest = arguments
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        calls[name] += 1
        if name == place and calls[name] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(count)
    if place == "count":
        atexit.register(lambda: Path(number).write_text(json.dumps(calls)))
    elif place not in PLACES:
        raise SystemExit(f"{place}: no such place; choose from {', '.join(PLACES)}")
    if "IMPATIENT" in os.environ:
        remote.RETRY_DELAYS_SECONDS = tuple(seconds / 100 for seconds in remote.RETRY_DELAYS_SECONDS)
        remote.TIMEOUT_SECONDS /= 100
    sys.argv = ["velora-pretrain", *rest]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
