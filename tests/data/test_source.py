"""Every kind of file that a user may give, whole and broken."""

import gzip
import json
import sys
import tracemalloc
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from velora_pretrain.data import source
from velora_pretrain.data.source import place, read_records
from velora_pretrain.errors import UserError

# Everything that str.splitlines, or a reader with universal newlines, would take for the end of a line.
ODD = "a\u2028b\u2029c\x85d\x1ce\x1df\x1eg"
TEXTS = ["one", f"two {ODD}", "three \r\n\x0b\x0c\t four", "día 日本 🎉", "five"]


def lines(texts, **options) -> bytes:
    return b"".join(json.dumps({"text": text, "url": "u"}, **options).encode() + b"\n" for text in texts)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def everything(_: int) -> bool:
    return True


def read(shard: str, skip_records: int = 0, wanted=everything):
    return list(read_records(shard, skip_records=skip_records, wanted=wanted))


def texts_of(shard: str, **options):
    return [record.text for record in read(shard, **options)]


def fault_of(shard: str) -> str:
    with pytest.raises(UserError) as caught:
        read(shard)
    message = str(caught.value)
    assert shard in message and "\n" not in message
    return message


def parquet(path: Path, columns: dict, **options) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", bytes),
        ("a.jsonl", bytes),
        ("a.JSONL", bytes),
        ("a.json.gz", gzip.compress),
        ("a.jsonl.gz", lambda raw: gzip.compress(raw[:40]) + gzip.compress(raw[40:])),
        ("a.json.zst", zstandard.compress),
        ("a.jsonl.zst", lambda raw: zstandard.compress(raw[:40]) + zstandard.compress(raw[40:])),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_each_format_gives_the_texts_exactly(tmp_path, name, pack, ascii_only):
    shard = write(tmp_path / name, pack(lines(TEXTS, ensure_ascii=ascii_only)))
    assert texts_of(shard) == TEXTS
    assert [record.number for record in read(shard, skip_records=2)] == [2, 3, 4]
    assert texts_of(shard, wanted=lambda number: number % 2 == 1) == TEXTS[1::2]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet(tmp_path, kind):
    many = [f"{n} {ODD}" for n in range(600)]
    shard = parquet(tmp_path / "a.parquet", {"n": range(600), "text": pyarrow.array(many, kind)}, row_group_size=100)
    assert texts_of(shard) == many
    assert texts_of(shard, skip_records=299) == many[299:]
    assert texts_of(shard, wanted=lambda number: number == 511) == [many[511]]
    assert place(shard, 0).endswith("a.parquet row 1")


