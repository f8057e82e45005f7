"""Train a small GPT for five minutes and print its validation bits per byte. The agent edits this file.

    uv run train.py > run.log 2>&1

Dimensions: B rows, T time, C model, H heads, D head_dim, V vocabulary, N = B*T tokens.
"""

import time

START = time.perf_counter()  # before the slow import of torch

import ctypes
import gc
import math
import os
import platform
import re
import resource
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, PROFILE, TIME_BUDGET, VOCAB_SIZE, Tokenizer, YardstickError
from prepare import available_cpus, dataset_id, evaluate_bpb, make_dataloader, start_watchdog

# --------------
# Hyperparameters. Each is set in its one line here and nowhere else.

# Sizes, the only constants that depend on the profile
COLUMN = ("full", "small", "tiny").index(PROFILE)
#                     full  small   tiny
DEPTH =             (    8,     4,     2)[COLUMN]  # transformer blocks
WIDTH =             (  768,   256,   128)[COLUMN]  # C
HEAD_DIM =          (  128,   128,    64)[COLUMN]  # channels of an attention head
TOTAL_BATCH_SIZE =  (2**17, 2**14, 2**13)[COLUMN]  # tokens per optimizer step
DEVICE_BATCH_SIZE = (   64,    16,    32)[COLUMN]  # rows per forward pass, fewer if they do not fit

# Model
QUERIES_PER_KV = 1  # query heads that share a key/value head
WINDOW_PATTERN = "SSSL"  # tiled over the layers: L full context, S short; the last layer is always L
SHORT_WINDOW = 1 / 8  # share of the context that an S layer sees
ROPE_BASE = 10_000  # the slowest channel turns by one radian in so many positions
VE_GATE_CHANNELS = 32  # channels of x that the value embeddings' gate sees
X0_LAMBDA = 0.1  # initial share of the embedding that each layer adds to its input
MLP_RATIO = 4  # hidden channels of an MLP / C
SOFTCAP = 15  # logits lie in (-SOFTCAP, SOFTCAP)

# Batch
LOSS_CHUNKS = 8  # parts of a pass whose logits exist one after the other, to save memory
EVAL_BATCH_SIZE = 16  # rows per forward pass of the evaluation

# Optimizer
EMBEDDING_LR = 0.74  # all embeddings, at width 768 (Adam)
VE_WEIGHT_DECAY = 0.004  # of the value embeddings
UNEMBEDDING_LR = 0.010  # lm_head, at width 768 (Adam)
X0_LR = 0.5  # x0_lambdas (Adam)
X0_BETAS = (0.96, 0.95)
SCALAR_LR = 0.005  # resid_lambdas, and all that you add, but for embeddings and matrices in blocks (Adam)
ADAM_BETAS = (0.8, 0.95)  # of the first and second moments
ADAM_EPS = 1e-10  # added to the root of the second moment
MATRIX_LR = 0.04  # every matrix in a block (Muon)
WEIGHT_DECAY = 0.2  # of Muon, falls to 0 over the run
MOMENTUM = (0.85, 0.95)  # of Muon: at the first step, and from MOMENTUM_STEPS on
MOMENTUM_STEPS = 300  # steps in which the momentum rises
NORMUON_BETA2 = 0.95  # of NorMuon's second moment

# Schedule, as shares of the time budget
WARMUP_RATIO = 0.0  # the learning rate rises from 0
WARMDOWN_RATIO = 0.825  # it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.025  # of the learning rate, at the end

# --------------
# Attention backends: q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D). All see `window` keys to the left plus
# the query itself.


def repeat_kv(t, n_head):
    """Repeat the heads of keys or values until there are n_head."""
    if t.size(2) == n_head:
        return t
    return t.repeat_interleave(n_head // t.size(2), dim=2)


def sdpa_attention(q, k, v, window):
    """Runs anywhere. An explicit mask, because MPS has leaked future tokens with is_causal in bf16."""
    k = repeat_kv(k, q.size(2)).transpose(1, 2)  # (B, H, T, D)
    v = repeat_kv(v, q.size(2)).transpose(1, 2)
    q = q.transpose(1, 2)
    position = torch.arange(q.size(2), device=q.device)
    distance = position[:, None] - position  # of query (row) and key (column)
    mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def varlen_attention(q, k, v, window):
    """FlashAttention as bundled with torch: any CUDA GPU with bf16."""
    from torch.nn.attention.varlen import varlen_attn
    B, T, H, _ = q.shape
    q = q.flatten(0, 1)  # (N, H, D)
    k = repeat_kv(k, H).flatten(0, 1)
    v = repeat_kv(v, H).flatten(0, 1)
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    left = window if window < T - 1 else -1  # -1 is full context
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=(left, 0)).unflatten(0, (B, T))


