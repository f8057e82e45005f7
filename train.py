"""Train a small GPT for five minutes and print its validation bits per byte. The agent edits this file.

    uv run train.py > run.log 2>&1

Dimensions: B rows, T time, C model, H heads, D head_dim, V vocabulary, N = B*T tokens.
"""

import time

START = time.perf_counter()  # before torch is imported, so that total_seconds has everything

import contextlib
import ctypes
import gc
import math
import os
import sys
import tempfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.adamw import adamw

from prepare import CACHE, MAX_SEQ_LEN, PROFILE, TIME_BUDGET, VOCAB_SIZE, Tokenizer, YardstickError
from prepare import dataset_id, evaluate_bpb, make_dataloader, start_watchdog

# ---------------------------------------------------------------------------
# Hyperparameters: the values of the full profile (one CUDA GPU), then what smaller machines override

# Model
DEPTH = 8  # transformer blocks
ASPECT_RATIO = 96  # model_dim = DEPTH * ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = 128  # channels of an attention head
QUERIES_PER_KV = 1  # query heads that share a key/value head
WINDOW_PATTERN = "SSSL"  # tiled over the layers: L full context, S SHORT_WINDOW of it; the last layer is always L
SHORT_WINDOW = 1 / 8  # share of the context, counted to the left
VE_GATE_CHANNELS = 32  # channels of x that the value embeddings' gate sees
SOFTCAP = 15  # logits lie in (-SOFTCAP, SOFTCAP)
BIGRAM_ROWS = 0  # hashed embeddings of (previous token, token), and a learned share of the one before; 0 is none

# Batch
TOTAL_BATCH_SIZE = 2**17  # tokens per optimizer step
DEVICE_BATCH_SIZE = 32  # rows per forward pass at most, fewer on a small GPU (rows_that_fit); the total stays the same
LOSS_CHUNK = 2**13  # tokens whose logits exist at the same time
EVAL_BATCH_SIZE = 16  # rows per forward pass of the evaluation, whose result does not depend on it

# Optimizer
EMBEDDING_LR = 0.74  # token, value and bigram embeddings (Adam)
UNEMBEDDING_LR = 0.010  # lm_head (Adam)
MATRIX_LR = 0.04  # the matrices of the blocks (Muon)
SCALAR_LR = 0.5  # x0_lambdas (Adam); smear at 0.1 and resid_lambdas at 0.01 of it
WEIGHT_DECAY = 0.2  # of Muon, falls to 0 over the run
VE_WEIGHT_DECAY = 0.004  # of the value embeddings (Adam)
ADAM_BETAS = (0.8, 0.95)  # decay of Adam's first and second moments; x0_lambdas have (0.96, 0.95)
ADAM_EPS = 1e-10  # added to the root of the second moment
POLAR_STEPS = 5  # iterations of Muon's orthogonalisation, 5 at most

# Schedule, as shares of the time budget
WARMUP_RATIO = 0.0  # the learning rate rises from 0
WARMDOWN_RATIO = 0.825  # it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = 0.025  # of the learning rate, at the end

if PROFILE != "full":  # the older constants: over 500 steps of tiny those above gave 1.3135, these 1.3089
    ASPECT_RATIO, SHORT_WINDOW = 64, 1 / 2
    EMBEDDING_LR, UNEMBEDDING_LR, VE_WEIGHT_DECAY = 0.6, 0.004, 0.0
    WARMDOWN_RATIO, FINAL_LR_FRAC = 0.5, 0.0
if PROFILE == "small":  # Apple MPS
    DEPTH, TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE = 4, 2**14, 16
if PROFILE == "tiny":  # two CPU cores: tokens count for more than size, and lookups cost next to nothing
    DEPTH, HEAD_DIM, WINDOW_PATTERN = 2, 64, "L"
    BIGRAM_ROWS, POLAR_STEPS = 2**16, 3
    TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE, LOSS_CHUNK = 2**12, 16, 2**10

# ---------------------------------------------------------------------------
# Attention backends. q (B, T, H, D), k and v (B, T, Hkv, D) -> (B, T, H, D), causal; `window` keys to the
# left plus the query itself are visible.


