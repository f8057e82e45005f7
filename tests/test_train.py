"""Model, attention, optimizer, schedules and the loop."""

import bisect
import json
import math
import os
import platform
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import prepare
import train

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = [("sdpa", "cpu"), pytest.param("sdpa", "cuda", marks=cuda), pytest.param("varlen", "cuda", marks=cuda),
            pytest.param("fa3", "cuda", marks=cuda)]


def backend(name, device):
    if name == "fa3":
        try:
            return train.load_fa3()
        except Exception as error:
            pytest.skip(f"fa3 is not available: {error}")
    return {"sdpa": train.sdpa_attention, "varlen": train.varlen_attention}[name]


def small_config(**changes):
    values = dict(vocab_size=50, seq_len=16, n_layer=3, n_head=4, n_kv_head=2, head_dim=8, windows=[8, 8, 15],
                  dtype=torch.float32, bigram_rows=0)
    return train.GPTConfig(**values | changes)


def small_model(attend=train.sdpa_attention, **changes):
    """A model whose zero-initialised parts are not zero, so that every path carries something."""
    torch.manual_seed(0)
    model = train.GPT(small_config(**changes), attend)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def naive_attention(q, k, v, window):
    """Attention in float64, one query at a time."""
    B, T, H, D = q.shape
    out = torch.zeros(B, T, H, D, dtype=torch.float64)
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    for h in range(H):
        kv = h * k.size(2) // H
        for t in range(T):
            first = max(0, t - window)
            scores = (k[:, first:t + 1, kv] @ q[:, t, h, :, None])[..., 0] / D**0.5
            out[:, t, h] = (scores.softmax(-1)[:, None] @ v[:, first:t + 1, kv])[:, 0]
    return out


# --- attention


@pytest.mark.parametrize("name, device", BACKENDS)
@pytest.mark.parametrize("window", [0, 3, 31, 63])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_equals_naive_attention(name, device, window, n_kv_head):
    torch.manual_seed(0)
    dtype = torch.float32 if name == "sdpa" else torch.bfloat16
    shape = (2, 64, 4, 64)
    q, k, v = (torch.randn(*shape[:2], h, 64, device=device, dtype=dtype, requires_grad=True)
               for h in (4, n_kv_head, n_kv_head))
    y = backend(name, device)(q, k, v, window)
    weights = torch.randn(shape, dtype=torch.float64)
    grads = torch.autograd.grad((y.cpu().double() * weights).sum(), (q, k, v))
    exact = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    kv_heads = torch.arange(4) * n_kv_head // 4
    mask = torch.ones(64, 64).tril().triu(-window).bool()
    scores = torch.einsum("bqhd,bkhd->bhqk", exact[0], exact[1][:, :, kv_heads]) / 8
    reference = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -math.inf).softmax(-1), exact[2][:, :, kv_heads])
    torch.testing.assert_close(reference.detach(), naive_attention(*exact, window).detach())
    exact_grads = torch.autograd.grad((reference * weights).sum(), exact)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip((y, *grads), (reference, *exact_grads)):
        assert (got.detach().cpu().double() - want).norm() <= bound * (1 + want.norm())


