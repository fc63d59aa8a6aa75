import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs
import sentencepiece

from velora_pretrain.data.tokenizer import BUNDLED_FILE, Tokenizer, check_vocabulary, load_tokenizer
from velora_pretrain.data.tokenizer_proto import read_model, round_scores, strip_provenance
from velora_pretrain.errors import UserError

TEXTS = ["Plain English prose, with a comma.", " leading space", *runs.TRICKY_TEXTS, "x" * 300]


@pytest.fixture(scope="module")
def bundled() -> Tokenizer:
    return load_tokenizer("bundled")


@pytest.fixture(scope="module")
def t5(shared_data: Path) -> Tokenizer:
    return load_tokenizer(str(shared_data / "tokenizers" / "t5_spiece.model"))


@pytest.fixture(scope="module")
def c4_texts(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "c4" / "c4-validation.sample.json.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_small(**options: object) -> bytes:
    """A model of some hundred pieces, trained on this file."""
    buffer = io.BytesIO()
    lines = Path(__file__).read_text(encoding="utf-8").split("\n")
    options = {"vocab_size": 600, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1} | options
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(lines), model_writer=buffer, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def nfkc_model() -> bytes:
    """As T5's: unigram, NFKC, spaces collapsed, no bytes to fall back on."""
    return train_small(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    """As LLaMA-2's: BPE, unk 0, bos 1, eos 2, no padding piece, bytes to fall back on, spaces kept."""
    return train_small(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


# --- the bundled model -------------------------------------------------------------------------------------------


def test_bundled_has_t5s_special_ids(bundled: Tokenizer) -> None:
    assert (bundled.vocab_size, bundled.pad_id, bundled.eos_id, bundled.unk_id) == (32_000, 0, 1, 2)
    assert bundled.has_pad
    assert bundled.sha256 == hashlib.sha256(BUNDLED_FILE.read_bytes()).hexdigest()
    assert BUNDLED_FILE.stat().st_size < 2**20


@pytest.mark.parametrize("text", TEXTS)
def test_bundled_gives_every_text_back(bundled: Tokenizer, text: str) -> None:
    (ids,) = bundled.encode([text])
    assert bundled.decode(ids) == text
    assert not {bundled.pad_id, bundled.eos_id, bundled.unk_id} & set(ids)


def test_bundled_holds_pieces_and_nothing_else() -> None:
    data = BUNDLED_FILE.read_bytes()
    assert strip_provenance(data) == data
    assert max(len(piece) for piece, _, _ in read_model(data).pieces) <= 16
    # Scores that float32 adds without rounding.
    assert round_scores(data, 2.0**-6) == data


def test_bundled_compresses_like_t5(bundled: Tokenizer, t5: Tokenizer, c4_texts: list[str]) -> None:
    # T5's drops newlines and repeated spaces, and has no byte pieces; 3 % more tokens is the most they may cost.
    ours, theirs = (sum(map(len, tokenizer.encode(c4_texts))) for tokenizer in (bundled, t5))
    assert ours < 1.03 * theirs
    assert [bundled.decode(ids) for ids in bundled.encode(c4_texts)] == c4_texts


def test_training_again_gives_the_same_bytes_and_no_paths(tmp_path: Path) -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    data = tmp_path / "somewhere.jsonl"
    data.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import train_tokenizer as tool\n"
        "sys.stdout.buffer.write(tool.train([pathlib.Path(sys.argv[2])], 500))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(root / "tools"), str(data)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    first, second = (subprocess.run(command, env=environment, capture_output=True, check=True).stdout for _ in range(2))
    assert first == second
    assert b"somewhere" not in first
    assert len(read_model(first).pieces) == 500


def test_strip_provenance_keeps_the_segmentation(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus), model_prefix=str(tmp_path / "m"), vocab_size=500, minloglevel=2
    )
    data = (tmp_path / "m.model").read_bytes()
    assert str(tmp_path).encode() in data
    stripped = strip_provenance(data)
    assert str(tmp_path).encode() not in stripped
    assert Tokenizer(stripped, "stripped").encode(TEXTS) == Tokenizer(data, "whole").encode(TEXTS)


# --- bytes per token ---------------------------------------------------------------------------------------------


def assert_bytes_add_up(tokenizer: Tokenizer, texts: list[str]) -> None:
    encoded = tokenizer.encode_with_bytes(texts)
    assert [ids for ids, _ in encoded] == tokenizer.encode(texts)
    for text, (ids, counts_bytes) in zip(texts, encoded, strict=True):
        assert len(ids) == len(counts_bytes)
        assert min(counts_bytes, default=0) >= 0
        assert sum(counts_bytes) == (len(text.encode()) if ids else 0), text


def test_bytes_add_up_with_the_bundled_model(bundled: Tokenizer) -> None:
    assert_bytes_add_up(bundled, TEXTS)


def test_bytes_add_up_when_the_normaliser_rewrites(nfkc_model: bytes) -> None:
    assert_bytes_add_up(Tokenizer(nfkc_model, "nfkc"), TEXTS)


def test_bytes_add_up_with_bpe(llama_model: bytes) -> None:
    assert_bytes_add_up(Tokenizer(llama_model, "llama"), TEXTS)


def test_bytes_add_up_on_real_text(t5: Tokenizer, bundled: Tokenizer, c4_texts: list[str]) -> None:
    assert_bytes_add_up(t5, TEXTS + c4_texts[:100])
    assert_bytes_add_up(bundled, c4_texts[:100])


def test_each_token_counts_the_bytes_it_spells(bundled: Tokenizer) -> None:
    # Identity normalisation: a token's bytes are its own text's, the space in front of all excepted.
    text = "é 漢😀\nand then ½"
    ((ids, counts_bytes),) = bundled.encode_with_bytes([text])
    all_pieces = read_model(BUNDLED_FILE.read_bytes()).pieces
    pieces = [all_pieces[index][0] for index in ids]
    spelled = [1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode()) for piece in pieces]
    spelled[0] -= 1
    assert counts_bytes == spelled


def test_dropped_bytes_go_to_a_neighbour(nfkc_model: bytes) -> None:
    ((ids, counts_bytes),) = Tokenizer(nfkc_model, "nfkc").encode_with_bytes(["  a  \n\n"])
    assert len(ids) >= 1
    assert sum(counts_bytes) == 7


def test_lone_surrogates_are_read_as_the_replacement_character(bundled: Tokenizer) -> None:
    (ids,) = bundled.encode(["a\ud800b"])
    assert bundled.decode(ids) == "a\ufffdb"
    ((same_ids, counts_bytes),) = bundled.encode_with_bytes(["a\ud800b"])
    assert same_ids == ids
    assert sum(counts_bytes) == len("a\ufffdb".encode())


def test_decode_skips_ids_beyond_the_vocabulary(bundled: Tokenizer) -> None:
    (ids,) = bundled.encode(["some words"])
    assert bundled.decode([bundled.pad_id, *ids, bundled.eos_id, 32_050, -1]) == "some words"


# --- finding and refusing ----------------------------------------------------------------------------------------


def test_a_model_without_padding_pads_with_its_end(llama_model: bytes) -> None:
    tokenizer = Tokenizer(llama_model, "llama")
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 2)
    assert not tokenizer.has_pad


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
def test_loads_a_file_and_a_folder(tmp_path: Path, name: str, bundled: Tokenizer) -> None:
    (tmp_path / name).write_bytes(BUNDLED_FILE.read_bytes())
    for given in (tmp_path, tmp_path / name):
        tokenizer = load_tokenizer(str(given))
        assert tokenizer.sha256 == bundled.sha256
        assert tokenizer.name == str(given)