def repeat_kv(q, *tensors):
    """Repeat the heads of key/value tensors until there are as many as in q."""
    return [t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in tensors]


def sdpa_attention(q, k, v, window):
    """Runs anywhere. An explicit mask, because MPS has leaked future tokens with is_causal in bf16."""
    k, v = repeat_kv(q, k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    position = torch.arange(q.size(2), device=q.device)
    distance = position[:, None] - position  # of the query in the row from the key in the column
    mask = (distance >= 0) & (distance <= window)
    if q.device.type == "cpu":  # torch's own is no faster in the whole model and failed a gradient test at window 0
        scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5
        y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2)


def varlen_attention(q, k, v, window):
    """FlashAttention as bundled with torch: any CUDA GPU with bf16."""
    from torch.nn.attention.varlen import varlen_attn
    B, T = q.shape[:2]
    k, v = repeat_kv(q, k, v)
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    window_size = (window if window < T - 1 else -1, 0)
    return varlen_attn(*(t.flatten(0, 1) for t in (q, k, v)), ends, ends, T, T, window_size=window_size).view_as(q)


def load_fa3():
    """FlashAttention 3 from the Hub's kernels: the fastest on Hopper. Raises whatever goes wrong."""
    from kernels import get_kernel
    # The branch that version=1 stands for; by this name it is also cached, and found again with HF_HUB_OFFLINE=1
    flash_attn_func = get_kernel("kernels-community/flash-attn3", revision="v1").flash_attn_func

    def fa3_attention(q, k, v, window):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window if window < q.size(1) - 1 else -1, 0))
        return y[0] if isinstance(y, tuple) else y

    return fa3_attention


def attempt(what, function):
    """The result of function(), or None after one printed line that says why `what` is not available."""
    try:
        return function()
    except Exception as error:  # no network, no build for this torch or GPU, no triton, ...: there is another way
        print(f"{what} is not available: {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)


def choose_attention(device):
    """(name, function) of the fastest attention backend that loads and runs on `device`."""
    def proven(attend):  # a kernel that is not built for this GPU fails at its first launch
        q = torch.ones(1, 128, 1, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        attend(q, q, q, 64).sum().backward()
        return attend

    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        if (8, 0) <= torch.cuda.get_device_capability(device) <= (9, 0):
            if attend := attempt("fa3", lambda: proven(load_fa3())):
                return "fa3", attend
        if attempt("varlen", lambda: proven(varlen_attention)):
            return "varlen", varlen_attention
    return "sdpa", sdpa_attention


# ---------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    vocab_size: int
    seq_len: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    windows: list  # keys to the left that each layer sees
    dtype: torch.dtype  # of the activations
    bigram_rows: int

    @property
    def model_dim(self):
        return self.n_head * self.head_dim


def layer_windows(pattern, n_layer, T):
    """Window of each layer: the pattern tiled, L full context and S SHORT_WINDOW of it, the last layer always L."""
    if not pattern or set(pattern) - set("SL"):
        raise SystemExit(f"WINDOW_PATTERN={pattern!r} must be made of S and L")
    tiled = [pattern[i % len(pattern)] for i in range(n_layer - 1)] + ["L"]
    return [T - 1 if kind == "L" else int(SHORT_WINDOW * T) for kind in tiled]


def config_from_constants(dtype):
    """The model that the hyperparameters above describe; SystemExit when they contradict each other."""
    n_head = -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
    if HEAD_DIM % 2:
        raise SystemExit(f"HEAD_DIM={HEAD_DIM} must be even: RoPE turns pairs of channels")
    if n_head % QUERIES_PER_KV:
        raise SystemExit(f"{QUERIES_PER_KV=} must divide the {n_head} heads (DEPTH*ASPECT_RATIO/HEAD_DIM)")
    return GPTConfig(VOCAB_SIZE, MAX_SEQ_LEN, DEPTH, n_head, n_head // QUERIES_PER_KV, HEAD_DIM,
                     layer_windows(WINDOW_PATTERN, DEPTH, MAX_SEQ_LEN), dtype, BIGRAM_ROWS)


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def apply_rope(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by their position's angles (T, 1, D/2)."""
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
    def __init__(self, config, layer, attend):
        super().__init__()
        self.config, self.window, self.attend = config, config.windows[layer], attend
        C, kv_dim = config.model_dim, config.n_kv_head * config.head_dim
        self.q, self.k, self.v, self.proj = Linear(C, C), Linear(C, kv_dim), Linear(C, kv_dim), Linear(C, C)
        self.ve_gate = Linear(min(VE_GATE_CHANNELS, C), config.n_kv_head) if has_ve(layer, config.n_layer) else None

    def forward(self, x, ve, cos, sin):
        B, T, C = x.shape
        q, k, v = [linear(x).view(B, T, -1, self.config.head_dim) for linear in (self.q, self.k, self.v)]
        if self.ve_gate is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :self.ve_gate.in_features]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(apply_rope(q, cos, sin)), norm(apply_rope(k, cos, sin))
        return self.proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.fc, self.proj = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer, attend):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer, attend), MLP(config.model_dim)

    def forward(self, x, x0, ve, resid_lambda, x0_lambda, cos, sin):
        x = resid_lambda * x + x0_lambda * x0
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


