"""What a finished run came to, and what that result depends on."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from velora_pretrain.data.sample import sample_sha256
from velora_pretrain.records import RunFolder
from velora_pretrain.setup import Prepared
from velora_pretrain.sharding import predict_per_device


def summarise(
    prepared: Prepared,
    folder: RunFolder,
    *,
    steps: int,
    tokens: int,
    seconds: float,
    device: str,
    processes: int,
    measured_memory: dict[str, Any] | None = None,
    reduced_bytes_per_step: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        prepared: what the run started from.
        folder: its records.
        steps: optimizer steps done.
        tokens: tokens read.
        seconds: wall time.
        device: where it ran.
        processes: how many took part.
        measured_memory: what `measurement.StepMemory` measured of one step.
        reduced_bytes_per_step: bytes of gradients that a process exchanged with others, by kind of parameter.
    """
    run, records = prepared.run, list(folder.records())
    training = [record for record in records if "loss_nats_per_token" in record]
    micro_batch = run.batch.micro_batch
    assert micro_batch != "auto"
    accumulates = micro_batch < run.batch.sequences // processes
    predicted = predict_per_device(run, micro_batch, accumulates=accumulates, devices=processes).memory
    return {
        "run_dir": str(folder.path),
        "size": run.size,
        "mode": run.mode,
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "first_loss_nats_per_token": training[0]["loss_nats_per_token"],
        "last_loss_nats_per_token": training[-1]["loss_nats_per_token"],
        "final_evaluation": next(r for r in reversed(records) if "perplexity" in r and r["step"] == steps),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in training),
        "skipped_steps": training[-1].get("skipped_steps", 0),
        "rollbacks": training[-1].get("rollbacks", 0),
        "loss_spikes": sum("loss_above_median_nats" in record for record in training),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in training),
        "predicted_memory": _as_json(asdict(predicted)),
        "measured_memory": _as_json(measured_memory),
        "reduced_bytes_per_step": reduced_bytes_per_step,
        "device": device,
        "processes": processes,
        **provenance(prepared),
    }


def _as_json(value: Any) -> Any:
    """The same as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))


def provenance(prepared: Prepared) -> dict[str, Any]:
    """What a result depends on beside its configuration: hashes of configuration, tokenizer and sample, versions."""
    packages = ("velora-pretrain", "torch", "sentencepiece", "datasets", "accelerate", "safetensors")
    versions = {name: _version(name) for name in packages}
    return {
        "config_sha256": prepared.run.sha256,
        "tokenizer": prepared.tokenizer.name,
        "tokenizer_sha256": prepared.tokenizer.sha256,
        "data": prepared.source.name,
        "data_sha256": sample_sha256(Path(prepared.source.shards[0])) if prepared.source.name == "sample" else None,
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
