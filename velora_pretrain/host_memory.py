"""Memory of the host that this process may use: the machine's, or less where a control group holds it below.

Containers and batch systems hold their processes in control groups (Linux, cgroups v1 and v2); what is beyond a
group's limit kills the process, however much the machine has. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

PROC = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def host_memory_bytes() -> int:
    """What there is in all."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_host_memory_bytes() -> int:
    """What could still be taken."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in, by all that it stands in, if they have any."""
    for folder, (limit_name, use_name, cache_key) in _groups():
        try:
            limit = int((folder / limit_name).read_text())
            use = int((folder / use_name).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such group here, or "max": no limit
        # Pages of files that were read are given back when they are wanted.
        yield limit, use - int(statistics.get(cache_key, 0))


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders of control groups, from this process's own upwards, with the names of what is read of each."""
    try:
        lines = PROC.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CONTROL_GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Within a container the path may be the host's, which is not seen; the root is then the container's group.
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            yield folder, names
            if folder == root:
                break
