"""Facts about the train.py that is shipped: its model, optimizer, schedules, constants and machines.

When you merge a night, mend or delete what it has changed here. What any honest train.py keeps is in test_train.py.
"""

import ast
import math
import re
import runpy
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

import prepare
import train
from conftest import REPO

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
backends = pytest.mark.parametrize("name, device", [
    ("sdpa", "cpu"), *(pytest.param(name, "cuda", marks=cuda) for name in ("sdpa", "varlen", "fa3"))])
SMALL = dict(VOCAB_SIZE=50, MAX_SEQ_LEN=16, DEPTH=3, WIDTH=32, HEAD_DIM=8, QUERIES_PER_KV=2, WINDOW_PATTERN="S",
             SHORT_WINDOW=0.5, MLP_RATIO=4, LOSS_CHUNKS=3, DEVICE_BATCH_SIZE=2, TOTAL_BATCH_SIZE=64)


def backend(name):
    if name == "fa3":
        try:
            return train.load_fa3()
        except Exception as error:
            pytest.skip(f"fa3 is not available: {error}")
    return {"sdpa": train.sdpa_attention, "varlen": train.varlen_attention}[name]


@pytest.fixture
def constants(monkeypatch):
    """Sets constants of train.py: those of a model of nothing, and what is given."""
    def set_constants(**changes):
        for name, value in (SMALL | changes).items():
            monkeypatch.setattr(train, name, value)
    return set_constants


@pytest.fixture
def build(constants):
    """Makes a model of given constants in which nothing is zero, so that every path carries something."""
    def make(dtype=torch.float32, attend=train.sdpa_attention, **changes):
        constants(**changes)
        torch.manual_seed(0)
        model = train.GPT(attend, dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return model
    return make


def optimizer_of(model):
    return train.MuonAdamW(*train.parameter_groups(model), model.dtype)


def random_batch(rows=2):
    return *torch.randint(train.VOCAB_SIZE, (2, rows, train.MAX_SEQ_LEN)), 1


# --- attention


@backends
@pytest.mark.parametrize("window", [0, 3, 31, 63])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_and_its_gradients_equal_float64(name, device, window, n_kv_head):
    torch.manual_seed(0)
    dtype, bound = (torch.float32, 1e-5) if name == "sdpa" else (torch.bfloat16, 1e-2)
    *inputs, dy = (torch.randn(2, 64, n, 64, device=device, dtype=dtype) for n in (4, n_kv_head, n_kv_head, 4))
    visible = torch.ones(64, 64).tril().triu(-window).bool()

    def exact(*qkv, window):
        qkv = [t.transpose(1, 2) for t in qkv]
        return F.scaled_dot_product_attention(*qkv, attn_mask=visible, enable_gqa=True).transpose(1, 2)

    results = []
    for attend, to in ((backend(name), dict(device=device)), (exact, dict(device="cpu", dtype=torch.float64))):
        leaves = [t.to(**to).requires_grad_() for t in inputs]
        y = attend(*leaves, window=window)
        results += [[t.detach().double().cpu() for t in (y, *torch.autograd.grad(y, leaves, dy.to(**to)))]]
    largest = max(t.norm() for t in results[1])
    for ours, reference in zip(*results):
        assert (ours - reference).norm() <= bound * largest


def moved_positions(model, position):
    tokens = torch.randint(50, (1, train.MAX_SEQ_LEN), device=model.cos.device)
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1) % 50
    with torch.no_grad():
        return ((model(tokens) - model(changed)).abs().amax(-1)[0] > 0).nonzero().flatten().tolist()


@backends
def test_the_model_is_causal_and_its_reach_is_the_sum_of_its_windows(build, monkeypatch, name, device):
    monkeypatch.setattr(train, "layer_windows", lambda: [4, 4, 4])
    dtype = torch.float32 if name == "sdpa" else torch.bfloat16
    model = build(dtype, backend(name), MAX_SEQ_LEN=64, HEAD_DIM=64, WIDTH=256).to(device)
    assert moved_positions(model, 20) == list(range(20, 20 + 3 * 4 + 1 + 1))  # and one by the token before


def test_layer_windows_tile_the_pattern_and_end_in_full_context(constants):
    constants(DEPTH=6, MAX_SEQ_LEN=64, SHORT_WINDOW=1 / 8, WINDOW_PATTERN="SSSL")
    assert train.layer_windows() == [8, 8, 8, 63, 8, 63]