def has_ve(layer, n_layer):
    """Value embeddings are on alternating layers, counted so that the last has one."""
    return layer % 2 == (n_layer - 1) % 2


def head_loss(x, weight, targets):
    """Sum of the cross-entropies of targets (n,) given the trunk's output x (n, C), in float32."""
    return F.cross_entropy(softcap(F.linear(x, weight.to(x.dtype)).float()), targets, reduction="sum")


def softcap(logits):
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


class ChunkedLoss(torch.autograd.Function):
    """Mean of loss_fn over tokens, chunk by chunk: gradients are taken in the forward pass, so that only
    one chunk's logits ever exist (whole ones are 2.1 GB in float32 at 32 x 2048 x 8192)."""

    @staticmethod
    def forward(ctx, loss_fn, x, weight, targets):
        total, dx, dweight = 0, torch.empty_like(x), torch.zeros_like(weight)
        weight = weight.detach().requires_grad_()
        for x_chunk, dx_chunk, target in zip(x.split(LOSS_CHUNK), dx.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            x_chunk = x_chunk.detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_fn(x_chunk, weight, target)
            grads = torch.autograd.grad(loss, (x_chunk, weight))
            dx_chunk.copy_(grads[0])
            dweight += grads[1]
            total += loss.detach()
        ctx.save_for_backward(dx.div_(len(x)), dweight.div_(len(x)))
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dweight = ctx.saved_tensors
        return None, dx * grad.to(dx.dtype), dweight * grad, None


class GPT(nn.Module):
    """model(inputs) gives logits (B, T, V), model.loss(inputs, targets) the mean cross-entropy."""

    def __init__(self, config, attend):
        super().__init__()
        self.config, self.head_loss = config, head_loss
        C, V = config.model_dim, config.vocab_size
        self.wte = nn.Embedding(V, C)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, config.n_kv_head * config.head_dim)
                                           for i in range(config.n_layer) if has_ve(i, config.n_layer)})
        if config.bigram_rows:
            self.bigram = nn.Embedding(config.bigram_rows, C)
            self.smear = nn.Parameter(torch.zeros(C))
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Linear(C, V)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        frequencies = 10_000.0 ** -torch.linspace(0, 1, config.head_dim // 2 + 1)[:-1]
        angles = torch.arange(config.seq_len)[:, None, None] * frequencies
        self.register_buffer("cos", angles.cos().to(config.dtype), persistent=False)  # (T, 1, D/2)
        self.register_buffer("sin", angles.sin().to(config.dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        bound = (3 / self.config.model_dim) ** 0.5  # of a uniform distribution with variance 1/C
        for block in self.blocks:
            for matrix in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
                nn.init.uniform_(matrix.weight, -bound, bound)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        if self.config.bigram_rows:
            nn.init.zeros_(self.bigram.weight)

    def trunk(self, inputs):
        """(B, T) ids -> (B, T, C), all but the head."""
        T = inputs.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x = self.wte(inputs)
        if self.config.bigram_rows:
            before = F.pad(inputs, (1, -1))
            x = x + self.bigram((before * 36313 ^ inputs * 27191) % self.config.bigram_rows)
            x = x + self.smear * F.pad(x, (0, 0, 1, -1))  # the position before
        x0 = norm(x.to(self.config.dtype))
        x = x0.view_as(x0)  # not the same object, for which the first block would be compiled once more
        for i, block in enumerate(self.blocks):
            ve = self.value_embeds[str(i)](inputs).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, x0, ve, self.resid_lambdas[i].to(x.dtype), self.x0_lambdas[i].to(x.dtype), cos, sin)
        return norm(x)

    def forward(self, inputs):
        return softcap(self.lm_head(self.trunk(inputs)))

    def loss(self, inputs, targets):
        x = self.trunk(inputs).flatten(0, 1)  # (N, C)
        return ChunkedLoss.apply(self.head_loss, x, self.lm_head.weight, targets.flatten())

    def compile(self):
        """Compile block by block: layers of the same kind share their code."""
        torch._dynamo.config.recompile_limit = 64  # kinds of layers, with and without gradients; over it: eager
        for block in self.blocks:
            block.compile(dynamic=False)
        self.head_loss = torch.compile(head_loss, dynamic=False)


def parameter_groups(model):
    """{group: parameters}: the one partition behind the optimizer, the counts and the FLOPs."""
    groups = {
        "embedding": [model.wte.weight] + ([model.bigram.weight] if model.config.bigram_rows else []),
        "value_embedding": list(model.value_embeds.parameters()),
        "smear": [model.smear] if model.config.bigram_rows else [],
        "lm_head": [model.lm_head.weight],
        "matrix": list(model.blocks.parameters()),
        "resid_lambdas": [model.resid_lambdas],
        "x0_lambdas": [model.x0_lambdas],
    }
    ids = sorted(id(p) for group in groups.values() for p in group)
    assert ids == sorted(map(id, model.parameters())), "every parameter must be in exactly one group"
    return groups


def flops_per_token(model):
    """Training FLOPs: 6 per matmul parameter, 12 H D per key of the window, also where the row has fewer."""
    groups, config = parameter_groups(model), model.config
    matmul = sum(p.numel() for p in groups["matrix"] + groups["lm_head"])
    return 6 * matmul + 12 * config.model_dim * sum(window + 1 for window in config.windows)


# ---------------------------------------------------------------------------
# Optimizer

# Polar Express (Amsel et al. 2025): the (a, b, c) of each step
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g, steps, dtype):
    """Replace the singular values of matrices g (n, rows, cols) by about 1."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # products of the smaller side
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x


def muon_update(p, g, momentum_buffer, second_moment, lr, weight_decay, momentum, beta2, steps, dtype):
    """One Muon step on stacked matrices (n, rows, cols): changes the buffers in place, returns the new p.

    Nesterov momentum, orthogonalisation, NorMuon (Li et al. 2025: divide each row by its running root mean square, or
    each column where rows are fewer and so all alike, and keep the norm), decay where update and weight agree in sign.
    """
    momentum_buffer.mul_(momentum).add_(g * (1 - momentum))
    u = orthogonalize(momentum * momentum_buffer + (1 - momentum) * g, steps, dtype).float()
    u_norm = u.norm(dim=(-2, -1), keepdim=True)
    second_moment.lerp_(u.square().mean(-1 if second_moment.size(-1) == 1 else -2, keepdim=True), 1 - beta2)
    u = u * second_moment.clamp_min(1e-10).rsqrt()
    u = u * (u_norm / u.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    return p - lr * (u + weight_decay * p * (u * p >= 0))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with kind "muon", AdamW for those with kind "adamw"; all state exists from the start."""

    def __init__(self, groups, dtype):
        super().__init__(groups, {})
        self.dtype, self.muon_update = dtype, muon_update
        for group in self.param_groups:
            params = group["params"]
            if group["kind"] == "adamw":
                for p in params:
                    self.state[p] = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p),
                                         step=torch.zeros((), device=p.device))
            else:  # matrices of one shape, stacked
                zeros = torch.zeros(len(params), *params[0].shape, device=params[0].device)
                axis = -1 if zeros.size(-2) >= zeros.size(-1) else -2
                self.state[params[0]] = dict(momentum_buffer=zeros, second_moment=zeros.mean(axis, keepdim=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, state = group["params"], [self.state[p] for p in group["params"]]
            if group["kind"] == "adamw":
                beta1, beta2 = group["betas"]
                adamw(params, [p.grad for p in params], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state],
                      [], [s["step"] for s in state], fused=True, amsgrad=False, maximize=False, lr=group["lr"],
                      beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"])
            else:
                rows, cols = params[0].shape
                new = self.muon_update(  # scheduled values as tensors, so that none is compiled in
                    torch.stack(params), torch.stack([p.grad for p in params]), state[0]["momentum_buffer"],
                    state[0]["second_moment"], torch.tensor(group["lr"] * max(1, rows / cols) ** 0.5),
                    torch.tensor(group["weight_decay"]), torch.tensor(group["momentum"]), group["beta2"], POLAR_STEPS,
                    self.dtype)
                torch._foreach_copy_(params, list(new.unbind()))


def make_optimizer(model):
    adam_scale = (model.config.model_dim / 768) ** -0.5  # Adam's learning rates were tuned at 768
    adam = dict(kind="adamw", betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0)
    options = {
        "embedding": adam | dict(lr=EMBEDDING_LR * adam_scale),
        "value_embedding": adam | dict(lr=EMBEDDING_LR * adam_scale, weight_decay=VE_WEIGHT_DECAY),
        "smear": adam | dict(lr=SCALAR_LR * 0.1),
        "lm_head": adam | dict(lr=UNEMBEDDING_LR * adam_scale),
        "resid_lambdas": adam | dict(lr=SCALAR_LR * 0.01),
        "x0_lambdas": adam | dict(lr=SCALAR_LR, betas=(0.96, 0.95)),
        "matrix": dict(kind="muon", lr=MATRIX_LR, beta2=0.95, momentum=0.0, weight_decay=0.0),
    }
    split = {}  # Muon stacks matrices of one shape
    for name, params in parameter_groups(model).items():
        for p in params:
            new = options[name] | dict(params=[], initial_lr=options[name]["lr"])
            split.setdefault((name, p.shape if name == "matrix" else None), new)["params"].append(p)
    return MuonAdamW(list(split.values()), model.config.dtype)


# ---------------------------------------------------------------------------
# Schedules


def lr_multiplier(progress):
    """Trapezoid over progress 0..1: up during WARMUP_RATIO, down to FINAL_LR_FRAC during WARMDOWN_RATIO."""
    up = progress / WARMUP_RATIO if WARMUP_RATIO else 1.0
    down = (1 - progress) / WARMDOWN_RATIO if WARMDOWN_RATIO else 1.0
    return min(1.0, up, FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * max(0.0, down))


def set_schedules(optimizer, progress, step):
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier(progress)
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.10 * min(step / 300, 1)
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)


# ---------------------------------------------------------------------------
# The run

PEAK_FLOPS = {  # dense bf16, by a part of the GPU's name
    "H100 PCIe": 756e12, "H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
    "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 210e12,
}


def choose_device():
    """(device, its name, the dtype of activations): bf16 where the hardware multiplies it, else float32."""
    if PROFILE != "tiny" and torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda"), torch.cuda.get_device_name(), torch.bfloat16 if bf16 else torch.float32
    if PROFILE == "small" and torch.backends.mps.is_available():
        return torch.device("mps"), "Apple MPS", torch.float32
    bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.device("cpu"), f"CPU x{torch.get_num_threads()}", torch.bfloat16 if bf16 else torch.float32


def keep_freed_memory():
    """Let glibc keep what is freed: mapping every large tensor anew costs more than the work on it."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


def keep_compiled_code(folder, limit=2 * 10**9):
    """Keep torch.compile's work in `folder` (/tmp goes with a reboot), without its oldest files beyond `limit` bytes.
    Runs may share it: torch and triton rename finished files into place and make again what is missing."""
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")  # FlashAttention 3 is one
    with contextlib.suppress(OSError):  # read-only: torch's folder in /tmp; a file is gone: another run deletes too
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
        files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
        for stat, path in sorted(files, key=lambda file: -file[0].st_mtime):
            limit -= stat.st_size
            if limit < 0:
                path.unlink()


def can_compile(device):
    """Whether to torch.compile: on CUDA, if triton works. On two CPU cores the tiny model ran at 16.7 k tokens/s
    compiled, after 62 s of start-up, and at 17.6 k eagerly."""
    probe = lambda: torch.compile(torch.sin)(torch.ones(64, device=device))
    return device.type == "cuda" and attempt("torch.compile", probe) is not None


def rows_that_fit(model, memory):
    """DEVICE_BATCH_SIZE, halved until training takes no more than so many bytes of GPU memory."""
    # Kept for each token: what goes into and comes out of the blocks' matmuls and a tenth more; at work besides: 16 C.
    # That makes 174 C elements at 8 layers, where 172 C were counted, tensor by tensor, without torch.compile.
    matmuls = sum(m.in_features + m.out_features for m in model.blocks.modules() if isinstance(m, Linear))
    row = model.config.seq_len * (1.1 * matmuls + 16 * model.config.model_dim) * model.config.dtype.itemsize
    # Weights, gradients, two moments and warm_up's three copies; for each logit of a chunk 16 bytes
    fixed = 7 * sum(p.nbytes for p in model.parameters()) + 16 * LOSS_CHUNK * model.config.vocab_size
    rows = DEVICE_BATCH_SIZE
    while rows % 2 == 0 and fixed + rows * row > 0.9 * memory - 1e9:  # the rest is for CUDA itself, a desktop and gaps
        rows //= 2
    return rows


def train_step(model, optimizer, batch, next_batch, grad_accum_steps):
    """One optimizer step from `batch`; returns (its mean loss as a tensor, the batch of the next step)."""
    total = 0
    for _ in range(grad_accum_steps):
        loss = model.loss(*batch[:2])
        total += loss.detach()
        (loss / grad_accum_steps).backward()
        batch = next_batch()  # while the GPU computes
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return total / grad_accum_steps, batch


def warm_up(model, optimizer, shape, device):
    """Compile and allocate everything with one step on random tokens, then undo what it did."""
    tensors = [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
    saved = [tensor.detach().clone() for tensor in tensors]
    tokens = torch.randint(VOCAB_SIZE, (2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    set_schedules(optimizer, 0.0, 0)
    loss, _ = train_step(model, optimizer, tokens, lambda: tokens, 1)
    with torch.no_grad():
        for tensor, value in zip(tensors, saved):
            tensor.copy_(value)
    return loss.item()  # waits for the device


def start_reading(loss, step):
    """Begin to copy a loss to the host; the function returned waits for that copy alone, not for later work."""
    host = loss.to("cpu", non_blocking=loss.is_cuda)
    copied = torch.cuda.current_stream().record_event() if loss.is_cuda else None

    def read():
        if copied:
            copied.synchronize()
        if not host.item() <= 100:  # NaN too
            raise SystemExit(f"FAIL: loss is {host.item()} at step {step}")
        return host.item()

    return read


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main():
    """One experiment; prints the summary and returns it as a dict."""
    start_watchdog()
    device, device_name, dtype = choose_device()
    seed = os.environ.get("SEED", "42")
    if not seed.isdecimal() or len(seed) > 18:
        raise SystemExit(f"SEED={seed} must be a whole number of at most 18 digits")
    torch.manual_seed(int(seed))
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        keep_compiled_code(CACHE / "compiled")
    if device.type == "cpu":
        keep_freed_memory()
    if TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * MAX_SEQ_LEN):
        raise SystemExit(f"{TOTAL_BATCH_SIZE=} must be a multiple of {DEVICE_BATCH_SIZE=} * {MAX_SEQ_LEN=}")

    tokenizer, dataset = Tokenizer.from_directory(), dataset_id()
    attention, attend = choose_attention(device)
    model = GPT(config_from_constants(dtype), attend).to(device)
    if device.type == "cuda":
        for table in (model.wte, *model.value_embeds.values()):
            table.to(torch.bfloat16)  # gradients and Adam's state too: half the traffic
    optimizer = make_optimizer(model)
    num_params = sum(p.numel() for p in model.parameters())
    flops, peak = flops_per_token(model), next((f for name, f in PEAK_FLOPS.items() if name in device_name), math.inf)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    rows = rows_that_fit(model, memory)
    grad_accum_steps = TOTAL_BATCH_SIZE // (rows * MAX_SEQ_LEN)
    loader = make_dataloader(tokenizer, rows, MAX_SEQ_LEN, "train", device)
    print(f"{device_name} | {attention} | {PROFILE} | {dataset} | {num_params / 1e6:.1f} M parameters | "
          f"{rows} rows x {grad_accum_steps}", flush=True)

    if can_compile(device):
        model.compile()
        optimizer.muon_update = torch.compile(muon_update, dynamic=False)
    warm_up(model, optimizer, (rows, MAX_SEQ_LEN), device)
    batch = next(loader)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in mid-run stalls the queue of a GPU
    print(f"ready to train after {time.perf_counter() - START:.1f} s", flush=True)

    step, elapsed, smooth, shown, read_loss, tty = 0, 0.0, 0.0, -math.inf, None, sys.stdout.isatty()
    begin = time.perf_counter()
    while elapsed < TIME_BUDGET:
        set_schedules(optimizer, elapsed / TIME_BUDGET, step)
        loss, batch = train_step(model, optimizer, batch, lambda: next(loader), grad_accum_steps)
        read_previous, read_loss = read_loss, start_reading(loss, step)
        loss = (read_previous or read_loss)()
        step += 1
        elapsed = time.perf_counter() - begin
        smooth = 0.9 * smooth + 0.1 * loss
        if tty or elapsed - shown >= TIME_BUDGET / 50:  # a line rewritten in place, or at most 50 lines in a file
            shown = elapsed
            rate = step * TOTAL_BATCH_SIZE / elapsed
            line = (f"step {step:5} | {100 * elapsed / TIME_BUDGET:5.1f} % | loss {smooth / (1 - 0.9**step):.4f} | "
                    f"{rate:,.0f} tok/s | mfu {100 * rate * flops / peak:.1f} % | epoch {batch[2]} | "
                    f"{max(0, TIME_BUDGET - elapsed):.0f} s left")
            print(f"\r{line:<110}" if tty else line, end="" if tty else "\n", flush=True)
    read_loss()  # waits for the last step
    training_seconds = time.perf_counter() - begin
    gc.enable()

    torch.save(model.state_dict(), "model.pt")
    if training_seconds > TIME_BUDGET + 15:  # time that others do not have
        raise SystemExit(f"FAIL: {training_seconds:.0f} s of training, a step takes {training_seconds / step:.0f} s: "
                         f"lower {TOTAL_BATCH_SIZE=} or the model's size")
    splits = ("val", "holdout") if os.environ.get("AUTORESEARCH_HOLDOUT") == "1" else ("val",)
    scores = {f"{split}_bpb": f"{evaluate_bpb(model, tokenizer, EVAL_BATCH_SIZE, split):.6f}" for split in splits}
    tokens = step * TOTAL_BATCH_SIZE
    summary = scores | {
        "training_seconds": f"{training_seconds:.1f}",
        "total_seconds": f"{time.perf_counter() - START:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(device):.1f}",
        "mfu_percent": f"{100 * tokens * flops / training_seconds / peak:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": step, "num_params_M": f"{num_params / 1e6:.1f}",
        "depth": DEPTH, "seed": seed, "device": device_name,
        "attention": attention, "profile": PROFILE, "dataset": dataset,
    }
    print("\n---" if tty else "---")
    for key, value in summary.items():
        print(f"{key + ':':<17} {value}")
    return summary


if __name__ == "__main__":
    try:
        main()
    except YardstickError as error:
        raise SystemExit(f"FAIL: {error}") from None
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and what the CPU and MPS raise
        if "out of memory" not in str(error).lower() and "allocate memory" not in str(error):
            raise
        raise SystemExit(f"FAIL: out of memory with {DEVICE_BATCH_SIZE=}: set it to half the rows of the first line, "
                         f"TOTAL_BATCH_SIZE stays the same; after the last step halve {EVAL_BATCH_SIZE=}") from None
