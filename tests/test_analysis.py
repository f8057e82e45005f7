"""analysis.ipynb on good, odd and broken ledgers: the numbers it shows and the figures it draws.

Most cases run the notebook's cells in this process on the Agg backend, which takes a second; three run
it as the user does, in a kernel.
"""

import ast
import json
import math
import os
import random
import re
import subprocess
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest

NOTEBOOK = Path(__file__).parent.parent / "analysis.ipynb"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
IDEAS = [
    "raise EMBEDDING_LR from 0.6 to 0.8", "halve TOTAL_BATCH_SIZE to 2**18", "SwiGLU instead of ReLU squared in the MLP",
    "depth 9 at the same width", "short window T/8", "warmdown 0.5 to 0.7 of the run", "weight decay on value embeddings 0.003",
    "multi-query attention", "hashed bigram value embeddings with 65,536 rows, added before the gate on every second layer",
    "RoPE base 200k", "FINAL_LR_FRAC 0.05", "Muon momentum 0.85 to 0.92", "init scale x0.68", "label smoothing 0.05",
    "parallel attention and MLP", "softcap 15 to 20", "x0_lambda init 0.05", "tie embedding and head", "cosine schedule",
    "costs $5 and $6 of (a) 'quoted' <b>text</b>", "fp8 matmuls", "gradient clipping at 1.0", "try again with \"fresh\" idea",
]


def row(i, val_bpb, status="discard", description=None, memory_gb=44.0):
    return f"{i:07x}\t{val_bpb:.6f}\t{memory_gb:.1f}\t{status}\t{description or IDEAS[i % len(IDEAS)]}"


def night(n, seed=0, baseline=0.9979, gain=0.028):
    """The lines of a plausible ledger: a falling staircase, discards, failed ideas far off the axis, crashes."""
    rng, best, lines = random.Random(seed), baseline, [HEADER, row(1, baseline, "keep", "baseline")]
    memory = 44.0
    for i in range(2, n + 1):
        kind, memory_gb = rng.random(), memory + rng.gauss(0, 1.5)
        if kind < 0.08:
            lines.append(row(i, 0, "crash", memory_gb=0))
        elif kind < 0.08 + 0.20 * (1 if n < 500 else 0.25):
            new = best - rng.expovariate(1) * gain * 7 / n - 1e-6
            best, memory = new, memory_gb
            lines.append(row(i, new, "keep", memory_gb=memory_gb))
        else:
            worse = rng.expovariate(1) * gain / 3 if kind < 0.9 else rng.uniform(0.05, 2)
            lines.append(row(i, best + worse - 0.0005, memory_gb=max(memory_gb, 1)))
    return lines


def write(folder, lines, name="results.tsv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_cells(folder):
    """Executes the code cells in this process inside `folder`; returns their names, what they displayed and printed."""
    matplotlib.use("Agg")
    plt.close("all")
    shown, here = [], os.getcwd()
    space = {"display": shown.append, "print": lambda *args: shown.append(" ".join(map(str, args)))}
    os.chdir(folder)
    try:
        with matplotlib.rc_context(), pd.option_context("display.max_rows", 60), warnings.catch_warnings():
            warnings.simplefilter("error")
            for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
                if cell.cell_type == "code":
                    tree = ast.parse(cell.source)
                    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
                    exec(compile(tree, "analysis.ipynb", "exec"), space)
                    if last is not None:
                        value = eval(compile(ast.Expression(last.value), "analysis.ipynb", "eval"), space)
                        shown.extend([] if value is None else [value])
    finally:
        os.chdir(here)
    space["shown"] = shown
    return space
