"""Bits per byte: right numbers for models whose numbers are known, and no number for models that are wrong on purpose."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import train

T, ROWS = 64, 30
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Table(torch.nn.Module):
    """Logits of the next token from the current one alone: causal, and easy to compute by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table, dtype=torch.float32))

    def forward(self, inputs):
        return self.table[inputs]


class Wrapped(Table):
    """A table of random logits that a fault changes."""

    def __init__(self, fault):
        super().__init__(3 * torch.randn(prepare.VOCAB_SIZE, prepare.VOCAB_SIZE, generator=torch.Generator().manual_seed(0)))
        self.fault = fault

    def forward(self, inputs):
        return self.fault(super().forward(inputs), inputs)


def gpt(attend=train.sdpa_attention, dtype=torch.float32, head_dim=16):
    """The model of train.py with weights that are all different from 0, so that every path carries something."""
    torch.manual_seed(0)
    config = train.GPTConfig(prepare.VOCAB_SIZE, T, 3, 2, 1, head_dim, [T // 2, T // 2, T - 1], dtype, 256)
    model = train.GPT(config, attend)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(autouse=True)
def short(prepared, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", T)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", ROWS * T)


# --- the number


def scored(tokenizer, split="val"):
    """The inputs and targets that evaluate_bpb must score, and the bytes of each target, as numpy."""
    inputs, targets, _ = next(prepare.make_dataloader(tokenizer, prepare.eval_rows(split), T, split))
    return inputs.numpy(), targets.numpy(), tokenizer.token_bytes()[targets.numpy()]


def test_bits_per_byte_equal_a_float64_computation_in_numpy_to_nine_digits(tokenizer):
    """A loss in float32 is off by 1e-8 here."""
    inputs, targets, sizes = scored(tokenizer)
    model = Wrapped(lambda logits, inputs: logits)
    logits = model.table.detach().numpy().astype(np.float64)
    nats = np.log(np.exp(logits).sum(1))[inputs] - logits[inputs, targets]
    want = nats[sizes > 0].sum() / math.log(2) / sizes.sum()
    assert prepare.evaluate_bpb(model, tokenizer, 8) == pytest.approx(want, rel=1e-9)


def test_a_uniform_model_scores_its_closed_form(tokenizer):
    _, _, sizes = scored(tokenizer)
    want = math.log2(prepare.VOCAB_SIZE) * (sizes > 0).sum() / sizes.sum()
    got = prepare.evaluate_bpb(Table(np.zeros((prepare.VOCAB_SIZE,) * 2)), tokenizer, 8)
    assert got == pytest.approx(want, rel=1e-9)


def test_special_tokens_are_in_neither_sum(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 10**9)  # the whole split: its short documents share rows
    table = np.zeros((prepare.VOCAB_SIZE,) * 2)
    table[:, -4:] = -1e4  # predicting BOS is hopeless, and must not matter
    _, _, sizes = scored(tokenizer)
    want = math.log2(prepare.VOCAB_SIZE - 4) * (sizes > 0).sum() / sizes.sum()
    assert (sizes == 0).any() and prepare.evaluate_bpb(Table(table), tokenizer, 8) == pytest.approx(want, rel=1e-9)


@given(st.text(st.sampled_from("az é\u0301ß你好世\U0001f680\U0001f9d1\u200d\x00\x7f\n\ud800"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_texts_tokens_are_those_of_its_utf_8(tokenizer, text):
    """Accents, CJK, emoji split over tokens, control bytes, and what a lone surrogate becomes."""
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(prepare.clean(text).encode())


def test_the_bytes_of_a_split_are_those_of_its_text(prepared, tokenizer):
    for split, count in prepare.load_manifest()["splits"].items():
        tokens = np.fromfile(prepare.data_dir() / f"{split}.tokens", np.uint16)
        texts = [text for where, text in prepare.documents(1) if where == split]
        assert tokenizer.token_bytes()[tokens].sum() == count["bytes"] == sum(len(text.encode()) for text in set(texts))


def test_the_score_does_not_depend_on_the_batch_size(tokenizer):
    """A score over `EVAL_TOKENS // (B * T)` batches changes its rows with B, and divides by zero for a large B."""
    model = Wrapped(lambda logits, inputs: logits)
    got = [prepare.evaluate_bpb(model, tokenizer, B) for B in (1, 7, ROWS, 64)]
    assert got == pytest.approx([got[0]] * 4, rel=1e-12)


def test_the_loss_is_taken_in_slices_of_bounded_size(tokenizer, monkeypatch):
    seen, real = [], F.cross_entropy

    def recorded(logits, *args, **options):
        seen.append(logits.numel() * logits.element_size())
        return real(logits, *args, **options)

    monkeypatch.setattr(prepare.F, "cross_entropy", recorded)
    model = Wrapped(lambda logits, inputs: logits)
    whole = prepare.evaluate_bpb(model, tokenizer, ROWS)
    assert len(seen) == 1
    monkeypatch.setattr(prepare, "LOSS_SLICE_BYTES", seen[0] // 10)
    assert prepare.evaluate_bpb(model, tokenizer, ROWS) == pytest.approx(whole, rel=1e-12)
    assert len(seen) == 11 and max(seen[1:]) == seen[0] // 10


def test_a_small_split_is_scored_once(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 10**9)
    tokens = prepare.load_manifest()["splits"]["val"]["tokens"]
    assert prepare.eval_rows("val") == tokens // T
    loader = prepare.make_dataloader(tokenizer, prepare.eval_rows("val"), T, "val")
    assert next(loader)[2] == 1


def test_evaluation_switches_dropout_off_and_leaves_the_mode_of_the_model(tokenizer):
    model = torch.nn.Sequential(Wrapped(lambda logits, inputs: logits), torch.nn.Dropout(0.5)).train()
    assert prepare.evaluate_bpb(model, tokenizer, 8) == prepare.evaluate_bpb(model[0], tokenizer, 8)
    assert model.training


# --- the gallery: models that are wrong on purpose


def see_one_ahead(q, k, v, window):
    """Attention with a window that is open to the right by one."""
    k, v = train.repeat_kv(q, k, v)
    position = torch.arange(q.size(1))
    distance = position[:, None] - position
    keep = (distance >= -1) & (distance <= window)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=keep).transpose(1, 2)


def in_layer(change, layer=1):
    """The GPT with `change` applied to the output of one block."""
    def make(dtype):
        model = gpt(dtype=dtype)
        model.blocks[layer].register_forward_hook(lambda module, args, x: change(x))
        return model
    return make


def ids_for(part):
    """The GPT whose embedding `part` is given each position's next token."""
    def make(dtype):
        model = gpt(dtype=dtype)
        part(model).register_forward_pre_hook(lambda module, args: (args[0].roll(-1, 1),))
        return model
    return make


def both_sides(x):
    return x + 0.01 * F.conv1d(x.mT, torch.ones(x.size(2), 1, 3, dtype=x.dtype), padding=1, groups=x.size(2)).mT


class Buffered(Wrapped):
    """Copies the next token, and writes the logits of every call to the same memory."""

    def __init__(self):
        super().__init__(self.write)
        self.buffer = None

    def write(self, logits, inputs):
        self.buffer = torch.empty_like(logits) if self.buffer is None else self.buffer
        return self.buffer.copy_(10 * F.one_hot(inputs.roll(-1, 1), logits.size(-1)))


class Recogniser(Wrapped):
    """Remembers every row, and copies the answers when it sees a row that begins like one it knows."""

    def __init__(self):
        super().__init__(self.recall)
        self.rows = {}

    def recall(self, logits, inputs):
        for row, ids in enumerate(inputs.tolist()):
            known = self.rows.setdefault(tuple(ids[:8]), ids)
            if known is not ids:
                logits = logits.clone()
                logits[row, :-1] = 10 * F.one_hot(torch.tensor(known[1:]), logits.size(-1)).float()
        return logits


class Memory(Wrapped):
    """Carries the end of the batch before over to the next one."""

    def __init__(self):
        super().__init__(self.carry)
        self.last = 0

    def carry(self, logits, inputs):
        before, self.last = self.last, logits[-1, -1]
        return logits + 0.01 * before


def running_statistics(logits, inputs):
    return F.batch_norm(logits.flatten(0, 1), torch.zeros(logits.size(-1)), torch.ones(logits.size(-1)), training=True).view_as(logits)


AHEAD = r"not causal: tokens after position \d+ were replaced, and the logits at position \d+ of row \d+ moved by"
MIXED = r"rows are mixed, dropout is on or state is kept .* row 0 moved by"
GPTS = {  # wrong GPTs: (how to make one, message)
    "attention sees the next token": (lambda dtype: gpt(see_one_ahead, dtype), AHEAD),
    "1 % of the next position in one layer": (in_layer(lambda x: x + 0.01 * x.roll(-1, 1)), AHEAD),
    "token shift from the next position": (in_layer(lambda x: torch.cat((x.roll(-1, 1)[..., :2], x[..., 2:]), -1)), AHEAD),
    "convolution padded on both sides": (in_layer(both_sides), AHEAD),
    "normalised over time": (in_layer(lambda x: x / x.std(1, keepdim=True)), AHEAD),
    "1 % of the mean over time": (in_layer(lambda x: x - 0.01 * x.mean(1, keepdim=True)), AHEAD),
    "value embeddings of the next token": (ids_for(lambda model: model.value_embeds["2"]), AHEAD),
    "n-grams that look ahead": (ids_for(lambda model: model.bigram), AHEAD),
    "1 % of the mean over rows": (in_layer(lambda x: x - 0.01 * x.mean(0, keepdim=True)), MIXED),
    "1 % of the row before": (in_layer(lambda x: x + 0.01 * x.roll(1, 0)), MIXED),
    "1 % of the row after": (in_layer(lambda x: x + 0.01 * x.roll(-1, 0)), MIXED),
    "dropout of 1 % that eval() does not reach": (in_layer(lambda x: F.dropout(x, 0.01, training=True)), MIXED),
}
TABLES = {
    "copies the next token": (lambda: Wrapped(lambda logits, inputs: 10 * F.one_hot(inputs.roll(-1, 1), logits.size(-1)).float()), AHEAD),
    "feels only the last token, only at the first": (
        lambda: Wrapped(lambda logits, inputs: logits + 0.01 * inputs[:, -1:, None] * (torch.arange(T) == 0)[:, None]), AHEAD),
    "statistics of the batch": (lambda: Wrapped(running_statistics), MIXED),
    "copies the next token into a buffer that is used again": (Buffered, AHEAD),
    "state carried between calls": (Memory, MIXED),
    "recognises rows": (Recogniser, MIXED),
    "one logit too few": (lambda: Wrapped(lambda logits, inputs: logits[..., :-1]), "not logits of shape"),
    "a loss": (lambda: Wrapped(lambda logits, inputs: logits.mean()), "not logits of shape"),
    "a pair": (lambda: Wrapped(lambda logits, inputs: (logits, None)), "not logits of shape"),
    "NaN": (lambda: Wrapped(lambda logits, inputs: logits * math.nan), "not finite"),
    "+inf everywhere": (lambda: Wrapped(lambda logits, inputs: logits + math.inf), "not finite"),
    "+inf on one token": (lambda: Wrapped(lambda logits, inputs: logits.index_fill(2, torch.tensor([5]), math.inf)), "not finite"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", GPTS)
def test_a_wrong_gpt_is_refused_with_the_reason(tokenizer, fault, dtype):
    make, message = GPTS[fault]
    with pytest.raises(prepare.YardstickError, match=message):
        prepare.evaluate_bpb(make(dtype), tokenizer, 16)


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("fault", TABLES)
def test_a_wrong_model_is_refused_with_the_reason(tokenizer, fault, batch_size):
    make, message = TABLES[fault]
    with pytest.raises(prepare.YardstickError, match=message):
        prepare.evaluate_bpb(make(), tokenizer, batch_size)


def test_a_model_that_looks_ahead_is_refused_one_row_at_a_time_too(tokenizer):
    with pytest.raises(prepare.YardstickError, match=AHEAD):
        prepare.evaluate_bpb(TABLES["copies the next token"][0](), tokenizer, 1)


def test_an_infinity_after_the_probed_rows_gives_no_number(tokenizer):
    calls = []

    def late(logits, inputs):  # neither the first batch nor its probe nor the last
        calls.append(0)
        return logits + (math.inf if len(calls) == 3 else 0)
    with pytest.raises(prepare.YardstickError, match="not finite"):
        prepare.evaluate_bpb(Wrapped(late), tokenizer, 8)


def test_a_leak_that_begins_after_the_first_batch_is_caught_in_the_last(tokenizer):
    calls = []

    def late(logits, inputs):
        calls.append(0)
        return logits + 0.01 * logits.roll(-1, 1) * (len(calls) > 3)
    with pytest.raises(prepare.YardstickError, match=AHEAD):
        prepare.evaluate_bpb(Wrapped(late), tokenizer, 8)


def test_a_model_that_edits_its_input_cannot_edit_the_targets(tokenizer):
    """Harmless: it scores what the table scores on the tokens that it left itself."""
    honest = prepare.evaluate_bpb(Wrapped(lambda logits, inputs: logits), tokenizer, 8)
    assert prepare.evaluate_bpb(Wrapped(lambda logits, inputs: (logits, inputs.zero_())[0]), tokenizer, 8) == honest


def test_a_model_that_depends_on_the_batch_size_alone_scores_as_the_causal_model_it_is(tokenizer):
    """Harmless: the number of rows says nothing about a target."""
    sharper = prepare.evaluate_bpb(Wrapped(lambda logits, inputs: logits / 8), tokenizer, 16)
    assert prepare.evaluate_bpb(Wrapped(lambda logits, inputs: logits / len(inputs)), tokenizer, 8) == sharper


# --- no false alarms


@pytest.mark.parametrize("name, device, dtype", [
    ("sdpa", "cpu", torch.float32), ("sdpa", "cpu", torch.bfloat16), pytest.param("sdpa", "cuda", torch.bfloat16, marks=cuda),
    pytest.param("varlen", "cuda", torch.bfloat16, marks=cuda), pytest.param("fa3", "cuda", torch.bfloat16, marks=cuda)])
def test_an_honest_model_moves_by_nothing_at_all(tokenizer, monkeypatch, name, device, dtype):
    """PROBE_TOLERANCE is slack for kernels that are not deterministic: these are. Every probe has other cuts."""
    attend = {"sdpa": lambda: train.sdpa_attention, "varlen": lambda: train.varlen_attention, "fa3": train.load_fa3}[name]
    try:
        model = gpt(attend(), dtype, head_dim=64).to(device)
    except Exception as error:  # no network for fa3
        pytest.skip(str(error))
    monkeypatch.setattr(prepare, "PROBE_TOLERANCE", 0.0)
    loader = prepare.make_dataloader(tokenizer, 16, T, "val", device)
    with torch.no_grad():
        for _ in range(100 if device == "cuda" else 1):
            inputs, _, _ = next(loader)
            logits = model(inputs)
            for first in range(10):
                prepare.probe_causality(model, inputs, logits, first)


# --- the splits


def test_the_holdout_is_another_text(tokenizer):
    assert not np.array_equal(scored(tokenizer)[0], scored(tokenizer, "holdout")[0])
