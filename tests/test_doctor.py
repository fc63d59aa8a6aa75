"""What a machine can do: figures against the ones that train and compare use, other machines by fakes, and advice."""

from __future__ import annotations

import copy
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from rich.console import Console

from velora_pretrain import advice as advising
from velora_pretrain import cli, doctor, installation
from velora_pretrain.config import BASELINE
from velora_pretrain.contender import operations_of
from velora_pretrain.dimensions import SIZES
from velora_pretrain.doctor_table import print_examination
from velora_pretrain.errors import UserError
from velora_pretrain.gemm_rate import GemmRate
from velora_pretrain.host_memory import host_memory_bytes
from velora_pretrain.prediction import predict
from velora_pretrain.recipe import build_run, resolve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """No network, small products, two sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "hub_fault", lambda timeout_seconds: "the hub does not answer (test)")
        patch.setattr(doctor, "SQUARE_SIDES", {"cpu": 64, "cuda": 64, "mps": 64})
        patch.setattr(doctor, "SIZES", {size: SIZES[size] for size in ("9m", "20m")})
        yield


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def facts(tiny_data: Path, tiny_tokenizer: Path) -> dict[str, Any]:
    run = build_run(runs.values(tiny_data, tiny_tokenizer), where="test")
    return doctor.examine(run, recipe="tiny", runs_folder=Path("runs"))


def test_the_command_prints_and_writes_nothing(
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe()
    assert status("doctor", "--recipe", str(recipe), "--json", "facts.json") == 0
    shown = capsys.readouterr().out
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert set(tmp_path.iterdir()) == {recipe, tmp_path / "facts.json"}
    for part in (
        "device",
        "host memory",
        "matrix products",
        "hub",
        "extras",
        "9m",
        "20m",
        "recipe recipe-0",
        "tokens/s",
    ):
        assert part in shown
    assert facts["recipe"]["name"] == "recipe-0"
    assert facts["device"]["kind"] == "cpu"
    assert 0 < facts["host"]["free_memory_bytes"] <= facts["host"]["memory_bytes"]
    assert facts["disk"]["free_bytes"] > 0
    assert all(each["operations_per_second"] > 0 for each in facts["formats"].values() if each["is_supported"])
    assert facts["formats"]["fp32"]["fp32_ratio"] == 1.0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hub"]["fault"] in shown.replace("\n", " ")


def test_what_fits_is_what_a_whole_prediction_says_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SIZES", {"9m": SIZES["9m"]})
    run = resolve(None, {"size": "9m", "batch.sequence_length": 512}, [])
    six = predict(run, 6, accumulates=True).memory.peak_bytes
    (row,) = doctor.fitting_sizes(run, "cpu", six - 1)
    full, *others = row["micro_batch_sequences"].values()
    assert next(iter(row["micro_batch_sequences"])) == BASELINE
    assert full == 5
    assert others
    assert all(5 <= number <= 8 for number in others)
    assert row["parameters"] == SIZES["9m"].num_parameters


def test_what_a_larger_model_says_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fits(run: Any, *, most: int, **options: Any) -> Any:
        asked.append((run.size, run.mode))
        return most if run.mode == BASELINE else 1, None

    def one(run: Any, micro_batch: int, **options: Any) -> Any:
        return types.SimpleNamespace(memory=types.SimpleNamespace(peak_bytes=run.llama.num_parameters * 4))

    monkeypatch.setattr(doctor, "largest_micro_batch", fits)
    monkeypatch.setattr(doctor, "predict_by_blocks", one)
    modes = doctor.shown_modes()
    run = resolve(None, {"size": "9m"}, [])
    doctor.fitting_sizes(run, "cpu", 2**60)
    assert asked == [*(("20m", mode) for mode in modes), *(("9m", mode) for mode in modes[1:])]
    asked.clear()
    monkeypatch.setattr(doctor, "predict_by_blocks", lambda *run, **options: pytest.fail("weights alone are too much"))
    (small, large) = doctor.fitting_sizes(run, "cpu", 4 * SIZES["9m"].num_parameters - 1)
    assert set(small["micro_batch_sequences"].values()) == set(large["micro_batch_sequences"].values()) == {0}
    monkeypatch.setattr(doctor, "predict_by_blocks", one)
    doctor.fitting_sizes(run, "cpu", 4 * SIZES["20m"].num_parameters - 1)
    assert asked == [("9m", mode) for mode in modes]


def rates(operations_per_second: float | None, bf16: float | None = 1e9) -> dict[str, Any]:
    figures = {"fp32": operations_per_second, "bf16": bf16}
    return {name: {"operations_per_second": value} for name, value in figures.items()}


def test_a_runs_operations_are_those_that_it_dispatches(tiny_run: Callable[..., Any]) -> None:
    run = tiny_run()
    found = doctor.run_facts(run, CPU, rates(1e9), 2**40)
    assert found["micro_batch_sequences"] == 4
    assert found["step_operations"] == operations_of(run)
    assert found["seconds_at_least"] == pytest.approx(6 * operations_of(run) / 1e9)
    step = found["measured_step"]
    assert step["seconds"] == pytest.approx(2 * step["pass_seconds"] + step["optimizer_seconds"])
    assert found["seconds"] == pytest.approx(6 * step["seconds"])
    assert found["tokens_per_second"] == pytest.approx(8 * 32 / step["seconds"])
    assert found["gemm_rate_share"] == pytest.approx(operations_of(run) / step["seconds"] / 1e9)


def test_a_step_from_fewer_sequences_is_counted_as_often_as_a_run_takes_it(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    one = predict(run, 1, accumulates=True).pass_operations
    monkeypatch.setattr(doctor, "LONGEST_PASS_SECONDS", 2.5 * one / 1e9)
    found = doctor.run_facts(run, CPU, rates(1e9), 2**40)
    step = found["measured_step"]
    assert step["micro_batch_sequences"] == 2
    assert step["seconds"] == pytest.approx(4 * step["pass_seconds"] + step["optimizer_seconds"])


@pytest.mark.parametrize(
    ("changes", "rate", "budget", "reason"),
    [
        ({}, 1e9, 1, "does not fit"),
        ({}, 1.0, 2**40, "one sequence alone"),
        ({"optimizer__update": "in_backward"}, 1e9, 2**40, "within the backward pass"),
        ({"precision": "bf16"}, 1e9, 2**40, "no products in bf16"),
    ],
)
def test_where_no_step_is_measured_it_is_said_why(
    tiny_run: Callable[..., Any], changes: dict[str, Any], rate: float, budget: int, reason: str
) -> None:
    run = tiny_run(**changes)
    found = doctor.run_facts(run, CPU, rates(rate, None), budget)
    assert found["measured_step"] is found["seconds"] is None
    assert reason in found["not_measured_because"]
    assert (found["seconds_at_least"] is None) == (run.precision == "bf16")


def test_a_gpu_by_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of=None: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    properties = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda of=None: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda of=None: (70 * 2**30, 80 * 2**30))
    assert doctor.free_memory_bytes(device) == 70 * 2**30
    assert doctor._device_facts(device, 70 * 2**30) == {
        "kind": "cuda",
        "name": "Fake GPU",
        "count": 8,
        "memory_bytes": 80 * 2**30,
        "free_memory_bytes": 70 * 2**30,
        "has_idle_gpu": False,
    }


def test_a_format_without_products_is_none_and_a_full_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_fp32(shapes: Any, *, dtype: torch.dtype, device: torch.device) -> GemmRate:
        if dtype == torch.bfloat16:
            raise TypeError("BFloat16 is not supported on MPS")
        return GemmRate(shapes, dtype=dtype, device=device)

    monkeypatch.setattr(doctor, "GemmRate", only_fp32)
    found = doctor.product_rates(CPU)
    assert found["bf16"] == {"is_supported": False, "operations_per_second": None, "fp32_ratio": None}
    assert found["fp32"]["operations_per_second"] > 0

    def full(shapes: Any, **options: Any) -> GemmRate:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "GemmRate", full)
    with pytest.raises(UserError, match="device cpu: has no memory free"):
        doctor.product_rates(CPU)


def test_ctrl_c_ends_it(tiny_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(device: torch.device) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "product_rates", interrupted)
    assert status("doctor", "--recipe", str(tiny_recipe())) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "lama_60m"], "did you mean 'llama_60m'"),
        (["--device", "cdua"], "did you mean 'cuda'"),
        (["--json", "no/such/folder.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [] if "--recipe" in arguments else ["--recipe", str(tiny_recipe())]
    assert status("doctor", *arguments, *recipe) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


METADATA = """Metadata-Version: 2.4
Name: velora-pretrain
Version: 9.9
Requires-Dist: missing-base>=1
Requires-Dist: missing-everywhere>=1; python_version > "3"
Requires-Dist: psutil>=1; extra == "met"
Requires-Dist: psutil>=9999; extra == "old"
Requires-Dist: no-such-package>=2; extra == "absent"
Requires-Dist: another-one; extra == "absent"
Requires-Dist: no-such-package; extra == "elsewhere" and python_version < "3"
Provides-Extra: met
Provides-Extra: old
Provides-Extra: absent
Provides-Extra: elsewhere
"""


def test_extras_are_those_of_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "velora_pretrain-9.9.dist-info").mkdir()
    (tmp_path / "velora_pretrain-9.9.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    assert installation.missing_of_extras() == {
        "met": [],
        "old": ["psutil>=9999"],
        "absent": ["no-such-package>=2", "another-one"],
        "elsewhere": [],
    }
    monkeypatch.setattr(installation, "DISTRIBUTION", "no-such-package")
    assert installation.missing_of_extras() is None


def test_compilers_are_those_that_torch_compile_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert installation.compiler_facts("cpu") == {"path": None, "missing": ["a C++ compiler (g++)"]}
    for name in ("g++", "clang", "mine"):
        (tmp_path / name).touch(mode=0o755)
    assert installation.compiler_facts("cpu") == {"path": str(tmp_path / "g++"), "missing": []}
    monkeypatch.setenv("CXX", "mine")
    assert installation.compiler_facts("cpu")["path"] == str(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert installation.compiler_facts("cuda") == {"path": str(tmp_path / "clang"), "missing": ["triton"]}
    assert installation.compiler_facts("mps") == {"path": None, "missing": []}


def test_a_driver_without_a_gpu_in_pytorch_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not installation.has_idle_gpu("cpu")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert installation.has_idle_gpu("cpu")
    assert not installation.has_idle_gpu("cuda")
    # Nor where it is the CPU that was asked for.
    for is_seen in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_seen=is_seen: is_seen)
        assert doctor._device_facts(torch.device("cpu"), 0)["has_idle_gpu"] is not is_seen


def changed(facts: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values; keys with `__` for the dots."""
    facts = copy.deepcopy(facts)
    for key, value in values.items():
        *tables, last = key.split("__")
        table = facts
        for name in tables:
            table = table[name]
        table[last] = value
    return facts


