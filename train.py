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
import re
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare import MAX_SEQ_LEN, PROFILE, TIME_BUDGET, VOCAB_SIZE, Tokenizer, YardstickError
from prepare import dataset_id, evaluate_bpb, make_dataloader, start_watchdog

# --------------
# Hyperparameters. Each is set in its one line here and nowhere else.


def by_profile(full, small, tiny):
    return {"full": full, "small": small, "tiny": tiny}[PROFILE]


CPU_BF16 = any(torch.cpu.get_capabilities().get(kind) for kind in ("amx_bf16", "avx512_bf16"))  # it multiplies bf16

# Model
DEPTH = by_profile(full=8, small=4, tiny=1)  # transformer blocks
ASPECT_RATIO = by_profile(full=96, small=64, tiny=256 if CPU_BF16 else 128)  # C = DEPTH * ASPECT_RATIO, in whole heads
HEAD_DIM = by_profile(full=128, small=128, tiny=64)  # channels of an attention head
QUERIES_PER_KV = 1  # query heads that share a key/value head
WINDOW_PATTERN = by_profile(full="SSSL", small="L", tiny="L")  # tiled over the layers: L full context, S short
SHORT_WINDOW = 1 / 8  # share of the context that an S layer sees
ROPE_BASE = 10_000  # the slowest channel turns by one radian in so many positions
KEY_SHIFT = by_profile(full=0, small=0, tiny=1)  # positions by which half of the heads get keys late
VE_GATE_CHANNELS = 32  # channels of x that the value embeddings' gate sees
X0_LAMBDA = 0.1  # initial share of the embedding that each layer adds to its input
MLP_RATIO = by_profile(full=4, small=4, tiny=1)  # hidden channels of an MLP / C
SOFTCAP = by_profile(full=15, small=15, tiny=0)  # logits lie in (-SOFTCAP, SOFTCAP); 0: anywhere
BIGRAM_ROWS = by_profile(full=0, small=0, tiny=2**17)  # hashed embeddings of token pairs, and smear; 0: neither
SMEAR = 3  # earlier positions mixed into an embedding, in learned shares

# Batch
TOTAL_BATCH_SIZE = by_profile(full=2**17, small=2**14, tiny=2**13)  # tokens per optimizer step
DEVICE_BATCH_SIZE = by_profile(full=64, small=16, tiny=32)  # rows per forward pass, fewer if they do not fit
LOSS_CHUNK = by_profile(full=2**13, small=2**13, tiny=2**12)  # tokens whose logits exist at a time
EVAL_BATCH_SIZE = 16  # rows per forward pass of the evaluation

# Optimizer
EMBEDDING_LR = by_profile(full=0.74, small=0.6, tiny=0.6)  # token, value and bigram embeddings
UNEMBEDDING_LR = by_profile(full=0.010, small=0.004, tiny=0.010)  # lm_head (Adam)
SCALAR_LR = 0.5  # x0_lambdas (Adam); smear at 0.1 and resid_lambdas at 0.01 of it
VE_WEIGHT_DECAY = by_profile(full=0.004, small=0, tiny=0)  # of the value embeddings (Adam)
ADAM_BETAS = (0.8, 0.95)  # of Adam's first and second moments
X0_BETAS = (0.96, 0.95)  # the same for x0_lambdas
ADAM_EPS = 1e-10  # added to the root of the second moment
MATRIX_LR = by_profile(full=0.04, small=0.04, tiny=0.06)  # the matrices of the blocks (Muon)
WEIGHT_DECAY = 0.2  # of Muon, falls to 0 over the run
MOMENTUM = (0.85, 0.95)  # of Muon: at the first step, and from MOMENTUM_STEPS on
MOMENTUM_STEPS = 300  # steps in which the momentum rises
NORMUON_BETA2 = 0.95  # of NorMuon's second moment
POLAR_STEPS = by_profile(full=5, small=5, tiny=3)  # iterations of Polar Express, 5 at most

