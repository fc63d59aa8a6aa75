"""The report: what is on the page and in the pictures, from runs in every state, and nothing that is not escaped."""

import json
import os
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import run_folders

from velora_pretrain.errors import UserError
from velora_pretrain.plots import MODE_COLOURS
from velora_pretrain.records import RunFolder
from velora_pretrain.report import write_report
from velora_pretrain.run_view import memory_of, view_run

PICTURES = (
    "loss_tokens",
    "loss_hours",
    "perplexity_tokens",
    "perplexity_hours",
    "memory",
    "perplexity_memory",
    "learning_rate",
    "gradient_norm",
    "speed",
)
VOID = ("meta", "link", "br", "i")


class Page(HTMLParser):
    """A page's tags in order, its text by table row, and whether its tags are balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The first row that begins with that name."""
        return next(row for row in self.rows if row[0] == name)

    def marks(self, picture: str) -> list[str]:
        """Ids of a picture's marks."""
        ids = [attributes.get("id") or "" for _, attributes in self.tags]
        return [each for each in ids if each.startswith(f"{picture}-{picture}-mark-")]


def test_every_picture_has_a_mark_for_every_run_in_the_page_and_in_files(tmp_path: Path):
    modes = ["full", "velora", "galore", "lora"]
    for mode in modes:
        run_folders.write(tmp_path / "runs" / mode, mode=mode)
    page, *pictures = write_report([tmp_path / "runs"], tmp_path / "out")
    assert [path.name for path in pictures] == [f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures if path.suffix == ".png")
    read = Page(page)
    assert not read.open
    for name in PICTURES:
        marks = read.marks(name)
        assert len([each for each in marks if re.search(r"mark-\d+$", each)] or marks) >= len(modes), name
        svg = (tmp_path / "out" / "pictures" / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        for mode in modes if name != "memory" else ():
            assert MODE_COLOURS[mode].lower() in svg or MODE_COLOURS[mode] == "#000000", (name, mode)
    svgs = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(svgs) == len(PICTURES)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert all({*(each["aria-labelledby"] or "").split()} <= {*ids} for each in svgs)
    for text in ("tokens read", "training time (", "validation perplexity", "GiB at the peak of a training step"):
        assert text in read.text


def test_the_page_has_every_final_figure_the_differences_the_environment_and_the_commands(tmp_path: Path):
    first = run_folders.write(tmp_path / "runs" / "a", mode="full")
    run_folders.write(tmp_path / "runs" / "b", mode="velora", optimizer__lr=0.02)
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    final = run_folders.evaluation_record(20)
    figures = ["20 / 20", "40,000", "0:00:40", "3.3333", f"{final.perplexity:.2f}", f"{final.perplexity_paper:.2f}"]
    figures += ["1.2500", "2.188", "2.188", "1.50", "1,000"]
    assert page.row("a") == ["a", "full", "finished", *figures]
    assert ["run", "mode", "optimizer.lr"] in page.rows
    assert ["b", "velora", "0.02"] in page.rows
    assert ["torch", "2.11.0"] in page.rows
    assert ["platform", "Linux-6.1"] in page.rows
    for text in (f"train --recipe {first.path}/config.toml", f"eval checkpoint {first.path}", "lr = 0.02"):
        assert text in page.text


def timed(folder: RunFolder, *, seconds_per_step: float, pause_seconds: float) -> RunFolder:
    """The run with times in its records: evaluations take a second each, and after step 10 nothing runs for a while."""
    lines, seconds = [], 0.0
    for record in folder.records():
        seconds += 1.0 if "perplexity" in record else seconds_per_step
        idle = pause_seconds if record["step"] > 10 else 0.0
        lines.append(json.dumps(record | {"run_seconds": seconds, "unix_seconds": 1.7e9 + seconds + idle}) + "\n")
    folder.metrics.write_text("".join(lines))
    return folder


def test_time_counts_evaluations_but_no_pauses_where_all_runs_have_recorded_it(tmp_path: Path):
    a = timed(run_folders.write(tmp_path / "runs" / "a"), seconds_per_step=3.0, pause_seconds=1e5)
    b = timed(run_folders.write(tmp_path / "runs" / "b"), seconds_per_step=1.0, pause_seconds=0.0)
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    # 20 steps and 4 evaluations.
    assert [page.row(name)[5] for name in "ab"] == ["0:01:04", "0:00:24"]
    assert "training time (seconds, without pauses)" in page.text
    assert "with evaluations and checkpoints, without pauses" in page.text
    views = [view_run(folder) for folder in (a, b)]
    hours = views[0].hours(steps_only=False)
    assert [round(3600 * hour) for hour in hours.training[:6]] == [3, 6, 9, 12, 15, 19]
    assert [round(3600 * hour) for hour in hours.evaluations if hour] == [16, 32, 48, 64]
    # One run of an early version, and nothing but steps can be counted for all.
    run_folders.write(tmp_path / "runs" / "c")
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    assert [page.row(name)[5] for name in "abc"] == ["0:00:40"] * 3
    assert "training time (seconds, steps only)" in page.text


def test_samples_of_the_first_the_middle_and_the_last_evaluation_are_shown(tmp_path: Path):
    folder = run_folders.write(tmp_path / "runs" / "a")
    run_folders.write(tmp_path / "runs" / "without")
    lines = [
        {"step": step, "prompt": f"The <b> {place}", "continuation": f" after\n{step}"}
        for step in (5, 10, 15, 20)
        for place in range(6)
    ]
    folder.samples.write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    shown = [row for row in page.rows if row[0] in ("5", "10", "15", "20") and len(row) == 3]
    assert shown == [[str(step), f"The <b> {n}", f"after {step}"] for step in (5, 15, 20) for n in range(4)]
    assert not [tag for tag, _ in page.tags if tag == "b"]
    alone = Page(write_report([tmp_path / "runs" / "without"], tmp_path / "out")[0])
    assert "Samples" not in alone.text


def test_runs_that_differ_in_the_seed_alone_are_taken_together(tmp_path: Path):
    for seed in range(3):
        run_folders.write(tmp_path / "runs" / f"full-{seed}", seed=seed, tracking__trackers=["wandb"] * (seed % 2))
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    perplexity = run_folders.evaluation_record(20).perplexity
    assert page.row("full-0, full-1, full-2") == [
        "full-0, full-1, full-2",
        "full",
        "3",
        f"{perplexity:.2f} ± 0.00",
        "1,000",
    ]


def test_runs_under_way_stopped_failed_or_with_numbers_that_are_not_finite(tmp_path: Path):
    root = tmp_path / "runs"
    run_folders.write(root / "young", done=7)
    old = run_folders.write(root / "old", done=3)
    os.utime(old.metrics, (0, 0))
    os.utime(old.config, (0, 0))
    run_folders.write(root / "broke", done=2, failure="the loss is <nan>")
    infinite = run_folders.write(root / "infinite", done=4)
    infinite.append(run_folders.training_record(5, loss=float("nan")))
    infinite.append(run_folders.evaluation_record(5, perplexity=float("inf")))
    run_folders.write(root / "begun", done=0)
    cut = run_folders.write(root / "cut", done=2)
    cut.metrics.write_text(cut.metrics.read_text() + '{"step": 3, "tok')
    page = Page(write_report([root], tmp_path / "out")[0])
    states = {name: page.row(name)[2] for name in ("young", "old", "broke", "infinite", "begun", "cut")}
    assert states == {
        "young": "running",
        "old": "stopped",
        "broke": "failed",
        "infinite": "running",
        "begun": "running",
        "cut": "running",
    }
    assert page.row("young")[3:6] == ["7 / 20", "14,000", "0:00:14"]
    assert page.row("infinite")[6:8] == ["–", "–"]
    assert page.row("begun")[3] == "0 / 20"
    assert "broke: failed at step 3: the loss is <nan>." in page.text
    assert f"train --resume --run-dir {root}/old" in page.text
    # None has a summary: no picture of memory.
    assert not page.marks("memory")
    assert len(page.marks("loss_tokens")) == 5
    assert len(page.marks("perplexity_tokens")) == 1


def test_a_run_that_failed_does_not_set_the_scale_of_the_others(tmp_path: Path):
    from velora_pretrain.report_figures import draw_pictures

    sound = run_folders.write(tmp_path / "sound", done=20)
    failed = run_folders.write(tmp_path / "failed", done=2, failure="nan")
    failed.append(run_folders.training_record(3, loss=1e6))
    pictures = {each.name: each for each in draw_pictures([view_run(sound), view_run(failed)])}
    low, high = pictures["loss_tokens"].figure.axes[0].get_ylim()
    assert 2.5 < low < 3.5
    assert high < 10


def test_dozens_of_runs_have_a_legend_of_modes_and_as_many_lines(tmp_path: Path):
    from velora_pretrain.report_figures import draw_pictures

    modes = ["full", "velora", "galore", "flora+velora"]
    folders = [run_folders.write(tmp_path / f"run-{place}", mode=modes[place % 4], seed=place) for place in range(36)]
    pictures = draw_pictures([view_run(folder) for folder in folders])
    for picture in pictures:
        figure = picture.figure
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box, room = legend.get_window_extent(), figure.bbox
        assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0, picture.name
        assert box.y1 <= figure.axes[0].get_window_extent().y0, picture.name
        if picture.name != "memory":
            assert [text.get_text() for text in legend.get_texts()] == [f"{mode} (9 runs)" for mode in modes]
            assert len(figure.axes[0].lines) == 36
    (page, *_) = write_report([folder.path for folder in folders], tmp_path / "out")
    assert page.stat().st_size < 3_000_000


def test_long_names_fit_the_legend(tmp_path: Path):
    from velora_pretrain.report_figures import draw_pictures

    names = [f"_{place}{'a-very-long-name-' * 8}{place}" for place in range(5)]
    views = [view_run(run_folders.write(tmp_path / name)) for name in names]
    for picture in draw_pictures(views):
        picture.figure.draw_without_rendering()
        (legend,) = picture.figure.legends
        box, room = legend.get_window_extent(), picture.figure.bbox
        assert room.x0 <= box.x0 and box.x1 <= room.x1, picture.name
        if picture.name != "memory":
            assert len(legend.get_texts()) == 5


def test_many_steps_make_no_large_page(tmp_path: Path):
    folder = run_folders.write(tmp_path / "long", steps=20_000, done=0, evaluation__every_steps=0)
    lines = [json.dumps(vars(run_folders.training_record(step))) for step in range(1, 20_001)]
    folder.metrics.write_text("\n".join(lines) + "\n")
    page, *_ = write_report([folder.path], tmp_path / "out")
    assert page.stat().st_size < 500_000


HOSTILE = [
    "<script>alert(1)<",
    '" onload="alert(1)',
    "$\\nonsense{$ & ' <b>",
    "--><img src=x onerror=alert(1)>]]>",
    "line\nbreak\x1b[31m",
    "_hidden",
]


@pytest.mark.filterwarnings("error")
def test_hostile_names_and_files_are_shown_and_do_nothing(tmp_path: Path):
    for place, name in enumerate(HOSTILE):
        run_folders.write(tmp_path / "runs" / name.replace("/", "_"), data=f"</code></pre><script>{place}", seed=place)
    run_folders.write(tmp_path / "runs" / "broke", done=2, failure="</p><script>alert(2)</script>")
    config = tmp_path / "runs" / "broke" / "config.toml"
    config.write_text(config.read_text() + "# </code><script>\n")
    page = Page(write_report([tmp_path / "runs"], tmp_path / "out")[0])
    assert not page.open
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "b", "iframe", "object"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    for name in HOSTILE:
        assert name.replace("\n", "\ufffd").replace("\x1b", "\ufffd") in page.text
    policy = next(attributes for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert "default-src 'none'" in (policy["content"] or "")
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key.endswith(("href", "src"))]
    assert all(str(link).startswith(("#", "data:")) for link in links)
    for path in (tmp_path / "out" / "pictures").glob("*.svg"):
        ElementTree.parse(path)


def rewritten(folder: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    records = list(folder.records())
    for record in records:
        change(record)
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_records_without_tokens_are_drawn_against_time_alone(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", mode="full")
    rewritten(folder, lambda record: record.pop("tokens", None))
    names = {path.stem for path in write_report([folder.path], tmp_path / "out")[1:]}
    assert {"loss_hours", "memory"} <= names
    assert not {"loss_tokens", "perplexity_tokens", "speed"} & names


def test_a_summary_by_hand_is_shown_as_far_as_it_can_be(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", mode="full")
    folder.summary.write_text(json.dumps({"predicted_memory": {"peak_bytes": "much"}, "final_evaluation": 3}))
    view = view_run(folder)
    assert view.final_evaluation == view.evaluations[-1]
    assert memory_of(view.summary, "predicted") is None


def test_something_else_for_a_number_is_told_with_its_step(tmp_path: Path):
    folder = run_folders.write(tmp_path / "run", mode="full")
    rewritten(folder, lambda record: record.update(grad_norm="much") if record["step"] == 3 else None)
    with pytest.raises(UserError, match=r"metrics\.jsonl: step 3: grad_norm is no number \('much'\); remove the line"):
        write_report([folder.path], tmp_path / "out")


def test_names_that_no_file_system_of_today_would_give(tmp_path: Path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff\xfe")
    run_folders.write(Path(path))
    page = Page(write_report([Path(path)], tmp_path / "out")[0])
    assert "r\ufffd\ufffd" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    for name in "xy":
        run_folders.write(tmp_path / name / "same")
    page = Page(write_report([tmp_path / "x", tmp_path / "y" / "same", tmp_path / "x" / "same"], tmp_path / "out")[0])
    assert [row[0] for row in page.rows if row[0].endswith("same")][:2] == ["x/same", "y/same"]


def test_the_same_runs_give_the_same_page(tmp_path: Path):
    run_folders.write(tmp_path / "run")
    first = [path.read_bytes() for path in write_report([tmp_path / "run"], tmp_path / "out")]
    assert first == [path.read_bytes() for path in write_report([tmp_path / "run"], tmp_path / "out")]


def test_mistakes_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def told(*paths: Path, output: Path = tmp_path / "out") -> str:
        with pytest.raises(UserError) as error:
            write_report(paths, output)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "none: no such folder" in told(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no run" in told(tmp_path / "empty")
    begun = run_folders.write(tmp_path / "begun", done=0)
    assert "no records yet" in told(begun.path)
    good = run_folders.write(tmp_path / "good")
    (tmp_path / "file").write_text("")
    assert "is a file" in told(good.path, output=tmp_path / "file")
    assert "cannot be written" in told(good.path, output=tmp_path / "file" / "below")
    for text in ("[]\n", "{\n", '{"tokens": 3}\n'):
        bad = run_folders.write(tmp_path / "bad")
        bad.metrics.write_text(text)
        assert "metrics.jsonl" in told(bad.path)
    bad = run_folders.write(tmp_path / "worse")
    bad.summary.write_text("[1]")
    assert "summary.json: not a JSON object" in told(bad.path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "velora-pretrain[plot]"' in told(good.path)
