"""Bits per byte: right numbers where they are known, no number for models that are wrong on purpose."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare

T, ROWS = 64, 30


class Table(torch.nn.Module):
    """Logits from the current token alone, easy to compute by hand, and then a fault."""

    def __init__(self, fault=lambda logits, inputs: logits, table=None):
        super().__init__()
        if table is None:
            table = 3 * torch.randn(prepare.VOCAB_SIZE, prepare.VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        self.table, self.fault = torch.nn.Parameter(torch.as_tensor(table, dtype=torch.float32)), fault

    def forward(self, inputs):
        return self.fault(self.table[inputs], inputs)


class GPT(torch.nn.Module):
    """A causal transformer, whose attention sees `ahead` tokens too far."""

    def __init__(self, dtype, ahead=0):
        super().__init__()
        torch.manual_seed(0)
        layer = lambda: torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.embed = torch.nn.Embedding(prepare.VOCAB_SIZE, 32)
        self.blocks = torch.nn.ModuleList(layer() for _ in range(3))
        self.head = torch.nn.Linear(32, prepare.VOCAB_SIZE)
        torch.nn.init.normal_(self.head.weight)
        self.mask = torch.ones(T, T, dtype=torch.bool).triu(1 + ahead)
        self.to(dtype)

    def forward(self, inputs):
        x = self.embed(inputs)
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        return self.head(x)


@pytest.fixture(autouse=True)
def short(prepared, monkeypatch):
    """Few short rows."""
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", T)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", ROWS * T)


# --- the number


def by_hand(table, tokenizer, split="val"):
    """Bits per byte of a table in float64."""
    inputs, targets, _ = next(prepare.make_dataloader(tokenizer, ROWS, T, split))
    inputs, targets, table = inputs.numpy(), targets.numpy(), np.asarray(table, np.float64)
    nats = np.log(np.exp(table).sum(1))[inputs] - table[inputs, targets]
    sizes = tokenizer.token_bytes()[targets]
    return nats[sizes > 0].sum() / math.log(2) / sizes.sum()


@pytest.mark.parametrize("split", ["val", "holdout"])
def test_bits_per_byte_are_those_of_numpy_in_float64(tokenizer, split):
    """To 1e-7: each loss is rounded to float32, by 6e-8 of it at most."""
    model = Table()
    want = by_hand(model.table.detach().numpy(), tokenizer, split)
    assert prepare.evaluate_bpb(model, tokenizer, 8, split) == pytest.approx(want, rel=1e-7)


def test_losses_are_summed_without_rounding(tokenizer):
    """Token 0 is certain, the loss of any other id is 100 + id / 2**14, exactly: a sum in float32 drops its end."""
    table = np.tile(-100 - np.arange(prepare.VOCAB_SIZE) / 2**14, (prepare.VOCAB_SIZE, 1))
    table[:, 0] = 0
    assert prepare.evaluate_bpb(Table(table=table), tokenizer, 8) == pytest.approx(by_hand(table, tokenizer), rel=1e-12)


def test_special_tokens_are_in_neither_sum_and_a_small_split_is_scored_once(tokenizer, monkeypatch):
    """A uniform model needs log2 V bits a token. BOS is hopeless, and must not matter."""
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 10**9)
    table = np.zeros((prepare.VOCAB_SIZE,) * 2)
    table[:, -4:] = -1e4
    tokens, _ = prepare.token_files(prepare.data_dir())["val"]
    _, targets, epoch = next(prepare.make_dataloader(tokenizer, len(tokens) // T, T, "val"))
    sizes = tokenizer.token_bytes()[targets.numpy()]
    want = math.log2(prepare.VOCAB_SIZE - 4) * (sizes > 0).sum() / sizes.sum()
    assert (sizes == 0).any() and epoch == 1
    assert prepare.evaluate_bpb(Table(table=table), tokenizer, 8) == pytest.approx(want, rel=1e-7)


def test_the_score_does_not_depend_on_the_batch_size(tokenizer):
    """A score over `EVAL_TOKENS // (B * T)` batches changes its rows with B."""
    assert len({prepare.evaluate_bpb(Table(), tokenizer, B) for B in (1, 7, ROWS, 64)}) == 1


def test_evaluation_switches_dropout_off(tokenizer):
    model = torch.nn.Sequential(Table(), torch.nn.Dropout(0.5)).train()
    assert prepare.evaluate_bpb(model, tokenizer, 8) == prepare.evaluate_bpb(model[0], tokenizer, 8)


def test_a_model_that_edits_its_input_edits_neither_the_targets_nor_the_probe(tokenizer):
    zeroed = prepare.evaluate_bpb(Table(lambda logits, inputs: (logits, inputs.zero_())[0]), tokenizer, 8)
    assert zeroed == prepare.evaluate_bpb(Table(), tokenizer, 8)


# --- the gallery: models that are wrong on purpose


def in_layer(change, layer=1):
    """`change` of the output of one block."""
    def make(dtype):
        model = GPT(dtype)
        model.blocks[layer].register_forward_hook(lambda module, args, x: change(x))
        return model
    return make


def next_embedding(dtype):
    model = GPT(dtype)
    model.embed.register_forward_pre_hook(lambda module, args: (args[0].roll(-1, 1),))
    return model


def both_sides(x):
    return x + 0.01 * F.conv1d(x.mT, torch.ones(x.size(2), 1, 3, dtype=x.dtype), padding=1, groups=x.size(2)).mT


def copying(logits, inputs):
    return 10 * F.one_hot(inputs.roll(-1, 1), logits.size(-1)).float()


def feeling(logits, inputs):
    return logits + 0.01 * inputs[:, -1:, None] * (torch.arange(T) == 0)[:, None]


def buffered():
    buffer = torch.empty(0)
    return Table(lambda logits, inputs: buffer.resize_(logits.shape).copy_(copying(logits, inputs)))


def recogniser():
    """Copies the answers of a row that begins like one it has seen."""
    rows = {}

    def recall(logits, inputs):
        ids = inputs.tolist()
        again = torch.tensor([tuple(row[:8]) in rows for row in ids])
        known = torch.tensor([rows.setdefault(tuple(row[:8]), row) for row in ids])
        return torch.where(again[:, None, None], copying(logits, known), logits)

    return Table(recall)


def memory():
    """Carries the end of the batch before over to the next one."""
    last = [0]
    return Table(lambda logits, inputs: last.append(logits[-1, -1]) or logits + 0.01 * last[-2])


AHEAD = r"not causal: tokens after position \d+ were replaced, and the logits at position \d+ of row \d+ moved by"
MIXED = r"rows are mixed, dropout is on or state is kept .* row 0 moved by"
SHAPE, INFINITE = "not logits of shape", "not finite"
GPTS = {  # wrong GPTs: (how to make one, message)
    "attention sees the next token": (lambda dtype: GPT(dtype, ahead=1), AHEAD),
    "1 % of the next position in one layer": (in_layer(lambda x: x + 0.01 * x.roll(-1, 1)), AHEAD),
    "token shift from the next position": (
        in_layer(lambda x: torch.cat((x.roll(-1, 1)[..., :2], x[..., 2:]), -1)), AHEAD),
    "convolution padded on both sides": (in_layer(both_sides), AHEAD),
    "1 % of the mean over time": (in_layer(lambda x: x - 0.01 * x.mean(1, keepdim=True)), AHEAD),
    "the embedding of the next token": (next_embedding, AHEAD),
    "1 % of the row before": (in_layer(lambda x: x + 0.01 * x.roll(1, 0)), MIXED),
    "dropout of 1 % that eval() does not reach": (in_layer(lambda x: F.dropout(x, 0.01, training=True)), MIXED),
}
TABLES = {  # wrong tables: (how to make one, message)
    "feels only the last token, only at the first": (lambda: Table(feeling), AHEAD),
    "copies the next token into a buffer that is used again": (buffered, AHEAD),
    "statistics of the batch": (lambda: Table(lambda x, ids: F.batch_norm(x.mT, None, None, training=True).mT), MIXED),
    "state carried between calls": (memory, MIXED),
    "recognises rows": (recogniser, MIXED),
    "one logit too few": (lambda: Table(lambda x, ids: x[..., :-1]), SHAPE),
    "a pair": (lambda: Table(lambda x, ids: (x, None)), SHAPE),
    "+inf on one token": (lambda: Table(lambda x, ids: x.index_fill(2, torch.tensor(5), math.inf)), INFINITE),
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


@pytest.mark.parametrize("B, fault, message", [  # calls for 8 rows: first, its probe, second, third, last, its probe
    (8, lambda logits, call: logits + (math.inf if call == 3 else 0), INFINITE),
    (8, lambda logits, call: logits + 0.01 * logits.roll(-1, 1) * (call > 3), AHEAD),
    (1, lambda logits, call: logits.roll(-1, 1), AHEAD),
], ids=["infinite between the probes", "looks ahead in the last batch", "looks ahead, a row at a time"])
def test_a_fault_in_few_calls_gives_no_number(tokenizer, B, fault, message):
    calls = itertools.count(1)
    with pytest.raises(prepare.YardstickError, match=message):
        prepare.evaluate_bpb(Table(lambda logits, inputs: fault(logits, next(calls))), tokenizer, B)


# --- no false alarm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_model_moves_by_nothing_at_all(tokenizer, monkeypatch, dtype):
    """PROBE_TOLERANCE is slack for kernels that are not deterministic: these are."""
    monkeypatch.setattr(prepare, "PROBE_TOLERANCE", 0.0)
    assert prepare.evaluate_bpb(GPT(dtype), tokenizer, 8) > 0
