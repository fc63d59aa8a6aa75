"""The loop in one process: what it learns, records, refuses and leaves behind."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from run_outcome import untimed
from safetensors.torch import load, load_file

from velora_pretrain.config import MODES
from velora_pretrain.data.c4 import resolve
from velora_pretrain.data.loader import TrainLoader
from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.display import Display
from velora_pretrain.errors import UserError
from velora_pretrain.evaluation import evaluate_checkpoint
from velora_pretrain.hugging_face import load_llama
from velora_pretrain.nn.llama import Llama
from velora_pretrain.optim.adamw import AdamW
from velora_pretrain.recipe import build_run, read_recipe
from velora_pretrain.records import RunFolder
from velora_pretrain.trainer import FAILURES_IN_A_ROW, Trainer, step_seed, train


class Silent(Display):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def trained(run: Any, path: Path, *, resume: bool = False) -> dict[str, Any]:
    return train(run, RunFolder(path), resume=resume, display=Silent())


def records(path: Path, key: str) -> list[Any]:
    return [record[key] for record in RunFolder(path).records() if key in record]


def weights(path: Path) -> dict[str, torch.Tensor]:
    # Not from the file itself: loaded tensors would follow what a test does to it.
    return load((RunFolder(path).checkpoints_newest_first()[0] / "model.safetensors").read_bytes())


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("mode", ["full", "velora"])
def test_it_learns(tiny_run: Callable[..., Any], tmp_path: Path, mode: str, packing: str) -> None:
    run = tiny_run(mode=mode, packing=packing, schedule__steps=40, batch__sequences=16, batch__micro_batch=16)
    summary = trained(run, tmp_path)
    losses = records(tmp_path, "loss_nats_per_token")
    assert losses[0] == pytest.approx(4.85, abs=0.1)  # ln 128: it starts from knowing nothing
    assert losses[-1] < 0.75 * losses[0]
    assert summary["final_evaluation"]["perplexity"] < 60
    assert summary["tokens"] == records(tmp_path, "tokens")[-1]


def test_losses_are_those_of_a_plain_loop_over_transformers(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """Schedule, accumulation, clipping, decay and zeroing, written out once more with transformers and torch."""
    run = tiny_run(optimizer__clip_norm=0.8, optimizer__weight_decay=0.1, schedule__warmup_steps=2)
    trained(run, tmp_path)

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**run.llama.model_dump()))
    theirs.load_state_dict(Llama(run.llama, seed=run.seed).state_dict())
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    norms = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}])
    source = resolve(run.data, split="train", holdout_every_documents=10)
    losses = []
    with TrainLoader(
        source,
        load_tokenizer(run.tokenizer),
        packing="pad",
        sequence_length=32,
        sequences=8,
        seed=run.seed,
        shuffle_block_documents=16,
    ) as loader:
        for step in range(1, 7):
            batch = next(loader)
            decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (0.5 if step == 1 else decay)
            logits = theirs(batch.inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.8)
            optimizer.step()
            losses.append(loss.item())
    assert records(tmp_path, "loss_nats_per_token") == pytest.approx(losses, rel=2e-5)


def test_records_and_summary_have_the_contracts_fields(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    summary = trained(tiny_run(evaluation__every_steps=4), tmp_path)
    lines = list(RunFolder(tmp_path).records())
    training = {"step", "tokens", "loss_nats_per_token", "learning_rate", "grad_norm"}
    training |= {"tokens_per_second", "peak_memory_bytes", "memory_limit_bytes", "run_seconds", "unix_seconds"}
    evaluation = {"step", "eval_loss_nats_per_token", "perplexity", "perplexity_paper", "bits_per_byte", "eval_tokens"}
    evaluation |= {"run_seconds", "unix_seconds"}
    assert [("eval" if "perplexity" in line else "train", line["step"]) for line in lines] == [
        *[("train", step) for step in (1, 2, 3, 4)], ("eval", 4), ("train", 5), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    assert all(training <= line.keys() for line in lines if "loss_nats_per_token" in line)
    assert all(evaluation == line.keys() for line in lines if "perplexity" in line)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["config_sha256"] == RunFolder(tmp_path).read_run().sha256
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert max(rates) == rates[0]
    assert rates[-1] == pytest.approx(0.001)


@pytest.mark.parametrize("mode", ["full", "velora"])
def test_the_numbers_do_not_depend_on_the_micro_batch(tiny_run: Callable[..., Any], tmp_path: Path, mode: str) -> None:
    results = []
    for micro_batch in (8, 4, 1):
        run = tiny_run(mode=mode, batch__micro_batch=micro_batch, optimizer__clip_norm=1.0, modes__velora__layers="all")
        trained(run, tmp_path / str(micro_batch))
        results.append(records(tmp_path / str(micro_batch), "loss_nats_per_token"))
    # fp32 sums in another order, carried through 6 optimizer steps.
    assert results[1] == pytest.approx(results[0], rel=2e-5)
    assert results[2] == pytest.approx(results[0], rel=2e-5)


def test_same_seed_same_weights_and_another_seed_others(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(tiny_run(seed=seed), tmp_path / name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_clipping_bounds_the_step(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = AdamW.step

    def spy(self: AdamW) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.nn.utils.get_total_norm(gradients))
        step(self)

    monkeypatch.setattr(AdamW, "step", spy)
    trained(tiny_run(optimizer__clip_norm=0.5), tmp_path)
    assert records(tmp_path, "grad_norm")[0] > 0.5
    assert seen[0].item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_its_checkpoint_scores_what_the_run_did(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str
) -> None:
    """Also where the checkpoint's weights are merged, and transformers reads them."""
    settings = {"modes__galore__rank": 8, "modes__lora__rank": 16, "modes__flora__rank": 8}
    run = tiny_run(mode=mode, schedule__steps=40, batch__sequences=16, batch__micro_batch=8, **settings)
    summary = trained(run, tmp_path)
    assert records(tmp_path, "loss_nats_per_token")[-1] < 0.85 * records(tmp_path, "loss_nats_per_token")[0]
    again = evaluate_checkpoint(tmp_path, data=None, tokens=None, device="cpu", display=Display())
    assert again["eval_tokens"] == summary["final_evaluation"]["eval_tokens"]
    assert again["perplexity"] == pytest.approx(summary["final_evaluation"]["perplexity"], rel=1e-5)
    checkpoint = RunFolder(tmp_path).checkpoints_newest_first()[0]
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    tokens = torch.arange(2, 34).view(2, 16)
    ours = load_llama(checkpoint).logits(tokens)
    torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=1e-4)


