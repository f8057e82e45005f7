"""Bits per byte: right numbers for models whose numbers are known, and no number for models that look ahead."""

import math

import numpy as np
import pytest
import torch

import prepare
import train

T, ROWS = 64, 30


class Table(torch.nn.Module):
    """Logits of the next token from the current one alone: causal, and easy to compute by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table, dtype=torch.float32))

    def forward(self, inputs):
        return self.table[inputs]


class Wrapped(Table):
    """A table whose logits a fault changes."""

    def __init__(self, fault):
        super().__init__(torch.randn(prepare.VOCAB_SIZE, prepare.VOCAB_SIZE, generator=torch.Generator().manual_seed(0)))
        self.fault = fault

    def forward(self, inputs):
        return self.fault(super().forward(inputs), inputs)


@pytest.fixture(autouse=True)
def short(prepared, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", T)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", ROWS * T)


def scored(tokenizer, split="val"):
    """The inputs and targets that evaluate_bpb must score, and the bytes of each target, as numpy."""
    inputs, targets, _ = next(prepare.make_dataloader(tokenizer, prepare.eval_rows(split), T, split))
    return inputs.numpy(), targets.numpy(), tokenizer.token_bytes()[targets.numpy()]


def test_a_uniform_model_scores_its_closed_form(tokenizer):
    _, _, sizes = scored(tokenizer)
    want = math.log2(prepare.VOCAB_SIZE) * (sizes > 0).sum() / sizes.sum()
    got = prepare.evaluate_bpb(Table(np.zeros((prepare.VOCAB_SIZE,) * 2)), tokenizer, 8)
    assert got == pytest.approx(want, rel=1e-6)


def test_a_bigram_model_scores_what_plain_numpy_computes(tokenizer):
    inputs, targets, sizes = scored(tokenizer)
    counts = np.full((prepare.VOCAB_SIZE,) * 2, 0.01)
    np.add.at(counts, (inputs.ravel(), targets.ravel()), 1)
    logp = np.log(counts / counts.sum(1, keepdims=True))
    nats = -logp[inputs, targets][sizes > 0].sum()
    got = prepare.evaluate_bpb(Table(np.log(counts)), tokenizer, 8)
    assert got == pytest.approx(nats / math.log(2) / sizes.sum(), rel=1e-6)


def test_special_tokens_are_in_neither_sum(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 10**9)  # the whole split: its short documents share rows
    table = np.zeros((prepare.VOCAB_SIZE,) * 2)
    table[:, -4:] = -1e4  # predicting BOS is hopeless, and must not matter
    _, _, sizes = scored(tokenizer)
    want = math.log2(prepare.VOCAB_SIZE - 4) * (sizes > 0).sum() / sizes.sum()
    assert (sizes == 0).any() and prepare.evaluate_bpb(Table(table), tokenizer, 8) == pytest.approx(want, rel=1e-6)


def test_the_score_does_not_depend_on_the_batch_size(tokenizer):
    """A score over `EVAL_TOKENS // (B * T)` batches changes its rows with B, and divides by zero for a large B."""
    model = Wrapped(lambda logits, inputs: logits)
    got = [prepare.evaluate_bpb(model, tokenizer, B) for B in (1, 7, ROWS, 64)]
    assert got == pytest.approx([got[0]] * 4, rel=1e-12)


def test_a_small_split_is_scored_once(tokenizer, monkeypatch):
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 10**9)
    tokens = prepare.load_manifest()["splits"]["val"]["tokens"]
    assert prepare.eval_rows("val") == tokens // T
    loader = prepare.make_dataloader(tokenizer, prepare.eval_rows("val"), T, "val")
    assert next(loader)[2] == 1


def test_the_holdout_is_another_text(tokenizer):
    assert not np.array_equal(scored(tokenizer)[0], scored(tokenizer, "holdout")[0])


def shifted(logits, inputs):  # a window open to the right by one, at a strength of 1 %
    return logits + 0.01 * logits.roll(-1, 1)


def mean_over_time(logits, inputs):
    return logits - logits.mean(1, keepdim=True)


def mean_over_rows(logits, inputs):
    return logits - 0.01 * logits.mean(0, keepdim=True)


def both_sides(logits, inputs):
    padded = torch.nn.functional.pad(logits, (0, 0, 1, 1))
    return logits + 0.01 * (padded[:, :-2] + padded[:, 2:])


def copies_the_answer(logits, inputs):
    return 10 * torch.nn.functional.one_hot(inputs.roll(-1, 1), logits.size(-1)).float()


@pytest.mark.parametrize("fault", [shifted, mean_over_time, mean_over_rows, both_sides, copies_the_answer])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_model_that_sees_what_it_must_not_is_refused(tokenizer, fault, batch_size):
    if fault is mean_over_rows and batch_size == 1:
        pytest.skip("there is no other row")
    with pytest.raises(prepare.YardstickError, match="not causal: logits at position [0-9]+ moved by"):
        prepare.evaluate_bpb(Wrapped(fault), tokenizer, batch_size)


def test_a_model_that_feels_only_the_last_token_from_the_first_is_refused(tokenizer):
    def fault(logits, inputs):
        logits = logits.clone()
        logits[:, 0] += 0.01 * inputs[:, -1:]
        return logits
    with pytest.raises(prepare.YardstickError, match="at position 0 moved"):
        prepare.evaluate_bpb(Wrapped(fault), tokenizer, 8)


@pytest.mark.parametrize("fault, message", [
    (lambda logits, inputs: logits[..., :-1], "not logits of shape"),
    (lambda logits, inputs: logits.mean(), "not logits of shape"),
    (lambda logits, inputs: (logits, None), "not logits of shape"),
    (lambda logits, inputs: logits * math.nan, "not finite"),
    (lambda logits, inputs: logits.masked_fill(inputs[..., None] == inputs[..., None], math.inf), "not finite"),
])
def test_what_is_not_a_distribution_over_the_vocabulary_is_refused(tokenizer, fault, message):
    with pytest.raises(prepare.YardstickError, match=message):
        prepare.evaluate_bpb(Wrapped(fault), tokenizer, 8)


def test_honest_models_are_never_refused(tokenizer):
    torch.manual_seed(0)
    config = train.GPTConfig(prepare.VOCAB_SIZE, T, 2, 2, 1, 16, [T // 2, T - 1], torch.float32, 64, True)
    for _ in range(5):
        model = train.GPT(config, train.sdpa_attention)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        assert prepare.evaluate_bpb(model, tokenizer, 8) > 0


def test_evaluation_leaves_the_mode_of_the_model(tokenizer):
    model = Wrapped(lambda logits, inputs: logits).train()
    prepare.evaluate_bpb(model, tokenizer, 8)
    assert model.training