@pytest.mark.parametrize("name, device", BACKENDS)
@pytest.mark.parametrize("window", [0, 5, 63])
def test_a_window_reaches_exactly_that_many_keys_to_the_left(name, device, window):
    """Ports of FlashAttention's window_size=(W, 0) often see W keys instead of W plus the query."""
    dtype = torch.float32 if name == "sdpa" else torch.bfloat16
    q, k, v = (torch.randn(1, 64, 2, 64, device=device, dtype=dtype) for _ in range(3))
    before = backend(name, device)(q, k, v, window)
    v = v.clone()
    v[:, 20] += 10
    moved = (backend(name, device)(q, k, v, window) - before).abs().amax((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(20, min(64, 20 + window + 1)))


@pytest.mark.parametrize("name, device", BACKENDS)
def test_the_model_is_causal_and_its_reach_is_the_sum_of_its_windows(name, device):
    dtype = torch.float32 if name == "sdpa" else torch.bfloat16
    model = small_model(backend(name, device), seq_len=64, windows=[4, 4, 4], dtype=dtype, head_dim=64).to(device)
    tokens = torch.randint(50, (1, 64), device=device)
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 50
    with torch.no_grad():
        moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == list(range(20, 20 + 3 * 4 + 1))


@pytest.mark.parametrize("other", ["bigram.weight", "smear"])
def test_bigrams_and_smear_look_back_by_one_and_never_ahead(other):
    model = small_model(windows=[0, 0, 0], bigram_rows=64)
    torch.nn.init.zeros_(model.get_parameter(other))  # each alone
    tokens = torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [7, 8]


def test_layer_windows_tile_the_pattern_and_end_in_full_context(monkeypatch):
    monkeypatch.setattr(train, "SHORT_WINDOW", 1 / 8)
    assert train.layer_windows("SSSL", 6, 64) == [8, 8, 8, 63, 8, 63]
    with pytest.raises(SystemExit, match="WINDOW_PATTERN='SXL'"):
        train.layer_windows("SXL", 6, 64)


REPO_ID = "kernels-community/flash-attn3"
KERNEL = """
calls = []
def flash_attn_func(q, k, v, **options):
    calls.append(options)
    return q * 1, None
"""


def write_kernel(folder, code=KERNEL, variant="torch-universal", **metadata):
    """A kernel as the `kernels` package finds it in a folder or a snapshot of the Hub."""
    build = folder / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(code)
    described = {"id": f"kernel_{os.urandom(4).hex()}", "name": "flash-attn3", "version": 1, "license": "mit",
                 "python-depends": [], "backend": {"type": "cuda", "archs": ["8.0", "9.0a"]}}
    (build / "metadata.json").write_text(json.dumps(described | metadata))
    return folder


@pytest.fixture
def hopper(monkeypatch):
    """The CPU posing as an H100, as far as choosing an attention asks; varlen is one that runs here."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(train, "varlen_attention", lambda q, k, v, window: q * 1)
    return monkeypatch


def test_fa3_loads_from_a_local_kernel_and_is_launched_with_the_window(hopper, tmp_path):
    hopper.setenv("LOCAL_KERNELS", f"{REPO_ID}={write_kernel(tmp_path)}")
    name, attend = train.choose_attention(torch.device("cuda"))
    q = torch.zeros(1, 16, 2, 8)
    assert name == "fa3" and attend(q, q, q, 4).shape == q.shape
    attend(q, q, q, 15)
    calls = attend.__closure__[0].cell_contents.__globals__["calls"]
    assert calls == [{"causal": True, "window_size": (64, 0)},  # the trial
                     {"causal": True, "window_size": (4, 0)}, {"causal": True, "window_size": (-1, 0)}]


def test_fa3_is_found_offline_in_the_cache_that_an_online_run_leaves(hopper, tmp_path):
    """The cache knows the kernel by the name it was asked for: version=1 would leave a commit without a name."""
    asked = []
    with hopper.context() as online:
        kernel = types.SimpleNamespace(flash_attn_func=None)
        online.setattr("kernels.get_kernel", lambda repo, **options: asked.append(options) or kernel)
        train.load_fa3()
    cached, commit = tmp_path / "kernels--kernels-community--flash-attn3", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / asked[0]["revision"]).write_text(commit)
    write_kernel(cached / "snapshots" / commit)
    hopper.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    hopper.setenv("KERNELS_CACHE", str(tmp_path))
    assert train.choose_attention(torch.device("cuda"))[0] == "fa3"


@pytest.mark.parametrize("kernel, reason", [
    (None, "FileNotFoundError: Cannot find a local snapshot"),  # no network: the tests run with HF_HUB_OFFLINE
    ("untrusted", "ValueError: Kernel repository 'kernels-community/flash-attn3' is not from a trusted publisher"),
    (dict(variant=f"torch25-cxx11-cu118-{platform.machine()}-linux"), "FileNotFoundError: Cannot find a build variant"),
    (dict(backend={"type": "cuda", "archs": ["10.0"]}), "RuntimeError: Kernel 'flash-attn3' variant 'torch-universal'"),
    (dict(code="import of_nothing"), "ModuleNotFoundError: No module named 'of_nothing'"),
    (dict(code=""), "AttributeError: module"),
    (dict(code="def flash_attn_func(*_, **__): raise RuntimeError('no kernel image')"), "RuntimeError: no kernel image"),
    (dict(code="def flash_attn_func(*_, **__): raise TimeoutError"), "TimeoutError: "),
], ids=["not cached", "untrusted", "torch", "architecture", "dependency", "attribute", "first launch", "no message"])
def test_whatever_is_wrong_with_fa3_is_one_printed_line_and_varlen(hopper, tmp_path, capsys, kernel, reason):
    if kernel is None:
        hopper.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    elif kernel == "untrusted":
        hopper.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hopper.setattr("huggingface_hub.HfApi.get_organization_overview", lambda *_: types.SimpleNamespace())
    else:
        hopper.setenv("LOCAL_KERNELS", f"{REPO_ID}={write_kernel(tmp_path, **kernel)}")
    assert train.choose_attention(torch.device("cuda")) == ("varlen", train.varlen_attention)
    printed = capsys.readouterr().out
    assert printed.startswith(f"fa3 is not available: {reason}") and printed.count("\n") == 1


def test_without_fa3_and_varlen_attention_is_sdpa(hopper, capsys):
    def fail(*_):
        raise RuntimeError("not built with FlashAttention")
    hopper.setattr(train, "varlen_attention", fail)
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))  # for which there is no fa3
    assert train.choose_attention(torch.device("cuda")) == ("sdpa", train.sdpa_attention)
    assert capsys.readouterr().out == "varlen is not available: RuntimeError: not built with FlashAttention\n"


# --- model


def test_rope_makes_scores_depend_on_distance_only():
    model = small_model(head_dim=16, seq_len=64)
    q, k = torch.randn(16), torch.randn(16)
    turned_q = train.apply_rope(q.expand(1, 64, 1, 16), model.cos, model.sin)[0, :, 0]
    turned_k = train.apply_rope(k.expand(1, 64, 1, 16), model.cos, model.sin)[0, :, 0]
    scores = turned_q @ turned_k.T
    for distance in (-9, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores[0, 1] != scores[0, 2]


def test_chunked_loss_equals_plain_cross_entropy_to_float32_rounding(monkeypatch):
    monkeypatch.setattr(train, "LOSS_CHUNK", 5)  # does not divide the tokens
    model = small_model()
    inputs, targets = torch.randint(50, (2, 2, 16))
    loss = model.loss(inputs, targets)
    (3 * loss).backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    (3 * plain).backward()
    torch.testing.assert_close(loss, plain)
    for ours, p in zip(got, model.parameters()):
        torch.testing.assert_close(ours, p.grad, atol=1e-6, rtol=1e-4)


def test_a_new_model_predicts_the_uniform_distribution():
    torch.manual_seed(0)
    model = train.GPT(small_config(), train.sdpa_attention)
    inputs, targets = torch.randint(50, (2, 8, 16))
    assert abs(model.loss(inputs, targets).item() - math.log(50)) < 1e-2


def test_logits_are_softcapped():
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    logits = model(torch.randint(50, (2, 16)))
    assert train.SOFTCAP * 0.99 < logits.abs().max() <= train.SOFTCAP


def test_initial_weights_follow_the_recipe():
    torch.manual_seed(0)
    model = train.GPT(small_config(vocab_size=2000, head_dim=32), train.sdpa_attention)
    assert abs(model.wte.weight.std() - 1) < 0.01 and abs(model.lm_head.weight.std() - 0.001) < 1e-5
    for block in model.blocks:
        assert not block.attn.proj.weight.any() and not block.mlp.proj.weight.any()
        assert abs(block.attn.q.weight.std() - 128**-0.5) < 0.002
    assert [block.attn.ve_gate is not None for block in model.blocks] == [True, False, True]
    assert (model.resid_lambdas == 1).all() and (model.x0_lambdas == torch.tensor(0.1)).all()


def test_every_parameter_is_in_exactly_one_group():
    model = small_model(bigram_rows=64)
    grouped = [p for group in train.parameter_groups(model).values() for p in group]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    optimizer = train.make_optimizer(model)
    assert sorted(map(id, grouped)) == sorted(id(p) for group in optimizer.param_groups for p in group["params"])
    model.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="exactly one group"):
        train.parameter_groups(model)


def test_flops_count_six_per_matmul_parameter_and_the_visible_keys():
    model = small_model()  # C=32, kv 16, gates of 32 channels on layers 0 and 2
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 128
    matmul = 3 * block + 2 * 32 * 2 + 50 * 32
    assert train.flops_per_token(model) == 6 * matmul + 12 * 32 * (9 + 9 + 16)


# --- optimizer


def test_only_the_value_embeddings_have_adams_weight_decay(monkeypatch):
    monkeypatch.setattr(train, "VE_WEIGHT_DECAY", 0.004)
    model = small_model(bigram_rows=64)
    decayed = [p for group in train.make_optimizer(model).param_groups if group["weight_decay"] for p in group["params"]]
    assert list(map(id, decayed)) == list(map(id, model.value_embeds.parameters())) and len(decayed) == 2


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    group = dict(kind="adamw", params=[ours], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    optimizer = train.MuonAdamW([group], torch.float32)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(7, 5)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_orthogonalised_singular_values_are_in_a_band_around_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(train.orthogonalize(torch.randn(3, *shape), 5, torch.float32))
    assert 0.7 < values.min() and values.max() < 1.3


def muon(p, **changes):
    group = dict(kind="muon", params=[p], lr=0.1, beta2=0.95, momentum=0.0, weight_decay=0.0)
    return train.MuonAdamW([group | changes], torch.float32)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_muon_keeps_the_norm_of_the_update_and_evens_out_its_rows(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape) * torch.logspace(-1, 1, shape[0])[:, None]
    plain = train.orthogonalize(p.grad[None], train.POLAR_STEPS, torch.float32)[0]
    muon(p).step()
    update = -p.detach() / (0.1 * max(1, shape[0] / shape[1]) ** 0.5)
    torch.testing.assert_close(update.norm(), plain.norm(), rtol=1e-3, atol=0)
    axis = 1 if shape[0] > shape[1] else 0
    assert update.square().mean(axis).std() < 0.01 * update.square().mean()


def test_decay_is_only_where_update_and_weight_agree():
    torch.manual_seed(0)
    start = torch.randn(8, 8)
    with_decay, without = (torch.nn.Parameter(start.clone()) for _ in range(2))
    with_decay.grad = without.grad = torch.randn(8, 8)
    muon(with_decay, weight_decay=0.5).step()
    muon(without).step()
    agree = (start - without) * start > 0
    torch.testing.assert_close(with_decay[agree], (without - 0.1 * 0.5 * start)[agree])
    torch.testing.assert_close(with_decay[~agree], without[~agree])


def test_stacked_matrices_move_as_they_would_alone():
    torch.manual_seed(0)
    start, grads = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    together, alone = [torch.nn.Parameter(s.clone()) for s in start], [torch.nn.Parameter(s.clone()) for s in start]
    for p, g in zip(together + alone, [*grads, *grads]):
        p.grad = g
    train.MuonAdamW([dict(kind="muon", params=together, lr=0.1, beta2=0.95, momentum=0.9, weight_decay=0.1)], torch.float32).step()
    for p in alone:
        muon(p, momentum=0.9, weight_decay=0.1).step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b)


# --- schedules


def test_schedules_at_their_end_points(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.0)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.1)
    got = [train.lr_multiplier(progress) for progress in (0, 0.5, 0.75, 1, 1.01)]
    assert got == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.2)
    assert [train.lr_multiplier(progress) for progress in (0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    optimizer, momenta = train.make_optimizer(small_model()), []
    for step in (0, 150, 300, 5000):
        train.set_schedules(optimizer, 0.0, step)
        momenta += {group["momentum"] for group in optimizer.param_groups if group["kind"] == "muon"}
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_schedules_reach_the_optimizer():
    optimizer = train.make_optimizer(small_model())
    train.set_schedules(optimizer, 1.0, 0)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(train.FINAL_LR_FRAC * group["initial_lr"])
        if group["kind"] == "muon":
            assert group["weight_decay"] == 0 and group["momentum"] == 0.85


# --- the run


SUMMARY = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
           "num_params_M", "depth", "seed", "device", "attention", "profile", "dataset"]


@pytest.fixture
def short_run(prepared, tmp_path, monkeypatch):
    """main() with a second of budget and a model of nothing, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_watchdog", lambda: None)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 8 * prepare.MAX_SEQ_LEN)
    for name, value in dict(DEPTH=2, ASPECT_RATIO=16, HEAD_DIM=16, BIGRAM_ROWS=2**10, TOTAL_BATCH_SIZE=1024, DEVICE_BATCH_SIZE=2,
                            TIME_BUDGET=1.0).items():
        monkeypatch.setattr(train, name, value)
    return monkeypatch


def test_a_run_prints_every_summary_key_once_and_in_order(short_run, tmp_path, capsys):
    summary = train.main()
    lines = capsys.readouterr().out.split("---\n")
    assert len(lines) == 2 and len(lines[0].splitlines()) <= 60
    assert [line.split(":")[0] for line in lines[1].splitlines()] == SUMMARY == list(summary)
    assert all(line[17] == " " and line[18] != " " for line in lines[1].splitlines())
    assert 0 < float(summary["val_bpb"]) < 5 and float(summary["training_seconds"]) >= 1.0
    assert float(summary["total_tokens_M"]) == pytest.approx(summary["num_steps"] * 1024 / 1e6, abs=0.05)
    assert set(torch.load(tmp_path / "model.pt")) >= {"wte.weight", "lm_head.weight", "resid_lambdas"}


def test_the_holdout_is_printed_after_val_bpb_and_only_on_demand(short_run, capsys):
    short_run.setenv("AUTORESEARCH_HOLDOUT", "1")
    summary = train.main()
    assert list(summary) == ["val_bpb", "holdout_bpb", *SUMMARY[1:]] and summary["holdout_bpb"] != summary["val_bpb"]


def test_warm_up_leaves_weights_optimizer_and_random_state_as_they_were():
    model = small_model(vocab_size=prepare.VOCAB_SIZE)
    optimizer = train.make_optimizer(model)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [*model.parameters(), *states, torch.get_rng_state()]
    before = [tensor.detach().clone() for tensor in tensors]
    train.warm_up(model, optimizer, (2, 16), torch.device("cpu"))
    for tensor, value in zip([*tensors[:-1], torch.get_rng_state()], before):
        assert torch.equal(tensor, value)
    assert all(p.grad is None for p in model.parameters())


def test_the_clock_counts_every_step_and_stops_at_the_first_one_past_the_budget(short_run, capsys):
    now = [0.0]
    progress = []
    real = train.train_step

    def step(*args):
        now[0] += 6.2
        return real(*args)

    short_run.setattr(train, "TIME_BUDGET", 30.0)
    short_run.setattr(train, "train_step", step)
    short_run.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    set_schedules = train.set_schedules
    short_run.setattr(train, "set_schedules", lambda o, p, s: progress.append((p, s)) or set_schedules(o, p, s))
    summary = train.main()
    assert summary["num_steps"] == 5 and summary["training_seconds"] == "31.0"
    assert summary["total_tokens_M"] == f"{5 * 1024 / 1e6:.1f}"
    assert progress == [(0.0, 0)] + [(pytest.approx(6.2 * i / 30), i) for i in range(5)]  # the first is the warm-up


def test_a_batch_so_huge_that_its_last_step_overruns_the_budget_gives_no_number(short_run):
    """Two steps of 290 s would have trained for twice the time."""
    now, real = [0.0], train.train_step

    def step(*args):
        now[0] += 290.0
        return real(*args)

    short_run.setattr(train, "TIME_BUDGET", 300.0)
    short_run.setattr(train, "train_step", step)
    short_run.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    with pytest.raises(SystemExit, match="^FAIL: 580 s of training, a step takes 290 s: lower TOTAL_BATCH_SIZE=1024 or"):
        train.main()


@pytest.mark.parametrize("value", [math.nan, math.inf, 101.0])
def test_a_loss_that_explodes_stops_the_run_with_its_step(short_run, value):
    calls = []

    def loss(self, inputs, targets):
        calls.append(1)
        return self.wte.weight.sum() * 0 + (value if len(calls) > 3 else 1.0) + sum(p.sum() * 0 for p in self.parameters())

    short_run.setattr(train, "TOTAL_BATCH_SIZE", 512)  # one forward pass a step; the first call is the warm-up
    short_run.setattr(train.GPT, "loss", loss)
    with pytest.raises(SystemExit, match=rf"^FAIL: loss is {value} at step 2$"):
        train.main()


def test_a_batch_that_cannot_be_split_is_refused(short_run):
    short_run.setattr(train, "TOTAL_BATCH_SIZE", 1000)
    with pytest.raises(SystemExit, match=r"TOTAL_BATCH_SIZE=1000 must be a multiple of DEVICE_BATCH_SIZE=2 \* MAX_SEQ_LEN="):
        train.main()


@pytest.mark.parametrize("name, value", [("HEAD_DIM", 7), ("QUERIES_PER_KV", 3)])
def test_heads_that_do_not_divide_are_refused(short_run, name, value):
    short_run.setattr(train, name, value)
    with pytest.raises(SystemExit, match=f"{name}={value} must"):
        train.main()


@pytest.mark.parametrize("seed", ["lucky", "-1", "\u00b2", "1" * 23])
def test_a_seed_that_is_no_number_is_refused(short_run, seed):
    short_run.setenv("SEED", seed)
    with pytest.raises(SystemExit, match=f"SEED={seed} must be a whole number"):
        train.main()


@pytest.mark.parametrize("profile, device", [("full", "cuda"), ("small", "cuda"), ("tiny", "cpu")])
def test_every_profile_but_tiny_uses_a_cuda_gpu(monkeypatch, profile, device):
    monkeypatch.setattr(train, "PROFILE", profile)
    for name, value in dict(is_available=True, is_bf16_supported=True, get_device_name="H100").items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value, **_: value)
    assert train.choose_device()[0].type == device


