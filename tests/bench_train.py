"""Measure what only a GPU can show: attention, the step against a plain one, kernels, start-up, the baseline.

    uv run tests/bench_train.py [attention] [step] [profile] [overhead] [recipe]     # without a name all five

`profile` shows what costs time in a step of the train.py that is there, and `step` its speed in passes of several
sizes. `recipe` takes most of an hour: nine runs of five minutes, from the faithful constants to those of train.py.

Needs the prepared dataset of this machine and prints Markdown tables: medians with the range. On a CPU it runs in
small, to show that it runs. "Plain" is the same GPT, optimizer and batch, with the logits of a whole pass at once and
with two waits for the GPU and an .item() in each step.
"""

import gc
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

import prepare
import train

T = train.MAX_SEQ_LEN
DEVICE, DEVICE_NAME, DTYPE = train.choose_device()
CUDA = DEVICE.type == "cuda"

# The constants of the faithful baseline where train.py has others, in the order in which `recipe` replaces them
FAITHFUL = dict(
    TOTAL_BATCH_SIZE=2**19, WIDTH=512, EMBEDDING_LR=0.6, UNEMBEDDING_LR=0.004, VE_WEIGHT_DECAY=0.0,
    SHORT_WINDOW=0.5, FINAL_LR_FRAC=0.0, WARMDOWN_RATIO=0.5)


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(title, *columns):
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def spread(values, digits=0):
    low, median, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{median} ({low} to {high}, n={len(values)})"


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------
# Attention


def naive_attention(q, k, v, window):
    heads = torch.arange(q.size(2)) * k.size(2) // q.size(2)  # the key/value head of each query head
    q, k, v = (t.transpose(1, 2) for t in (q, k[:, :, heads], v[:, :, heads]))
    visible = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril().triu(-window)
    return ((q @ k.mT / q.size(-1) ** 0.5).masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)


def largest_errors(attend, n_kv_head, windows):
    """Of the output and the gradients of q, k and v: ||x - reference|| / ||reference||, the worst of all windows."""
    errors = []
    for window in windows:
        tensors = [torch.randn(2, 256, n, 128).bfloat16() for n in (6, n_kv_head, n_kv_head, 6)]
        both = []
        for function, device, dtype in ((attend, DEVICE, torch.bfloat16), (naive_attention, "cpu", torch.float64)):
            *leaves, dy = (t.to(device, dtype, copy=True).requires_grad_() for t in tensors)
            y = function(*leaves, window)
            both.append([x.detach().double().cpu() for x in (y, *torch.autograd.grad(y, leaves, dy))])
        errors.append([(a - b).norm() / b.norm() for a, b in zip(*both)])
    return torch.tensor(errors).amax(0).tolist()  # NaN stays NaN


def tflops(call, flops):
    """Median and range of seven rounds, after two calls that compile."""
    from torch.utils.benchmark import Timer  # whose import complains where there is no GPU
    timer = Timer("call()", globals={"call": call})  # waits for the GPU before and after
    rounds = [timer.timeit(30 if CUDA else 1).mean for _ in range(7)]
    return spread([flops / seconds / 1e12 for seconds in rounds], 1 if CUDA else 4)


