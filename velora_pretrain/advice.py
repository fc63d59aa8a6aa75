"""What to do about what `doctor` has found, a line each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from velora_pretrain.records import GIB

SLOWER, FASTER = 0.8, 1.3
"""Ratios of rates from which on a format is worth avoiding, or taking."""
BUSY = 0.5
"""Share of the cores from which on other programs' work is told."""
LONG_SECONDS = 14 * 86_400
"""What nobody waits for."""


def advice(facts: Mapping[str, Any]) -> list[str]:
    """Lines of advice.

    Args:
        facts: of `doctor`.
    """
    return [*_of_installation(facts), *_of_data(facts), *_of_recipe(facts)]


def _of_installation(facts: Mapping[str, Any]) -> list[str]:
    lines, device, host = [], facts["device"], facts["host"]
    if device["has_idle_gpu"]:
        lines.append(
            f"NVIDIA's driver is here, but this PyTorch ({facts['versions']['torch']}) sees no GPU: install its CUDA"
            " build (pytorch.org says how), or look at CUDA_VISIBLE_DEVICES"
        )
    if device["kind"] == "cpu" and host["threads"] < host["usable_cores"]:
        lines.append(
            f"PyTorch uses {host['threads']} of {host['usable_cores']} cores: unset OMP_NUM_THREADS, or raise it"
        )
    if host["busy_cores"] is not None and host["busy_cores"] > BUSY * host["usable_cores"]:
        lines.append(
            f"other programs keep {host['busy_cores']:.1f} of {host['usable_cores']} cores busy: speed and time are"
            " what they leave, and may be several times better without them"
        )
    if device["count"] > 1:
        lines.append(
            f"figures are of one device; use all {device['count']} by: torchrun --standalone --nproc-per-node"
            f" {device['count']} -m velora_pretrain train ..."
        )
    if facts["compiler"]["missing"]:
        lines.append(f"--compile would fail: it needs {' and '.join(facts['compiler']['missing'])}")
    return lines


def _of_data(facts: Mapping[str, Any]) -> list[str]:
    if facts["hub"]["is_reachable"]:
        return []
    lines = [
        "the hub is not reachable: --data auto would use the bundled sample. Where there is a network, `velora-pretrain"
        " data fetch --shards 15 --to DIR` fetches C4; bring DIR here and give --data DIR"
    ]
    recipe = facts["recipe"]
    if recipe["data"] == "c4":
        lines.append(f"{recipe['name']} reads C4 from the hub, and would stop without it: give --data DIR")
    return lines


def _of_recipe(facts: Mapping[str, Any]) -> list[str]:
    recipe, bf16 = facts["recipe"], facts["formats"]["bf16"]
    lines = []
    if not recipe["fits"]:
        fitting = [row["size"] for row in facts["sizes"] if any(row["micro_batch_sequences"].values())]
        smaller = f"; the largest size that fits is {fitting[-1]}" if fitting else ""
        lines.append(
            f"{recipe['name']} does not fit: one sequence takes {recipe['peak_bytes'] / GIB:.1f} GiB of the"
            f" {facts['budget_bytes'] / GIB:.1f} that may be used; try --set memory.recompute=block{smaller}"
        )
    ratio = bf16["fp32_ratio"]
    if recipe["precision"] != "fp32" and (ratio is None or ratio < SLOWER):
        how = "are not there" if ratio is None else f"run at {ratio:.2f} × the rate of fp32"
        lines.append(f"matrix products in bf16 {how} on this device: give --precision fp32")
    if recipe["precision"] == "fp32" and ratio is not None and ratio > FASTER:
        lines.append(
            f"matrix products in bf16 run at {ratio:.1f} × the rate of fp32 on this device: try --precision bf16-mixed"
        )
    if recipe["kept_checkpoints_bytes"] > facts["disk"]["free_bytes"]:
        lines.append(
            f"{facts['disk']['folder']} has {facts['disk']['free_bytes'] / GIB:.1f} GiB free, and the checkpoints of"
            f" {recipe['name']} take {recipe['kept_checkpoints_bytes'] / GIB:.1f}: give a --run-dir with more room"
        )
    if (recipe["seconds"] or recipe["seconds_at_least"] or 0) > LONG_SECONDS:
        lines.append(
            f"{recipe['name']} is not for this machine alone: --recipe quickstart shows in minutes that all works"
        )
    return lines