@pytest.mark.parametrize("error, line", [
    ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')", "FAIL: out of memory with DEVICE_BATCH_SIZE="),
    ("RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried\")", "FAIL: out of memory with DEVICE_BATCH_SIZE="),
    ("prepare.YardstickError('not causal')", "FAIL: not causal"),
])
def test_expected_failures_end_in_one_line_and_exit_code_one(error, line):
    code = (f"import prepare, torch, runpy, sys; sys.path.insert(0, '.')\ndef boom(): raise {error}\n"
            "prepare.start_watchdog = boom\nrunpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=prepare.Path(train.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_weights_are_saved_before_an_evaluation_that_fails(short_run, tmp_path):
    def fail(*_):
        raise prepare.YardstickError("not causal")
    short_run.setattr(train, "evaluate_bpb", fail)
    with pytest.raises(prepare.YardstickError):
        train.main()
    assert (tmp_path / "model.pt").exists()


def test_two_runs_of_one_seed_are_identical_and_another_seed_differs(prepared, tokenizer):
    def trained(seed):
        torch.manual_seed(seed)
        model = train.GPT(small_config(vocab_size=prepare.VOCAB_SIZE, seq_len=32), train.sdpa_attention)
        optimizer = train.make_optimizer(model)
        loader = prepared.make_dataloader(tokenizer, 4, 32, "train")
        batch = next(loader)
        for step in range(3):
            train.set_schedules(optimizer, step / 3, step)
            _, batch = train.train_step(model, optimizer, batch, lambda: next(loader), 2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


@cuda
def test_compiling_changes_speed_only():
    inputs, targets = torch.randint(50, (2, 2, 16), device="cuda")
    losses = []
    for compiled in (False, True):
        model = small_model().to("cuda")
        if compiled:
            model.compile()
        loss = model.loss(inputs, targets)
        loss.backward()
        losses.append((loss.detach(), model.wte.weight.grad))
    for ours, theirs in zip(*losses):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_triton_the_run_goes_on_eagerly_after_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no triton\nsecond line")
    monkeypatch.setattr(torch, "compile", fail)
    assert train.can_compile(torch.device("cpu")) is False and capsys.readouterr().out == ""  # it does not pay there
    monkeypatch.setattr(torch, "ones", lambda n, device: None)
    assert train.can_compile(torch.device("cuda")) is False
    assert capsys.readouterr().out.count("\n") == 1


def test_nothing_is_compiled_after_warm_up(monkeypatch):
    """Schedules change the learning rates at every step; windows and value embeddings make five kinds of layers."""
    compile = torch.compile
    aot_eager = lambda f, **options: compile(f, backend="aot_eager", **options)  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", aot_eager)
    torch._dynamo.reset()
    graphs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        model = small_model(vocab_size=prepare.VOCAB_SIZE, n_layer=7, windows=[3, 4, 5, 6, 7, 4, 3])
        optimizer = train.make_optimizer(model)
        model.compile()
        optimizer.muon_update = torch.compile(train.muon_update, dynamic=False)
        before = graphs()
        train.warm_up(model, optimizer, (2, 16), torch.device("cpu"))
        warm = graphs()
        shapes = {p.shape for p in model.blocks.parameters()}
        assert warm - before == 5 + 1 + len(shapes)  # blocks of one kind are compiled once; the loss; Muon by shape
        batch = torch.randint(prepare.VOCAB_SIZE, (2, 2, 16))
        for step in range(4):
            train.set_schedules(optimizer, step / 4, step)
            train.train_step(model, optimizer, batch, lambda: batch, 2)
        assert graphs() == warm
        with torch.no_grad():  # the evaluation compiles once, for its own shape; 10 kinds are over torch's limit of 8
            for _ in range(3):
                model(torch.randint(prepare.VOCAB_SIZE, (1, 16)))
        assert graphs() == warm + 5
    torch._dynamo.reset()


def test_a_step_never_waits_for_the_device():
    """Tensors on the meta device have no values: whatever would read one on the host raises."""
    with torch.device("meta"):
        model = train.GPT(small_config(bigram_rows=64), train.sdpa_attention)
    optimizer, batch = train.make_optimizer(model), torch.zeros(2, 2, 16, dtype=torch.long, device="meta")
    for step in range(2):
        train.set_schedules(optimizer, step / 2, step)
        loss, _ = train.train_step(model, optimizer, batch, lambda: batch, 2)
    assert loss.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


# --- memory and the compile cache


@pytest.fixture
def full_model(monkeypatch):
    """The model of the full profile, without memory."""
    monkeypatch.setattr(train, "LOSS_CHUNK", 2**13)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 128)

    def build(n_layer=8, n_head=4, n_kv_head=None):
        config = train.GPTConfig(8192, 2048, n_layer, n_head, n_kv_head or n_head, 128,
                                 train.layer_windows("SSSL", n_layer, 2048), torch.bfloat16, 0)
        with torch.device("meta"):
            return train.GPT(config, None)
    return build


def test_rows_that_fit_grow_with_the_memory_of_the_gpu(full_model):
    model = full_model()
    rows = {gigabytes: train.rows_that_fit(model, gigabytes * 10**9) for gigabytes in (8, 12, 16, 24, 48, 80, 141)}
    assert rows == {8: 8, 12: 16, 16: 16, 24: 32, 48: 64, 80: 128, 141: 128}
    for gigabytes, count in rows.items():
        assert 2**19 % (count * 2048) == 0
        peak = 2.0 + 45.1 / 128 * count  # GB: counted tensor by tensor at 128 and 64 rows without torch.compile
        assert peak < 0.9 * gigabytes - 0.5
    assert train.rows_that_fit(model, math.inf) == 128 and train.rows_that_fit(model, 0) == 1
    assert train.rows_that_fit(full_model(n_layer=16, n_head=8), 80 * 10**9) == 32


def test_the_full_profile_keeps_its_total_batch_on_small_gpus():
    code = """import json, torch, train
with torch.device("meta"):
    model = train.GPT(train.config_from_constants(torch.bfloat16), None)
rows = [train.rows_that_fit(model, gigabytes * 10**9) for gigabytes in (8, 12, 16, 24, 48, 80, 141)]
print(json.dumps([rows, train.TOTAL_BATCH_SIZE, train.MAX_SEQ_LEN]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=prepare.Path(train.__file__).parent,
                          env=os.environ | dict(AUTORESEARCH_PROFILE="full"),
                          capture_output=True, text=True, check=True)
    rows, total, T = json.loads(done.stdout)
    assert rows == [4, 8, 16, 16, 32, 32, 32]
    assert all(total % (count * T) == 0 for count in rows)


@pytest.mark.parametrize("n_layer, n_head, n_kv_head", [(8, 4, 4), (2, 4, 4), (8, 4, 1), (4, 8, 4)])
def test_the_formula_for_rows_covers_what_autograd_keeps(monkeypatch, n_layer, n_head, n_kv_head):
    """Counted on a small model with a norm and an attention that keep what CUDA's do, less than the CPU's."""
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            rms = x.float().square().mean(-1, keepdim=True).rsqrt()
            ctx.save_for_backward(x, rms)
            return (x * rms).to(x.dtype)

    def attend(q, k, v, window):
        k, v = train.repeat_kv(q, k, v)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)

    monkeypatch.setattr(train, "norm", Norm.apply)
    model = train.GPT(small_config(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, head_dim=32, seq_len=61,
                                   windows=[60] * n_layer, dtype=torch.bfloat16), attend)
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() % (17 * 61) == 0 and storage not in parameters:  # it grows with the tokens
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.trunk(torch.randint(50, (17, 61)))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 17
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 2**20)
    memory = bisect.bisect(range(2**60), False, key=lambda memory: train.rows_that_fit(model, memory) == 2**20)
    assert 0.7 < measured / (0.9 * memory / 2**20) < 1


def cache_files(folder, *sizes):
    """Files of these sizes, the first the oldest."""
    for age, size in enumerate(sizes):
        path = folder / f"{age:02}" / f"file{age}"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
        os.utime(path, (age, age))
    return [path.name for path in sorted(folder.rglob("file*"))]


@pytest.fixture
def no_cache_variables(monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"):
        monkeypatch.setenv(name, "")  # so that the end of the test takes away what the test sets
        monkeypatch.delenv(name)
    return monkeypatch


def test_the_compile_cache_is_kept_below_its_limit_by_deleting_the_oldest_files(no_cache_variables, tmp_path):
    cache_files(tmp_path / "compiled", 400, 300, 200, 100)
    train.keep_compiled_code(tmp_path / "compiled", limit=350)
    assert sorted(path.name for path in (tmp_path / "compiled").rglob("file*")) == ["file2", "file3"]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


def test_two_runs_may_delete_from_the_compile_cache_at_once(no_cache_variables, tmp_path):
    cache_files(tmp_path, *[10] * 20)
    unlink = prepare.Path.unlink
    slower = lambda path: [unlink(path), unlink(path)]  # the other run has deleted the file before
    no_cache_variables.setattr(prepare.Path, "unlink", slower)
    train.keep_compiled_code(tmp_path, limit=50)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_a_read_only_cache_leaves_torchs_own_compile_cache(no_cache_variables, tmp_path):
    def read_only(dir):
        raise OSError(30, "Read-only file system")
    no_cache_variables.setattr(train.tempfile, "TemporaryFile", read_only)
    train.keep_compiled_code(tmp_path)
    (tmp_path / "file").touch()
    train.keep_compiled_code(tmp_path / "file" / "compiled")  # a folder that cannot be made
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_cache_folder_set_by_the_user_is_respected(no_cache_variables, tmp_path):
    no_cache_variables.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    train.keep_compiled_code(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_torch_reads_the_cache_variables_after_they_are_set():
    """It reads one of them when torch._functorch.config is imported: nothing may import that before main() sets it."""
    code = ("import os, sys, torch, prepare, train\n"
            "def stop(): sys.exit(print(*(name in sys.modules for name in ('torch._functorch.config', 'torch._inductor'))))\n"
            "train.choose_device = lambda: (torch.device('cuda'), 'H100', torch.bfloat16)\n"
            "train.keep_compiled_code = lambda folder: stop()\ntrain.start_watchdog = lambda: None\ntrain.main()")
    folder = prepare.Path(train.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
