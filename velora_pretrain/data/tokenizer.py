"""SentencePiece tokenizers: the bundled one, a file, a folder, or one from the Hugging Face hub.

`</s>` is never added here: where a document ends is the packing's affair.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

import sentencepiece

from velora_pretrain.data.tokenizer_export import write_pretrained
from velora_pretrain.data.tokenizer_proto import BYTE, read_model, read_spans
from velora_pretrain.errors import UserError, one_line
from velora_pretrain.llama_folder import TOKENIZER_FILES

BUNDLED_FILE = Path(__file__).with_name("bundled") / "c4-openwebtext-32k.model"
HUB_DEADLINE_SECONDS = 25.0
PROBE_SECONDS = 8.0
OFFLINE_HELP = "offline, use --tokenizer bundled or --tokenizer PATH"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        name: what it was asked for by.
        sha256: of the model file's bytes, in hexadecimal; what two runs must share for their perplexities to compare.
        vocab_size: the number of pieces.
        eos_id: the piece that ends a document.
        unk_id: the piece for what has no other.
        has_pad: whether the model has a padding piece.
        pad_id: that piece, or `eos_id` where there is none. Padding must therefore be ignored by position, never by id.
    """

    def __init__(self, model_file: bytes, name: str) -> None:
        """Read a model file's bytes.

        Raises:
            UserError: they are not a whole SentencePiece model, or it has no piece that ends a document.
        """
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._model = read_model(model_file)
            # The methods' CamelCase names exist in every release; the snake_case ones are added at run time.
            self._processor.LoadFromSerializedProto(model_file)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"tokenizer: {name} is not a whole SentencePiece model ({one_line(error)}); "
                "fetch it again or give another"
            ) from error
        self._model_file = model_file
        self.name = name
        self.sha256 = hashlib.sha256(model_file).hexdigest()
        self.vocab_size = len(self._model.pieces)
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        self.has_pad = self._processor.pad_id() >= 0
        self.pad_id = self._processor.pad_id() if self.has_pad else self.eos_id
        self._is_byte = bytes(kind == BYTE for _, _, kind in self._model.pieces)
        if self.eos_id < 0:
            raise UserError(f"tokenizer: {name} has no piece that ends a document (eos_id -1); give one that has")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return each text's ids, without `</s>`.

        A lone surrogate, which no UTF-8 text can hold but JSON can, is read as U+FFFD.
        """
        # One thread makes millions of tokens a second, without the interpreter lock, and leaves the rest to training.
        try:
            return self._processor.Encode(texts, out_type=int, num_threads=1)
        except (TypeError, RuntimeError):
            return self._processor.Encode([_without_surrogates(t) for t in texts], out_type=int, num_threads=1)

    def encode_with_bytes(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Return each text's ids and, for each, how many UTF-8 bytes of the text as given it stands for.

        The counts sum to `len(text.encode())` for every text that has a token at all. What the normaliser drops
        goes with a neighbour: bytes that no token covers count with the token after them, those behind the last
        token with the last. A character spelled in byte pieces counts one byte for each. The space that
        SentencePiece puts in front of a text counts 0. Where the normaliser writes one character as several (T5's
        "½" as " 1⁄2"), one of the pieces has its bytes and the others 0. A text without tokens (T5's model:
        nothing but spaces) has no count to put its bytes in.
        """
        try:
            messages = self._processor.Encode(texts, out_type="serialized_proto", num_threads=1)
        except (TypeError, RuntimeError):
            texts = [_without_surrogates(text) for text in texts]
            messages = self._processor.Encode(texts, out_type="serialized_proto", num_threads=1)
        return [self._count_bytes(message, len(text.encode())) for message, text in zip(messages, texts, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; control pieces, and ids beyond the vocabulary (a model's spare rows), give none."""
        return self._processor.Decode([index for index in ids if 0 <= index < self.vocab_size])

    def save_pretrained(self, folder: Path) -> None:
        """Write the files that `AutoTokenizer.from_pretrained(folder)` loads; it then appends `</s>` to each text.

        Raises:
            UserError: transformers has no equal of this model's segmentation.
        """
        write_pretrained(
            Path(folder),
            self._model_file,
            self._model,
            unk_id=self.unk_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id if self.has_pad else None,
        )

    def _count_bytes(self, message: bytes, text_bytes: int) -> tuple[list[int], list[int]]:
        ids, ends_bytes = read_spans(message)
        if not ids:
            return [], []
        ends_bytes[-1] = text_bytes
        counts_bytes = [end - start for start, end in zip([0, *ends_bytes[:-1]], ends_bytes, strict=True)]
        # SentencePiece gives a spelled character's bytes to the last of its pieces.
        run = 0
        for index, token in enumerate(ids):
            if not self._is_byte[token]:
                run = 0
                continue
            run += 1
            if counts_bytes[index] == run:
                counts_bytes[index - run + 1 : index + 1] = [1] * run
                run = 0
        return ids, counts_bytes


def load_tokenizer(name_or_path: str, *, name: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_path: `bundled`; a SentencePiece file; a folder that holds `spiece.model` or `tokenizer.model`; else a
            name on the Hugging Face hub (`t5-base`), of which a cached copy is used without asking the hub.
        name: what it was asked for by, where that is not the same.

    Raises:
        UserError: there is no such tokenizer, its file is damaged, or the hub does not answer (within 30 s).
    """
    if name_or_path == "bundled":
        return Tokenizer(BUNDLED_FILE.read_bytes(), name_or_path)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        path = _file_in_folder(path)
    elif not path.is_file():
        if path.suffix == ".model" or not _HUB_NAME.fullmatch(name_or_path) or name_or_path.startswith("."):
            raise UserError(f"tokenizer: no file or folder {name_or_path}; give a path, a hub name, or bundled")
        path = _download_within(name_or_path, HUB_DEADLINE_SECONDS)
    try:
        model_file = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer: cannot read {path} ({one_line(error)}); give a readable file") from error
    return Tokenizer(model_file, name or name_or_path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Hold a tokenizer against a model.

    Raises:
        UserError: the tokenizer has more pieces than the model's vocabulary has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer: {tokenizer.name} has {tokenizer.vocab_size} pieces but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or more, or choose a smaller tokenizer"
        )


def _file_in_folder(folder: Path) -> Path:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"tokenizer: {folder} holds no {' or '.join(TOKENIZER_FILES)};"
        " give --tokenizer a file, a folder that has one, or a name"
    )


def _download_within(name: str, deadline_seconds: float) -> Path:
    """Run `_download` against a clock: the hub client's own time limits are per request, and it repeats requests."""
    outcome: list[Path | Exception] = []

    def download() -> None:
        try:
            outcome.append(_download(name))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=download, name="tokenizer-download", daemon=True)
    thread.start()
    thread.join(deadline_seconds)
    if not outcome:
        raise UserError(f"tokenizer: {name} did not arrive from the hub in {deadline_seconds:g} s; {OFFLINE_HELP}")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _download(name: str) -> Path:
    """Return the cached or downloaded model file of a hub repository."""
    # Imported here: it takes longer to import than the bundled tokenizer takes to load.
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        for filename in TOKENIZER_FILES:
            cached = try_to_load_from_cache(name, filename)
            if isinstance(cached, str):
                return Path(cached)
        # The client itself would ask six times in 23 s, with a warning each time.
        if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
            raise UserError(f"tokenizer: {name} is not cached and the hub does not answer; {OFFLINE_HELP}")
        for filename in TOKENIZER_FILES:
            try:
                return Path(hf_hub_download(name, filename))
            except LocalEntryNotFoundError:  # an EntryNotFoundError too, but one that means: no answer
                raise
            except EntryNotFoundError:
                continue
    except UserError:
        raise
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UserError(
            f"tokenizer: the hub has no {name}, or it is private; give another name, a path, or bundled"
        ) from error
    except Exception as error:  # connection, proxy, certificate, disk: the client raises many kinds
        raise UserError(f"tokenizer: fetching {name} failed ({one_line(error)}); {OFFLINE_HELP}") from error
    raise UserError(
        f"tokenizer: {name} on the hub holds no {' or '.join(TOKENIZER_FILES)}; give another name or a path"
    )


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # The client brings certificates of its own and may succeed where this fails.
        return isinstance(error.reason, ssl.SSLError) and not isinstance(error.reason, TimeoutError)
    except OSError:
        return False
    return True


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
