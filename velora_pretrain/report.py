"""The report of runs: one HTML page that needs no network, and each picture as PNG and SVG.

    DIR/report.html               everything in one file: pictures inline, no script
    DIR/pictures/loss_tokens.png  and so on, see `report_figures.py`; .svg beside each

Runs may be under way, stopped or failed: what they have is shown. No torch here, and no trainer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from velora_pretrain.config import MODES
from velora_pretrain.errors import UserError
from velora_pretrain.files import write_atomically
from velora_pretrain.plots import HOW_TO_INSTALL, STYLE, has_matplotlib, save_figures
from velora_pretrain.report_figures import MOST_NAMED, Picture, draw_pictures
from velora_pretrain.report_page import inline_svg, render_page
from velora_pretrain.run_view import find_runs, run_names, view_run

REPORT_STYLE: dict[Any, Any] = STYLE | {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8,
    "text.parse_math": False,
}
"""Names of runs are shown as they are, dollars included."""


def write_report(paths: Sequence[Path], output: Path) -> list[Path]:
    """Writes the report of runs.

    Args:
        paths: run folders, or folders of run folders.
        output: the folder that takes the page and the pictures.

    Returns:
        The page, then the pictures.

    Raises:
        UserError: a path holds no run or nothing to show, matplotlib is missing, or the folder cannot be written.
    """
    if not has_matplotlib():
        raise UserError(f"report: {HOW_TO_INSTALL}")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, not a folder")
    folders = find_runs(paths)
    views = [view_run(folder, name=name) for folder, name in zip(folders, run_names(folders), strict=True)]
    if len(views) > MOST_NAMED:
        # Of many it is the modes that are looked for.
        views.sort(key=lambda view: MODES.index(view.run.mode))
    if not any(view.training or view.evaluations for view in views):
        raise UserError(f"{paths[0]}: no records yet; a report needs at least one step")

    import matplotlib

    with matplotlib.rc_context(REPORT_STYLE):
        pictures = draw_pictures(views)
        shown = [(picture, inline_svg(picture.name, _svg(picture))) for picture in pictures]
        for picture in pictures:
            # On the page the caption says it.
            picture.figure.axes[0].set_title(picture.title, loc="left", fontsize=10)
        command = ["velora-pretrain", "report", *map(str, paths), "--output", str(output)]
        page = render_page(views, shown, command)
        try:
            written = save_figures({picture.name: picture.figure for picture in pictures}, output / "pictures")
            write_atomically(output / "report.html", page.encode("utf-8"))
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    return [output / "report.html", *written]


def _svg(picture: Picture) -> str:
    """The picture for a page of any colour: nothing behind it."""
    written = io.StringIO()
    picture.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return written.getvalue()
