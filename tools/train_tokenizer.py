"""Train the bundled tokenizer, a 32,000-piece unigram SentencePiece model, or one like it of another size.

    python tools/train_tokenizer.py --data c4-train.json.gz openwebtext.json.gz --validate c4-validation.json.gz
    python tools/train_tokenizer.py --pieces 4096 --data ... --output small.model

The inputs are JSON-lines files (gzip or plain) with a column `text`. The same inputs, in the same order, give the
same bytes with one version of sentencepiece. The output holds pieces and scores only: neither a path nor a text.

Choices, and why:
  identity normalisation, whitespace kept   decode(encode(text)) == text; perplexity and bits per byte are of the
                                            text itself, not of a cleaned copy of it
  byte_fallback                             every UTF-8 text has a spelling, so `<unk>` never stands for anything
  digits one by one                         numbers get one spelling each, as in LLaMA's own tokenizer
  special ids as T5's                       `<pad>` 0, `</s>` 1, `<unk>` 2, no BOS: recipes need not know which is used
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from velora_pretrain.data.tokenizer import load_tokenizer
from velora_pretrain.data.tokenizer_proto import round_scores, strip_provenance

VOCAB_SIZE = 32_000
# Partial sums in expectation-maximisation are split by thread: another count gives other scores in the last bits.
NUM_THREADS = 2
MAX_DOCUMENT_BYTES = 1 << 20
# Sums stay exact to 2**24 steps, some 30,000 tokens.
SCORE_STEP_NATS = 2.0**-6
DEFAULT_OUTPUT = Path(__file__).parents[1] / "velora_pretrain" / "data" / "bundled" / "c4-openwebtext-32k.model"


def read_texts(path: Path) -> Iterator[str]:
    """Yield the `text` of each record of a JSON-lines file, gzip or plain."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def train(paths: list[Path], pieces: int = VOCAB_SIZE) -> bytes:
    """Return the model file's bytes, trained on the texts of `paths` in the order given."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        # An iterator, so that no input path enters the model.
        sentence_iterator=(text for path in paths for text in read_texts(path)),
        model_writer=buffer,
        model_type="unigram",
        vocab_size=pieces,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        character_coverage=0.9998,  # the rest (rare scripts) is spelled in bytes
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,  # a word at the start of a text is the word that it is elsewhere
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=MAX_DOCUMENT_BYTES,
        num_threads=NUM_THREADS,
        minloglevel=1,
    )
    return round_scores(strip_provenance(buffer.getvalue()), SCORE_STEP_NATS)


def report_compression(model: Path, paths: list[Path]) -> None:
    """Print tokens per UTF-8 byte and the share of texts that come back unchanged, for each file."""
    tokenizer = load_tokenizer(str(model))
    for path in paths:
        texts = list(read_texts(path))
        num_bytes = sum(len(text.encode()) for text in texts)
        ids = tokenizer.encode(texts)
        num_tokens = sum(map(len, ids))
        unchanged = sum(tokenizer.decode(row) == text for row, text in zip(ids, texts, strict=True))
        print(
            f"{path.name}: {num_tokens:,} tokens / {num_bytes:,} bytes = {num_tokens / num_bytes:.4f} tokens per byte"
            f" ({num_bytes / num_tokens:.3f} bytes per token), {unchanged}/{len(texts)} texts round-trip"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled SentencePiece tokenizer, or one of another size.")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON-lines files to train on")
    parser.add_argument("--validate", type=Path, nargs="*", default=[], help="JSON-lines files to report on")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="where to write the model file")
    parser.add_argument("--pieces", type=int, default=VOCAB_SIZE, help="size of the vocabulary")
    arguments = parser.parse_args()
    if arguments.pieces != VOCAB_SIZE and arguments.output == DEFAULT_OUTPUT:
        parser.error("a tokenizer of another size needs an --output of its own")

    model = train(arguments.data, arguments.pieces)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_bytes(model)
    temporary.replace(arguments.output)
    print(f"{arguments.output.name}: {len(model):,} bytes, sha256 {hashlib.sha256(model).hexdigest()}")
    report_compression(arguments.output, arguments.validate)


if __name__ == "__main__":
    main()
