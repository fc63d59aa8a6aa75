"""The wheel: it holds what the tool needs, and trains from outside the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what an installed wheel brings."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder / "dist"), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "velora_pretrain", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=300,
    )


def test_every_file_of_the_package_and_every_recipe_is_in_it(installed: Path):
    sources = subprocess.run(
        ["git", "ls-files", "velora_pretrain", "recipes"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not sources:
        pytest.skip("not a git checkout")
    expected = {name.replace("recipes/", "velora_pretrain/bundled_recipes/", 1) for name in sources}
    held = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert expected <= held
    assert not {name for name in held if name.startswith(("tests", "tools", "recipes"))}


def test_it_trains_by_a_recipes_name_outside_the_source_tree(installed: Path, tmp_path: Path):
    settings = ["--steps", "1", "--batch-size", "1", "--sequence-length", "16", "--run-dir", "run", "--data", "sample"]
    small = ["--tokenizer", "bundled", "--set", "evaluation.tokens=100", "--set", "model.num_hidden_layers=1"]
    done = run(installed, "train", "--recipe", "llama_60m", *settings, *small, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/summary.json").exists()


def test_a_report_has_its_style(installed: Path, tmp_path: Path):
    import run_folders

    run_folders.write(tmp_path / "run", mode="full")
    done = run(installed, "report", "run", "--output", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prefers-color-scheme" in next((tmp_path / "out").glob("*.html")).read_text()
