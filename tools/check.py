"""Every check of the repository, the tests last; stops at the first that fails. Arguments go to pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(CORES, 4)
"""Tests run side by side, each on one thread: so small a model gains nothing from more."""
LINT_IMPORTS = Path(sysconfig.get_path("scripts")) / "lint-imports"

CHECKS: list[list[str]] = [
    [sys.executable, "-m", "ruff", "check", "."],
    [sys.executable, "-m", "ruff", "format", "--check", "."],
    [sys.executable, "-m", "pyright", "--pythonpath", sys.executable],
    [str(LINT_IMPORTS)],
    [sys.executable, "-m", "pytest", f"--numprocesses={WORKERS}", "--dist=worksteal", *sys.argv[1:]],
]


def main() -> int:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for check in CHECKS:
        shown = " ".join([Path(check[0]).name, *check[1:]])
        print(f"$ {shown}", flush=True)
        status = subprocess.run(check, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
