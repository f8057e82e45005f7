"""Compare make_dataloader with a loader that tokenizes on the fly and scans its buffer, in one run.

    uv run tests/bench_loader.py        # on the prepared dataset of this machine

Both feed batches of 128 x 2048 tokens from the same text to the CPU. Prints tokens per second of each,
as the median of five rounds with the range, and their ratio.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import prepare

B, T, ROUNDS = 128, 2048, 5


def scanning_loader(tokenizer, documents, buffer_size=1000):
    """Best fit by linear scan over a list of token lists; what does not fit is cropped and lost."""
    bos, buffer = tokenizer.get_bos_token_id(), []
    while True:
        rows = []
        for _ in range(B):
            row = []
            while len(row) < T + 1:
                while len(buffer) < buffer_size:
                    buffer += tokenizer.encode([next(documents) for _ in range(128)], prepend=bos)
                room = T + 1 - len(row)
                fitting = [i for i, ids in enumerate(buffer) if len(ids) <= room]
                if fitting:
                    row += buffer.pop(max(fitting, key=lambda i: len(buffer[i])))
                else:
                    row += buffer.pop(min(range(len(buffer)), key=lambda i: len(buffer[i])))[:room]
            rows.append(row)
        batch = torch.tensor(rows)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def endless_documents():
    while True:
        for split, text in prepare.documents(1):
            if split == "train":
                yield text


def tokens_per_second(loader, batches):
    """Of each of ROUNDS rounds, after one batch that fills the buffer."""
    next(loader)
    rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        rates.append(batches * B * T / (time.perf_counter() - start))
    return rates


def main():
    torch.set_num_threads(1)
    tokenizer = prepare.Tokenizer.from_directory()
    ours = tokens_per_second(prepare.make_dataloader(tokenizer, B, T, "train"), 20)
    theirs = tokens_per_second(scanning_loader(tokenizer, endless_documents()), 1)
    for name, rates in (("make_dataloader", ours), ("tokenize and scan", theirs)):
        low, median, high = (f(rates) / 1e6 for f in (min, statistics.median, max))
        print(f"{name:18} {median:8.2f} M tokens/s  ({low:.2f} to {high:.2f}, n={ROUNDS})")
    print(f"{'ratio':18} {statistics.median(ours) / statistics.median(theirs):8.1f}")


if __name__ == "__main__":
    main()