def test_advice_answers_what_was_found(facts: dict[str, Any]) -> None:
    well = changed(
        facts,
        hub={"endpoint": "https://huggingface.co", "is_reachable": True, "fault": None},
        device__has_idle_gpu=False,
        host__threads=2,
        host__usable_cores=2,
        host__busy_cores=0.9,
        compiler__missing=[],
        formats__bf16__fp32_ratio=1.0,
    )
    assert advising.advice(well) == []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hub__is_reachable": False}, "data fetch --shards 15"),
        ({"device__has_idle_gpu": True}, "sees no GPU"),
        ({"host__threads": 1}, "uses 1 of 2 cores"),
        ({"host__busy_cores": 1.5}, "keep 1.5 of 2 cores busy"),
        ({"device__count": 4}, "--nproc-per-node 4"),
        ({"compiler__missing": ["a C++ compiler (g++)"]}, "needs a C++ compiler (g++)"),
        ({"recipe__fits": False}, "the largest size that fits is 20m"),
        ({"recipe__precision": "bf16", "formats__bf16__fp32_ratio": 0.25}, "0.25 × the rate of fp32"),
        ({"recipe__precision": "bf16", "formats__bf16__fp32_ratio": None}, "are not there on this device"),
        ({"formats__bf16__fp32_ratio": 2.0}, "try --precision bf16-mixed"),
        ({"disk__free_bytes": 1}, "give a --run-dir with more room"),
        ({"recipe__seconds": 1e8}, "--recipe quickstart"),
        ({"recipe__seconds": None, "recipe__seconds_at_least": 1e8}, "--recipe quickstart"),
    ]
    for changes, words in cases:
        (line,) = advising.advice(changed(well, **changes))
        assert words in line
    pinned = advising.advice(changed(well, hub__is_reachable=False, recipe__data="c4"))
    assert len(pinned) == 2
    assert "would stop without it" in pinned[1]


