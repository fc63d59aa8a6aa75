"""The README's pictures: a terminal while a run goes on, and the head of a report, both as a user sees them.

    python tools/pictures.py --runs RUNS --output tools/results/pictures

Starts `train` in a terminal of its own (tmux), takes what that shows after some steps, and stops the run; then makes a
report of the runs under RUNS. A headless Chromium draws both.
"""

from __future__ import annotations

import argparse
import io
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from browser import Browser, find_browser
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from velora_pretrain.report import write_report

ROOT = Path(__file__).parents[1]
COLUMNS, ROWS = 100, 16
PATIENCE_SECONDS = 600.0
ANSI = [
    (40, 44, 52),
    (224, 108, 117),
    (152, 195, 121),
    (229, 192, 123),
    (97, 175, 239),
    (198, 120, 221),
    (86, 182, 194),
]
THEME = TerminalTheme((24, 27, 32), (220, 223, 228), [*ANSI, (171, 178, 191)], [*ANSI, (255, 255, 255)])
PAGE = """<!DOCTYPE html><meta charset="utf-8"><style>{stylesheet}
body {{ margin: 0; padding: 18px 22px; color: {foreground}; background: {background}; width: max-content }}
pre {{ margin: 0; font: 15px/1.35 "DejaVu Sans Mono", monospace }}</style><pre><code>{code}</code></pre>"""


def terminal_after(command: Sequence[str], shown: str, folder: Path) -> str:
    """What a terminal shows, colours included, once its text has `shown`; the command is stopped then.

    Raises:
        TimeoutError: it never did.
    """
    tmux = ["tmux", "-L", f"pictures-{folder.name}"]
    line = f"cd {shlex.quote(str(folder))} && PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(command)}"
    window = ["new-session", "-d", "-s", "run", "-x", str(COLUMNS), "-y", str(ROWS), line]
    subprocess.run([*tmux, "-f", "/dev/null", *window], check=True)
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            time.sleep(0.5)
            capture = [*tmux, "capture-pane", "-e", "-p", "-t", "run"]
            screen = subprocess.run(capture, capture_output=True, text=True, check=True).stdout
            if shown in screen:
                return screen.strip("\n")
        raise TimeoutError(f"the terminal never showed {shown!r}")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def write_pictures(*, runs: Sequence[Path], steps: int, output: Path) -> None:
    """Writes live.png and report.png."""
    program = find_browser()
    if program is None:
        sys.exit("no Chromium here; install one, or name it in $VELORA_TEST_BROWSER")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, Browser(program) as browser:
        folder = Path(name)
        train = [sys.executable, "-m", "velora_pretrain", "train", "--recipe", "quickstart"]
        screen = terminal_after(train, f"{steps}/100 steps", folder)
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        prompt = "$ velora-pretrain train --recipe quickstart\n"
        console.print(Text(prompt) + Text.from_ansi(screen), soft_wrap=True)
        page = folder / "live.html"
        page.write_text(console.export_html(theme=THEME, code_format=PAGE))
        browser.show(page, width=1000, height=100)
        browser.screenshot(output / "live.png")
        browser.show(write_report(runs, folder / "report")[0], width=1280, height=1500)
        browser.screenshot(output / "report.png", whole=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="run folders, or folders of them")
    parser.add_argument("--steps", type=int, default=60, help="steps after which the terminal is taken")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    arguments = parser.parse_args()
    write_pictures(runs=arguments.runs, steps=arguments.steps, output=arguments.output)


if __name__ == "__main__":
    main()
