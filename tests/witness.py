"""Runs train.py as a program and writes down what it did, knowing nothing of what is inside.

    python tests/witness.py BUDGET [nan|memory]

Its clock is driven by the tokens that train.py reads: TOKENS_PER_SECOND, whatever the machine. So a run of BUDGET
seconds is the same on every machine. At its fourth batch every weight becomes NaN, or the memory ends, if that is asked
for. Writes witness.json into the current folder.
"""

import gc
import json
import math
import runpy
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch
import torch.nn.functional as F

import prepare

TOKENS_PER_SECOND = 10_000
make_dataloader, evaluate_bpb = prepare.make_dataloader, prepare.evaluate_bpb
told = dict(tokens=0, reads=0, splits=[], evaluated=[], opened=[], stuck=[], start=None, saved=None)
initial = {}  # {id of a parameter: its value when training begins}


def parameters():
    modules = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)]
    return {id(p): p for module in modules for p in module.parameters(recurse=False)}.values()


def watched_dataloader(tokenizer, B, T, split, *args, **options):
    told["splits"].append(split)
    for batch in make_dataloader(tokenizer, B, T, split, *args, **options):
        told["reads"] += 1
        if told["reads"] == 1:
            initial.update((id(p), p.detach().clone()) for p in parameters())
            told["start"] = sum(p.double().abs().sum().item() for p in initial.values())
        if told["reads"] == 4 and "nan" in sys.argv:
            for p in parameters():
                p.data.fill_(math.nan)
        if told["reads"] == 4 and "memory" in sys.argv:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        told["tokens"] += batch[0].numel()
        write()
        yield batch


def watched_evaluation(model, tokenizer, batch_size, split="val"):
    told["evaluated"].append(split)
    weights = dict(model.named_parameters())
    saved = torch.load("model.pt").values() if Path("model.pt").exists() else []
    told["saved"] = all(any(torch.equal(p, q) for q in saved if q.shape == p.shape) for p in weights.values())
    inputs, targets, _ = next(make_dataloader(tokenizer, 2, prepare.MAX_SEQ_LEN, "train"))
    with torch.enable_grad():
        F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten()).backward()
    told["stuck"] = [name for name, p in weights.items()
                     if p.grad is not None and p.grad.any() and torch.equal(p, initial[id(p)])]
    write()
    prepare.make_dataloader = make_dataloader
    return evaluate_bpb(model, tokenizer, batch_size, split)


def watch_files(event, args):
    """Note the token files that are opened by others than prepare.py."""
    if event == "open" and str(args[0]).endswith(".tokens"):
        frame, files = sys._getframe(), []
        while frame:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        if str(REPO / "prepare.py") not in files:
            told["opened"].append(str(args[0]))


def write():
    Path("witness.json").write_text(json.dumps(told))


if __name__ == "__main__":
    sys.argv.pop(0)
    prepare.TIME_BUDGET = float(sys.argv[0])
    prepare.EVAL_TOKENS = 16 * prepare.MAX_SEQ_LEN
    prepare.make_dataloader, prepare.evaluate_bpb = watched_dataloader, watched_evaluation
    sys.addaudithook(watch_files)
    for clock in ("time", "monotonic", "perf_counter"):
        setattr(time, clock, lambda: told["tokens"] / TOKENS_PER_SECOND)
    runpy.run_path(str(REPO / "train.py"), run_name="__main__")