@pytest.mark.parametrize(
    "data",
    [b"", b"not a model at all" * 9, b"\0" * 50, BUNDLED_FILE.read_bytes()[:300_000], BUNDLED_FILE.read_bytes()[:-150]],
    ids=["empty", "text", "zeros", "half", "end cut"],
)
def test_a_damaged_file_is_the_users_to_mend(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.model") as caught:
        load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_cut_between_pieces_is_damaged(nfkc_model: bytes, tmp_path: Path) -> None:
    # Protobuf takes any whole number of fields for a message, and SentencePiece loads it.
    texts = [piece.encode() for piece, _, _ in read_model(nfkc_model).pieces]
    last_kept = texts[-2]
    cut = nfkc_model.index(bytes([len(last_kept)]) + last_kept + b"\x15") + 1 + len(last_kept) + 5
    path = tmp_path / "cut.model"
    path.write_bytes(nfkc_model[:cut])
    assert sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(nfkc_model[:cut])
    with pytest.raises(UserError, match="specs is missing"):
        load_tokenizer(str(path))


def test_a_model_without_an_end_is_refused() -> None:
    data = train_small(eos_id=-1)
    with pytest.raises(UserError, match="eos_id"):
        Tokenizer(data, "endless")


@pytest.mark.parametrize("name", ["missing.model", "./t5-base", "a/b/c", "two words", "", "."])
def test_a_missing_path_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bundled|holds no"):
        load_tokenizer(name)


def test_check_vocabulary(bundled: Tokenizer) -> None:
    check_vocabulary(bundled, 32_000)
    check_vocabulary(bundled, 32_128)
    with pytest.raises(UserError, match=r"^tokenizer: .*32000.*model\.vocab_size.*31999"):
        check_vocabulary(bundled, 31_999)


# --- the hub -----------------------------------------------------------------------------------------------------


def load_from_hub(name: str, cache: Path, **environment: str) -> tuple[str, float]:
    """What `load_tokenizer` says in a process of its own (the hub client reads its settings at import), and seconds."""
    script = (
        "import sys; from velora_pretrain.data.tokenizer import load_tokenizer\n"
        "from velora_pretrain.errors import UserError\n"
        "try: print('sha256', load_tokenizer(sys.argv[1]).sha256)\n"
        "except UserError as error: print(error)"
    )
    unset = {"HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"}
    inherited = {key: value for key, value in os.environ.items() if key not in unset}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, name],
        env=inherited | {"HF_HOME": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), time.monotonic() - start


