"""Cross-entropy of a linear head, forward and backward: chunked by us, naive, and by PyTorch where it has one.

    naive            F.cross_entropy(F.linear(hidden, weight).float()): all logits at once, in fp32 as in transformers
    torch            F.linear_cross_entropy as it comes (2.13 and later)
    torch-chunked    the same with LinearCrossEntropyOptions(), which asks for its chunks
    ours-N           nn.loss.linear_cross_entropy with chunks of N rows; ours-auto with its default

They take turns, in an order that rotates; a ratio is naive's time over the contender's, round by round. One label in
sixteen is no target. The peak is of bytes beyond hidden states, weight and labels, gradients included: on CUDA the
allocator's, on a CPU counted by `velora_pretrain.memory`; the largest tensor is counted on a CPU only. Each loss is
held against float64; one that is summed in bf16 can be far off.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from figures import MIB, environment, environment_line, spread, wide_console, with_quartiles, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from velora_pretrain.config import Precision
from velora_pretrain.devices import WEIGHT_DTYPES, autocast
from velora_pretrain.memory import MemoryTracker
from velora_pretrain.nn.loss import IGNORE_INDEX, linear_cross_entropy

NAIVE = "naive"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class _LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest result of an operation."""

    largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.largest_bytes = max(self.largest_bytes, *sizes, 0)
        return result


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the loss: leaves that take gradients, and labels."""

    hidden: Tensor
    head: nn.Linear
    labels: Tensor
    precision: Precision
    device: str

    @classmethod
    def random(cls, *, tokens: int, hidden: int, vocab: int, precision: Precision, device: str) -> Problem:
        """Hidden states of a norm's size, a head of usual initial weights."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(vocab, (tokens,), generator=generator)
        labels[::16] = IGNORE_INDEX
        head = nn.Linear(hidden, vocab, bias=False)
        nn.init.normal_(head.weight, std=0.02, generator=generator)
        # Under autocast the norm before the head hands over bf16.
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        states = torch.randn(tokens, hidden, generator=generator).to(device=device, dtype=dtype)
        head.to(device=device, dtype=WEIGHT_DTYPES[precision])
        labels = labels.to(device)
        return cls(hidden=states.requires_grad_(), head=head, labels=labels, precision=precision, device=device)

    def run(self, loss: Loss) -> Tensor:
        """Forward and backward pass; gives the loss, leaves gradients."""
        self.hidden.grad = self.head.weight.grad = None
        with autocast(self.precision, self.device):
            nats = loss(self.hidden, self.head.weight, self.labels)
        nats.backward()
        return nats.detach()

    def exact_nats(self) -> float:
        """The loss in float64, a few rows at a time."""
        with torch.no_grad():
            weight = self.head.weight.to(self.hidden.dtype).double()
            parts = [
                F.cross_entropy(hidden.double() @ weight.t(), labels, reduction="sum").item()
                for hidden, labels in zip(self.hidden.split(256), self.labels.split(256), strict=True)
                if (labels != IGNORE_INDEX).any()
            ]
        return sum(parts)


def contenders(chunk_rows: Sequence[int]) -> dict[str, Loss]:
    """Each loss by its name."""
    losses: dict[str, Loss] = {
        NAIVE: lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    }
    torch_loss: Any = getattr(F, "linear_cross_entropy", None)
    make_options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    if torch_loss:
        losses["torch"] = lambda hidden, weight, labels: torch_loss(hidden, weight, labels, reduction="sum")
    if torch_loss and make_options:
        losses["torch-chunked"] = lambda hidden, weight, labels: torch_loss(
            hidden, weight, labels, reduction="sum", options=make_options()
        )
    losses["ours-auto"] = linear_cross_entropy
    for rows in chunk_rows:
        losses[f"ours-{rows}"] = lambda hidden, weight, labels, rows=rows: linear_cross_entropy(
            hidden, weight, labels, chunk_rows=rows
        )
    return losses


