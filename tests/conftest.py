"""Shared set-up: shapes and types are checked while testing, and real data is found or its tests are skipped."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parent))  # for tests/runs.py

import runs

try:
    from jaxtyping import install_import_hook
except ImportError:  # the package itself needs jaxtyping: let its own import say so
    install_import_hook = None

# Annotations are compiled in when a module is imported, so a module imported earlier would go unchecked.
if install_import_hook is not None:
    early = [name for name in sys.modules if name.split(".")[0] == "velora_pretrain"]
    assert not early, f"imported before the type checking was installed: {early}"
    install_import_hook("velora_pretrain", "beartype.beartype")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text and T5's tokenizer: $VELORA_TEST_DATA, or shared/data beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("VELORA_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip("no test data; set VELORA_TEST_DATA to a folder that holds c4/, openwebtext/ and tokenizers/")
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short documents with a grammar."""
    return runs.write_documents(tmp_path_factory.mktemp("data") / "tiny.jsonl", 300)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A SentencePiece model of 120 pieces."""
    return runs.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_data)


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_data: Path, tiny_tokenizer: Path) -> Callable[..., Path]:
    """Writes a recipe of a small run, with dotted keys changed (`__` for the dots); gives its path."""

    def write(**changes: Any) -> Path:
        path = tmp_path / f"recipe-{len(list(tmp_path.glob('recipe-*')))}.toml"
        path.write_text(tomli_w.dumps(runs.values(tiny_data, tiny_tokenizer, **changes)))
        return path

    return write


@pytest.fixture
def tiny_run(tiny_data: Path, tiny_tokenizer: Path) -> Callable[..., Any]:
    """A small run's configuration, with dotted keys changed (`__` for the dots)."""

    def build(**changes: Any) -> Any:
        from velora_pretrain.recipe import build_run

        return build_run(runs.values(tiny_data, tiny_tokenizer, **changes), where="test")

    return build