def test_a_cached_copy_works_offline(tmp_path: Path, bundled: Tokenizer) -> None:
    repository = tmp_path / "hub" / "models--someone--something"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "tokenizer.model").write_bytes(BUNDLED_FILE.read_bytes())
    said, _ = load_from_hub("someone/something", tmp_path, HF_HUB_OFFLINE="1")
    assert said == f"sha256 {bundled.sha256}"


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_an_unreachable_hub_is_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    said, seconds = load_from_hub("t5-base", tmp_path, **environment)
    assert said.startswith("tokenizer: t5-base")
    assert "--tokenizer bundled" in said
    assert "--tokenizer PATH" in said
    assert "\n" not in said
    assert seconds < 15  # the client alone would repeat itself for 23 s


class FakeHub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository, which holds `tokenizer.model` and no `spiece.model`."""

    def do_GET(self) -> None:
        body = b""
        if self.path == "/someone/something/resolve/main/tokenizer.model":
            body = BUNDLED_FILE.read_bytes()
            self.send_response(200)
            self.send_header("ETag", '"0123"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            known = self.path.startswith("/someone/something/")
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_downloads_from_the_hub(tmp_path: Path, bundled: Tokenizer) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            said, _ = load_from_hub("someone/something", tmp_path, HF_ENDPOINT=endpoint)
            assert said == f"sha256 {bundled.sha256}"
            said, _ = load_from_hub("no/such", tmp_path, HF_ENDPOINT=endpoint)
            assert said.startswith("tokenizer: the hub has no no/such")
        finally:
            server.shutdown()


# --- saved for transformers --------------------------------------------------------------------------------------


def assert_transformers_agrees(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    tokenizer.save_pretrained(folder)
    # transformers 5 does without these two; 4.57 takes config.json's class, and sends token_type_ids, without them.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded(texts)["input_ids"] == [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(texts)]
    assert (loaded.eos_token_id, loaded.unk_token_id) == (tokenizer.eos_id, tokenizer.unk_id)
    assert loaded.pad_token_id == (tokenizer.pad_id if tokenizer.has_pad else None)
    assert len(loaded) == tokenizer.vocab_size
    # What LLaMA's forward takes.
    assert set(loaded("a")) == {"input_ids", "attention_mask"}
    again = load_tokenizer(str(folder))
    assert again.sha256 == tokenizer.sha256
    for text in texts:
        (ids,) = tokenizer.encode([text])
        if tokenizer.unk_id not in ids:
            assert loaded.decode(ids) == tokenizer.decode(ids)


def test_transformers_agrees_on_the_bundled_model(bundled: Tokenizer, tmp_path: Path) -> None:
    assert_transformers_agrees(bundled, tmp_path, TEXTS)


def test_transformers_agrees_on_a_model_that_normalises(nfkc_model: bytes, tmp_path: Path) -> None:
    assert_transformers_agrees(Tokenizer(nfkc_model, "nfkc"), tmp_path, TEXTS)


def test_transformers_agrees_on_bpe(llama_model: bytes, tmp_path: Path) -> None:
    assert_transformers_agrees(Tokenizer(llama_model, "llama"), tmp_path, TEXTS)


def test_transformers_agrees_on_real_text(
    t5: Tokenizer, bundled: Tokenizer, c4_texts: list[str], tmp_path: Path
) -> None:
    for name, tokenizer in (("t5", t5), ("bundled", bundled)):
        folder = tmp_path / name
        folder.mkdir()
        assert_transformers_agrees(tokenizer, folder, TEXTS + c4_texts)


def test_other_kinds_cannot_be_saved(tmp_path: Path) -> None:
    tokenizer = Tokenizer(train_small(model_type="word", vocab_size=100), "words")
    with pytest.raises(UserError, match="unigram and BPE"):
        tokenizer.save_pretrained(tmp_path)
