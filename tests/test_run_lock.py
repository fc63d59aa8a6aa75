"""One process per run folder, and none that is dead."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from velora_pretrain.errors import UserError
from velora_pretrain.run_lock import LOCK_FILE, RunLock


def held_by_another(folder: Path) -> subprocess.Popen[str]:
    """A process that has taken the lock of `folder` and sleeps."""
    code = (
        "import sys, time; from pathlib import Path; from velora_pretrain.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); lock.take(); print('taken', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=runs.environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    holder = held_by_another(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=rf"run: process {holder.pid} on .* is training in this folder"):
            RunLock(tmp_path / "run").take()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with RunLock(tmp_path / "run") as lock:
        lock.take()
        lock.take()
    RunLock(tmp_path / "run").take()


def test_it_is_not_passed_on_to_children(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        lock.take()
        sleeping = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(100)"]
        child = subprocess.Popen(sleeping, close_fds=False, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
    try:
        RunLock(tmp_path).take()
    finally:
        child.kill()
        child.communicate()


def test_a_lock_file_of_nonsense_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(b"\xff{")
    RunLock(tmp_path).take()


def test_a_run_that_goes_on_elsewhere_is_neither_resumed_nor_overwritten(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = tiny_recipe(schedule__steps=100_000, checkpoint__every_steps=2), tmp_path / "run"
    first = runs.start("train", "--recipe", str(recipe), "--run-dir", str(folder))
    try:
        deadline = time.monotonic() + 100
        while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        for arguments in (["--resume"], ["--recipe", str(recipe)]):
            second = runs.tool("train", *arguments, "--run-dir", str(folder))
            assert second.returncode == 2, second.stderr
            assert len(second.stderr.splitlines()) == 1
        assert "already holds a run" in second.stderr
        refused = runs.tool("train", "--resume", "--run-dir", str(folder))
        assert f"process {first.pid} on" in refused.stderr
    finally:
        first.kill()
        first.communicate()
