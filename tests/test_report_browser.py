"""The report in a real browser: it loads without complaint or network, and every chart shows its marks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import run_folders
from browser import Browser, find_browser

from velora_pretrain.report import write_report

MODES = ("full", "velora", "galore", "lora", "flora")
LINES = (
    "loss_tokens",
    "loss_hours",
    "perplexity_tokens",
    "perplexity_hours",
    "learning_rate",
    "gradient_norm",
    "speed",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    for mode in MODES:
        run_folders.write(root / "runs" / f"<b>{mode}<b>", mode=mode)
    return write_report([root / "runs"], root / "out")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here; install one, or name it in $VELORA_TEST_BROWSER")
    with Browser(program) as started:
        yield started


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_the_page_loads_and_fits(browser: Browser, page: Path, width: int, dark: bool, tmp_path: Path):
    browser.show(page, width=width, dark=dark)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('script, img, b').length") == 0
    background, ink = browser.value(
        "[document.body, document.querySelector('svg text')].map(e => getComputedStyle(e))"
        ".map((s, i) => i ? s.fill : s.backgroundColor)"
    )
    assert (background, ink) == (
        ("rgb(20, 23, 27)", "rgb(232, 234, 237)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
    )
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_every_chart_shows_its_marks(browser: Browser, page: Path):
    browser.show(page)
    boxes = """[...document.querySelectorAll('[id^="%s-%s-mark-"]')]
        .map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height])"""
    for name in LINES:
        marks = browser.value(boxes % (name, name))
        assert len(marks) == len(MODES), name
        assert all(width > 100 and height > 2 for _, _, width, height in marks), name
    assert len(browser.value(boxes % ("perplexity_memory", "perplexity_memory"))) == len(MODES)
    bars = browser.value(boxes % ("memory", "memory"))
    assert len(bars) == 6 * len(MODES)
    assert all(width > 3 and height > 5 for _, _, width, height in bars)


def test_what_is_black_on_a_light_page_has_the_colour_of_the_text_on_a_dark_one(browser: Browser, page: Path):
    colours = """['#loss_tokens-loss_tokens-mark-%d path',
        '#loss_tokens-patch_3 path', '#memory-memory-mark-0-temporaries_bytes path']
        .map(s => document.querySelector(s)).map(e => [getComputedStyle(e).stroke, getComputedStyle(e).fill])"""
    browser.show(page, dark=True)
    full, spine, temporaries = browser.value(colours % sorted(MODES).index("full"))
    assert "rgb(232, 234, 237)" in full
    assert "rgb(232, 234, 237)" in spine
    assert "rgb(232, 234, 237)" in temporaries


def test_texts_on_a_phone_are_large_enough_to_read(browser: Browser, page: Path):
    browser.show(page, width=390)
    sizes = browser.value("""[...document.querySelectorAll('svg text')].map(e => [e.getScreenCTM(), e])
        .map(([m, e]) => Math.hypot(m.a, m.b) * parseFloat(getComputedStyle(e).fontSize))""")
    assert len(sizes) > 100
    assert min(sizes) >= 7.5