def test_restarts_merge_reset_and_warm_up_again(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    settings = {"restart_every": 3, "restart_warmup_steps": 2, "reset_share": 0.9, "rank": 8}
    run = tiny_run(
        mode="lora",
        schedule__steps=8,
        schedule__kind="constant",
        schedule__warmup_steps=0,
        **{f"modes__lora__{key}": value for key, value in settings.items()},
    )
    display = Silent()
    train(run, RunFolder(tmp_path), resume=False, display=display)
    rates = [rate / run.lr for rate in records(tmp_path, "learning_rate")]
    assert rates == pytest.approx([1, 1, 1, 0.5, 1, 1, 0.5, 1])
    restarts = {r["step"]: r["zero_moments_share"] for r in RunFolder(tmp_path).records() if "zero_moments_share" in r}
    assert set(restarts) == {3, 6}
    # Nine tenths of each second moment, and of the first a little more; not the default share.
    assert all(0.9 <= share < 0.95 for share in restarts.values())
    assert [note for note in display.notes if note.startswith("step 3: zero moments share 0.9")]


def test_every_step_draws_its_own_numbers(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask of dropout that came again in every step would drop the same inputs for ever."""
    seeds = {
        (seed, step, process): step_seed(seed, step, process)
        for seed in (0, 1)
        for step in (1, 2, 11)
        for process in (0, 1)
    }
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    masks: list[torch.Tensor] = []
    dropout = torch.native_dropout

    def kept(x: torch.Tensor, rate: float, is_training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        result = dropout(x, rate, is_training)
        masks.append(result[1])
        return result

    monkeypatch.setattr(torch, "native_dropout", kept)
    trained(tiny_run(mode="lora", modes__lora__dropout=0.5, schedule__steps=2, batch__micro_batch=8), tmp_path)
    torch.manual_seed(step_seed(0, 1, 0))
    again = dropout(torch.ones_like(masks[0], dtype=torch.float32), 0.5, True)[1]
    assert torch.equal(masks[0], again)
    assert not torch.equal(masks[len(masks) // 2], masks[0])


def test_blocks_can_learn_at_a_rate_of_their_own(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """Adam's first step is the learning rate times a sign, so a ratio of the rates is one of the steps."""
    begin = Llama(tiny_run().llama, seed=0).state_dict()
    for ratio in (1.0, 0.25):
        run = tiny_run(schedule__steps=1, schedule__warmup_steps=0, modes__full__block_lr_ratio=ratio)
        trained(run, tmp_path / str(ratio))
    plain, slower = (weights(tmp_path / name) for name in ("1.0", "0.25"))
    for name, weight in begin.items():
        ratio = 0.25 if ".layers." in name and weight.ndim == 2 else 1.0
        torch.testing.assert_close(slower[name] - weight, ratio * (plain[name] - weight), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
@pytest.mark.parametrize("mode", ["full", "velora"])
def test_other_precisions_stay_near_fp32(
    tiny_run: Callable[..., Any], tmp_path: Path, mode: str, precision: str
) -> None:
    for name in ("fp32", precision):
        trained(tiny_run(mode=mode, precision=name), tmp_path / name)
    exact, rounded = (records(tmp_path / name, "loss_nats_per_token") for name in ("fp32", precision))
    assert rounded == pytest.approx(exact, rel=0.02)
    expected = torch.bfloat16 if precision == "bf16" else torch.float32
    assert weights(tmp_path / precision)["lm_head.weight"].dtype == expected


def test_a_folder_with_a_run_is_not_overwritten(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained(tiny_run(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"already holds a run; go on with it by --resume, or .* --run-dir"):
        trained(tiny_run(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_resumes_to_its_own_end(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    first = trained(tiny_run(), tmp_path)
    again = trained(tiny_run(), tmp_path, resume=True)
    assert untimed(again["final_evaluation"]) == untimed(first["final_evaluation"])
    assert again["tokens"] == first["tokens"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer__lr": 0.5}, r"optimizer\.lr: 0\.5 was asked for, but the run in .* has 0\.01"),
        ({"mode": "velora"}, "mode: 'velora'"),
        ({"batch__micro_batch": 2}, r"batch\.micro_batch"),
        ({"seed": 9}, "seed: 9"),
    ],
)
def test_another_configuration_is_not_resumed(
    tiny_run: Callable[..., Any], tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    trained(tiny_run(), tmp_path)
    with pytest.raises(UserError, match=key):
        trained(tiny_run(**change), tmp_path, resume=True)


def test_what_leaves_the_numbers_alone_may_change(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained(tiny_run(), tmp_path)
    trained(tiny_run(checkpoint__keep_last=5, reading__prefetch_batches=1), tmp_path, resume=True)
    assert RunFolder(tmp_path).read_run().checkpoint.keep_last == 5


def test_autos_are_decided_once_and_recorded(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    trained(tiny_run(batch__micro_batch="auto"), tmp_path)
    assert RunFolder(tmp_path).read_run().batch.micro_batch == 8
    trained(tiny_run(batch__micro_batch="auto"), tmp_path, resume=True)


def test_the_recorded_config_is_a_recipe(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run(mode="velora", modes__velora__num_groups={"v_proj": 4})
    trained(run, tmp_path)
    assert build_run(read_recipe(tmp_path / "config.toml"), where="config") == run


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run(checkpoint__every_steps=2)
    expected = trained(run, tmp_path)
    final = weights(tmp_path)
    newest = RunFolder(tmp_path).checkpoints_newest_first()[0] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    display = Silent()
    again = train(run, RunFolder(tmp_path), resume=True, display=display)
    assert "step-00000006 is damaged" in display.warnings[0]
    assert "step-00000004" in display.notes[0]
    assert untimed(again["final_evaluation"]) == untimed(expected["final_evaluation"])
    assert all(torch.equal(final[name], tensor) for name, tensor in weights(tmp_path).items())


def test_nan_stops_the_run_names_the_tensor_and_keeps_the_checkpoint(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer._backward

    def poisoned(self: Trainer, *args: Any) -> float:
        if self.done_steps == 4:
            with torch.no_grad():
                self.model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
        return backward(self, *args)

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    message = r"step 5: the loss is nan; first tensor .*: model\.layers\.1\.mlp\.up_proj\.weight\..*step-00000004"
    with pytest.raises(UserError, match=message):
        trained(tiny_run(checkpoint__every_steps=2), tmp_path)
    assert records(tmp_path, "step") == [1, 2, 3, 4]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_an_infinite_gradient_is_named(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer._backward

    def poisoned(self: Trainer, *args: Any) -> float:
        nats = backward(self, *args)
        self.model.model.norm.weight.grad[2] = torch.inf
        return nats

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    # Also where clipping would spread it over all gradients.
    for clip_norm in (0.0, 1.0):
        with pytest.raises(UserError, match=r"step 1: the loss is 4\..*: the gradient of model\.norm\.weight\."):
            trained(tiny_run(optimizer__clip_norm=clip_norm), tmp_path)


def with_nats(change: Callable[[Trainer, int, float], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes backward passes give what `change` makes of the trainer, how many it has tried, and what they gave."""
    backward, tried = Trainer._backward, 0

    def changed(self: Trainer, *args: Any) -> float:
        nonlocal tried
        tried += 1
        return change(self, tried, backward(self, *args))

    monkeypatch.setattr(Trainer, "_backward", changed)


def failing_in(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the backward passes of these steps, counted as they are tried, give what is no number."""
    with_nats(lambda _, tried, nats: math.nan if tried in steps else nats, monkeypatch)


@pytest.mark.parametrize("mode", ["full", "galore", "lora", "flora", "velora"])
def test_a_step_that_fails_can_be_skipped_and_is_counted(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run = tiny_run(mode=mode, optimizer__not_finite="skip", schedule__steps=5, batch__micro_batch=4)
    states: list[dict[str, torch.Tensor]] = []
    step = Trainer._step

    def watched(self: Trainer, *args: Any) -> Any:
        end = step(self, *args)
        states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        # What came for a step that is not taken does not come for the next.
        assert all(parameter.grad is None for parameter in self.own.parameters())
        assert not any("accumulated" in state for state in self.optimizer.state.values())
        return end

    monkeypatch.setattr(Trainer, "_step", watched)
    failing_in({3}, monkeypatch)
    summary = trained(run, tmp_path)
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[2].items())
    assert any(not torch.equal(states[2][name], tensor) for name, tensor in states[3].items())
    assert records(tmp_path, "skipped_steps") == [1, 1, 1]
    assert [loss is None for loss in records(tmp_path, "loss_nats_per_token")] == [False, False, True, False, False]
    assert (summary["steps"], summary["skipped_steps"], summary["rollbacks"]) == (5, 1, 0)


@pytest.mark.parametrize("update", ["step", "in_backward"])
@pytest.mark.parametrize("mode", ["full", "galore", "lora", "flora", "velora"])
def test_a_run_can_go_back_and_on_with_the_next_data(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, update: str
) -> None:
    """What follows is what a run gives that never saw the data from the checkpoint up to the failure."""
    run = tiny_run(
        mode=mode,
        optimizer__not_finite="rollback",
        optimizer__update=update,
        checkpoint__every_steps=2,
        checkpoint__keep_last=3,
        evaluation__every_steps=2,
        checkpoint__background=False,
        modes__velora__refresh_every=2,
        modes__lora__restart_every=3,
    )
    step = Trainer._step
    with monkeypatch.context() as patch:
        failing_in({4}, patch)
        summary = trained(run, tmp_path / "failing")
    assert (summary["steps"], summary["skipped_steps"], summary["rollbacks"]) == (6, 0, 1)
    assert records(tmp_path / "failing", "step") == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert records(tmp_path / "failing", "rollbacks") == [1, 1, 1, 1]
    # Saved at once, with the new place in the data: a resumed run does not meet the same numbers again.
    state = RunFolder(tmp_path / "failing").checkpoint(2) / "training_state.json"
    assert json.loads(state.read_text())["rollbacks"] == 1
    # Steps 3 and 4 were read, and never trained on: the same run, made to pass over their batches.
    moved: list[int] = []

    def skipping(self: Trainer, loader: Any) -> Any:
        if self.done_steps == 2 and not moved:
            moved.extend(1 for _ in (next(loader), next(loader)))
        return step(self, loader)

    monkeypatch.setattr(Trainer, "_step", skipping)
    trained(run, tmp_path / "by-hand")
    for name, tensor in weights(tmp_path / "by-hand").items():
        assert torch.equal(weights(tmp_path / "failing")[name], tensor), name


def test_a_run_whose_numbers_fail_again_and_again_ends(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, last in (("skip", "step-00000012"), ("rollback", "step-00000002")):
        run = tiny_run(optimizer__not_finite=kind, schedule__steps=30, checkpoint__every_steps=2)
        with monkeypatch.context() as patch:
            failing_in(set(range(3, 100)), patch)
            message = rf"for the {FAILURES_IN_A_ROW + 1}th time in a row\. .*{last}"
            with pytest.raises(UserError, match=message):
                trained(run, tmp_path / kind)
    assert records(tmp_path / "skip", "skipped_steps")[-1] == FAILURES_IN_A_ROW


def test_a_step_that_always_fails_is_not_gone_back_from_for_ever(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps between the checkpoint and it are taken every time."""
    with_nats(lambda trainer, _, nats: math.nan if trainer.done_steps == 3 else nats, monkeypatch)
    run = tiny_run(optimizer__not_finite="rollback", checkpoint__every_steps=2)
    with pytest.raises(UserError, match=rf"step 4: .*for the {FAILURES_IN_A_ROW + 1}th time in a row"):
        trained(run, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"modes__velora__init": "running_average"},
        {"modes__velora__refresh_every": 1, "modes__velora__refresh_moments": "reproject"},
        {"mode": "lora", "modes__lora__restart_every": 2},
    ],
)
def test_a_run_that_skipped_a_step_is_resumed_bitwise(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    settings = {"mode": "velora", "optimizer__not_finite": "skip", "checkpoint__every_steps": 2, **changes}
    run = tiny_run(**settings, checkpoint__keep_last=3)
    for skipped in (1, 2):
        folder = tmp_path / str(skipped)
        with monkeypatch.context() as patch:
            failing_in({skipped}, patch)
            trained(run, folder)
        straight = weights(folder)
        for step in (4, 6):
            shutil.rmtree(RunFolder(folder).checkpoint(step))
        trained(run, folder, resume=True)
        assert records(folder, "skipped_steps")[-1] == 1
        for name, tensor in weights(folder).items():
            assert torch.equal(straight[name], tensor), (skipped, name)


def test_weights_that_go_bad_at_a_checkpoint_are_gone_back_from(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, tried = AdamW.step, 0

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal tried
        tried += 1
        step(self, *args, **kwargs)
        if tried == 4:
            self.param_groups[0]["params"][0].data[0] = torch.inf

    monkeypatch.setattr("velora_pretrain.optim.adamw.AdamW.step", poisoned)
    summary = trained(tiny_run(optimizer__not_finite="rollback", checkpoint__every_steps=2), tmp_path)
    assert (summary["steps"], summary["rollbacks"]) == (6, 1)


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_of_bad_weights_says_so_in_the_folder(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    step = AdamW.step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0] = torch.inf

    monkeypatch.setattr("velora_pretrain.optim.adamw.AdamW.step", poisoned)
    with pytest.raises(UserError):
        trained(tiny_run(checkpoint__every_steps=1, checkpoint__background=background), tmp_path)
    assert json.loads(RunFolder(tmp_path).failure.read_text())["step"] in (1, 2)


def test_there_is_no_way_back_before_the_first_checkpoint(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_in({2}, monkeypatch)
    with pytest.raises(UserError, match=r"step 2: .*before there was a checkpoint to go back to.*in a new run$"):
        trained(tiny_run(optimizer__not_finite="rollback"), tmp_path)


def test_a_spike_is_recorded_and_counted(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nats(lambda _, tried, nats: nats * (3 if tried == 19 else 1), monkeypatch)
    summary = trained(tiny_run(schedule__steps=20, optimizer__lr=1e-4), tmp_path)
    (spike,) = [record for record in RunFolder(tmp_path).records() if "loss_above_median_nats" in record]
    assert spike["step"] == 19
    assert spike["loss_above_median_nats"] == pytest.approx(2 / 3 * spike["loss_nats_per_token"], rel=0.1)
    assert summary["loss_spikes"] == 1


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_before_anything_is_written(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        trained(tiny_run(model__vocab_size=64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directions_follow_refresh_and_stay_otherwise(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    def directions(**changes: Any) -> list[torch.Tensor]:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        trained(tiny_run(mode="velora", checkpoint__every_steps=1, checkpoint__keep_last=9, **changes), path)
        states = sorted(path.glob("checkpoints/*/training_state.safetensors"))
        return [load_file(state)["model.model.layers.0.mlp.down_proj.direction.vector"] for state in states]

    fixed = directions()
    assert all(torch.equal(fixed[0], v) for v in fixed)
    refreshed = directions(modes__velora__refresh_every=2)
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(refreshed)]
    assert changes == [False, True, False, True, False]
    moving = directions(modes__velora__init="running_average")
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(moving))


def test_the_last_good_checkpoint_outlives_damaged_ones(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run(checkpoint__every_steps=2, checkpoint__keep_last=3)
    trained(run, tmp_path)
    folder = RunFolder(tmp_path)
    for step in (4, 6):
        (folder.checkpoint(step) / "model.safetensors").write_bytes(b"cut")
    trained(tiny_run(checkpoint__every_steps=2, checkpoint__keep_last=1), tmp_path, resume=True)
    assert [path.name for path in folder.checkpoints_newest_first()] == ["step-00000006"]
    assert {path.name for path in folder.checkpoints.iterdir()} == {
        "step-00000006",
        "damaged-step-00000004",
        "damaged-step-00000006",
    }


def test_an_evaluation_that_fails_loses_no_training(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    validation = tmp_path / "validation.jsonl"
    validation.write_text(json.dumps({"text": "balmer cenos dip"}) + "\n" + "{broken\n")
    run = tiny_run(validation_data=str(validation), evaluation__tokens=10_000)
    with pytest.raises(UserError, match=r"validation\.jsonl"):
        trained(run, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    good = json.dumps({"text": "balmer cenos dip"}) + "\n"
    validation.write_text(good * 300 + "{broken\n")
    with pytest.raises(UserError, match=r"after step 6: .*validation\.jsonl.* 301\b.*wrote .*step-00000006"):
        trained(run, tmp_path / "run")
    validation.write_text(good * 300)
    assert trained(run, tmp_path / "run", resume=True)["final_evaluation"]["step"] == 6


def test_too_few_documents_for_validation_are_said_before_the_first_step(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds no documents for validation.*reading\.holdout_every_documents"):
        trained(tiny_run(reading__holdout_every_documents=1000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_data_that_is_also_trained_on_is_held_out(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run()
    same = tiny_run(validation_data=run.data)
    a, b = trained(same, tmp_path / "a"), trained(run, tmp_path / "b")
    assert untimed(a["final_evaluation"]) == untimed(b["final_evaluation"])


def test_another_tokenizer_is_not_resumed(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    import sentencepiece

    tokenizer = tmp_path / "tokenizer.model"
    run = tiny_run(tokenizer=str(tokenizer), checkpoint__every_steps=2)
    tokenizer.write_bytes(Path(tiny_run().tokenizer).read_bytes())
    trained(run, tmp_path / "run")
    for path in RunFolder(tmp_path / "run").checkpoints_newest_first()[:1]:
        (path / "model.safetensors").unlink()
    texts = [json.loads(line)["text"] for line in Path(run.data).read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "tokenizer"), vocab_size=90, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="tokenizer differs from the run that is resumed"):
        trained(run, tmp_path / "run", resume=True)


def test_weights_that_are_not_finite_are_not_saved(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AdamW.step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        for group in self.param_groups:
            group["params"][0].data[0] = torch.inf

    monkeypatch.setattr("velora_pretrain.optim.adamw.AdamW.step", poisoned)
    with pytest.raises(UserError, match=r"step 1: .* is not finite, so no checkpoint is written"):
        trained(tiny_run(checkpoint__every_steps=1), tmp_path)
    assert list(RunFolder(tmp_path).checkpoints.iterdir()) == []


def test_a_record_that_a_crash_cut_short_is_left_out(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    run = tiny_run(checkpoint__every_steps=2)
    expected = trained(run, tmp_path)
    folder = RunFolder(tmp_path)
    whole = folder.metrics.read_bytes()
    folder.metrics.write_bytes(whole + b'{"step": 7, "tok')
    assert len(list(folder.records())) == whole.count(b"\n")
    again = trained(run, tmp_path, resume=True)
    assert untimed(again["final_evaluation"]) == untimed(expected["final_evaluation"])
