"""One process writes to a run folder at a time: an advisory lock on a file of it, which ends with its holder.

The operating system drops the lock when its process ends, be it by kill -9, so nothing is left to clean up. It holds
between machines where their file system passes locks on, as NFS does. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType

from velora_pretrain.errors import UserError

LOCK_FILE = "run.lock"
ATTEMPTS, SECONDS_BETWEEN_ATTEMPTS = 5, 0.1


class RunLock:
    """The right to write to a folder, from `take` to `release`; a context manager that releases it.

    Args:
        folder: the folder.
        file: name of the locked file in it.
        busy: what to say of another process that has the lock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file: str = LOCK_FILE,
        busy: str = "is training in this folder; wait for it, stop it, or give another --run-dir",
    ) -> None:
        self._path, self._busy = folder / file, busy
        self._descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock; makes the folder if it is missing. Harmless when repeated.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        if self._descriptor is not None:
            return
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Python opens it so that no child inherits it, and with it the lock.
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{folder}: the folder cannot be written ({error.strerror})") from None
        try:
            is_locked = _is_locked(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"{folder}: its file system has no locks ({error.strerror})") from None
        if not is_locked:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(f"{folder}: {holder} {self._busy}")
        self._descriptor = descriptor
        # For the message alone: a full disk is told by whoever writes what matters.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)

    def release(self) -> None:
        """Gives the lock back; harmless when repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the lock of a run folder; None where there is no such file to ask."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            # Shared, so that two readers never take each other for the training process.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _is_locked(descriptor: int) -> bool:
    """Takes the lock, if it is free within a moment: readers hold it for as long as it takes to see that it is."""
    for _ in range(ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        else:
            return True
    return False


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