# --- the choice of the attention backend


def flash_attn_func(q, k, v, causal, window_size):
    assert causal and window_size in ((8, 0), (-1, 0))
    return q + (k + v).repeat_interleave(q.size(2) // k.size(2), dim=2), None


def no_kernel(*_, **__):
    raise RuntimeError("no kernel image\nfor sm_90")


def attend_but_not_back(*args):
    y = train.sdpa_attention(*args)
    y.register_hook(no_kernel)
    return y


def attend_to_nothing(q, k, v, window):
    return q * math.nan


def offer_h100s_backends(monkeypatch, tmp_path, fa3, varlen):
    """To this CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(train, "varlen_attention", varlen)
    of_h100 = train.attention_backends(CUDA, torch.bfloat16)
    monkeypatch.setattr(train, "attention_backends", lambda device, dtype: of_h100)
    monkeypatch.setattr("kernels.resolver.CACHE_DIR", str(tmp_path))
    if fa3:
        monkeypatch.setattr("kernels.get_kernel", lambda *_, **__: types.SimpleNamespace(flash_attn_func=fa3))


@pytest.mark.parametrize("fa3, varlen, chosen, reasons", [
    (flash_attn_func, None, "fa3", []),
    (None, train.sdpa_attention, "varlen", ["FileNotFoundError: Cannot find a local snapshot"]),  # nor a network
    (no_kernel, attend_but_not_back, "sdpa", ["RuntimeError: no kernel image"] * 2),
    (None, attend_to_nothing, "sdpa", ["FileNotFoundError:", "ArithmeticError: its numbers are not finite"])])
def test_the_first_backend_that_works_forward_and_back_is_chosen(constants, monkeypatch, tmp_path, capsys, fa3, varlen,
                                                                 chosen, reasons):
    """Each other one is a printed line; the random numbers of the model's weights are the same with all of them."""
    constants()
    offer_h100s_backends(monkeypatch, tmp_path, fa3, varlen)
    random_state = torch.get_rng_state()
    name, attend = train.choose_attention(CPU, torch.float32, compiles=False)
    assert name == chosen and (attend.__name__.startswith(chosen) or attend is varlen)
    assert torch.equal(torch.get_rng_state(), random_state)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(reasons)
    for line, tried, reason in zip(lines, ("fa3", "varlen"), reasons):
        assert line.startswith(f"{tried} is not available: {reason}")


def test_a_backend_that_cannot_be_compiled_is_not_chosen(constants, monkeypatch, tmp_path, capsys):
    constants()
    offer_h100s_backends(monkeypatch, tmp_path, flash_attn_func, train.sdpa_attention)
    monkeypatch.setattr(torch, "compile", lambda attend, dynamic: no_kernel)
    assert train.choose_attention(CPU, torch.float32, compiles=True) == ("sdpa", train.sdpa_attention)


@pytest.mark.parametrize("capability, dtype, hip, first", [
    ((9, 0), torch.bfloat16, None, "fa3"), ((8, 6), torch.bfloat16, None, "fa3"),
    ((12, 0), torch.bfloat16, None, "varlen"), ((7, 5), torch.float32, None, "sdpa"),
    ((9, 0), torch.bfloat16, "7.2", "varlen")])  # ROCm says so of some AMD cards
def test_each_gpu_is_offered_the_fastest_backend_that_it_can_run(monkeypatch, capability, dtype, hip, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert train.attention_backends(CUDA, dtype)[0][0] == first


# --- model


def test_queries_and_keys_have_unit_rms_and_their_scores_depend_on_distance_only(build):
    seen = []

    def attend(q, k, v, window):
        seen.extend((q, k))
        return q

    model = build(attend=attend, HEAD_DIM=16, MAX_SEQ_LEN=64)
    model.blocks[1].attn(10 * torch.randn(32).expand(1, 64, 32), None, model.cos, model.sin)  # the same everywhere
    q, k = (t[0, :, 0] for t in seen)
    for rms in (q.square().mean(-1).sqrt(), k.square().mean(-1).sqrt()):
        torch.testing.assert_close(rms, torch.ones(64))
    scores = q @ k.T
    for distance in (-9, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert scores[0, 1] != scores[0, 2]


def test_the_scale_of_the_token_embeddings_does_not_matter(build):
    model = build()
    inputs = random_batch()[0]
    before = model(inputs)
    for table in (model.wte, model.previous_wte):
        table.weight.data *= 10
    torch.testing.assert_close(model(inputs), before, atol=1e-4, rtol=1e-4)


def test_loss_and_gradients_in_chunks_and_shares_are_those_of_the_mean_cross_entropy(build):
    model = build(SOFTCAP=7)  # LOSS_CHUNKS=3 does not divide the tokens
    model.lm_head.weight.data *= 1000
    inputs, targets = torch.randint(50, (2, 4, 16))
    losses = [train.backward(model, *batch, 1 / 2) for batch in zip(inputs.split(2), targets.split(2))]
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    plain.backward()
    torch.testing.assert_close(sum(losses), plain.detach())
    for ours, p in zip(got, model.parameters()):
        torch.testing.assert_close(ours, p.grad, atol=1e-5, rtol=1e-4)


def test_training_and_evaluation_have_the_same_float32_logits_softcapped(build):
    model = build(torch.bfloat16, LOSS_CHUNKS=1, SOFTCAP=8)  # by which bf16 divides exactly
    model.lm_head.weight.data *= 100
    inputs, targets, _ = random_batch()
    logits = model(inputs)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    uncapped = F.linear(model.trunk(inputs), model.lm_head.weight.bfloat16()).float()
    torch.testing.assert_close(logits, 8 * torch.tanh(uncapped / 8))
    assert abs(plain - train.backward(model, inputs, targets, 1).item()) < 1e-6


def test_a_new_block_adds_the_embedding_and_its_gate_lets_the_value_embedding_through(constants, monkeypatch):
    monkeypatch.setattr(train, "layer_windows", lambda: [0, 0, 0])  # each position sees its own value
    constants(QUERIES_PER_KV=1)
    model = train.GPT(train.sdpa_attention, torch.float32)
    block, (x, x0, ve) = model.blocks[2], torch.randn(3, 1, 16, 32)
    torch.testing.assert_close(block(x, x0, ve, 0.5, 0.25, model.cos, model.sin), 0.5 * x + 0.25 * x0)
    torch.nn.init.zeros_(block.attn.v.weight)
    torch.nn.init.eye_(block.attn.proj.weight)
    torch.testing.assert_close(block.attn(x, ve, model.cos, model.sin), ve)


def test_initial_weights_follow_the_recipe_and_predict_the_uniform_distribution(constants):
    constants(VOCAB_SIZE=2000, HEAD_DIM=32, WIDTH=128)
    torch.manual_seed(0)
    model = train.GPT(train.sdpa_attention, torch.float32)
    assert abs(model.wte.weight.std() - 1) < 0.01 and abs(model.lm_head.weight.std() - 0.001) < 1e-5
    attn, mlp = model.blocks[2].attn, model.blocks[2].mlp
    for part in (*model.value_embeds.values(), attn.q, attn.k, attn.v, mlp.fc):
        assert abs(part.weight.std() - 128**-0.5) < 0.003 and part.weight.abs().max() <= (3 / 128) ** 0.5
    for part in (attn.proj, mlp.proj, attn.ve_gate, model.previous_wte):
        assert not part.weight.any()
    assert list(model.value_embeds) == ["0", "2"]
    assert (model.resid_lambdas == 1).all() and (model.x0_lambdas == train.X0_LAMBDA).all()
    assert abs(train.backward(model, *random_batch()[:2], 1).item() - math.log(2000)) < 0.01


def test_flops_count_six_per_matmul_parameter_and_the_visible_keys(build):
    model = build()  # C=32, kv 16, gates of 32 channels on layers 0 and 2
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 128
    matmul = 3 * block + 2 * 32 * 2 + 50 * 32
    assert train.flops_per_token(model) == 6 * matmul + 12 * 32 * (9 + 9 + 16)


# --- optimizer


def options_of(model):
    """{name of a parameter: (lr, weight decay, betas)}, Muon's without betas."""
    names = {p: name for name, p in model.named_parameters()}
    optimizer, got = optimizer_of(model), []
    for group in optimizer.param_groups + optimizer.muon_groups:
        options = pytest.approx(group["lr"]), group.get("weight_decay"), group.get("betas")
        got += [(names[p], options) for p in group["params"]]
    assert len(got) == len(dict(got)) == len(names)
    return dict(got)


def test_every_parameter_is_in_exactly_one_group_with_its_options(build):
    model = build(EMBEDDING_LR=1, UNEMBEDDING_LR=2, X0_LR=3, SCALAR_LR=5, MATRIX_LR=4, VE_WEIGHT_DECAY=0.1,
                  ADAM_BETAS=(0.8, 0.95), X0_BETAS=(0.96, 0.9))
    scale, betas = (32 / 768) ** -0.5, (0.8, 0.95)
    wanted = {"wte.weight": (scale, 0, betas), "lm_head.weight": (2 * scale, 0, betas),
              "value_embeds.0.weight": (scale, 0.1, betas), "value_embeds.2.weight": (scale, 0.1, betas),
              "previous_wte.weight": (scale, 0, betas), "resid_lambdas": (5, 0, betas),
              "x0_lambdas": (3, 0, (0.96, 0.9))}
    for name, p in model.blocks.named_parameters(prefix="blocks"):
        wanted[name] = 4 * max(1, p.size(0) / p.size(1)) ** 0.5, None, None
    assert options_of(model) == wanted


def test_a_parameter_that_is_added_anywhere_has_a_group_by_its_place_and_shape(build):
    model = build(SCALAR_LR=5, EMBEDDING_LR=1, MATRIX_LR=4)
    for place in (model, model.blocks[0].mlp):
        place.gain = torch.nn.Parameter(torch.ones(32))
        place.scale = torch.nn.Parameter(torch.ones(()))
        place.kernels = torch.nn.Parameter(torch.ones(4, 3, 3))
        place.extra = torch.nn.Linear(32, 16)
        place.table = torch.nn.Embedding(7, 32)
    got = options_of(model)
    betas, scale = train.ADAM_BETAS, (32 / 768) ** -0.5
    for place in ("", "blocks.0.mlp."):
        for name in ("gain", "scale", "kernels", "extra.bias"):
            assert got[place + name] == (5, 0, betas)
        assert got[place + "table.weight"] == (scale, 0, betas)
    assert got["extra.weight"] == (5, 0, betas) and got["blocks.0.mlp.extra.weight"] == (4, None, None)
    model.lm_head.weight = model.wte.weight  # tied: one parameter
    assert "lm_head.weight" not in options_of(model)


def test_a_parameter_without_a_gradient_is_left_as_it_is_and_the_others_move(build):
    """It was a TypeError: an agent's matrix that is not used yet."""
    model = build()
    model.blocks[0].mlp.unused = train.Linear(32, 32)
    model.blocks[0].mlp.unused.weight.data.normal_()
    model.unused = torch.nn.Parameter(torch.ones(3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model)
    for _ in range(2):
        train.set_schedules(optimizer, 0.0, 0)
        train.train_step(model, optimizer, random_batch(), random_batch, 1)
    still = {name for (name, p), old in zip(model.named_parameters(), before) if torch.equal(p, old)}
    assert still == {"unused", "blocks.0.mlp.unused.weight"}


def muon(*params, **options):
    group = dict(params=list(params), lr=0.1, momentum=0.0, weight_decay=0.0) | options
    return train.MuonAdamW([dict(params=[torch.nn.Parameter(torch.zeros(1))])], [group], torch.float32)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_polar_express_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape)
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    values = U.mT @ train.orthogonalize(g, torch.float32) @ Vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert 0.7 < diagonal.min() and diagonal.max() < 1.3
    assert (values - diagonal.diag_embed()).abs().max() < 1e-3


def test_muons_momentum_is_nesterovs(monkeypatch):
    """As torch.optim.SGD's, times 1 - momentum; a sign turned here still learns, only worse."""
    seen = []
    monkeypatch.setattr(train, "orthogonalize", lambda g, dtype: seen.append(g[0]) or g)
    ours, theirs = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer, reference = muon(ours, momentum=0.9), torch.optim.SGD([theirs], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(3):
        before = theirs.detach().clone()
        ours.grad = theirs.grad = torch.randn(4, 4)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(seen.pop(), (before - theirs).detach() * (1 - 0.9))


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_normuon_keeps_the_norm_of_the_update_and_evens_out_its_rows(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape) * torch.logspace(-1, 1, shape[0])[:, None]
    optimizer, plain = muon(p), train.orthogonalize(p.grad[None], torch.float32)[0]
    optimizer.step()
    update, axis = p.detach() / -0.1, 1 if shape[0] > shape[1] else 0
    torch.testing.assert_close(update.norm(), plain.norm(), rtol=1e-3, atol=0)
    assert (update * plain).sum() > 0.5 * plain.square().sum()  # and the direction, down the gradient
    assert update.square().mean(axis).std() < 0.01 * update.square().mean()
    seen = (1 - train.NORMUON_BETA2) * plain.square().mean(axis, keepdim=True)
    torch.testing.assert_close(optimizer.state[p]["second_moment"][0], seen)


def test_decay_is_only_where_update_and_weight_agree():
    torch.manual_seed(0)
    start = torch.randn(8, 8)
    decayed, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    decayed.grad = plain.grad = torch.randn(8, 8)
    muon(decayed, weight_decay=0.5).step()
    muon(plain).step()
    agree = (start - plain) * start > 0
    torch.testing.assert_close(decayed, torch.where(agree, plain - 0.1 * 0.5 * start, plain))


def test_stacked_matrices_move_as_they_would_alone():
    torch.manual_seed(0)
    start, grads = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    together, alone = ([torch.nn.Parameter(s.clone()) for s in start] for _ in range(2))
    for p, g in zip(together + alone, [*grads, *grads]):
        p.grad = g
    for params in (together, *([p] for p in alone)):
        muon(*params, momentum=0.9, weight_decay=0.1).step()
    torch.testing.assert_close(together, alone)


def test_schedules_at_their_end_points(build, constants):
    model = build(WARMUP_RATIO=0.0, WARMDOWN_RATIO=0.5, FINAL_LR_FRAC=0.1, WEIGHT_DECAY=0.2, MOMENTUM=(0.85, 0.95),
                  MOMENTUM_STEPS=300)
    optimizer = optimizer_of(model)
    for progress, step, share, *wanted in [(0, 0, 1, 0.85, 0.2), (0.75, 150, 0.55, 0.9, 0.05), (1, 900, 0.1, 0.95, 0)]:
        train.set_schedules(optimizer, progress, step)
        for group in optimizer.param_groups + optimizer.muon_groups:
            assert group["lr"] == pytest.approx(share * group["initial_lr"])
        for group in optimizer.muon_groups:
            assert [group["momentum"], group["weight_decay"]] == pytest.approx(wanted)
    constants(WARMUP_RATIO=0.2)
    assert [train.lr_multiplier(x) for x in (0, 0.1, 0.2, 0.5)] == pytest.approx([0, 0.5, 1, 1])


def test_it_compiles_where_that_works_and_pays(monkeypatch):
    """On a CPU the first number would come minutes later."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    assert train.can_compile(CUDA) and not train.can_compile(CPU)
    for broken in (no_kernel, lambda f: no_kernel):  # at once, as where torch does not support it, or when called
        monkeypatch.setattr(torch, "compile", broken)
        assert not train.can_compile(CUDA)


# --- the step


def test_a_step_never_waits_for_the_device(build):
    """Fake tensors have no values: whatever would read one on the host raises."""
    with FakeTensorMode():
        model = build()
        optimizer, batch = optimizer_of(model), random_batch()
        for step in range(2):
            train.set_schedules(optimizer, step / 2, step)
            loss, _ = train.train_step(model, optimizer, batch, lambda: batch, 2)
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_pass_and_optimizer_run_on_fake_cuda_tensors(dtype):
    """Fake tensors have a device, a dtype and a shape; autograd would want a real GPU."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = train.GPT(train.sdpa_attention, dtype)
        optimizer = optimizer_of(model)
        with torch.no_grad():
            logits = model(torch.zeros(2, train.MAX_SEQ_LEN, dtype=torch.int64, device="cuda"))
        assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        train.set_schedules(optimizer, 0.0, 0)
        optimizer.step()
        assert all(tensor.is_cuda for state in optimizer.state.values() for tensor in state.values())


@pytest.fixture
def graphs(monkeypatch):
    """A function that counts what torch.compile has compiled, here without a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(disable=False, recompile_limit=8):  # torch's own limit
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_nothing_is_compiled_after_warm_up(build, graphs):
    """Schedules change the learning rates at every step."""
    model = build(LOSS_CHUNKS=2)
    optimizer = optimizer_of(model)
    train.compile_hot_functions(model, optimizer)
    assert torch._dynamo.config.recompile_limit == 64  # an agent's ninth matrix shape ran uncompiled
    train.warm_up(model, optimizer, CPU)
    warm = 2 + len({p.shape for p in model.blocks.parameters()})  # trunk, loss, Muon by shape
    assert graphs() == warm
    weights_after(model, optimizer, 3)
    assert graphs() == warm
    with torch.no_grad():  # the evaluation compiles once, for its own shape
        for _ in range(2):
            model(random_batch(rows=1)[0])
    assert graphs() == warm + 1


def weights_after(model, optimizer, steps):
    torch.manual_seed(1)
    for step in range(steps):
        train.set_schedules(optimizer, step / steps, step)
        train.train_step(model, optimizer, random_batch(), random_batch, 1)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GiB)")])
@pytest.mark.parametrize("fit, tried", [(99, [20]), (5, [20, 10, 5]), (2, [20, 10, 5, 1]), (0, [20, 10, 5, 1])])
def test_warm_up_halves_the_rows_until_a_step_fits_and_leaves_no_trace(build, fit, tried, error):
    """The memory ends in the middle of the optimizer's step, when half of the weights have moved."""
    def out_of_memory(*args, **options):
        stacks.append(1)
        if len(stacks) % 2 == 0 and rows[-1] > fit:
            raise error
        return train.muon_update(*args, **options)

    rows, stacks = [], []
    model, fresh = (build(DEVICE_BATCH_SIZE=20, TOTAL_BATCH_SIZE=20 * 16 * 2) for _ in range(2))
    optimizer, random_state = optimizer_of(model), torch.get_rng_state()
    trunk = model.trunk
    model.trunk = lambda inputs: rows.append(len(inputs)) or trunk(inputs)
    optimizer.muon_update = out_of_memory
    if fit:
        assert train.warm_up(model, optimizer, CPU) == tried[-1] and train.TOTAL_BATCH_SIZE % (tried[-1] * 16) == 0
    else:
        with pytest.raises(type(error)):
            train.warm_up(model, optimizer, CPU)
    assert rows == [n for n in tried for _ in range(2)]  # two passes each
    assert torch.equal(torch.get_rng_state(), random_state) and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))
    optimizer.muon_update = train.muon_update
    assert all(map(torch.equal, weights_after(model, optimizer, 2), weights_after(fresh, optimizer_of(fresh), 2)))


# --- the constants


HYPERPARAMETERS = (REPO / "train.py").read_text().split("# Hyperparameters")[1].split("\n# ------")[0]
NAMES = re.findall("^([A-Z0-9_]+) += ", HYPERPARAMETERS, re.MULTILINE)


def test_every_constant_is_set_in_one_place_and_used():
    """A constant set again below would make an edit of its line change nothing."""
    names = [node for node in ast.walk(ast.parse((REPO / "train.py").read_text())) if isinstance(node, ast.Name)]
    stored = [node.id for node in names if not isinstance(node.ctx, ast.Load)]
    loaded = [node.id for node in names if isinstance(node.ctx, ast.Load)]
    assert len(NAMES) > 25
    assert {name: (stored.count(name), name in loaded) for name in NAMES} == dict.fromkeys(NAMES, (1, True))


def values_of(profile, monkeypatch):
    monkeypatch.setattr(prepare, "PROFILE", profile)
    return runpy.run_path(REPO / "train.py", run_name="train")


def test_the_table_of_the_baseline_has_the_constants_of_the_recipe_and_of_train():
    import bench_train
    text = (REPO / "docs/baseline.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([\d*./]+)`? \| `?([\d*./]+)`? \|", text, re.MULTILINE)
    assert {name: eval(old) for name, old, _ in rows} == bench_train.FAITHFUL
    code = (REPO / "train.py").read_text()
    for name, _, new in rows:
        value = re.search(rf"^{name} += *\(? *(\d[\d*./ ]*)", code, re.MULTILINE)[1]
        assert eval(value) == eval(new), name


def test_only_sizes_depend_on_the_profile(monkeypatch):
    """An idea that one profile has alone says nothing about the others."""
    profiles = [values_of(profile, monkeypatch) for profile in prepare.PROFILES]
    differ = {name for name in NAMES if len({values[name] for values in profiles}) > 1}
    assert differ == {"COLUMN", "DEPTH", "WIDTH", "HEAD_DIM", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE"}
    assert [values["WIDTH"] for values in profiles] == [768, 256, profiles[2]["WIDTH"]]
    for (_, _, seq_len, _), values in zip(prepare.PROFILES.values(), profiles):
        assert values["WIDTH"] % values["HEAD_DIM"] == 0
        assert values["TOTAL_BATCH_SIZE"] % (values["DEVICE_BATCH_SIZE"] * seq_len) == 0


# --- the run


@pytest.fixture
def short_run(constants, prepared, tmp_path, monkeypatch):
    """main() with a model of nothing, in an empty folder, on a clock of its own: a step takes .step_seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "start_watchdog", lambda: None)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 8 * prepare.MAX_SEQ_LEN)
    constants(VOCAB_SIZE=prepare.VOCAB_SIZE, MAX_SEQ_LEN=prepare.MAX_SEQ_LEN, TOTAL_BATCH_SIZE=1024, TIME_BUDGET=30.0)
    now, train_step, monkeypatch.step_seconds = [0.0], train.train_step, 6.2

    def step(*args):
        now[0] += monkeypatch.step_seconds
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return monkeypatch


def test_the_clock_counts_every_step_and_stops_at_the_first_one_past_the_budget(short_run):
    progress, set_schedules = [], train.set_schedules
    short_run.setattr(train, "set_schedules", lambda o, p, s: progress.append((p, s)) or set_schedules(o, p, s))
    summary = train.main()
    assert summary["num_steps"] == 5 and summary["training_seconds"] == "31.0"
    assert summary["total_tokens_M"] == f"{5 * 1024 / 1e6:.1f}"
    assert progress == [(0.0, 0)] + [(pytest.approx(6.2 * i / 30), i) for i in range(5)]


def test_a_last_step_that_overruns_the_budget_gives_no_number(short_run):
    short_run.setattr(train, "TIME_BUDGET", 300.0)
    short_run.step_seconds = 290.0
    with pytest.raises(SystemExit, match="^training took 580 s for 2 steps, .*: lower TOTAL_BATCH_SIZE=1024 or"):
        train.main()


def test_a_run_uses_the_cpus_that_it_may_and_says_how_many(short_run):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    short_run.setattr(train, "available_cpus", lambda: 1)
    try:
        assert train.main()["device"] == "CPU x1" and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_loss_is_read_when_the_next_step_has_been_launched(short_run):
    """Read at once it made the GPU wait for Python in every step."""
    events, train_step, finish_copy = [], train.train_step, train.finish_copy
    short_run.setattr(train, "train_step", lambda *args: events.append("launch") or train_step(*args))
    short_run.setattr(train, "finish_copy", lambda step, *copy: events.append(step) or finish_copy(step, *copy))
    train.main()
    assert events == ["launch", "launch", "launch", 0, "launch", 1, "launch", 2, "launch", 3, 4]  # the first warms up


def test_a_loss_above_100_stops_the_run(short_run):
    real, losses = train.train_step, iter([1.0, 1.0, 1.0, 101.0, 1.0])  # one for the warm-up; read a step late
    short_run.setattr(train, "train_step", lambda *args: (torch.tensor(next(losses)), real(*args)[1]))
    with pytest.raises(SystemExit, match="^the loss is 101.0 at step 2$"):
        train.main()


@pytest.mark.parametrize("name, value, message", [
    ("TOTAL_BATCH_SIZE", 1000, r"TOTAL_BATCH_SIZE=1000 must be a multiple of DEVICE_BATCH_SIZE=2 \* MAX_SEQ_LEN=256"),
    ("WIDTH", 36, r"WIDTH=36 must be a multiple of HEAD_DIM=8 \* QUERIES_PER_KV=2"),
    ("SEED", "-1", "SEED=-1 must be a whole")])
def test_impossible_constants_and_seeds_are_refused(short_run, name, value, message):
    if name == "SEED":
        short_run.setenv(name, value)
    else:
        short_run.setattr(train, name, value)
    with pytest.raises(SystemExit, match=message):
        train.main()


@pytest.mark.parametrize("error, line", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "FAIL: out of memory with DEVICE_BATCH_SIZE="),
    (prepare.YardstickError("not causal"), "FAIL: not causal"), (SystemExit("SEED=x"), "FAIL: SEED=x"),
    (RuntimeError("size mismatch"), None)])
def test_expected_failures_end_in_one_line_and_others_in_a_traceback(monkeypatch, error, line):
    def fail():
        raise error
    monkeypatch.setattr(prepare, "start_watchdog", fail)
    with pytest.raises(SystemExit if line else RuntimeError) as raised:
        runpy.run_path(REPO / "train.py", run_name="__main__")
    assert not line or raised.value.code.startswith(line) and "\n" not in raised.value.code


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA RTX A1000", math.inf), ("NVIDIA GeForce RTX 4090 Laptop GPU", math.inf),
    ("NVIDIA H100 PCIe", 756)])
def test_peak_flops_are_found_by_whole_words(name, teraflops):
    assert train.peak_flops(name) == teraflops * 1e12


# --- machines


@pytest.mark.parametrize("release, fraction", [("6.6.87.2-microsoft-standard-WSL2", 0.9), ("6.8.0-generic", None)])
def test_under_wsl_cuda_fails_where_it_would_spill_into_the_systems_memory(monkeypatch, release, fraction):
    """64 rows "fitted" a card of 24 GB there, and ran several times slower."""
    limits = []
    monkeypatch.setattr(train.platform, "release", lambda: release)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    train.set_memory_limits(torch.device("cuda"))
    assert limits == ([fraction] if fraction else [])


# --- Apple's GPU


class OnMPS(torch.Tensor):
    """A CPU tensor that says it is on MPS."""
    device = property(lambda self: torch.device("mps"))


class MPS(TorchFunctionMode):
    """Refuses what torch 2.11 refuses or gets wrong on MPS."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args)
        places = [str(x) for x in [*args, *kwargs.values()] if isinstance(x, (str, torch.device))]
        there = "mps" in places
        if func is torch.Tensor.to and (there or isinstance(args[0], OnMPS)):
            assert not kwargs.get("non_blocking"), "a pageable copy that is not waited for"
            there = True  # .to("cpu", float64) too: it converts first
        result = func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        if isinstance(result, torch.Tensor):
            assert not (there or isinstance(result, OnMPS)) or result.dtype not in (torch.float64, torch.uint16), func
            if {"mps", "cpu"} & {*places}:
                result = result.as_subclass(OnMPS if "mps" in places else torch.Tensor)
        return result


def on_cpu(x):
    return "cpu" if isinstance(x, (str, torch.device)) and str(x) == "mps" else x


def run_on(device, tokenizer, monkeypatch):
    """Rows, a step of training and the evaluation of a small model; returns bits per byte and the weights."""
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 8 * prepare.MAX_SEQ_LEN)
    torch.manual_seed(0)
    model = train.GPT(train.sdpa_attention, torch.float32)
    optimizer = train.MuonAdamW(*train.parameter_groups(model), torch.float32)
    parameters = list(model.parameters())
    if device == "mps":
        monkeypatch.setattr(model, "parameters", lambda: (p.detach().as_subclass(OnMPS) for p in parameters))
    train.set_schedules(optimizer, 0.0, 0)
    loader = prepare.make_dataloader(tokenizer, 2, prepare.MAX_SEQ_LEN, "train", device)
    inputs, targets, _ = next(loader)
    assert str(inputs.device) == str(targets.device) == device
    train.backward(model, inputs, targets, 1.0)
    optimizer.step()
    return prepare.evaluate_bpb(model, tokenizer, 4), parameters


def test_nothing_runs_on_mps_that_torch_lacks_there(prepared, tokenizer, monkeypatch):
    """float64 and uint16, and copies that are not waited for; the results are the CPU's."""
    with monkeypatch.context() as patch:
        bpb, weights = run_on("cpu", tokenizer, patch)
    with MPS():
        mps_bpb, mps_weights = run_on("mps", tokenizer, monkeypatch)
    assert mps_bpb == pytest.approx(bpb, abs=1e-5)
    for ours, theirs in zip(weights, mps_weights):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@cuda
@pytest.mark.parametrize("name", ["sdpa", "varlen", "fa3"])
def test_the_model_passes_the_probe_without_its_slack_on_a_gpu(build, tokenizer, monkeypatch, name):
    """PROBE_TOLERANCE is for kernels that are not deterministic: these are."""
    monkeypatch.setattr(prepare, "PROBE_TOLERANCE", 0.0)
    size = dict(VOCAB_SIZE=prepare.VOCAB_SIZE, MAX_SEQ_LEN=prepare.MAX_SEQ_LEN, HEAD_DIM=64, WIDTH=256)
    model = build(torch.bfloat16, backend(name), **size).to("cuda")
    loader = prepare.make_dataloader(tokenizer, 16, prepare.MAX_SEQ_LEN, "val", CUDA)
    with torch.no_grad():
        for first in range(100):
            inputs, _, _ = next(loader)
            prepare.probe_causality(model, inputs, model(inputs), first)
