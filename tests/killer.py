"""Runs the tool and kills it, as kill -9 does, at the n-th time that it comes to a place.

python killer.py PLACE N ARGUMENT...
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from velora_pretrain import checkpoint, cli, trainer
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim.adamw import AdamW

PLACES: dict[str, tuple[Any, str]] = {
    "reading": (trainer.TrainLoader, "__next__"),
    "forward": (Llama, "forward"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (AdamW, "_move"),
    "recording": (trainer.RunFolder, "append"),
    "evaluation": (trainer, "evaluate"),
    "writing weights": (checkpoint, "save_file"),
    "bringing to disk": (checkpoint, "_to_disk"),
    "removing old": (checkpoint.RunFolder, "checkpoints_newest_first"),
}
"""Where a run can be killed; the call is not made."""


def kill_at(place: str, count: int) -> None:
    """Replaces the function of a place by one that kills the process when it is called for the `count`-th time."""
    owner, name = PLACES[place]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.argv = ["velora-pretrain", *sys.argv[3:]]
    cli.main()
