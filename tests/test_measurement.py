"""A run measures one of its steps, and its numbers stay as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_outcome import untimed
from safetensors.torch import load_file

from velora_pretrain import measurement
from velora_pretrain.config import MODES
from velora_pretrain.display import Display, make_display
from velora_pretrain.records import RunFolder
from velora_pretrain.trainer import train


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "velora", "modes__velora__layers": "all", "memory__recompute": "elementwise"},
        {"mode": "lora", "memory__recompute": "block", "precision": "bf16-mixed"},
    ],
)
def test_measuring_changes_no_bit(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    run, results = tiny_run(schedule__steps=4, **settings), []
    for step in (3, 10**9):
        monkeypatch.setattr("velora_pretrain.trainer.MEASURED_STEP", step)
        # The last step is measured where there are fewer; not here.
        if step > 3:
            monkeypatch.setattr(measurement.StepMemory, "watch", lambda self, is_due: _nothing())
        folder = RunFolder(tmp_path / f"run-{step}")
        with make_display() as display:
            summary = train(run, folder, resume=False, display=display)
        records = [untimed(each) for each in folder.records()]
        weights = load_file(folder.checkpoint(4) / "model.safetensors")
        results.append((summary["measured_memory"], records, weights))
    (measured, records, weights), (nothing, plain_records, plain_weights) = results
    assert nothing is None
    assert records == plain_records
    assert all(weights[name].equal(plain_weights[name]) for name in plain_weights)
    predicted = summary["predicted_memory"]
    assert measured["weights_bytes"] == predicted["weights_bytes"]
    assert measured["optimizer_state_bytes"] == pytest.approx(predicted["optimizer_state_bytes"], rel=0.03)
    assert measured["saved_activations_bytes"] == pytest.approx(predicted["saved_activations_bytes"], rel=0.05)
    # Labels, inputs and the sum of the loss come beside what the prediction has: 16 bytes for each of 256 tokens.
    assert predicted["peak_bytes"] <= measured["peak_bytes"] <= predicted["peak_bytes"] * 1.03 + 3 * 16 * 256


@pytest.mark.parametrize("mode", MODES)
def test_measuring_changes_no_bit_of_what_a_mode_does_now_and_then(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Refreshes, restarts and resamples lie in the step that is measured: a resumed run measures another one."""
    settings = {
        "modes__galore__rank": 8,
        "modes__galore__update_gap": 2,
        "modes__lora__rank": 8,
        "modes__lora__restart_every": 3,
        "modes__flora__rank": 8,
        "modes__flora__kappa": 3,
        "modes__velora__init": "svd",
        "modes__velora__refresh_every": 2,
    }
    run, weights = tiny_run(mode=mode, schedule__steps=4, **settings), []
    for step in (3, 1):
        monkeypatch.setattr("velora_pretrain.trainer.MEASURED_STEP", step)
        folder = RunFolder(tmp_path / f"run-{step}")
        train(run, folder, resume=False, display=Display())
        files = (folder.checkpoint(4) / name for name in ("model.safetensors", "training_state.safetensors"))
        weights.append({key: value for file in files for key, value in load_file(file).items()})
    assert [name for name, value in weights[0].items() if not value.equal(weights[1][name])] == []


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...
