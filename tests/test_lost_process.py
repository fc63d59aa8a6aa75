"""A process that dies ends the run everywhere, soon and in one line; and two hosts, of which one dies."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launches
import psutil
import pytest
import runs

SETTINGS: dict[str, Any] = {
    "mode": "velora",
    "modes__velora__layers": "all",
    "batch__micro_batch": 2,
    "schedule__steps": 60,
    "checkpoint__every_steps": 5,
}
END_SECONDS = 60
LAUNCH = [sys.executable, "-m", "torch.distributed.run"]


def launched(command: list[str], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=runs.environment(**changes),
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tool(recipe: Path, folder: Path, *arguments: str) -> list[str]:
    return ["-m", "velora_pretrain", "train", "--recipe", str(recipe), "--run-dir", str(folder), *arguments]


def wait_for(path: Path, launcher: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)


def workers(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of the run below one launcher, by rank."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.parametrize("sharding", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(
    tiny_recipe: Callable[..., Path], tmp_path: Path, sharding: str
) -> None:
    recipe, folder = tiny_recipe(distributed__sharding=sharding, **SETTINGS), tmp_path / "killed"
    launcher = launched([*LAUNCH, "--standalone", "--nproc-per-node", "2", *tool(recipe, folder)])
    wait_for(folder / "checkpoints" / "step-00000005", launcher)
    began = time.monotonic()
    workers(launcher)[1].send_signal(signal.SIGKILL)
    _, errors = launcher.communicate(timeout=2 * END_SECONDS)
    seconds = time.monotonic() - began
    print(f"torchrun returned after {seconds:.1f} seconds")  # shown by -s
    assert launcher.returncode != 0
    assert seconds < END_SECONDS
    message = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert "another process ended, or cannot be reached; the last good checkpoint is " in message
    assert f"go on with: velora-pretrain train --resume --run-dir {folder}" in message
    assert "[rank0]: Traceback" not in errors
    assert re.search(r"rank +: 0 .*\n +exitcode +: 1 ", errors), errors
    assert not (folder / "summary.json").exists()
    launches.train(recipe, folder, "--resume", processes=2)
    launches.train(recipe, tmp_path / "straight", processes=2)
    launches.assert_same_tensors(tmp_path / "straight", folder, rel=0, steps=60)
    losses = [
        [json.loads(line).get("loss_nats_per_token") for line in (run / "metrics.jsonl").open()]
        for run in (folder, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces joined by a cable: name, interface and address of each."""
    made = [(f"vp{end}{os.getpid()}", f"ve{end}{os.getpid()}", f"10.77.0.{end}") for end in (1, 2)]
    try:
        for name, _, _ in made:
            ip("netns", "add", name)
        ip("link", "add", made[0][1], "type", "veth", "peer", "name", made[1][1])
        for name, interface, address in made:
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    else:
        yield made
    finally:
        for name, _, _ in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def on_both(hosts: list[tuple[str, str, str]], command: list[str]) -> list[subprocess.Popen[str]]:
    """One process on each host."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    where += ["--rdzv-endpoint", f"{hosts[0][2]}:29400"]
    launchers = []
    for place, (name, interface, address) in enumerate(hosts):
        # Which of them answers at the endpoint is not left to how a machine resolves its own name.
        mine = [f"--rdzv-conf=is_host={int(place == 0)}", f"--local-addr={address}"]
        inside = ["ip", "netns", "exec", name, *LAUNCH, *where, *mine, *command]
        launchers.append(launched(inside, GLOO_SOCKET_IFNAME=interface))
    return launchers


def test_two_hosts_give_the_numbers_of_one_process(
    tiny_recipe: Callable[..., Path], tmp_path: Path, hosts: list[tuple[str, str, str]]
) -> None:
    recipe = tiny_recipe(mode="velora", **launches.SETTINGS)
    launchers = on_both(hosts, tool(recipe, tmp_path / "two"))
    ends = [(*launcher.communicate(timeout=240), launcher.returncode) for launcher in launchers]
    assert [status for *_, status in ends] == [0, 0], "\n".join(errors for _, errors, _ in ends)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    launches.train(recipe, tmp_path / "one")
    launches.assert_same(tmp_path / "one", tmp_path / "two", rel=1e-5)


@pytest.mark.slow
def test_a_process_killed_on_one_host_ends_the_other(
    tiny_recipe: Callable[..., Path], tmp_path: Path, hosts: list[tuple[str, str, str]]
) -> None:
    recipe, folder = tiny_recipe(**SETTINGS), tmp_path / "killed"
    launchers = on_both(hosts, tool(recipe, folder))
    wait_for(folder / "checkpoints" / "step-00000005", launchers[0])
    began = time.monotonic()
    ranks = [next(iter(workers(launcher))) for launcher in launchers]
    workers(launchers[ranks.index(1)])[1].send_signal(signal.SIGKILL)
    errors = [launcher.communicate(timeout=2 * END_SECONDS)[1] for launcher in launchers]
    assert time.monotonic() - began < END_SECONDS
    assert all(launcher.returncode != 0 for launcher in launchers)
    assert "error: another process ended" in errors[ranks.index(0)]
