"""The files of a checkpoint as they lie on a disk: found, verified, and read within bounds.

Whatever a file says about names, shapes and sizes is checked before anything is allocated by it, and no name in it is
followed out of its folder: a checkpoint may come from somebody else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from velora_pretrain.errors import UserError
from velora_pretrain.files import read_json, sha256_of
from velora_pretrain.llama_folder import CONFIG
from velora_pretrain.records import RunFolder

STATE_FILE, STATE_TENSORS, WEIGHTS = "training_state.json", "training_state.safetensors", "model.safetensors"
SIGNATURE = "state_sha256"
"""Key of training_state.json with the hash of the rest of it."""
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Formats of tensors that are read."""


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


def newest_whole(folder: RunFolder, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are all as they were written, and its state; None where there is none.

    Args:
        folder: the run.
        warn: told of each newer checkpoint that is damaged, and why.
    """
    for path in folder.checkpoints_newest_first():
        try:
            return path, verified_state(path)
        except DamagedCheckpoint as damage:
            warn(f"{path} is damaged ({damage}) and is not used")
    return None


def recover_replaced(folder: RunFolder) -> None:
    """Gives back its name to a checkpoint that was about to be replaced when the process was killed."""
    for path in folder.checkpoints.glob(".step-*.old"):
        replaced = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not replaced.exists():
            path.rename(replaced)


def set_aside_newer(folder: RunFolder, than: Path | None) -> None:
    """Renames the checkpoints newer than `than`, which are damaged, so that none of them counts as the newest."""
    for path in folder.checkpoints_newest_first():
        if than is not None and path.name <= than.name:
            return
        shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        path.rename(path.with_name(f"damaged-{path.name}"))


def verified_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files have the hashes they were written with.

    Raises:
        DamagedCheckpoint: a file is missing or changed, or training_state.json says what it cannot.
    """
    try:
        state = read_json(path / STATE_FILE)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{STATE_FILE} cannot be read: {reason_of(error)}") from None
    fault = _state_fault(state, path)
    if fault:
        raise DamagedCheckpoint(f"{STATE_FILE}: {fault}")
    # Older versions wrote none.
    if SIGNATURE in state and signed(state)[SIGNATURE] != state[SIGNATURE]:
        raise DamagedCheckpoint(f"{STATE_FILE} is not what was written")
    for name, sha256 in state["sha256"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if sha256_of(file) != sha256:
            raise DamagedCheckpoint(f"{name} is not what was written")
    return state


def signed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the SHA-256 of the rest of it, which tells damage, not ill will."""
    rest = {key: value for key, value in state.items() if key != SIGNATURE}
    return {**rest, SIGNATURE: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _state_fault(state: dict[str, Any], path: Path) -> str | None:
    """What is wrong with the content of a training_state.json, if anything."""
    hashes = state.get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        return "names no files"
    outside = [name for name in hashes if PurePath(name).name != name or name in ("", ".", "..")]
    if outside:
        return f"{outside[0]!r} is no name of a file of this folder"
    missing = [name for name in (WEIGHTS, STATE_TENSORS, CONFIG) if name not in hashes]
    if missing:
        return f"does not name {missing[0]}"
    for key, kinds in {"step": (int,), "tokens": (int,), "cursor": (dict, type(None))}.items():
        if type(state.get(key)) not in kinds:
            return f"{key} is {state.get(key)!r}"
    for key in ("seconds", "skipped_steps", "rollbacks"):
        if not isinstance(state.get(key, 0), int | float) or state.get(key, 0) < 0:
            return f"{key} is {state[key]!r}"
    number = path.name.removeprefix("step-")
    if min(state["step"], state["tokens"]) < 0 or (number.isdigit() and int(number) != state["step"]):
        return f"step {state['step']}, tokens {state['tokens']} cannot be those of {path.name}"
    return None


def tensor_shapes(path: Path, formats: Collection[str] = DTYPES) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, by its header alone.

    Args:
        path: the file.
        formats: those that its tensors may have.

    Raises:
        UserError: the file is cut short or no safetensors file, or a tensor has another format.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in slices.items():
            if tensor.get_dtype() not in formats:
                raise UserError(f"{path}: {name} has the format {tensor.get_dtype()}, which is not read here")
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({reason_of(error)})") from None


def reason_of(error: Exception) -> str:
    """What went wrong with a file, in a few words."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error).splitlines()[0]
