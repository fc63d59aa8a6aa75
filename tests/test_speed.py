"""The comparison of modes by speed: rows, limits, what memory does not hold, and what is not installed."""

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from velora_pretrain import speed
from velora_pretrain.contender import settled
from velora_pretrain.speed import Entry, compare_speed
from velora_pretrain.speed_table import print_speed


@pytest.fixture
def entries(tiny_run: Callable[..., Any]) -> list[Entry]:
    everywhere = {"modes__velora__layers": "all", "optimizer__update": "in_backward"}
    changes = {"full": {}, "galore": {}, "velora": everywhere}
    runs = {mode: tiny_run(mode=mode, packing="pack", **more) for mode, more in changes.items()}
    return [Entry(label=mode, run=run) for mode, run in runs.items()]


def test_rows_of_every_mode_beside_full_rank(entries: list[Entry]) -> None:
    result = compare_speed(entries[::-1], rounds=2, warmup_steps=2)
    rows = {row["mode"]: row for row in result["rows"]}
    assert list(rows) == ["velora", "galore", "full"]
    assert result["settings"]["baseline"] == "full"
    assert result["settings"]["blocks"] == 0
    assert result["notes"] == []
    for row in rows.values():
        assert len(row["tokens_per_second_samples"]) == 2
        parts = [row[f"{part}_seconds"]["median"] for part in ("data", "forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert row["cpu_seconds"]["median"] > 0
        assert row["predicted"]["peak_bytes"] > 0
        assert row["model_flops_utilisation"] > 0
        assert row["options"]["micro_batch_sequences"] == 4
    full = rows["full"]
    assert full["wall_speed_ratio"]["median"] == full["matmul_limit_ratio"] == 1.0
    assert full["model_flops_utilisation"] == full["matmul_utilisation"]
    assert result["settings"]["model_operations"] == full["matmul_operations"]
    assert rows["velora"]["matmul_limit_ratio"] > 1.0 > rows["galore"]["matmul_limit_ratio"]
    assert rows["velora"]["optimizer_share_at_131072_tokens"] is None
    assert [work["period_steps"] for work in rows["galore"]["rare_work"]] == [200]
    assert set(result["gemm"]["shapes"]) == {"projection", "mlp", "head", "square"}
    out = io.StringIO()
    print_speed(result, Console(file=out, width=200))
    shown = out.getvalue()
    assert "interleaved" in shown
    assert "galore: what it does once in 200 steps" in shown
    assert "in backward" in shown


def test_what_memory_does_not_hold_runs_in_blocks_and_what_is_not_installed_is_said(
    entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "free_memory_bytes", lambda device: 0)
    monkeypatch.setitem(sys.modules, "velora_pretrain.data.tokenizer", None)
    lines: list[str] = []
    result = compare_speed(entries[:1], rounds=2, warmup_steps=2, note=lines.append)
    assert result["settings"]["blocks"] == 2
    assert lines == result["notes"]
    assert [line.split(":")[0] for line in lines] == [
        "memory does not hold all 1 at once",
        "random tokens in place of text, no time for data",
    ]


def test_a_step_has_one_forward_pass_unless_the_run_says_otherwise(tiny_run: Callable[..., Any]) -> None:
    given = settled(tiny_run(batch__sequences=12, batch__micro_batch="auto", batch__sequence_length=16), "cpu").batch
    assert (given.sequences, given.micro_batch) == (12, 12)
    table = tiny_run().batch
    left_out = type(table)(micro_batch="auto", sequence_length=16)
    run = tiny_run().model_copy(update={"batch": left_out})
    assert (settled(run, "cpu").batch.sequences, settled(run, "cpu").batch.micro_batch) == (256, 256)