# Schedule, as shares of the time budget
WARMUP_RATIO = 0.0  # the learning rate rises from 0
WARMDOWN_RATIO = by_profile(full=0.825, small=0.5, tiny=0.85)  # it falls to FINAL_LR_FRAC
FINAL_LR_FRAC = by_profile(full=0.025, small=0, tiny=0)  # of the learning rate, at the end

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
    k, v = repeat_kv(k, q.size(2)), repeat_kv(v, q.size(2))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    position = torch.arange(q.size(2), device=q.device)
    distance = position[:, None] - position  # of query (row) and key (column)
    mask = (distance >= 0) & (distance <= window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def varlen_attention(q, k, v, window):
    """FlashAttention as bundled with torch: any CUDA GPU with bf16."""
    from torch.nn.attention.varlen import varlen_attn
    B, T, H, _ = q.shape
    q, k, v = q.flatten(0, 1), repeat_kv(k, H).flatten(0, 1), repeat_kv(v, H).flatten(0, 1)  # (N, H, D)
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
    backends = [("sdpa", lambda: sdpa_attention)]
    if device.type == "cuda" and dtype == torch.bfloat16:
        backends.insert(0, ("varlen", lambda: varlen_attention))
        if (8, 0) <= torch.cuda.get_device_capability() <= (9, 0):  # what it is built for
            backends.insert(0, ("fa3", load_fa3))
    return backends


# --------------
# Model


def layer_windows():
    """Keys to the left that each layer sees: the pattern tiled, the last layer always L (full context)."""
    sizes = {"L": MAX_SEQ_LEN - 1, "S": int(SHORT_WINDOW * MAX_SEQ_LEN)}
    windows = [sizes[WINDOW_PATTERN[i % len(WINDOW_PATTERN)]] for i in range(DEPTH)]
    windows[-1] = sizes["L"]
    return windows


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def apply_rope(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by their position's angles (T, 1, D)."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class Linear(nn.Linear):
    """No bias, zero at first; the float32 weight is used in the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, C, window, has_ve):
        super().__init__()
        self.window, self.attend = window, sdpa_attention  # warm_up_fastest() replaces it
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
        if KEY_SHIFT:  # a query like an earlier position finds the token after it: one layer can copy
            k, late = k.tensor_split(2, 2)
            k = torch.cat((k, F.pad(late, (0, 0, 0, 0, KEY_SHIFT, -KEY_SHIFT))), 2)
        q, k = norm(apply_rope(q, cos, sin)), norm(apply_rope(k, cos, sin))  # QK-norm
        return self.proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.fc, self.proj = Linear(C, MLP_RATIO * C), Linear(MLP_RATIO * C, C)

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, C, window, has_ve):
        super().__init__()
        self.attn, self.mlp = Attention(C, window, has_ve), MLP(C)

    def forward(self, x, x0, ve, resid_lambda, x0_lambda, cos, sin):
        x = resid_lambda * x + x0_lambda * x0
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


def logits_of(x, weight):
    """Float32 logits of the trunk's output x (..., C) and the head's weight (V, C)."""
    logits = F.linear(x, weight.to(x.dtype)).float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP) if SOFTCAP else logits


@torch.no_grad()
def head_loss(x, weight, target):
    """(sum of the cross-entropies of target (n, 1) given the trunk's output x (n, C), its gradients by x and weight).

    By hand: autograd would pass over the logits, the largest tensors, more often.
    """
    logits = logits_of(x, weight)
    p = logits.softmax(-1)
    # sum of -log p[target], by the likeliest token, whose p cannot underflow
    loss = (logits.amax(-1) - logits.gather(1, target)[:, 0] - p.amax(-1).log()).sum()
    grad = p.scatter_add_(1, target, p.new_full(target.shape, -1))  # by the softcapped logits
    if SOFTCAP:
        grad *= 1 - (logits / SOFTCAP).square()
    grad = grad.to(x.dtype)
    return loss, grad @ weight.to(x.dtype), grad.mT @ x


class GPT(nn.Module):
    """model(inputs) gives logits (B, T, V), model.loss_backward(inputs, targets) the loss and its gradients."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.head_loss = dtype, head_loss  # dtype of the activations
        n_head = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)
        if n_head % QUERIES_PER_KV:
            raise SystemExit(f"{QUERIES_PER_KV=} must divide the {n_head} heads")
        self.model_dim = C = n_head * HEAD_DIM
        self.windows = layer_windows()
        with_ve = range((DEPTH - 1) % 2, DEPTH, 2)  # every second layer, and the last
        self.wte = nn.Embedding(VOCAB_SIZE, C)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(VOCAB_SIZE, C // QUERIES_PER_KV) for i in with_ve})
        if BIGRAM_ROWS:
            self.bigram = nn.Embedding(BIGRAM_ROWS, C, sparse=True)
            self.smear = nn.Parameter(torch.zeros(SMEAR, C))
        self.blocks = nn.ModuleList(Block(C, window, i in with_ve) for i, window in enumerate(self.windows))
        self.lm_head = Linear(C, VOCAB_SIZE)
        self.resid_lambdas = nn.Parameter(torch.ones(DEPTH))
        self.x0_lambdas = nn.Parameter(torch.full((DEPTH,), X0_LAMBDA))
        frequencies = float(ROPE_BASE) ** -torch.linspace(0, 1, HEAD_DIM // 2 + 1)[:-1]
        angles = torch.arange(MAX_SEQ_LEN)[:, None, None] * torch.cat((frequencies, -frequencies))
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)  # (T, 1, D)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        bound = (3 / self.model_dim) ** 0.5  # of a uniform distribution with variance 1/C
        for block in self.blocks:
            for matrix in (block.attn.q, block.attn.k, block.attn.v, block.mlp.fc):
                nn.init.uniform_(matrix.weight, -bound, bound)
        nn.init.normal_(self.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        if BIGRAM_ROWS:
            nn.init.zeros_(self.bigram.weight)

    def trunk(self, inputs):
        """(B, T) ids -> (B, T, C), all but the head."""
        T = inputs.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x = self.wte(inputs)
        if BIGRAM_ROWS:
            before = F.pad(inputs, (1, -1))
            x = x + self.bigram((before * 36313 ^ inputs * 27191) % BIGRAM_ROWS)
            x = x + sum(share * F.pad(x, (0, 0, i, -i)) for i, share in enumerate(self.smear, 1))
        x = x0 = norm(x.to(self.dtype))
        resid_lambdas, x0_lambdas = self.resid_lambdas.unbind(), self.x0_lambdas.unbind()
        for i, block in enumerate(self.blocks):
            ve = self.value_embeds[str(i)](inputs).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, x0, ve, resid_lambdas[i], x0_lambdas[i], cos, sin)
        return norm(x)

    def forward(self, inputs):
        return logits_of(self.trunk(inputs), self.lm_head.weight)

    def loss_backward(self, inputs, targets, share=1.0):
        """`share` of the mean cross-entropy, its gradients added to .grad; the head chunk by chunk, to save memory."""
        x = self.trunk(inputs).flatten(0, 1)  # (N, C)
        weight, scale = self.lm_head.weight, share / len(x)
        total, x_grads = 0, []
        for chunk, target in zip(x.split(LOSS_CHUNK), targets.view(-1, 1).split(LOSS_CHUNK)):
            loss, x_grad, weight_grad = self.head_loss(chunk, weight, target)
            total += loss * scale
            x_grads.append(x_grad)
            weight.backward(weight_grad * scale)  # adds it to .grad
        x.backward(torch.cat(x_grads) * scale)
        return total

    def compile(self):
        self.trunk = torch.compile(self.trunk, dynamic=False)
        self.head_loss = torch.compile(head_loss, dynamic=False)


def parameter_groups(model):
    """(AdamW's groups, Muon's groups): every parameter in exactly one of them."""
    scale = (model.model_dim / 768) ** -0.5  # Adam's learning rates were tuned at 768
    adamw = [
        dict(params=[model.wte.weight], lr=EMBEDDING_LR * scale),
        dict(params=list(model.value_embeds.parameters()), lr=EMBEDDING_LR * scale, weight_decay=VE_WEIGHT_DECAY),
        dict(params=[model.lm_head.weight], lr=UNEMBEDDING_LR * scale),
        dict(params=[model.resid_lambdas], lr=SCALAR_LR * 0.01),
        dict(params=[model.x0_lambdas], lr=SCALAR_LR, betas=X0_BETAS),
    ]
    if BIGRAM_ROWS:
        adamw[0]["params"].append(model.bigram.weight)
        adamw.append(dict(params=[model.smear], lr=SCALAR_LR * 0.1))
    stacks = {}  # Muon stacks matrices of one shape
    for p in model.blocks.parameters():
        stacks.setdefault(p.shape, []).append(p)
    muon = [dict(params=stack, lr=MATRIX_LR * max(1, rows / cols) ** 0.5) for (rows, cols), stack in stacks.items()]
    grouped = [id(p) for group in adamw + muon for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "a parameter is in no group or in two"
    return adamw, muon


def flops_per_token(model):
    """Training FLOPs: 6 per matmul parameter, 12 C per key of the window, also where the row has fewer."""
    matmul = sum(p.numel() for p in [*model.blocks.parameters(), model.lm_head.weight])
    return 6 * matmul + 12 * model.model_dim * sum(window + 1 for window in model.windows)


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
    x = x.mT if tall else x  # products of the smaller side
    for a, b, c in POLAR_EXPRESS[:POLAR_STEPS]:
        A = x @ x.mT
        x = a * x + (b * A + c * (A @ A)) @ x
    return x.mT if tall else x


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


class MuonAdamW(torch.optim.AdamW):
    """Muon, torch's AdamW, and a normalized step for sparse gradients. All state begins as zeros."""

    def __init__(self, adamw_groups, muon_groups, dtype):
        super().__init__(adamw_groups, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True)
        self.muon_groups, self.dtype, self.muon_update = muon_groups, dtype, muon_update
        for group in muon_groups:
            first = group["params"][0]
            buffer = torch.zeros(len(group["params"]), *first.shape, device=first.device)
            axis = -1 if first.size(0) >= first.size(1) else -2
            self.state[first] = dict(momentum_buffer=buffer, second_moment=buffer.mean(axis, keepdim=True))
        for group in self.param_groups + muon_groups:
            group["initial_lr"] = group["lr"]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse:  # Adam would pass over all rows, not those met
                    grad, p.grad = p.grad.coalesce(), None
                    step = F.normalize(grad.values()) * p.size(1) ** 0.5
                    p.index_add_(0, grad.indices()[0], step, alpha=-group["lr"])
        super().step()
        for group in self.muon_groups:
            params = group["params"]
            # tensors, so that torch.compile makes no constants of them
            scheduled = {name: torch.tensor(group[name]) for name in ("lr", "momentum", "weight_decay")}
            new = self.muon_update(torch.stack(params), torch.stack([p.grad for p in params]), dtype=self.dtype,
                                   **self.state[params[0]], **scheduled)
            torch._foreach_copy_(params, list(new.unbind()))


# --------------
# Schedules


def lr_multiplier(progress):
    """Trapezoid over progress 0..1 (warm-up, constant, warm-down)."""
    up = progress / WARMUP_RATIO if WARMUP_RATIO else 1.0
    down = (1 - progress) / WARMDOWN_RATIO if WARMDOWN_RATIO else 1.0
    return min(1.0, up, FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * max(0.0, down))


def set_schedules(optimizer, progress, step):
    first, last = MOMENTUM
    for group in optimizer.param_groups + optimizer.muon_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier(progress)
    for group in optimizer.muon_groups:
        group["momentum"] = first + (last - first) * min(step / MOMENTUM_STEPS, 1)
        group["weight_decay"] = WEIGHT_DECAY * (1 - progress)


# --------------
# The run

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
    return torch.device("cpu"), f"CPU x{torch.get_num_threads()}", torch.bfloat16 if CPU_BF16 else torch.float32


def keep_freed_memory():
    """Let glibc keep what is freed: mapping every large tensor anew costs more than the work on it."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # no glibc
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-2, 2**28)  # M_TOP_PAD


def can_compile(device, dtype):
    """Whether torch.compile works and pays: on a GPU, or on a CPU with bf16."""
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # spares a CPU trials of itself
    compiled = lambda: torch.compile(torch.sin)(torch.ones(64, device=device))
    return (device.type == "cuda" or dtype == torch.bfloat16) and attempt("torch.compile", compiled) is not None


def train_step(model, optimizer, batch, next_batch, grad_accum_steps):
    """One optimizer step; returns (its mean loss as a tensor, the batch of the next step)."""
    total = 0
    for _ in range(grad_accum_steps):
        inputs, targets, _ = batch
        total += model.loss_backward(inputs, targets, 1 / grad_accum_steps)
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
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        finally:
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_copy_(weights, saved)
                for state in optimizer.state.values():
                    torch._foreach_zero_(list(state.values()))
        # not in the except block, which holds the failed step's tensors
        torch.cuda.empty_cache()
        rows = rows // 2 if rows % 2 == 0 else 1


def attempt(what, function):
    """The result of function(), or None after one line that says why `what` is not available."""
    try:
        return function()
    except Exception as error:  # no network, no triton, ...
        print(f"{what} is not available: {type(error).__name__}: {error}".splitlines()[0][:200], flush=True)


def warm_up_fastest(model, optimizer, device):
    """(attention backend, rows): the fastest with which a step compiles and runs."""
    for name, load in attention_backends(device, model.dtype):

        def trial():
            attend = load()
            for block in model.blocks:
                block.attn.attend = attend
            return warm_up(model, optimizer, device)

        # what fails with sdpa, the last, is the model, whose traceback is wanted
        if rows := trial() if name == "sdpa" else attempt(name, trial):
            return name, rows


def start_reading(loss, step):
    """Begin to copy a loss to the host; the function returned waits for the copy, not for later work."""
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
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main():
    """One experiment: prints the summary and returns it as a dict."""
    start_watchdog()
    device, device_name, dtype = choose_device()
    seed = os.environ.get("SEED", "42")
    if not seed.isdecimal():
        raise SystemExit(f"SEED={seed} must be a whole number")
    if TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * MAX_SEQ_LEN):
        raise SystemExit(f"{TOTAL_BATCH_SIZE=} must be a multiple of {DEVICE_BATCH_SIZE=} * {MAX_SEQ_LEN=}")
    torch.manual_seed(int(seed) % 2**63)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()

    tokenizer, dataset = Tokenizer.from_directory(), dataset_id()
    model = GPT(dtype).to(device)
    if device.type == "cuda":
        for table in (model.wte, *model.value_embeds.values()):
            table.to(torch.bfloat16)  # gradients and Adam's state too: half the traffic
    optimizer = MuonAdamW(*parameter_groups(model), dtype)
    if can_compile(device, dtype):
        model.compile()
        optimizer.muon_update = torch.compile(muon_update, dynamic=False)
    attention, rows = warm_up_fastest(model, optimizer, device)
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
    step, elapsed, shown, read_loss = 0, 0.0, -math.inf, None
    begin = time.perf_counter()
    while elapsed < TIME_BUDGET:
        set_schedules(optimizer, elapsed / TIME_BUDGET, step)
        loss, batch = train_step(model, optimizer, batch, lambda: next(loader), grad_accum_steps)
        # read while the GPU works on the next step, so that it never waits for Python
        read_previous, read_loss = read_loss, start_reading(loss, step)
        loss = read_previous() if read_previous else read_loss()
        step += 1
        elapsed = time.perf_counter() - begin
        if line_end == "\r" or elapsed - shown >= TIME_BUDGET / 50:
            shown = elapsed
            tokens_per_second = step * TOTAL_BATCH_SIZE / elapsed
            print(f"step {step:5} | {100 * elapsed / TIME_BUDGET:5.1f} % | loss {loss:7.4f} | "
                  f"{tokens_per_second:11,.0f} tok/s | epoch {batch[2]}", end=line_end, flush=True)
    read_loss()  # waits for the last step
    training_seconds = time.perf_counter() - begin

    torch.save(model.state_dict(), "model.pt")
    if training_seconds > TIME_BUDGET + 15:  # time that others do not have
        raise SystemExit(f"FAIL: {training_seconds:.0f} s of training in {step} steps: lower {TOTAL_BATCH_SIZE=} or "
                         "the model's size")
    start_watchdog()  # anew: a slow GPU evaluates for minutes
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
    except YardstickError as error:
        raise SystemExit(f"FAIL: {error}") from None
    except RuntimeError as error:  # as CUDA, MPS and the CPU say it
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise SystemExit(f"FAIL: out of memory with {DEVICE_BATCH_SIZE=}: halve it, TOTAL_BATCH_SIZE stays the same; "
                         f"after the last step halve {EVAL_BATCH_SIZE=}") from None
