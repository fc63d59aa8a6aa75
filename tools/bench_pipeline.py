"""Tokens a second that the data pipeline alone delivers: read, shuffle, tokenise, pack, make tensors.

Counted are input tokens that are not padding. With `pad`, what a document has beyond the sequence length is tokenised
and dropped, so fewer are delivered than tokenised. CPU seconds are those of the whole process, all threads.
"""

import argparse
import os
import statistics
import time

from velora_pretrain.data.c4 import resolve
from velora_pretrain.data.loader import DocumentTokenizer, TrainLoader
from velora_pretrain.data.tokenizer import load_tokenizer


def measure(options: argparse.Namespace, tokenizer: DocumentTokenizer) -> tuple[float, float]:
    """One pass of `--batches` batches from the beginning, tokens per wall second and per CPU second."""
    source = resolve(options.data, split="train")
    begun, begun_cpu, tokens = time.perf_counter(), time.process_time(), 0
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
            tokens += next(batches).num_input_tokens
        wall_seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - begun_cpu
    return tokens / wall_seconds, tokens / cpu_seconds


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
    parser.add_argument("--one-core", action="store_true", help="pin the process to one core (Linux)")
    options = parser.parse_args()
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = load_tokenizer(options.tokenizer)
    measured = [measure(options, tokenizer) for _ in range(options.repeats)]
    for name, values in zip(("wall", "CPU"), zip(*measured, strict=True), strict=True):
        each = " ".join(f"{value / 1e6:.2f}" for value in values)
        print(f"{statistics.median(values) / 1e6:.2f}M tokens per {name} second (median of {each})")


if __name__ == "__main__":
    main()
