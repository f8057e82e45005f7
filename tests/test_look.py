"""The look before a run: it tells what a train.py does without a word on val_bpb."""

import pytest

import look
from conftest import run_python

TRAIN = """
import time
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, VOCAB_SIZE, Tokenizer, evaluate_bpb, make_dataloader

class Model(torch.nn.Module):
    def forward(self, inputs):
        return F.one_hot(inputs, VOCAB_SIZE).float()

tokenizer = Tokenizer.from_directory()
loader = make_dataloader(tokenizer, 2, MAX_SEQ_LEN, "train")
begin = time.time()
while time.time() < begin + TIME_BUDGET:
    next(loader)
    time.sleep(PAUSE)
print("step 9 | loss 5.5")
print("---")
print(f"val_bpb: {evaluate_bpb(Model(), tokenizer, 2):.6f}")
print(f"training_seconds: 1.0\\ntotal_seconds: 2.0\\npeak_vram_mb: 1234.0")
""".replace("PAUSE", "0.05")


def test_a_look_tells_speed_memory_and_progress_and_no_val_bpb(prepared, capsys):
    fast = look.look("mine", TRAIN, 1)
    slow = look.look("HEAD", TRAIN.replace("0.05", "0.1"), 1)
    assert 1.5 < fast / slow < 2.5 and abs(fast * 0.05 / (2 * prepared.MAX_SEQ_LEN) - 1) < 0.3
    told = capsys.readouterr().out
    assert told.startswith("mine: ") and "1234.0 MB" in told and "step 9 | loss 5.5" in told and "bpb" not in told


@pytest.mark.parametrize("old, new, message", [
    ("import torch\n", "import torch\nslip\n", "name 'slip' is not defined"),
    ("F.one_hot(inputs,", "F.one_hot(inputs.roll(-1, 1),", "not causal"),
])
def test_a_look_shows_a_slip_and_a_look_at_later_tokens(prepared, old, new, message):
    with pytest.raises(SystemExit, match=f"(?s){message}.*\nmine fails: see above"):
        look.look("mine", TRAIN.replace(old, new), 1)


def test_what_git_does_not_know_is_one_line():
    done = run_python("tests/look.py", "--output=x")
    assert done.returncode == 1 and done.stderr == "git has no --output=x:train.py: name a commit\n"
