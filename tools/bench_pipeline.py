"""Tokens a second that the data pipeline alone delivers: read, shuffle, tokenise, pack, make tensors.

Counted are input tokens that are not padding. With `pad`, what a document has beyond the sequence length is tokenised
and dropped, so fewer are delivered than tokenised. CPU seconds are those of the whole process, all threads.

With --token-cache the same batches are also read from what `velora-pretrain data tokenise` has left for --data, turn by
turn with the text, and must be the same.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence

from velora_pretrain.data.c4 import Source, resolve
from velora_pretrain.data.loader import DocumentTokenizer, TrainLoader
from velora_pretrain.data.token_cache import with_tokens
from velora_pretrain.data.tokenizer import load_tokenizer


def measure(
    options: argparse.Namespace, source: Source, tokenizer: DocumentTokenizer
) -> tuple[float, float, Sequence[str]]:
    """One pass of `--batches` batches from the beginning: tokens per wall second, per CPU second, and digests."""
    begun, begun_cpu, tokens, digests = time.perf_counter(), time.process_time(), 0, []
    with TrainLoader(
        source,
        tokenizer,
        packing=options.packing,
        sequence_length=options.sequence_length,
        sequences=options.sequences,
        seed=0,
        shuffle_block_documents=options.shuffle_block_documents,
    ) as batches:
        for _ in range(options.batches):
            batch = next(batches)
            tokens += batch.num_input_tokens
            digests.append(batch.digest)
        wall_seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    return tokens / wall_seconds, tokens / cpu_seconds, digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample", help="as of `velora-pretrain train`")
    parser.add_argument("--tokenizer", default="bundled", help="as of `velora-pretrain train`")
    parser.add_argument("--packing", choices=["pad", "pack"], default="pad")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--sequences", type=int, default=512, help="sequences of a batch")
    parser.add_argument("--shuffle-block-documents", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=20, help="batches of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--token-cache", help="auto, or the folder of `data tokenise --output`: also read from there")
    parser.add_argument("--one-core", action="store_true", help="pin the process to one core (Linux)")
    options = parser.parse_args()
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = load_tokenizer(options.tokenizer)
    source = resolve(options.data, split="train")
    contenders = {"text": source}
    if options.token_cache:
        contenders["tokens"], remarks = with_tokens(source, tokenizer, options.token_cache)
        print(*remarks, sep="\n")
    measured = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, documents in contenders.items():
            measured[name].append(measure(options, documents, tokenizer))
    if len({tuple(digests) for values in measured.values() for _, _, digests in values}) > 1:
        raise SystemExit("the batches differ")
    for name, values in measured.items():
        walls, cpus, _ = zip(*values, strict=True)
        for kind, speeds in (("wall", walls), ("CPU", cpus)):
            each = " ".join(f"{speed / 1e6:.2f}" for speed in speeds)
            print(f"{name}: {statistics.median(speeds) / 1e6:.2f}M tokens per {kind} second (median of {each})")


if __name__ == "__main__":
    main()
