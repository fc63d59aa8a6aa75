"""GaLore's subspace of a gradient: randomised by us, by a full SVD as galore-torch takes it, and by an eigenproblem.

    svd          torch.linalg.svd(gradient, full_matrices=False), cut to the rank
    gram         all eigenvectors of the Gram matrix of the smaller side, cut to the rank; exact but for rounding
    randomised   optim.galore.randomised_subspace

They take turns, in an order that rotates; a ratio is svd's time over the contender's, round by round. Processor seconds
are those of the whole process. The energy is ‖projection of G‖² over that of svd's subspace, in float64. Spectra:

    gaussian     independent normal numbers, the flattest that a gradient can be
    power        singular values i^-½ between random orthogonal bases
    low-rank     as many directions as half the rank, ten times as strong as the noise on top
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from figures import environment, environment_line, spread, wide_console, with_quartiles, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from velora_pretrain.optim.galore import exact_subspace, project, randomised_subspace

SVD = "svd"
Finder = Callable[[Tensor, int], Tensor]


def gram_subspace(gradient: Tensor, rank: int) -> Tensor:
    """The rank's leading eigenvectors of GᵀG, or GGᵀ where that is smaller, laid out as `exact_subspace` does."""
    right = gradient.shape[0] >= gradient.shape[1]
    gram = gradient.t() @ gradient if right else gradient @ gradient.t()
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    return vectors.t().contiguous() if right else vectors


def randomised(gradient: Tensor, rank: int) -> Tensor:
    return randomised_subspace(gradient, rank, torch.Generator(gradient.device).manual_seed(1))


FINDERS: dict[str, Finder] = {SVD: exact_subspace, "gram": gram_subspace, "randomised": randomised}


def gaussian(outputs: int, features: int, rank: int) -> Tensor:
    return torch.randn(outputs, features)


def power(outputs: int, features: int, rank: int) -> Tensor:
    side = min(outputs, features)
    left, right = (torch.linalg.qr(torch.randn(size, side)).Q for size in (outputs, features))
    return (left * torch.arange(1, side + 1).rsqrt()) @ right.t()


def low_rank(outputs: int, features: int, rank: int) -> Tensor:
    directions = max(1, rank // 2)
    signal = torch.randn(outputs, directions) @ torch.randn(directions, features)
    return 10 * signal / directions**0.5 + torch.randn(outputs, features)


SPECTRA: dict[str, Callable[[int, int, int], Tensor]] = {"gaussian": gaussian, "power": power, "low-rank": low_rank}


def measure(gradient: Tensor, rank: int, finders: dict[str, Finder], *, rounds: int, warmup: int) -> dict[str, Any]:
    """By finder: seconds, processor seconds, their ratios to svd's, and the share of svd's energy."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in finders}
    energies: dict[str, float] = {}
    names = list(finders)
    for index in range(warmup + rounds):
        for name in [*names[index % len(names) :], *names[: index % len(names)]]:
            taken, projection = _timed(finders[name], gradient, rank)
            if index >= warmup:
                seconds[name].append(taken)
            if name not in energies:
                energies[name] = project(gradient.double(), projection.double()).square().sum().item()
    return {
        name: {
            "seconds": spread([wall for wall, _ in taken]),
            "processor_seconds": spread([processor for _, processor in taken]),
            "speed_ratio": spread([svd[0] / own[0] for svd, own in zip(seconds[SVD], taken, strict=True)]),
            "processor_ratio": spread([svd[1] / own[1] for svd, own in zip(seconds[SVD], taken, strict=True)]),
            "energy_ratio": energies[name] / energies[SVD],
        }
        for name, taken in seconds.items()
    }


def _timed(finder: Finder, gradient: Tensor, rank: int) -> tuple[tuple[float, float], Tensor]:
    synchronise = torch.cuda.synchronize if gradient.is_cuda else lambda: None
    synchronise()
    wall, processor = time.perf_counter(), time.process_time()
    projection = finder(gradient, rank)
    synchronise()
    return (time.perf_counter() - wall, time.process_time() - processor), projection


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table of all sizes."""
    table = Table(title="Subspace of a gradient: median (quartiles)", title_justify="left")
    for heading in ("gradient", "rank", "spectrum", "finder"):
        table.add_column(heading)
    for heading in ("ms", "processor ms", "× svd", "× svd, processor", "share of svd's energy"):
        table.add_column(heading, justify="right")
    for row in rows:
        for name, figures in row["finders"].items():
            table.add_row(
                f"{row['outputs']}×{row['features']}",
                str(row["rank"]),
                row["spectrum"],
                name,
                with_quartiles(figures["seconds"], 1, 1e3),
                with_quartiles(figures["processor_seconds"], 1, 1e3),
                with_quartiles(figures["speed_ratio"], 1),
                with_quartiles(figures["processor_ratio"], 1),
                f"{figures['energy_ratio']:.5f}",
            )
    console.print(table)


def parse_size(text: str) -> tuple[int, int, int]:
    """Outputs, features and rank from `1376x512:128`."""
    shape, _, rank = text.partition(":")
    try:
        outputs, features = (int(part) for part in shape.split("x"))
        size = outputs, features, int(rank)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not of the form 1376x512:128") from None
    if not 1 <= size[2] <= min(outputs, features):
        raise argparse.ArgumentTypeError(f"{text}: the rank must be from 1 to the smaller side")
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(1376, 512, 128)], metavar="MxD:RANK")
    parser.add_argument("--spectra", nargs="+", choices=list(SPECTRA), default=["gaussian"])
    parser.add_argument("--finders", nargs="+", choices=list(FINDERS), default=list(FINDERS), help="svd is always one")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each finder")
    parser.add_argument("--warmup", type=int, default=1, help="untimed calls of each finder, before")
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too; - for standard output")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    finders = {name: finder for name, finder in FINDERS.items() if name == SVD or name in options.finders}
    rows = []
    for outputs, features, rank in options.sizes:
        for spectrum in options.spectra:
            torch.manual_seed(0)
            gradient = SPECTRA[spectrum](outputs, features, rank).to(options.device)
            figures = measure(gradient, rank, finders, rounds=options.rounds, warmup=options.warmup)
            size = {"outputs": outputs, "features": features, "rank": rank, "spectrum": spectrum}
            rows.append({**size, "finders": figures})
    facts = environment(options.device)
    console = wide_console(stderr=options.json == "-")
    print_rows(rows, console)
    console.print(environment_line(facts))
    if options.json:
        write_json(options.json, {"environment": facts, "rows": rows})


if __name__ == "__main__":
    main()
