"""Memory of the host under control groups of both versions, nested, and as a container sees them."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from velora_pretrain import host_memory

GIB = 2**30
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 64 GiB, 40 of them free, and no control groups."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "CONTROL_GROUPS", tmp_path / "groups")
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write_group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def figures() -> tuple[float, float]:
    return host_memory.host_memory_bytes() / GIB, host_memory.free_host_memory_bytes() / GIB


def test_without_control_groups_it_is_the_machines() -> None:
    assert figures() == (64, 40)


@pytest.mark.parametrize("seen", ["/batch/job", "/not/seen/here"])
def test_the_second_version(tmp_path: Path, seen: str) -> None:
    """The tightest of a group and those that it stands in; a container that sees the host's path has the root."""
    (tmp_path / "cgroup").write_text(f"0::{seen}\n")
    write_group(tmp_path / "groups" / "batch" / "job", V2, "max", 3 * GIB, 0)
    write_group(tmp_path / "groups" / "batch", V2, str(16 * GIB), 6 * GIB, 2 * GIB)
    assert figures() == ((16, 12) if seen == "/batch/job" else (64, 40))
    write_group(tmp_path / "groups", V2, str(8 * GIB), 7 * GIB, GIB)
    assert figures() == (8, 2)


def test_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:cpuset,memory:/docker/1:2\n0::/\n")
    write_group(tmp_path / "groups" / "memory", V1, str(2**63 - 4096), 50 * GIB, 0)
    assert figures() == (64, 40)
    write_group(tmp_path / "groups" / "memory" / "docker" / "1:2", V1, str(4 * GIB), 5 * GIB, 0)
    assert figures() == (4, 0)
