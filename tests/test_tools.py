"""The measuring tools at toy size, and the fairness of what they hold the tool against."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
SETTINGS = [f"--set=model.{key}={value}" for key, value in runs.MODEL.items()]
runs.MODEL_STEP = [*SETTINGS, "--micro-batch=2", "--sequence-length=16", "--rounds=3", "--threads=1"]


@pytest.fixture(autouse=True)
def tools_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def figures(tool: str, path: Path, *arguments: str) -> dict[str, Any]:
    """What a tool's `main` writes as JSON."""
    module = __import__(tool)
    module.main([*arguments, "--json", str(path)])
    return json.loads(path.read_text())


def test_bench_step_times_every_contender(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from contenders import CONTENDERS

    names = [*CONTENDERS, "full:mlp", "transformers:block"]
    arguments = [*runs.MODEL_STEP, "--contenders", *names, "--baseline=full", "--accumulation=2", "--grad-norm"]
    content = figures("bench_step", tmp_path / "step.json", *arguments)
    rows = {row["contender"]: row for row in content["rows"]}
    assert set(rows) == set(names)
    assert content["environment"]["threads"] == 1
    assert content["settings"]["accumulation"] == 2
    for row in rows.values():
        parts = [row[f"{part}_seconds"]["median"] for part in ("forward", "backward", "optimizer")]
        assert all(seconds > 0 for seconds in parts)
        wall = row["wall_seconds"]
        assert wall["lower_quartile"] <= wall["median"] <= wall["upper_quartile"]
        assert len(row["tokens_per_second_samples"]) == 3
        assert row["peak_bytes"] > 0
        assert row["cpu_speed_ratio"]["median"] > 0
        # All start from the same function and see the same tokens.
        assert row["first_loss_nats_per_token"] == pytest.approx(rows["full"]["first_loss_nats_per_token"], abs=1e-5)
    assert rows["full"]["wall_speed_ratio"]["median"] == 1.0
    assert rows["velora-all"]["matmul_limit_ratio"] > rows["velora"]["matmul_limit_ratio"] > 1.0
    assert rows["straightforward-velora"]["matmul_limit_ratio"] < 1.0
    assert [work["period_steps"] for work in rows["galore-torch"]["rare_work"]] == [200]
    # Their model asks for the products that ours asks for.
    assert rows["transformers"]["matmul_operations"] == rows["full"]["matmul_operations"]
    # Adapters save dW of the projections and add their own products.
    assert rows["peft-lora"]["matmul_operations"] == rows["lora"]["matmul_operations"]
    shown = capsys.readouterr().out
    assert "interleaved" in shown
    assert "velora-all" in shown


@pytest.mark.parametrize("dtype", ["bf16-mixed", "bf16"])
def test_bench_step_in_blocks_and_low_precision(tmp_path: Path, dtype: str) -> None:
    arguments = [*runs.MODEL_STEP, "--one-at-a-time", "--blocks=2", f"--dtype={dtype}"]
    content = figures(
        "bench_step", tmp_path / "step.json", *arguments, "--contenders", "full", "straightforward-velora"
    )
    assert [len(row["tokens_per_second_samples"]) for row in content["rows"]] == [3, 3]


def test_a_baseline_that_does_not_run_is_refused() -> None:
    import bench_step

    with pytest.raises(SystemExit):
        bench_step.main([*runs.MODEL_STEP, "--contenders", "full", "--baseline", "velora"])


def test_the_straightforward_velora_computes_our_gradients() -> None:
    from contenders import compress_straightforwardly

    from velora_pretrain.dimensions import PROJECTIONS, LlamaConfig
    from velora_pretrain.nn.llama import Llama
    from velora_pretrain.nn.velora import VeLoRALinear, compress_linears, expand

    ours = Llama(LlamaConfig(**runs.MODEL), seed=0).double()
    plain = copy.deepcopy(ours)
    num_groups = {name: 6 if name == "down_proj" else 8 for name in PROJECTIONS}
    compress_linears(ours, layers=PROJECTIONS, num_groups=num_groups)
    compress_straightforwardly(plain, num_groups)
    assert not any(isinstance(m, nn.Linear) for m in plain.model.modules())
    tokens = torch.randint(runs.MODEL["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens, tokens) for model in (ours, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    compressed = {name: module for name, module in ours.named_modules() if isinstance(module, VeLoRALinear)}
    assert len(compressed) == 14
    for name, layer in compressed.items():
        assert layer.coefficients.grad is not None
        gradient = expand(layer.coefficients.grad, layer.direction.vector)
        torch.testing.assert_close(gradient, theirs[f"{name}.weight"], rtol=1e-10, atol=1e-13)
    plain_names = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    for name in (name for name in plain_names if not name.endswith("coefficients")):
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", ["fp32", "bf16-mixed", "bf16"])
def test_bench_loss(tmp_path: Path, dtype: str) -> None:
    arguments = ["--tokens=96", "--hidden=16", "--vocab=512", f"--dtype={dtype}", "--rounds=2", "--threads=1"]
    content = figures("bench_loss", tmp_path / "loss.json", *arguments, "--chunk-rows", "32", "96")
    rows = {row["loss"]: row for row in content["rows"]}
    assert {"naive", "ours-auto", "ours-32", "ours-96"} <= set(rows)
    assert ("torch" in rows) == hasattr(nn.functional, "linear_cross_entropy")
    logits_bytes = 4 * 96 * 512
    assert rows["naive"]["largest_tensor_bytes"] == logits_bytes
    assert rows["ours-32"]["largest_tensor_bytes"] == logits_bytes // 3
    assert rows["ours-32"]["peak_bytes"] < rows["naive"]["peak_bytes"]
    for name in ("ours-auto", "ours-32", "ours-96"):
        assert rows[name]["loss_dtype"] == "float32"
        # fp32 sums in another order; of bf16 logits, each rounded to 8 bits, the errors mostly cancel in the sum.
        assert rows[name]["relative_error"] < (1e-6 if dtype == "fp32" else 1e-4)
        assert rows[name]["speed_ratio"]["median"] > 0


def test_check_gpu_tries_itself_on_a_cpu(tmp_path: Path) -> None:
    # A process of its own: what it imports must be what a machine with torch and few other packages has.
    path = tmp_path / "gpu.json"
    program = (
        "import sys; sys.path.insert(0, 'tools'); import check_gpu\n"
        f"status = check_gpu.main(['--device=cpu', '--quick', '--threads=1', '--output', {str(path)!r}])\n"
        "absent = ('datasets', 'pyarrow', 'typer', 'sentencepiece', 'tomli_w')\n"
        "assert not [name for name in absent if name in sys.modules]\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content["ok"]
    assert content["left_out"] == []
    assert {row["mode"] for row in content["memory"]} == {"full", "velora", "velora-all", "galore", "lora", "flora"}
    # On a CPU the prediction and the measurement are one tracker on fake and on real tensors.
    assert [row["measured_over_predicted"] for row in content["memory"]] == pytest.approx([1.0] * 6, rel=5e-3)
    assert {row["contender"] for row in content["speed"]} == {"transformers", "full", "velora-all"}
    assert [row["contender"] for row in content["rate"]] == ["full", "velora-all"]
    for row in content["rate"]:
        assert row["model_flops_utilisation"] == row["model_flops_per_second"] / row["gemm_operations_per_second"]
        assert 0 < row["model_flops_utilisation"] < 2
    assert len(content["checks"]) >= 16


def test_check_gpu_fails_loudly() -> None:
    import check_gpu

    report = check_gpu.Report()
    checks = check_gpu.Checks(device="cpu", trajectory_steps=1, rows=report.checks)
    checks.hold("fine", "", 1.0, 1.0)
    assert report.is_ok
    checks.hold("not a number", "", float("nan"), 1.0)
    assert not report.is_ok


def test_bench_subspace_holds_the_finder_against_the_full_svd(tmp_path: Path) -> None:
    arguments = ["--sizes", "160x96:24", "--rounds", "2", "--threads", "1", "--spectra", "gaussian", "power"]
    rows = figures("bench_subspace", tmp_path / "subspace.json", *arguments)["rows"]
    assert {row["spectrum"] for row in rows} == {"gaussian", "power"}
    for row in rows:
        shares = {name: finder["energy_ratio"] for name, finder in row["finders"].items()}
        assert set(shares) == {"svd", "gram", "randomised"}
        assert shares["gram"] == pytest.approx(1.0, abs=1e-5)
        assert 0.99 <= shares["randomised"] < 1 + 1e-5


def test_bench_growth_holds_time_and_bytes_against_theory(
    tmp_path: Path, tiny_data: Path, tiny_tokenizer: Path
) -> None:
    import bench_growth

    assert bench_growth.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    arguments = [*SETTINGS, f"--set=data={tiny_data}", f"--set=tokenizer={tiny_tokenizer}", "--modes=full"]
    arguments += ["--size=", "--sizes", "--micro-batches", "1", "2", "--sequence-lengths", "16", "--rounds=2"]
    arguments += ["--micro-batch=1", "--sequence-length=16", "--threads=1", f"--plot={tmp_path / 'plots'}"]
    content = figures("bench_growth", tmp_path / "growth.json", *arguments)
    assert [(row["axis"], row["x"]) for row in content["rows"]] == [
        ("micro_batch", 1),
        ("micro_batch", 2),
        ("sequence_length", 16),
    ]
    # One point along an axis has no slope; products are in proportion to the sequences.
    (slopes,) = content["slopes"]
    assert slopes["axis"] == "micro_batch"
    assert slopes["matmul_operations"] == pytest.approx(1.0)
    assert 0 < slopes["theory_bytes"] < 1
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"growth.png", "growth.svg"}


def test_fault_injection_loses_nothing_and_says_when_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fault_injection

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    arguments = ["--files=1", "--documents=30", "--requests=100", "--timeout=0.1"]
    content = figures("fault_injection", tmp_path / "faults.json", *arguments)
    assert content["requests"] >= 100
    assert content["faults"] == sum(content["faults_by_kind"].values()) > 20
    assert content["retries_logged"] > 10
    assert content["documents_read"] == 4 * 30 * content["passes"]
    assert "documents lost" in capsys.readouterr().out

    own = runs.write_documents(tmp_path / "own.jsonl", 20)
    assert fault_injection.main([f"--data={own}", "--requests=5", "--fault-rate=0"]) == 0
    read = fault_injection.read_texts

    def careless(source: Any, seed: int) -> list[str]:
        texts = read(source, seed)
        return [*texts[1:], texts[-1]] if source.shards[0].startswith("http") else texts

    monkeypatch.setattr(fault_injection, "read_texts", careless)
    assert fault_injection.main([f"--data={own}", "--requests=5", "--json", str(tmp_path / "bad.json")]) == 1
    bad = json.loads((tmp_path / "bad.json").read_text())
    assert bad["documents_lost"] == bad["documents_doubled"] == bad["passes_out_of_order"] == bad["passes"] > 0


def test_torture_kills_resumes_and_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torture

    found = tmp_path / "found.json"
    arguments = ["--kills=3", "--modes=velora", "--packings=pack", "--sources=hub", "--fault-rate=0.2"]
    with pytest.raises(SystemExit) as ended:
        torture.main([*arguments, "--json", str(found)])
    figures = json.loads(found.read_text())
    assert ended.value.code == 0, figures
    assert figures["kills"] == sum(figures["places"].values()) == 3
    assert figures["divergences"] == 0
    assert "3 kills" in capsys.readouterr().out


def test_torture_sees_a_run_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run that loses its optimizer: the first difference that the tool is there to find."""
    import torture

    forgetful = (
        "import sys; sys.path.insert(0, TOOLS)\n"
        "import killer\n"
        "from velora_pretrain import trainer\n"
        "restore = trainer.restore\n"
        "def forgets(path, *, model, optimizer, part):\n"
        "    restore(path, model=model, optimizer=optimizer, part=part)\n"
        "    optimizer.state.clear()\n"
        "trainer.restore = forgets\n"
        "killer.main(sys.argv[1:])\n"
    )
    (tmp_path / "forgetful.py").write_text(forgetful.replace("TOOLS", repr(str(ROOT / "tools"))))
    monkeypatch.setattr(torture, "KILLER", tmp_path / "forgetful.py")
    found = tmp_path / "found.json"
    with pytest.raises(SystemExit) as ended:
        torture.main(["--kills=2", "--modes=full", "--packings=pad", "--sources=files", "--json", str(found)])
    assert ended.value.code == 1
    assert "weights" in json.loads(found.read_text())["cases"][0]["divergences"][0]


def test_soak_watches_a_run_from_outside(tmp_path: Path) -> None:
    import soak

    found = tmp_path / "found.json"
    with pytest.raises(SystemExit):  # so few steps need not be flat
        soak.main(["--steps=200", "--json", str(found)])
    figures = json.loads(found.read_text())
    assert [row["last_step"] for row in figures["tenths"]] == list(range(20, 201, 20))
    assert figures["checkpoints_left"][-1] == "step-00000200"
    assert all(row["resident_mib"] > 50 and row["files"] > 2 and row["threads"] > 1 for row in figures["tenths"])


@pytest.mark.slow
def test_bytes_reduced_are_what_the_runs_have_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SETTINGS, "--set=model.vocab_size=32000", "--size=", "--steps=1", "--sequence-length=16"]
    content = figures("bytes_reduced", tmp_path / "bytes.json", *arguments, "--modes=full,velora[layers=all]")
    full, compressed = (row["reduced_bytes_per_step"] for row in content["rows"])
    assert full["projections"] == 16 * compressed["projections"] > 0
    assert full["other"] == compressed["other"] > 0
    assert "16.0" in capsys.readouterr().out


def test_processes_agree_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import processes

    found = tmp_path / "found.json"
    processes.ROWS = [("velora", 2, "full")]
    with pytest.raises(SystemExit) as ended:
        processes.main(["--json", str(found)])
    (row,) = json.loads(found.read_text())["rows"]
    assert ended.value.code == 0
    assert row["same_documents"]
    assert 0 < row["largest_relative_difference"] < 1e-3  # the norm's own sum, over whole matrices or parts
    assert "velora" in capsys.readouterr().out


def test_bench_saving_times_the_loop_and_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_saving

    found = tmp_path / "found.json"
    bench_saving.main(["--size=9m", "--tokens=16", "--rounds=2", "--json", str(found)])
    content = json.loads(found.read_text())
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in content["seconds"].values())
    assert content["checkpoint_mib"] > 100
    assert "% of a step of" in capsys.readouterr().out