def test_parquet_of_categories(tmp_path):
    shard = parquet(tmp_path / "a.parquet", {"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
    assert texts_of(shard) == ["x", "y", "x"]


def test_bad_parquet_rows_are_named(tmp_path):
    stored = pyarrow.array([b"good", b"\xff\xfe", None, b"last"], pyarrow.binary()).view(pyarrow.string())
    shard = parquet(tmp_path / "a.parquet", {"text": stored})
    records = read(shard)
    assert [record.text for record in records] == ["good", None, None, "last"]
    assert "UTF-8" in records[1].fault and "null" in records[2].fault


def test_bad_parquet_files(tmp_path):
    good = Path(parquet(tmp_path / "good.parquet", {"text": ["x"] * 100}))
    assert "columns found: title, body" in fault_of(parquet(tmp_path / "a.parquet", {"title": ["x"], "body": ["y"]}))
    assert "int64, not strings" in fault_of(parquet(tmp_path / "b.parquet", {"text": [1, 2]}))
    assert "no documents" in fault_of(parquet(tmp_path / "c.parquet", {"text": pyarrow.array([], pyarrow.string())}))
    for content in (b"", b"not parquet", good.read_bytes()[:-20]):
        assert "not a readable parquet file" in fault_of(write(tmp_path / "d.parquet", content))


def test_windows_line_ends_byte_order_mark_blank_lines_and_no_last_newline(tmp_path):
    raw = b"\xef\xbb\xbf" + lines(["a", "b"]).replace(b"\n", b"\r\n") + b"\r\n  \n" + lines(["c"])[:-1]
    records = read(write(tmp_path / "a.jsonl", raw))
    assert [(record.number, record.text) for record in records] == [(0, "a"), (1, "b"), (4, "c")]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "cut', "not valid JSON (Unterminated string"),
        (b'{"text": "raw \x01 control"}', "not valid JSON"),
        (b'{"text": "half \\ud83d pair"}', "surrogate"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": null}', '"text" is null'),
        (b'{"text": 7}', '"text" is not a string'),
        (b'{"body": "x"}', 'no "text"'),
        (b'"text"', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "not valid JSON"),
    ],
)
def test_a_bad_record_is_given_with_its_line_and_fault(tmp_path, line, fault):
    shard = write(tmp_path / "a.jsonl", lines(["a"]) + line + b"\n" + lines(["b"]))
    good, bad, last = read(shard)
    assert (good.text, good.fault, last.text, last.number) == ("a", None, "b", 2)
    assert bad.text is None and fault in bad.fault and "\n" not in bad.fault
    assert place(shard, bad.number) == f"{shard} line 2"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "holds no documents"),
        (b"\n\n", "holds no documents"),
        (b'{"title": "x", "body": "y"}\n', "columns found: title, body"),
        (b"{}\n", "columns found: none"),
        (b'[\n{"text": "x"}\n]\n', "one JSON array or object over many lines"),
        (b'[{"text": "x"}]', "one JSON array or object over many lines"),
        (b'{\n"text": "x"\n}\n', "one JSON array or object over many lines"),
    ],
)
def test_a_file_of_another_kind_is_refused_whatever_is_allowed(tmp_path, content, fault):
    assert fault in fault_of(write(tmp_path / "a.json", content))


def test_an_ending_that_nothing_reads(tmp_path):
    message = fault_of(write(tmp_path / "a.txt", b"x"))
    assert "cannot tell its format" in message and ".jsonl.zst" in message
    assert "cannot be opened (No such file" in fault_of(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    assert "cannot be opened (Is a directory)" in fault_of(str(tmp_path / "folder.jsonl"))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_compressed_data_that_is_cut_short_never_passes_for_whole(tmp_path, compress, kept):
    whole = compress(lines([f"{n} {zlib.crc32(str(n).encode())}" for n in range(5000)]))
    name = "a.json.gz" if compress is gzip.compress else "a.json.zst"
    assert "stops in the middle" in fault_of(write(tmp_path / name, whole[: int(len(whole) * kept)]))


@pytest.mark.parametrize("name", ["a.json.gz", "a.json.zst"])
def test_data_that_is_not_what_its_name_says(tmp_path, name):
    assert "not valid .json" in fault_of(write(tmp_path / name, lines(["a"] * 100)))
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    damaged = bytearray(compress(lines([str(n) for n in range(5000)])))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 50] = bytes(50)
    if name.endswith("gz"):  # zstandard writes no checksum unless asked to
        assert "fetch it again" in fault_of(write(tmp_path / name, bytes(damaged)))


def test_zst_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    shard = write(tmp_path / "a.json.zst", b"")
    with pytest.raises(UserError, match=r'pip install "velora-pretrain\[zstd\]"'):
        read(shard)


def test_a_document_of_50_megabytes(tmp_path):
    big = "word " * 10_000_000
    shard = write(tmp_path / "a.json.gz", gzip.compress(lines(["a", big, "b"]), 1))
    tracemalloc.start()
    assert [len(text) for text in texts_of(shard) if text] == [1, 50_000_000, 1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 6 * len(big)


def test_a_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 1000)
    assert "line 2: longer than 1000 bytes" in fault_of(write(tmp_path / "a.json", lines(["a", "b" * 2000])))
