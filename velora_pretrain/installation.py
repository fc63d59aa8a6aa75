"""What is installed beside PyTorch, as the package's own metadata and the system tell it. No torch here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DISTRIBUTION = "velora-pretrain"


def missing_of_extras() -> dict[str, list[str]] | None:
    """For each extra of the package the requirements that are not met; None where the package is not installed."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    extras = distribution.metadata.get_all("Provides-Extra") or []
    missing: dict[str, list[str]] = {extra: [] for extra in extras}
    for requirement in map(Requirement, distribution.requires or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or _is_met(requirement):
            continue
        for extra in extras:
            if marker.evaluate({"extra": extra}):
                missing[extra].append(f"{requirement.name}{requirement.specifier}")
    return missing


def _is_met(requirement: Requirement) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def compiler_facts(device_kind: str) -> dict[str, Any]:
    """What torch.compile needs on a device: the compiler's path, and what is missing, if anything.

    Args:
        device_kind: cpu, cuda or mps.
    """
    if device_kind == "cuda":
        # Triton compiles its kernels itself, and the code that launches them with a C compiler.
        named = os.environ.get("CC")
        found = next((path for each in ([named] if named else ["gcc", "clang"]) if (path := shutil.which(each))), None)
        wanted = {
            f"a C compiler ({named or 'gcc or clang'})": found is None,
            "triton": importlib.util.find_spec("triton") is None,
        }
    elif device_kind == "cpu":
        named = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        found = shutil.which(named)
        wanted = {f"a C++ compiler ({named})": found is None}
    else:
        found, wanted = None, {}
    return {"path": found, "missing": [name for name, is_missing in wanted.items() if is_missing]}


def disk_facts(folder: Path) -> dict[str, Any]:
    """Room where a folder lies, or would."""
    folder = folder.absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    usage = shutil.disk_usage(existing)
    return {"folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total}


def busy_cores() -> float | None:
    """Cores that programs keep busy, on average over the last minute; None where the system does not say."""
    ask = getattr(os, "getloadavg", None)
    return ask()[0] if ask else None


def has_idle_gpu(device_kind: str) -> bool:
    """Whether NVIDIA's driver is there and PyTorch does not see a GPU."""
    return device_kind == "cpu" and shutil.which("nvidia-smi") is not None