def shown(facts: dict[str, Any]) -> str:
    out = io.StringIO()
    print_examination(facts, Console(file=out, width=200, highlight=False, markup=False))
    return out.getvalue()


def test_the_table_says_what_was_measured_and_what_was_not(facts: dict[str, Any]) -> None:
    facts = changed(facts, extras={"plot": [], "zstd": ["zstandard>=0.22"]}, recipe__seconds=200_000.0)
    measured = shown(facts)
    assert "about 2.3 days without evaluations" in measured
    assert 'plot; not there, for pip install "velora-pretrain[NAME]": zstd (zstandard>=0.22)' in measured
    assert all(f"! {line}" in measured for line in facts["advice"])
    bound = shown(
        changed(facts, recipe__seconds=None, recipe__seconds_at_least=3600.0, recipe__not_measured_because="a reason")
    )
    assert "at least 1:00:00, if only matrix products took time; no step was measured: a reason" in bound
    fast = {"is_supported": True, "operations_per_second": 7.5e14, "fp32_ratio": 15.0}
    gpu = shown(
        changed(
            facts,
            device={**facts["device"], "kind": "cuda", "name": "Fake GPU", "count": 2},
            formats__bf16=fast,
            extras=None,
            compiler={"path": None, "missing": ["triton"]},
        )
    )
    for part in (
        "cuda: 2 × Fake GPU",
        "device memory",
        "750 TFLOP/s (15.00 × fp32)",
        "is not installed",
        "want of triton",
    ):
        assert part in gpu
    lacking = {"is_supported": False, "operations_per_second": None, "fp32_ratio": None}
    assert "none in bf16" in shown(changed(facts, formats__bf16=lacking))


def test_a_budget_is_a_share_of_what_is_free(facts: dict[str, Any]) -> None:
    assert facts["device"]["memory_bytes"] == host_memory_bytes()
    assert facts["budget_bytes"] == int(doctor.USABLE_SHARE * facts["device"]["free_memory_bytes"])
