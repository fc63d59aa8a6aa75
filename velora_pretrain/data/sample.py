"""The `sample` data set: English prose that every Python installation already holds, for runs without a network.

    pydoc's topics + the standard library's docstrings -> paragraphs -> documents of a few KB -> one JSON-lines file

Docstrings are found by parsing the sources, never by importing them. One Python version gives one file, byte for byte;
another version gives another, so its hash belongs to the run's records. It is for trying the tool and for tests: a
perplexity on it compares with nothing published.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import platformdirs

from velora_pretrain.errors import UserError

# A change of what a document holds needs a new number, so that no old file is taken for a new one.
FORMAT_VERSION = 1
CACHE_VARIABLE = "VELORA_PRETRAIN_CACHE"
MIN_DOCUMENT_CHARACTERS = 200
MAX_DOCUMENT_CHARACTERS = 4000
# A library stripped of its sources or docstrings leaves some thousand bytes of remains; that is no data set.
MIN_SAMPLE_BYTES = 500_000

# Tests, generated code, bundled wheels, and what differs between builds of one version.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "lib-dynload", "pydoc_data", "_bundled"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "__phello__")


def sample_file(cache_dir: Path | None = None) -> Path:
    """Return the sample's file, built first if it is not there whole.

    Args:
        cache_dir: the folder that holds it; by default `$VELORA_PRETRAIN_CACHE`, else the user's cache folder.

    Returns:
        A JSON-lines file whose records hold `text` and `source`; beside it `<name>.sha256` records its hash.

    Raises:
        UserError: this Python has no standard-library sources, or the cache cannot be written.
    """
    folder = cache_dir or Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("velora-pretrain"))
    name = f"python-docs-{platform.python_implementation().lower()}-{platform.python_version()}-v{FORMAT_VERSION}.jsonl"
    path = folder / name
    if _is_whole(path):
        return path
    content = _build()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes may do this at once: both write the same bytes, and each file appears whole.
        _write(path, content)
        _write(_hash_file(path), hashlib.sha256(content).hexdigest().encode())
    except OSError as error:
        raise UserError(
            f"data: cannot write the sample to {folder} ({error.strerror}); set {CACHE_VARIABLE}"
        ) from error
    return path


def sample_sha256(path: Path) -> str:
    """Return the SHA-256 of a sample file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return _hash_file(path).read_text(encoding="ascii") == sample_sha256(path)
    except (OSError, ValueError):
        return False


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.close()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _build() -> bytes:
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    lines: list[str] = []
    for source, texts in [*_topics(), *_docstrings(library)]:
        for document in _documents(texts, seen):
            lines.append(json.dumps({"text": document, "source": source}, ensure_ascii=False) + "\n")
    content = "".join(lines).encode("utf-8", "replace")
    if len(content) < MIN_SAMPLE_BYTES:
        raise UserError(f"data: this Python has no standard-library sources at {library} to sample; give --data PATH")
    return content


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"pydoc/{name}", [topics[name].strip()]


def _docstrings(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (module file, its docstrings in source order) over the library, sorted by name."""
    for path in sorted(_sources(library), key=lambda path: path.relative_to(library).parts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a source's invalid escapes are not the user's concern
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        texts = [inspect.cleandoc(text) for node in nodes if (text := ast.get_docstring(node, clean=False))]
        if texts:
            yield path.relative_to(library).as_posix(), texts


def _sources(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.name in _SKIPPED_FOLDERS or entry.name.startswith(_SKIPPED_PREFIXES):
            continue
        if entry.is_dir():
            yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _documents(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Join paragraphs into documents of at most `MAX_DOCUMENT_CHARACTERS`, leaving out every paragraph in `seen`."""
    document = ""
    for text in texts:
        for paragraph in text.split("\n\n"):
            paragraph = _unwrap(paragraph.rstrip())
            if not paragraph or paragraph in seen:
                continue
            seen.add(paragraph)
            if document and len(document) + len(paragraph) + 2 > MAX_DOCUMENT_CHARACTERS:
                if len(document) >= MIN_DOCUMENT_CHARACTERS:
                    yield document
                document = ""
            document += "\n\n" + paragraph if document else paragraph
    if len(document) >= MIN_DOCUMENT_CHARACTERS:
        yield document


def _unwrap(paragraph: str) -> str:
    """Return a paragraph of plain prose as one line, as web text has it; anything set out in lines as it is."""
    lines = paragraph.split("\n")
    wrapped = all(line[:1].isalnum() or line[:1] in "\"'(`*" for line in lines)
    filled = all(len(line) > 45 for line in lines[:-1])
    return " ".join(lines) if wrapped and filled else paragraph.strip("\n")
