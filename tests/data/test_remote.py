"""Reading through servers that break off, count wrongly, and know no ranges."""

import gzip
import http.client
import io
import json
import logging
import os
import urllib.error

import pyarrow
import pyarrow.parquet
import pytest
from fileserver import serve

from velora_pretrain.data import remote
from velora_pretrain.data.source import read_records
from velora_pretrain.errors import UserError

TEXTS = [f"document {n} " + os.urandom(40).hex() for n in range(20_000)]
RAW = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACKED = gzip.compress(RAW, 1)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_DELAYS_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def texts_of(shard: str) -> list[str | None]:
    return [record.text for record in read_records(shard, wanted=lambda _: True)]


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("name", ["/a.jsonl", "/a.jsonl.gz"])
def test_a_url_reads_as_the_file_does(name, framing):
    with serve(files={"/a.jsonl": RAW, "/a.jsonl.gz": PACKED}, framing=framing) as server:
        assert texts_of(f"{server.url}{name}?download=true") == TEXTS
        assert len(server.requests) == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["/a.jsonl", "/a.jsonl.gz"])
def test_broken_connections_lose_and_double_nothing(name, ranges, framing, caplog):
    files = {"/a.jsonl": RAW, "/a.jsonl.gz": PACKED}
    size = len(files[name])
    with serve(files=files, ranges=ranges, framing=framing) as server, caplog.at_level(logging.WARNING):
        server.cuts = [0, size // 5, 1, size // 2, size // 2 + 777] if not ranges else [0, size // 5, 1, 70_001]
        count = len(server.cuts)
        assert texts_of(server.url + name) == TEXTS
        assert len(server.requests) > count - 1
    assert len([record for record in caplog.records if "trying again from byte" in record.message]) >= count - 1


def test_a_short_body_is_never_the_end_of_the_file():
    with serve(files={"/a.jsonl": RAW}, cuts=[len(RAW) // 2] + [0] * 20) as server:
        given = []
        with pytest.raises(ConnectionError, match=rf"reading failed 4 times at byte {len(RAW) // 2}") as caught:
            given.extend(record.text for record in read_records(f"{server.url}/a.jsonl", wanted=lambda _: True))
        assert server.url in str(caught.value) and f"of {len(RAW)}" in str(caught.value)
        assert not isinstance(caught.value, UserError)


def test_a_cut_before_the_last_line_s_end_is_noticed_where_no_line_is_broken():
    end_of_a_line = RAW.index(b"\n", len(RAW) // 2) + 1
    with serve(files={"/a.jsonl": RAW}, cuts=[end_of_a_line]) as server:
        assert texts_of(f"{server.url}/a.jsonl") == TEXTS
        assert server.requests[1][1]["Range"] == f"bytes={end_of_a_line}-"


def test_a_server_that_says_no_length_is_refused():
    with (
        serve(files={"/a.jsonl": RAW}, framing="close") as server,
        pytest.raises(UserError, match="does not say how long"),
    ):
        texts_of(f"{server.url}/a.jsonl")


def test_a_file_that_changes_meanwhile_is_refused():
    with (
        serve(files={"/a.jsonl": RAW}, cuts=[1000], etags=['"one"', '"two"']) as server,
        pytest.raises(UserError, match="changed on the server"),
    ):
        texts_of(f"{server.url}/a.jsonl")


def test_server_errors_are_tried_again_and_refusals_are_not():
    with serve(files={"/a.jsonl": RAW}) as server:
        server.statuses = [503, 429, 500]
        assert texts_of(f"{server.url}/a.jsonl") == TEXTS
        for status, message in ((404, "no such file"), (403, "refuses it")):
            server.statuses, server.requests = [status], []
            with pytest.raises(UserError, match=rf"a\.jsonl: .*{message} \(HTTP {status}\)"):
                texts_of(f"{server.url}/a.jsonl")
            assert len(server.requests) == 1
        server.statuses = [503] * 10
        with pytest.raises(ConnectionError, match="reading failed 4 times at byte 0: HTTP Error 503"):
            texts_of(f"{server.url}/a.jsonl")
    with pytest.raises(ConnectionError, match="reading failed 4 times"):
        texts_of(f"{server.url}/a.jsonl")


def test_an_empty_file_is_refused():
    with serve(files={"/a.jsonl": b""}) as server, pytest.raises(UserError, match="the file is empty"):
        texts_of(f"{server.url}/a.jsonl")


def test_remote_parquet_through_a_broken_connection():
    stored = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), stored)
    with serve(files={"/a.parquet": stored.getvalue()}, cuts=[100_000]) as server:
        assert texts_of(f"{server.url}/a.parquet") == TEXTS


def test_hub_files_follow_the_endpoint_and_keep_the_token_to_it(monkeypatch):
    path = "/datasets/allenai/c4/resolve/main/en/c4%20x.json.gz"
    with serve(files={"/signed": PACKED}) as store, serve(redirects={path: f"{store.url}/signed"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        store.cuts = [50_000]
        assert texts_of("hf://datasets/allenai/c4/en/c4 x.json.gz") == TEXTS
        assert [request[0] for request in hub.requests] == [path, path]
        assert all(request[1]["Authorization"] == "Bearer hf_secret" for request in hub.requests)
        assert len(store.requests) == 2
        assert not any("Authorization" in request[1] for request in store.requests)


def test_hub_addresses(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert (
        remote.web_address("hf://datasets/a/b@refs/x.json") == "https://huggingface.co/datasets/a/b/resolve/refs/x.json"
    )
    assert remote.web_address("http://h/a b") == "http://h/a b"
    for wrong in ("hf://datasets/a/b", "hf://a/b/c.json", "hf://datasets/a//c.json"):
        with pytest.raises(UserError, match="not of the form hf://datasets/OWNER/NAME/FILE"):
            remote.web_address(wrong)


def test_the_exceptions_that_are_tried_again_cover_the_library_s():
    assert issubclass(urllib.error.URLError, OSError) and issubclass(TimeoutError, OSError)
    assert issubclass(http.client.IncompleteRead, http.client.HTTPException)