def attention():
    B, T, H, D = (64, 2048, 6, 128) if CUDA else (1, 128, 6, 128)
    loads = {"fa3": train.load_fa3, "varlen": lambda: train.varlen_attention} if CUDA else {}
    backends = {}
    header("Relative error in bf16 against float64 at (2, 256, 6, 128), the worst of windows 255, 128 and 32",
           "backend", "kv heads", "output", "dq", "dk", "dv")
    for name, load in (loads | {"sdpa": lambda: train.sdpa_attention}).items():
        attend = train.attempt(name, load)
        for n_kv_head in (6, 2) if attend else ():
            if errors := train.attempt(name, lambda: largest_errors(attend, n_kv_head, (255, 128, 32))):
                backends[name] = attend
                row(name, n_kv_head, *(f"{error:.1e}" for error in errors))

    torch._dynamo.config.recompile_limit = 64
    for compiled in (False, True) if train.can_compile(DEVICE) else (False,):
        header(f"TFLOP/s at ({B}, {T}, {H}, {D}) in bf16, {'compiled' if compiled else 'eager'}; a visible key counts "
               "4 D FLOPs forward and 12 D with backward", "backend", "window", "forward", "forward + backward")
        for name, attend in backends.items():
            function = torch.compile(attend, dynamic=False) if compiled else attend
            for window in (T - 1, T // 2, T // 8):
                *leaves, dy = (torch.randn(B, T, H, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
                leaves = [t.requires_grad_() for t in leaves]
                forward = torch.no_grad()(lambda: function(*leaves, window))
                both = lambda: torch.autograd.grad(function(*leaves, window), leaves, dy)
                flops = 4 * D * B * H * sum(min(t, window) + 1 for t in range(T))
                row(name, window, train.attempt(name, lambda: tflops(forward, flops)) or "failed",
                    train.attempt(name, lambda: tflops(both, 3 * flops)) or "failed")


# ---------------------------------------------------------------------------
# Steps


class Trainer:
    """What train.main makes before its first step, and a plain loss beside its own."""

    def __init__(self):
        torch.manual_seed(42)
        compiles = train.can_compile(DEVICE)
        attention, attend = train.choose_attention(DEVICE, DTYPE, compiles)
        self.model = model = train.GPT(attend, DTYPE).to(DEVICE)
        self.optimizer = train.MuonAdamW(*train.parameter_groups(model), DTYPE)
        cross_entropy = F.cross_entropy
        if compiles:
            train.compile_hot_functions(model, self.optimizer)
            cross_entropy = torch.compile(cross_entropy, dynamic=False)

        def plain(model, inputs, targets, share):
            loss = cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten()) * share
            loss.backward()
            return loss.detach()

        self.losses = {"ours": train.backward, "plain": plain}
        self.tokenizer = prepare.Tokenizer.from_directory()
        self.rows = train.warm_up(model, self.optimizer, DEVICE)
        print(f"\nattention {attention}, {'compiled' if compiles else 'eager'}, dataset {prepare.dataset_id()}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters")


class Version:
    """One way to train the trainer's model: "ours" or "plain", with as many rows of `rows` as fit."""

    def __init__(self, trainer, kind, rows):
        self.trainer, self.loss, self.waits = trainer, trainer.losses[kind], kind == "plain"
        train.DEVICE_BATCH_SIZE, train.backward = rows, self.loss
        self.rows = train.warm_up(trainer.model, trainer.optimizer, DEVICE)
        loader = prepare.make_dataloader(trainer.tokenizer, self.rows, T, "train", DEVICE)
        self.next_batch, self.grad_accum_steps = lambda: next(loader), train.TOTAL_BATCH_SIZE // (self.rows * T)
        self.batch, self.rates, self.peak_mb = next(loader), [], 0

    def run(self, steps):
        """One round: adds its tokens per second to `rates`."""
        model, optimizer, copies = self.trainer.model, self.trainer.optimizer, []
        train.backward = self.loss
        gc.collect()
        gc.disable()  # as train.main
        synchronize()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for step in range(steps):
            if self.waits:
                synchronize()
            train.set_schedules(optimizer, 0.0, 0)
            loss, self.batch = train.train_step(model, optimizer, self.batch, self.next_batch, self.grad_accum_steps)
            if self.waits:
                synchronize()
                loss.item()
            else:  # one step late, as train.main
                copies.append(train.start_copy(loss, step))
                if step > 0:
                    train.finish_copy(*copies.pop(0))
        synchronize()
        self.rates.append(steps * train.TOTAL_BATCH_SIZE / (time.perf_counter() - start))
        gc.enable()
        self.peak_mb = max(self.peak_mb, train.peak_memory_mb(DEVICE))


def step(rounds=5 if CUDA else 2, steps=6 if CUDA else 2):
    trainer = Trainer()
    header(f"{rounds} alternating rounds of {steps} steps of {train.TOTAL_BATCH_SIZE:,} tokens in passes of some sizes",
           "rows", "version", "tokens/s", "MFU %", "ours / it", "peak MB" if CUDA else "peak MB of the process so far")
    flops, peak = train.flops_per_token(trainer.model), train.peak_flops(DEVICE_NAME)
    for rows in sorted({trainer.rows // 2, trainer.rows, 2 * trainer.rows} - {0}):  # what does not fit is halved
        if train.TOTAL_BATCH_SIZE % (rows * T):
            continue
        versions = {kind: Version(trainer, kind, rows) for kind in trainer.losses}
        ours, plain = versions.values()
        for version in versions.values():
            version.run(1)
            version.rates.clear()  # the first step after a warm-up is slower
        for i in range(rounds):
            for version in (ours, plain)[::(-1) ** i]:  # there and back: none is always the one after a rest
                version.run(steps)
        for kind, version in versions.items():
            mfu = 100 * statistics.median(version.rates) * flops / peak
            ratio = spread([a / b for a, b in zip(ours.rates, version.rates)], 3)
            row(version.rows, kind, spread(version.rates), f"{mfu:.2f}", ratio, f"{version.peak_mb:,.0f}")
        losses = [loss(trainer.model, *ours.batch[:2], 1).item() for loss in trainer.losses.values()]
        trainer.model.zero_grad()
    print("\nmean loss of the same weights on the same rows: ours {:.5f}, plain {:.5f}".format(*losses))


class Enough(Exception):
    """So many steps are measured."""


def profile(steps=3, skipped=20 if CUDA else 5):
    """Profile train.main as it is, knowing only that it calls train_step(): first to warm up, then in its loop."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    train_step, calls, times = train.train_step, itertools.count(), []

    def profiled_step(*args, **options):
        call = next(calls)
        if call in (skipped, skipped + steps):
            synchronize()
            times.append(time.perf_counter())
            profiler.start() if call == skipped else profiler.stop()
        if call == skipped + steps:
            raise Enough
        return train_step(*args, **options)

    train.train_step = profiled_step
    try:
        train.main()
        raise SystemExit(f"train.main() ended within {skipped + steps} calls of train_step()")
    except Enough:
        pass
    device = DeviceType.CUDA if CUDA else DeviceType.CPU  # without the ranges that torch.compile names
    events = [e for e in profiler.key_averages() if e.device_type == device and not e.is_user_annotation]
    own_ms = lambda e: (e.self_device_time_total if CUDA else e.self_cpu_time_total) / 1000 / steps
    total, wall = sum(map(own_ms, events)), 1000 * (times[1] - times[0]) / steps
    what = "kernels" if CUDA else "operators"
    header(f"{steps} profiled steps of {wall:.1f} ms each, {total:.1f} ms of it in {what}",
           f"{what}, top 15", "calls a step", "ms a step", "share")
    for event in sorted(events, key=own_ms, reverse=True)[:15]:
        row(event.key[:100].replace("|", "/"), f"{event.count / steps:.1f}", f"{own_ms(event):.2f}",
            f"{100 * own_ms(event) / total:.1f} %")


# ---------------------------------------------------------------------------
# Whole runs


EVAL_TOKENS = prepare.EVAL_TOKENS if CUDA else 2**14


def whole_run(folder, env, constants):
    """(what train.py printed with these constants, its summary as a dict of strings)."""
    run = f"import prepare, train; prepare.EVAL_TOKENS = {EVAL_TOKENS}; vars(train).update({constants}); train.main()"
    done = subprocess.run([sys.executable, "-c", run], cwd=folder, env=os.environ | dict(PYTHONPATH=str(REPO)) | env,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"train.py with {constants} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout, dict(re.findall(r"^(\w+): +(.+)$", done.stdout, re.MULTILINE))


def overhead(budget=20 if CUDA else 2):
    header(f"train.py with a budget of {budget} s and {EVAL_TOKENS:,} tokens of evaluation", "cache of compiled code",
           "s to ready", "total - training s", "recompilations in training", "in evaluation", "peak MB", "attention")
    with tempfile.TemporaryDirectory() as folder:
        caches = {f"{name}_CACHE_DIR": f"{folder}/{name}" for name in ("TORCHINDUCTOR", "TRITON")}
        for cache in ("cold", "warm"):
            output, value = whole_run(folder, caches | dict(TORCH_LOGS="recompiles"), dict(TIME_BUDGET=budget))
            ready = re.search(r"ready to train after ([\d.]+) s", output)
            training, _, evaluation = output[ready.end():].rpartition("| loss ")  # the last progress line
            row(cache, ready[1], f"{float(value['total_seconds']) - float(value['training_seconds']):.1f}",
                *(text.count("Recompiling function") for text in (training, evaluation)),
                value["peak_vram_mb"], value["attention"])


def recipe():
    constants = FAITHFUL if CUDA else dict(UNEMBEDDING_LR=0.01)  # on a CPU any other value
    extra = {} if CUDA else dict(TIME_BUDGET=2)
    header(f"Whole runs on {prepare.dataset_id()}, SEED={os.environ.get('SEED', 42)}: one more constant in each",
           "constant", "val_bpb", "difference", "tokens M", "peak MB", "MFU %", "total s")
    before, what = None, "faithful baseline"
    with tempfile.TemporaryDirectory() as folder:
        while True:
            _, value = whole_run(folder, {}, constants | extra)
            row(what, value["val_bpb"], f"{float(value['val_bpb']) - before:+.4f}" if before else "",
                *(value[key] for key in ("total_tokens_M", "peak_vram_mb", "mfu_percent", "total_seconds")))
            if not constants:
                return
            before, (name, old), *rest = float(value["val_bpb"]), *constants.items()
            what, constants = f"{name} {old} -> {getattr(train, name)}", dict(rest)


def main():
    parts = {part.__name__: part for part in (attention, step, profile, overhead, recipe)}
    names = sys.argv[1:] or list(parts)
    if set(names) - set(parts):
        raise SystemExit(f"{' '.join(names)}: choose among {', '.join(parts)}")
    if len(names) > 1:  # each in a process of its own, so that a fault or a hang of one costs no other
        failed = [name for name in names if subprocess.run([sys.executable, __file__, name]).returncode]
        raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
    start = time.perf_counter()
    sys.stdout.reconfigure(line_buffering=True)
    if names[0] != "recipe":  # whose runs have one each
        prepare.start_watchdog()
    torch.set_float32_matmul_precision("high")  # this and the next as train.main
    train.set_memory_limits(DEVICE)
    print(f"\n## {names[0]}: {DEVICE_NAME}, torch {torch.__version__}, profile {train.PROFILE}"
          f"{'' if CUDA else ', no GPU: small shapes, only to show that it runs'}")
    parts[names[0]]()
    print(f"\n{names[0]} took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
