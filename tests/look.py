"""A look before a run: does the train.py of this folder train, and how fast is it beside that of a commit?

    uv run tests/look.py [COMMIT]     # HEAD, if none is named

Both train for a few seconds, twice and by turns. The model then passes through the checks of evaluate_bpb on training
text, so that a crash or a look at later tokens shows now. The validation text is not read and no val_bpb is shown.
Nothing is known of train.py but that it runs as a program and reads make_dataloader(). It takes a minute and a half
on one CPU core, and compiles on a GPU. Nothing in this folder is written.
"""

import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SECONDS = 8  # of training, each time
ROUNDS = 2


def trial(seconds):
    """Run train.py of the current folder with this budget; print how fast it read its batches."""
    import prepare
    make_dataloader, evaluate_bpb = prepare.make_dataloader, prepare.evaluate_bpb
    reads = []  # (time, tokens) of each batch

    def timed_dataloader(*args, **options):
        for batch in make_dataloader(*args, **options):
            reads.append((time.perf_counter(), batch[0].numel()))
            yield batch

    def checks_alone(model, tokenizer, batch_size, split="val"):
        prepare.make_dataloader = make_dataloader
        evaluate_bpb(model, tokenizer, batch_size, "train")
        return math.nan

    prepare.TIME_BUDGET = seconds
    prepare.EVAL_TOKENS = 2 * prepare.PROBE_ROWS * prepare.MAX_SEQ_LEN
    prepare.make_dataloader, prepare.evaluate_bpb = timed_dataloader, checks_alone
    runpy.run_path("train.py", run_name="__main__")
    reads.pop(0)  # before the clock starts
    speed = math.nan  # of a machine that makes less than two steps
    if len(reads) > 1:
        tokens = sum(count for _, count in reads[:-1])
        speed = tokens / (reads[-1][0] - reads[0][0])
    print(f"tokens_per_second: {speed}")


def look(name, code, seconds):
    """Tokens per second of a train.py with this code; prints what it tells of itself, SystemExit if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(code, encoding="utf-8")
        path = os.pathsep.join([str(REPO), str(REPO / "tests")])
        done = subprocess.run([sys.executable, "-c", f"import look; look.trial({seconds})"], cwd=folder, text=True,
                              env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:].strip()}\n{name} fails: see above")
    told = dict(re.findall(r"^(\w+): +(.+)$", done.stdout, re.MULTILINE))
    progress = done.stdout.partition("\n---\n")[0].splitlines()[-1]
    print(f"{name}: {float(told['tokens_per_second']):,.0f} tokens/s, {told['peak_vram_mb']} MB, "
          f"{float(told['total_seconds']) - float(told['training_seconds']):.0f} s besides training\n    {progress}",
          flush=True)
    return float(told["tokens_per_second"])


def main():
    commit = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    blob = f"{commit}:train.py"
    shown = subprocess.run(["git", "cat-file", "blob", blob], cwd=REPO, capture_output=True, encoding="utf-8")
    if shown.returncode:
        raise SystemExit(f"git has no {blob}: name a commit")
    here = (REPO / "train.py").read_text(encoding="utf-8")
    ratios = []
    for _ in range(ROUNDS):
        speed = look("train.py here", here, SECONDS)
        ratios.append(speed / look(commit, shown.stdout, SECONDS))
    same = ", whose train.py is the same" if here == shown.stdout else ""
    print(f"train.py here makes {statistics.mean(ratios):.3f} times the tokens per second of {commit}{same} "
          f"({min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} rounds)")


if __name__ == "__main__":
    main()