def load_fa3():
    """FlashAttention 3 from the Hugging Face Hub, the fastest on Hopper."""
    from kernels import get_kernel
    # by branch: unlike version=1 it is found in the cache with HF_HUB_OFFLINE=1
    flash_attn_func = get_kernel("kernels-community/flash-attn3", revision="v1").flash_attn_func

    def fa3_attention(q, k, v, window):
        left = window if window < q.size(1) - 1 else -1
        y = flash_attn_func(q, k, v, causal=True, window_size=(left, 0))
        return y[0] if isinstance(y, tuple) else y

    return fa3_attention


def attention_backends(device, dtype):
    """(name, function that loads it) of the backends for `device`, the fastest first."""
    backends = []
    if device.type == "cuda" and dtype == torch.bfloat16:
        nvidia = torch.version.hip is None
        if nvidia and (8, 0) <= torch.cuda.get_device_capability() <= (9, 0):  # what it is built for
            backends.append(("fa3", load_fa3))
        backends.append(("varlen", lambda: varlen_attention))
    backends.append(("sdpa", lambda: sdpa_attention))
    return backends


def attempt(what, function, *args):
    """The result of function(*args), or None after one line that says why `what` is not available."""
    try:
        return function(*args)
    except Exception as error:  # no network, no triton, no kernel for this GPU, ...
        print(f"{what} is not available: {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)


def load_and_try(load, device, dtype, compiles):
    """Load a backend and return it if a forward and a backward pass with it give finite numbers."""
    attend = load()
    called = torch.compile(attend, dynamic=False) if compiles else attend
    n_head = WIDTH // HEAD_DIM
    n_kv_head = n_head // QUERIES_PER_KV
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, MAX_SEQ_LEN, n, HEAD_DIM, generator=generator) for n in (n_head, n_kv_head, n_kv_head)]
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    y = called(*leaves, layer_windows()[0])
    y.square().mean().backward()
    for result in (y, *(leaf.grad for leaf in leaves)):
        if not result.isfinite().all():
            raise ArithmeticError("its numbers are not finite")
    return attend


def choose_attention(device, dtype, compiles):
    """(name, function) of the fastest backend that works here."""
    *faster, last = attention_backends(device, dtype)
    for name, load in faster:
        attend = attempt(name, load_and_try, load, device, dtype, compiles)
        if attend:
            return name, attend
    name, load = last
    return name, load()


# --------------
# Model


