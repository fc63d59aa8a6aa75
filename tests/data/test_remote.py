"""Reading through servers that break off, count wrongly, and know no ranges."""

import errno
import gzip
import http.client
import io
import json
import logging
import os
import shutil
import socket
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
PATIENCE_SECONDS = remote.RETRY_DELAYS_SECONDS
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
        # One for the file, one that confirms its end.
        assert len(server.requests) == 2


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
        assert server.requests[1][1]["Range"] == f"bytes={end_of_a_line - remote.OVERLAP_BYTES}-"


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


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """The delays that were waited for, as they would be, in no time."""
    seconds: list[float] = []
    monkeypatch.setattr(remote, "RETRY_DELAYS_SECONDS", (0.5, 1.0, 2.0, 4.0, 8.0))
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    return seconds


def test_a_wait_that_the_server_asks_for_is_honoured_within_bounds(slept, monkeypatch):
    monkeypatch.setattr(remote, "MAX_RETRY_AFTER_SECONDS", 100.0)
    for asked, waited in (("7", 7.0), ("0", 0.5), ("86400", 100.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.5)):
        with serve(files={"/a.jsonl": RAW}, statuses=[429], headers={"Retry-After": asked}) as server:
            assert texts_of(f"{server.url}/a.jsonl") == TEXTS
        assert slept == [waited]
        slept.clear()


def test_delays_grow_and_begin_anew_with_what_arrives(slept):
    with serve(files={"/a.jsonl": RAW}, cuts=[1000, 1000, 0, 0, 0, 1000]) as server:
        assert texts_of(f"{server.url}/a.jsonl") == TEXTS
    assert slept == [0.5, 0.5, 1.0, 2.0, 4.0, 0.5]


def test_patience_lasts_for_minutes_and_a_first_contact_for_seconds():
    assert 180 < sum(PATIENCE_SECONDS) < 900
    assert sum(PATIENCE_SECONDS[: remote.FIRST_CONTACT_RETRIES]) < 5


def test_a_name_that_never_answered_is_given_up_soon_and_one_that_did_is_not(slept, monkeypatch):
    resolve, faults = socket.getaddrinfo, []

    def fails(*arguments, **options):
        if faults:
            raise faults.pop()
        return resolve(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with serve(files={"/a.jsonl": RAW}) as server:
        faults.extend([unknown] * 9)
        with pytest.raises(ConnectionError, match=r"reading failed 4 times at byte 0: .*Name or service not known"):
            texts_of(f"{server.url}/a.jsonl")
        assert slept == [0.5, 1.0, 2.0]
        faults.clear()
        assert texts_of(f"{server.url}/a.jsonl") == TEXTS
        # Also for another file of that server, and where the first answer was an error.
        slept.clear()
        faults.extend([unknown] * 5)
        assert texts_of(f"{server.url}/a.jsonl?again") == TEXTS
        assert slept == [0.5, 1.0, 2.0, 4.0, 8.0]
    with serve(files={"/a.jsonl": RAW}, statuses=[503] * 5) as server:
        assert texts_of(f"{server.url}/a.jsonl") == TEXTS


@pytest.mark.parametrize("excess", [1000, -1000])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etags", [['"one"'] * 9, []])
def test_a_false_length_is_corrected_where_the_server_names_the_version(excess, ranges, etags):
    """And refused where it does not: the file may as well have changed."""
    for excesses in ([excess], [0, excess]):
        cuts = [5000] if excesses[0] == 0 else []
        with serve(files={"/a.jsonl": RAW}, ranges=ranges, excesses=excesses, cuts=cuts, etags=[*etags]) as server:
            if etags:
                assert texts_of(f"{server.url}/a.jsonl") == TEXTS
            else:
                with pytest.raises(UserError, match="changed on the server"):
                    texts_of(f"{server.url}/a.jsonl")


@pytest.mark.parametrize("ranges", [True, False])
def test_other_bytes_of_the_same_length_are_never_joined_to_those_before(ranges):
    with serve(files={"/a.jsonl": RAW}, ranges=ranges, cuts=[5000]) as server:
        records = read_records(f"{server.url}/a.jsonl", wanted=lambda _: True)
        given = [next(records).text]
        server.files["/a.jsonl"] = b"x" * len(RAW)
        with pytest.raises(ConnectionError, match="has other bytes before byte 5000 than were read there"):
            given.extend(record.text for record in records)
        assert given == TEXTS[: len(given)]


def test_a_web_page_in_place_of_the_file_is_told():
    page = b"\n<html>Please sign in.</html>"
    with serve(files={"/a.json.gz": page, "/b.jsonl": RAW}, content_type="text/html; charset=utf-8") as server:
        with pytest.raises(ConnectionError, match="sends a web page in place of the file"):
            texts_of(f"{server.url}/a.json.gz")
        # The type alone proves nothing.
        assert texts_of(f"{server.url}/b.jsonl") == TEXTS


def test_an_empty_file_is_refused():
    with serve(files={"/a.jsonl": b""}) as server, pytest.raises(UserError, match="the file is empty"):
        texts_of(f"{server.url}/a.jsonl")


def test_remote_parquet_through_a_broken_connection():
    stored = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), stored)
    with serve(files={"/a.parquet": stored.getvalue()}, cuts=[100_000]) as server:
        assert texts_of(f"{server.url}/a.parquet") == TEXTS


def test_remote_parquet_without_room_for_its_copy_is_told(monkeypatch):
    def is_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", is_full)
    with (
        serve(files={"/a.parquet": RAW}) as server,
        pytest.raises(UserError, match=r"/a\.parquet: no room for a copy in /.*; let TMPDIR name a larger folder"),
    ):
        texts_of(f"{server.url}/a.parquet")


def test_hub_files_follow_the_endpoint_and_keep_the_token_to_it(monkeypatch):
    path = "/datasets/allenai/c4/resolve/main/en/c4%20x.json.gz"
    with serve(files={"/signed": PACKED}) as store, serve(redirects={path: f"{store.url}/signed"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        store.cuts = [50_000]
        assert texts_of("hf://datasets/allenai/c4/en/c4 x.json.gz") == TEXTS
        assert [request[0] for request in hub.requests] == [path, path, path]
        assert all(request[1]["Authorization"] == "Bearer hf_secret" for request in hub.requests)
        assert len(store.requests) == 3
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