def memory_of(problem: Problem, loss: Loss) -> tuple[int, int | None]:
    """Bytes alive at the peak beyond what the call was given, and bytes of the largest tensor (CPU only)."""
    problem.run(loss)
    problem.hidden.grad = problem.head.weight.grad = None
    if problem.device == "cuda":
        torch.cuda.synchronize()
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        problem.run(loss)
        return torch.cuda.max_memory_allocated() - before_bytes, None
    with _LargestTensor() as largest:
        problem.run(loss)
    problem.hidden.grad = problem.head.weight.grad = None
    given = [problem.hidden, problem.head.weight, problem.labels]
    # The tracker counts a storage once an operation returns it: views make it see all that was given.
    with MemoryTracker(problem.head, torch.optim.SGD([problem.head.weight])) as tracker:
        views = [tensor.detach() for tensor in given]
        tracker.forget_peak()
        problem.run(loss)
        del views
    return tracker.use.peak_bytes - sum(tensor.nbytes for tensor in given), largest.largest_bytes


def measure(problem: Problem, losses: dict[str, Loss], *, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """One row per loss: seconds, ratio to naive, memory, error; a loss that cannot run gets its complaint."""
    exact_nats, rows, seconds = problem.exact_nats(), {}, {}
    for name, loss in losses.items():
        try:
            peak_bytes, largest_bytes = memory_of(problem, loss)
        except (RuntimeError, TypeError, ValueError) as error:
            rows[name] = {"loss": name, "failed": str(error).splitlines()[0]}
            continue
        nats = problem.run(loss)
        rows[name] = {
            "loss": name,
            "loss_dtype": str(nats.dtype).removeprefix("torch."),
            "relative_error": abs(nats.item() - exact_nats) / exact_nats,
            "peak_bytes": peak_bytes,
            "largest_tensor_bytes": largest_bytes,
        }
        seconds[name] = []
    names = list(seconds)
    for index in range(warmup + rounds):
        for name in [*names[index % len(names) :], *names[: index % len(names)]]:
            taken_seconds = _seconds(problem, losses[name])
            if index >= warmup:
                seconds[name].append(taken_seconds)
    for name, samples in seconds.items():
        rows[name]["seconds"] = spread(samples)
        rows[name]["speed_ratio"] = spread([a / b for a, b in zip(seconds[NAIVE], samples, strict=True)])
    return list(rows.values())


def _seconds(problem: Problem, loss: Loss) -> float:
    if problem.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    problem.run(loss)
    if problem.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def print_rows(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """The table of `measure`."""
    table = Table(title=title, title_justify="left")
    table.add_column("loss")
    for heading in ("ms", "× naive", "peak, MiB", "largest tensor, MiB", "relative error", "dtype"):
        table.add_column(heading, justify="right")
    for row in rows:
        if "failed" in row:
            table.add_row(row["loss"], row["failed"])
            continue
        largest_bytes = row["largest_tensor_bytes"]
        table.add_row(
            row["loss"],
            with_quartiles(row["seconds"], 1, 1e3),
            with_quartiles(row["speed_ratio"], 3),
            f"{row['peak_bytes'] / MIB:,.1f}",
            "" if largest_bytes is None else f"{largest_bytes / MIB:,.1f}",
            f"{row['relative_error']:.1e}",
            row["loss_dtype"],
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the hidden states")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", choices=list(get_args(Precision)), default="fp32")
    parser.add_argument("--chunk-rows", type=int, nargs="*", default=[128, 256, 512, 1024], help="tried beside auto")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each loss")
    parser.add_argument("--warmup", type=int, default=2, help="untimed calls of each loss, before")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    problem = Problem.random(
        tokens=options.tokens,
        hidden=options.hidden,
        vocab=options.vocab,
        precision=options.dtype,
        device=options.device,
    )
    losses = contenders(options.chunk_rows)
    rows, facts = measure(problem, losses, rounds=options.rounds, warmup=options.warmup), environment(options.device)
    console = wide_console(stderr=options.json == "-")
    shape = f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}"
    print_rows(rows, f"{shape}, {options.dtype}, {options.device}; {options.rounds} rounds, interleaved", console)
    console.print(environment_line(facts))
    if options.json:
        write_json(options.json, {"environment": facts, "settings": vars(options), "rows": rows})


if __name__ == "__main__":
    main()