def layer_windows():
    """Keys to the left that each layer sees."""
    sizes = {"L": MAX_SEQ_LEN - 1, "S": int(SHORT_WINDOW * MAX_SEQ_LEN)}
    windows = [sizes[WINDOW_PATTERN[i % len(WINDOW_PATTERN)]] for i in range(DEPTH)]
    windows[-1] = sizes["L"]
    return windows


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def apply_rope(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by the angles of their position (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """No bias, zero at first; the float32 weight is used in the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, attend, window, has_ve):
        super().__init__()
        self.attend = attend
        self.window = window
        C = WIDTH
        n_kv_head = C // HEAD_DIM // QUERIES_PER_KV
        self.q = Linear(C, C)
        self.k = Linear(C, n_kv_head * HEAD_DIM)
        self.v = Linear(C, n_kv_head * HEAD_DIM)
        self.proj = Linear(C, C)
        self.ve_gate = Linear(VE_GATE_CHANNELS, n_kv_head) if has_ve else None

    def forward(self, x, ve, cos, sin):
        B, T, C = x.shape
        q = self.q(x).view(B, T, -1, HEAD_DIM)  # (B, T, H, D)
        k = self.k(x).view(B, T, -1, HEAD_DIM)  # (B, T, Hkv, D)
        v = self.v(x).view(B, T, -1, HEAD_DIM)
        if self.ve_gate is not None:  # value residual: an embedding of the token, weighed per head
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q = apply_rope(norm(q), cos, sin)  # QK-norm
        k = apply_rope(norm(k), cos, sin)
        return self.proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Linear(WIDTH, MLP_RATIO * WIDTH)
        self.proj = Linear(MLP_RATIO * WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, attend, window, has_ve):
        super().__init__()
        self.attn = Attention(attend, window, has_ve)
        self.mlp = MLP()

    def forward(self, x, x0, ve, resid_lambda, x0_lambda, cos, sin):
        x = resid_lambda * x + x0_lambda * x0
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """model(inputs) takes ids (B, T) and gives the logits (B, T, V) of the next ones."""

    def __init__(self, attend, dtype):
        super().__init__()
        self.dtype = dtype  # of the activations
        self.windows = layer_windows()
        with_ve = range((DEPTH - 1) % 2, DEPTH, 2)  # every second layer, and the last
        self.wte = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.previous_wte = nn.Embedding(VOCAB_SIZE, WIDTH)  # of the token before
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(VOCAB_SIZE, WIDTH // QUERIES_PER_KV) for i in with_ve})
        self.blocks = nn.ModuleList(Block(attend, window, i in with_ve) for i, window in enumerate(self.windows))
        self.lm_head = Linear(WIDTH, VOCAB_SIZE)
        self.resid_lambdas = nn.Parameter(torch.ones(DEPTH))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_LAMBDA))
        frequencies = float(ROPE_BASE) ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1]
        angles = torch.arange(MAX_SEQ_LEN)[:, None, None] * frequencies  # (T, 1, D/2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        bound = (3 / WIDTH) ** 0.5  # of a uniform distribution with variance 1/C
        for block in self.blocks:
            for matrix in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
                nn.init.uniform_(matrix.weight, -bound, bound)
        nn.init.normal_(self.wte.weight)
        nn.init.zeros_(self.previous_wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)

    def trunk(self, inputs):
        """(B, T) ids -> (B, T, C), all but the head."""
        T = inputs.size(1)
        cos = self.cos[:T]
        sin = self.sin[:T]
        previous = F.pad(inputs, (1, -1))
        x0 = norm(self.wte(inputs).to(self.dtype) + self.previous_wte(previous).to(self.dtype))
        x = x0
        for i, block in enumerate(self.blocks):
            ve = None
            if str(i) in self.value_embeds:
                ve = self.value_embeds[str(i)](inputs).to(x.dtype)
            x = block(x, x0, ve, self.resid_lambdas[i], self.x0_lambdas[i], cos, sin)
        return norm(x)

    def head(self, x):
        """Float32 logits (..., V) of the trunk's output (..., C)."""
        logits = self.lm_head(x / SOFTCAP).float()  # divided here, where it is smallest
        return SOFTCAP * torch.tanh(logits)

    def forward(self, inputs):
        return self.head(self.trunk(inputs))

    def loss(self, x, targets):
        """The summed loss of the trunk's output x (n, C) for targets (n,). Change it here: autograd does the rest."""
        return F.cross_entropy(self.head(x), targets, reduction="sum")


def backward(model, inputs, targets, share):
    """Add the gradients of `share` of the mean loss to .grad, and return that part of the loss.

    The head comes chunk by chunk: the logits, the largest tensors by far, exist for one chunk at a time.
    """
    x = model.trunk(inputs).flatten(0, 1)  # (N, C)
    chunks = x.detach().chunk(LOSS_CHUNKS)
    total = 0
    for chunk, chunk_targets in zip(chunks, targets.flatten().chunk(LOSS_CHUNKS)):
        loss = model.loss(chunk.requires_grad_(), chunk_targets) * (share / targets.numel())
        loss.backward()
        total += loss.detach()
    x.backward(torch.cat([chunk.grad for chunk in chunks]))
    return total


def flops_per_token(model):
    """Training FLOPs: 6 per matmul parameter, 12 C per key of the window, also where the row has fewer."""
    matmul = sum(p.numel() for p in [*model.blocks.parameters(), model.lm_head.weight])
    return 6 * matmul + 12 * WIDTH * sum(window + 1 for window in model.windows)


# --------------
# Optimizer

# Polar Express (Amsel et al. 2025): the (a, b, c) of each step
POLAR_EXPRESS = (
    (8.15655452, -22.48329293, 15.87876992),
    (4.04292994, -2.80891747, 0.50001785),
    (3.89166780, -2.77248415, 0.50606482),
    (3.28575366, -2.36812949, 0.46449024),
    (2.34654133, -1.70978284, 0.42323551),
)


def orthogonalize(g, dtype):
    """Replace the singular values of matrices g (n, rows, cols) by about 1, computing in `dtype`."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    if tall:  # products of the smaller side
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    if tall:
        x = x.mT
    return x


def muon_update(p, g, momentum_buffer, second_moment, lr, momentum, weight_decay, dtype):
    """One Muon step on stacked matrices (n, rows, cols): changes the buffers in place, returns the new p."""
    momentum_buffer.mul_(momentum).add_(g * (1 - momentum))
    nesterov = momentum * momentum_buffer + (1 - momentum) * g
    u = orthogonalize(nesterov, dtype).float()
    # NorMuon (Li et al. 2025): divide rows (columns where rows are fewer) by their running RMS, keep the norm
    u_norm = u.norm(dim=(-2, -1), keepdim=True)
    axis = -1 if second_moment.size(-1) == 1 else -2
    second_moment.lerp_(u.square().mean(axis, keepdim=True), 1 - NORMUON_BETA2)
    u = u * second_moment.clamp_min(1e-10).rsqrt()
    u = u * (u_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    agree = u * p >= 0  # cautious weight decay (Chen et al. 2025): only where update and weight agree in sign
    return p - lr * (u + weight_decay * p * agree)


def parameter_groups(model):
    """(AdamW's groups, Muon's groups): every parameter in exactly one of them, by its place and shape.

    Muon moves the matrices of the blocks, stacked by shape; AdamW moves the tables, the head and all the rest.
    """
    scale = (WIDTH / 768) ** -0.5  # the learning rates of tables and head were tuned at 768
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    value_tables = set(model.value_embeds.parameters())
    adamw = []
    stacks = {}
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2 and p not in tables:
            stacks.setdefault(p.shape, []).append(p)
        elif p in value_tables:
            adamw.append(dict(params=[p], lr=EMBEDDING_LR * scale, weight_decay=VE_WEIGHT_DECAY))
        elif p in tables:
            adamw.append(dict(params=[p], lr=EMBEDDING_LR * scale))
        elif p is model.lm_head.weight:
            adamw.append(dict(params=[p], lr=UNEMBEDDING_LR * scale))
        elif p is model.x0_lambdas:
            adamw.append(dict(params=[p], lr=X0_LR, betas=X0_BETAS))
        else:
            adamw.append(dict(params=[p], lr=SCALAR_LR))
    muon = [dict(params=stack, lr=MATRIX_LR * max(1, rows / cols) ** 0.5) for (rows, cols), stack in stacks.items()]
    return adamw, muon


class MuonAdamW(torch.optim.AdamW):
    """torch's AdamW, and Muon for groups of matrices of one shape. All state begins as zeros."""

    def __init__(self, adamw_groups, muon_groups, dtype):
        super().__init__(adamw_groups, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True)
        self.muon_groups = muon_groups
        self.muon_update = muon_update
        self.dtype = dtype
        for group in muon_groups:
            first = group["params"][0]
            buffer = torch.zeros(len(group["params"]), *first.shape, device=first.device)
            axis = -1 if first.size(0) >= first.size(1) else -2
            self.state[first] = dict(momentum_buffer=buffer, second_moment=buffer.mean(axis, keepdim=True))
        for group in self.param_groups + muon_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.muon_groups:
            params = group["params"]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            # tensors, so that torch.compile makes no constants of them
            scheduled = {name: torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")}
            stepped = self.muon_update(torch.stack(params), torch.stack(grads), dtype=self.dtype,
                                       **self.state[params[0]], **scheduled)
            for p, new in zip(params, stepped):
                if p.grad is not None:
                    p.copy_(new)


# --------------
# Schedules


def lr_multiplier(progress):
    """Trapezoid over progress 0..1 (warm-up, constant, warm-down)."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = max(0.0, 1 - progress) / WARMDOWN_RATIO
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * left


def set_schedules(optimizer, progress, step):
    first, last = MOMENTUM
    for group in optimizer.param_groups + optimizer.muon_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier(progress)
    for group in optimizer.muon_groups:
        group["momentum"] = first + (last - first) * min(step / MOMENTUM_STEPS, 1)
        group["weight_decay"] = WEIGHT_DECAY * (1 - progress)


# --------------
# The machine

PEAK_FLOPS = {  # dense bf16, by words of the GPU's name
    "H100 PCIe": 756e12, "H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
    "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 210e12,
}


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a GPU; infinite where unknown, which makes the MFU 0."""
    for words, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{words}\b(?!.*Laptop)", device_name):
            return flops
    return math.inf


def choose_device():
    """(device, its name, dtype of activations): bf16 where the hardware multiplies it, else float32."""
    if PROFILE != "tiny" and torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda"), torch.cuda.get_device_name(), torch.bfloat16 if bf16 else torch.float32
    if PROFILE == "small" and torch.backends.mps.is_available():
        return torch.device("mps"), "Apple MPS", torch.float32
    capabilities = torch.cpu.get_capabilities()
    bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.device("cpu"), f"CPU x{torch.get_num_threads()}", torch.bfloat16 if bf16 else torch.float32


def set_memory_limits(device):
    """Let glibc keep what is freed, and let CUDA fail, not spill into the system's memory, under WSL 2."""
    if device.type == "cuda" and "microsoft" in platform.release().lower():
        torch.cuda.set_per_process_memory_fraction(0.9)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # no glibc
    # mapping every large tensor anew costs a CPU more than the work on it
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 2**28)  # M_TOP_PAD


def can_compile(device):
    """Whether torch.compile works, and pays within five minutes: on a CPU it takes one or two of them."""
    if device.type != "cuda":
        return False
    compiled_sine = lambda: torch.compile(torch.sin)(torch.ones(64, device=device))
    return attempt("torch.compile", compiled_sine) is not None


def compile_hot_functions(model, optimizer):
    torch._dynamo.config.recompile_limit = 64  # shapes of a function: with more, it would go on uncompiled
    model.trunk = torch.compile(model.trunk, dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
    optimizer.muon_update = torch.compile(optimizer.muon_update, dynamic=False)


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def is_out_of_memory(error):
    """Whether a RuntimeError is that of CUDA, MPS or a CPU without memory."""
    return re.search("out of memory|allocate memory", str(error)) is not None


# --------------
# The run


def train_step(model, optimizer, batch, next_batch, grad_accum_steps):
    """One optimizer step; returns (its mean loss as a tensor, the batch of the next step)."""
    total = 0
    for _ in range(grad_accum_steps):
        inputs, targets, _ = batch
        total += backward(model, inputs, targets, 1 / grad_accum_steps)
        batch = next_batch()  # while the GPU computes
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return total, batch


def warm_up(model, optimizer, device):
    """Compile and allocate all with a step on random tokens, undo it, return the rows per pass that fit."""
    weights = list(model.parameters())
    saved = [p.detach().clone() for p in weights]
    set_schedules(optimizer, 0.0, 0)
    rows = DEVICE_BATCH_SIZE
    while True:
        tokens = torch.randint(VOCAB_SIZE, (rows, MAX_SEQ_LEN), generator=torch.Generator()).to(device)
        batch = tokens, tokens, 0
        passes = min(2, TOTAL_BATCH_SIZE // tokens.numel())  # the second finds the first one's gradients
        try:
            loss, _ = train_step(model, optimizer, batch, lambda: batch, passes)
            loss.item()  # waits for the device
            return rows
        except RuntimeError as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        finally:
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_copy_(weights, saved)
                for state in optimizer.state.values():
                    torch._foreach_zero_(list(state.values()))
        # not in the except block, which holds the failed step's tensors
        torch.cuda.empty_cache()
        if device.type == "mps":
            torch.mps.empty_cache()
        rows = rows // 2 if rows % 2 == 0 else 1


def start_copy(loss, step):
    """Begin to copy a loss to the host: (step, the copy, an event after which it is there)."""
    if not loss.is_cuda:
        return step, loss, None
    return step, loss.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()


def finish_copy(step, loss, copied):
    """The loss as a number, waiting for nothing that was launched after it; SystemExit if training has failed."""
    if copied is not None:
        copied.synchronize()
    if not loss.item() <= 100:  # NaN too
        raise SystemExit(f"the loss is {loss.item()} at step {step}")
    return loss.item()


def main():
    """One experiment: prints the summary and returns it as a dict."""
    start_watchdog()
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    device, device_name, dtype = choose_device()
    seed = os.environ.get("SEED", "42")
    if not seed.isdecimal():
        raise SystemExit(f"SEED={seed} must be a whole number")
    if WIDTH % (HEAD_DIM * QUERIES_PER_KV):
        raise SystemExit(f"{WIDTH=} must be a multiple of {HEAD_DIM=} * {QUERIES_PER_KV=}")
    if TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * MAX_SEQ_LEN):
        raise SystemExit(f"{TOTAL_BATCH_SIZE=} must be a multiple of {DEVICE_BATCH_SIZE=} * {MAX_SEQ_LEN=}")
    torch.manual_seed(int(seed) % 2**63)
    torch.set_float32_matmul_precision("high")
    set_memory_limits(device)

    tokenizer = Tokenizer.from_directory()
    dataset = dataset_id()
    compiles = can_compile(device)
    attention, attend = choose_attention(device, dtype, compiles)
    model = GPT(attend, dtype).to(device)
    optimizer = MuonAdamW(*parameter_groups(model), dtype)
    if compiles:
        compile_hot_functions(model, optimizer)
    rows = warm_up(model, optimizer, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    grad_accum_steps = TOTAL_BATCH_SIZE // (rows * MAX_SEQ_LEN)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"{device_name} | {attention} | {PROFILE} | {dataset} | {num_params / 1e6:.1f} M parameters | "
          f"{rows} rows x {grad_accum_steps}", flush=True)

    loader = make_dataloader(tokenizer, rows, MAX_SEQ_LEN, "train", device)
    batch = next(loader)
    gc.disable()  # a collection stalls a GPU
    print(f"ready to train after {time.perf_counter() - START:.1f} s", flush=True)

    line_end = "\r" if sys.stdout.isatty() else "\n"  # rewritten, or at most 50 lines in a file
    step = 0
    elapsed = 0.0
    shown = -math.inf
    copies = []
    begin = time.perf_counter()
    while elapsed < TIME_BUDGET:
        set_schedules(optimizer, elapsed / TIME_BUDGET, step)
        loss, batch = train_step(model, optimizer, batch, lambda: next(loader), grad_accum_steps)
        # a loss is read when the next step has been launched, so that the GPU never waits for Python
        copies.append(start_copy(loss, step))
        if step > 0:
            last_loss = finish_copy(*copies.pop(0))
        step += 1
        elapsed = time.perf_counter() - begin
        if step > 1 and (line_end == "\r" or elapsed - shown >= TIME_BUDGET / 50):
            shown = elapsed
            tokens_per_second = step * TOTAL_BATCH_SIZE / elapsed
            print(f"step {step:5} | {100 * elapsed / TIME_BUDGET:5.1f} % | loss {last_loss:7.4f} | "
                  f"{tokens_per_second:11,.0f} tok/s | epoch {batch[2]}", end=line_end, flush=True)
    finish_copy(*copies.pop())  # waits for the last step
    training_seconds = time.perf_counter() - begin

    torch.save(model.state_dict(), "model.pt")
    if training_seconds > TIME_BUDGET + 15:  # time that others do not have
        raise SystemExit(f"training took {training_seconds:.0f} s for {step} steps, longer than the budget: "
                         f"lower {TOTAL_BATCH_SIZE=} or the size of the model")
    summary = {"val_bpb": f"{evaluate_bpb(model, tokenizer, EVAL_BATCH_SIZE):.6f}"}
    if os.environ.get("AUTORESEARCH_HOLDOUT") == "1":
        summary["holdout_bpb"] = f"{evaluate_bpb(model, tokenizer, EVAL_BATCH_SIZE, 'holdout'):.6f}"
    tokens = step * TOTAL_BATCH_SIZE
    mfu = tokens * flops_per_token(model) / training_seconds / peak_flops(device_name)
    summary |= {
        "training_seconds": f"{training_seconds:.1f}",
        "total_seconds": f"{time.perf_counter() - START:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(device):.1f}",
        "mfu_percent": f"{100 * mfu:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": step,
        "num_params_M": f"{num_params / 1e6:.1f}",
        "depth": DEPTH,
        "seed": seed,
        "device": device_name,
        "attention": attention,
        "profile": PROFILE,
        "dataset": dataset,
    }
    print("\n---" if line_end == "\r" else "---")
    for key, value in summary.items():
        print(f"{key + ':':<17} {value}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except (SystemExit, YardstickError) as error:  # the agent looks for FAIL
        raise SystemExit(f"FAIL: {error}") from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"FAIL: out of memory with {DEVICE_BATCH_SIZE=}: halve it, and leave TOTAL_BATCH_SIZE. If all "
                         f"steps were made, halve {EVAL_BATCH_SIZE=} instead") from None
