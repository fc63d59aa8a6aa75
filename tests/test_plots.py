"""Plots of a comparison: their marks, their order and that the same data gives the same file."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from velora_pretrain import plots
from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.plots import COLOURS, has_matplotlib, moving_mean, write_plots

GIB = 2**30
NAMES = ["full", "velora", "velora[layers=all,update=projected]", "galore", "flora", "lora", "a+b", "c+d", "e+f"]


def row(variant: str, perplexity: float, memory_gib: float | None, sd: float | None = 0.1) -> dict[str, Any]:
    return {
        "variant": variant,
        "mode": variant.partition("[")[0],
        "learning_rate": 0.001 if math.isfinite(perplexity) else None,
        "perplexity_mean": perplexity,
        "perplexity_sd": sd,
        "peak_memory_bytes": {"predicted": memory_gib and int(memory_gib * GIB), "measured": None},
        "cells": [{"seed": 0}, {"seed": 1}],
    }


def rows() -> list[dict[str, Any]]:
    """Nine points, some of them close together."""
    places = [(25.0, 2.3), (25.2, 2.1), (25.05, 1.7), (25.5, 2.0), (25.52, 2.01), (33.9, 1.2), (25.6, 1.6), (26, 1.6)]
    places.append((34.2, 1.1))
    return [row(name, *place) for name, place in zip(NAMES, places, strict=True)]


def curves(steps: int = 3_000) -> dict[str, dict[str, list[float]]]:
    tokens = [1000.0 * step for step in range(1, steps + 1)]
    return {
        name: {"tokens": tokens, "loss": [3 + 0.1 * place + 7 / (1 + step) for step in range(steps)]}
        for place, name in enumerate(NAMES)
    }


def test_every_variant_has_its_marks_in_both_plots(tmp_path: Path):
    written = write_plots(rows(), curves(), tmp_path / "plots")
    names = [f"{name}.{ending}" for name in ("loss", "perplexity_memory") for ending in ("png", "svg")]
    assert [path.name for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    loss, memory = ((tmp_path / "plots" / f"{name}.svg").read_text() for name in ("loss", "perplexity_memory"))
    for name in NAMES:
        assert f'id="loss of {name}"' in loss
        assert f">{name}, lr 0.001</text>" in loss
        assert f">{name}</text>" in memory
    for text in ("tokens read", "training loss (nats per token)", "mean over 2 seeds, moving mean over 61 steps"):
        assert text in loss
    for text in ("predicted peak memory of a training step (GiB)", "validation perplexity (mean ± sd over seeds)"):
        assert text in memory
    # One colour per variant, the same in both.
    assert all(svg.count(colour.lower()) > 0 for colour in COLOURS for svg in (loss, memory))
    assert len(loss) < 2_000_000


def test_the_same_data_gives_the_same_files(tmp_path: Path):
    first, second = (write_plots(rows(), curves(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_no_two_variants_look_alike():
    looks = plots.variant_looks({f"velora[rank={place}]": "velora" for place in range(32)})
    assert len({(look["marker"], look["linestyle"]) for look in looks.values()}) == 32


def test_a_mode_has_one_colour_whatever_it_is_compared_with():
    modes = {name: name.partition("[")[0] for name in NAMES[:6]}
    looks = plots.variant_looks(modes)
    for name, mode in modes.items():
        alone = plots.variant_looks({mode: mode})[mode]
        assert (looks[name]["color"] == alone["color"]) == (name == mode)
    assert len({look["color"] for look in looks.values()}) == len(modes)
    assert len(set(plots.MODE_COLOURS.values())) == len(plots.MODE_COLOURS) == len(MODES)


def test_labels_cover_neither_points_nor_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    boxes: list[Any] = []
    original = plots._place_labels

    def placed(figure: Any, axes: Any, shown: Any) -> None:
        original(figure, axes, shown)
        figure.draw_without_rendering()
        labels = [text for text in axes.texts if text.get_text()]
        boxes.extend(label.get_window_extent() for label in labels)
        for place in shown:
            at = axes.transData.transform((place["peak_memory_bytes"]["predicted"] / GIB, place["perplexity_mean"]))
            assert not [box for box in boxes if box.contains(*at)]
        room = figure.bbox
        assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in boxes)

    monkeypatch.setattr(plots, "_place_labels", placed)
    write_plots(rows(), {}, tmp_path)
    assert len(boxes) == len(NAMES)
    assert not [(a, b) for place, a in enumerate(boxes) for b in boxes[:place] if a.overlaps(b)]


@pytest.mark.filterwarnings("error")
def test_long_names_stand_below_and_leave_the_axes_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside their points they would push the axes together."""
    names = [f"velora[{'a_long_setting=1, ' * place}last={place}]" for place in range(12)]
    given = [row(name, 25.0 + place, 2.0 + 0.1 * place) for place, name in enumerate(names)]
    lines = {name: {"tokens": [1.0, 2.0], "loss": [2.0, 1.0]} for name in names}
    figures: dict[str, Any] = {}
    original = plots.save_figures
    monkeypatch.setattr(plots, "save_figures", lambda drawn, folder: figures.update(drawn) or original(drawn, folder))
    write_plots(given, lines, tmp_path)
    for name, figure in figures.items():
        figure.draw_without_rendering()
        legend, room = figure.legends[0].get_window_extent(), figure.bbox
        shown = "".join(text.get_text() for text in figure.legends[0].get_texts()).replace("\n    ", " ")
        assert all(each in shown for each in names), name
        assert room.x0 <= legend.x0 and legend.x1 <= room.x1 and room.y0 <= legend.y0, name
        axes = figure.axes[0].get_window_extent()
        assert legend.y1 <= axes.y0
        assert axes.width > 0.8 * room.width
        assert axes.height > 3.5 * figure.dpi


def test_a_variant_that_diverged_has_no_point_and_one_seed_no_deviation(tmp_path: Path):
    given = [row("full", 25.0, 2.0, None), row("lost", math.inf, None, None)]
    write_plots(given, {"full": {"tokens": [1.0], "loss": [2.0]}, "lost": {"tokens": [], "loss": []}}, tmp_path)
    memory, loss = ((tmp_path / f"{name}.svg").read_text() for name in ("perplexity_memory", "loss"))
    assert ">full</text>" in memory
    assert "lost" not in memory + loss
    assert ">validation perplexity</text>" in memory
    assert ">Training loss, mean over 2 seeds</text>" in loss
    assert write_plots(given[1:], {}, tmp_path) == []


def test_a_moving_mean_is_a_mean_over_what_there_is_of_its_window():
    assert moving_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert moving_mean([1.0, 2.0], 1) == [1.0, 2.0]
    assert moving_mean([], 3) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="plots cannot be written"):
        write_plots(rows(), {}, tmp_path / "file")


def test_matplotlib_may_be_missing(monkeypatch: pytest.MonkeyPatch):
    assert has_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not has_matplotlib()
