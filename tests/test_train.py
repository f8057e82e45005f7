"""Promises that any honest train.py keeps, also one that a night has rewritten: it is run as a program and watched."""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import REPO, run_python
from witness import TOKENS_PER_SECOND

BUDGET = 12  # seconds of a clock that the tokens drive
SUMMARY = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
           "num_params_M", "depth", "seed", "device", "attention", "profile", "dataset"]


def watched_run(folder, budget, *fault, **env):
    """(the process that has ended, what the witness saw)"""
    command = [sys.executable, str(REPO / "tests/witness.py"), str(budget), *fault]
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    told = folder / "witness.json"
    return done, json.loads(told.read_text()) if told.exists() else {}


def summary_of(done):
    """{key: string} of what stands below the line; the run must have ended well."""
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [re.fullmatch(r"(\w+): +(\S.*)", line) for line in done.stdout.split("---\n")[-1].splitlines()]
    return {line[1]: line[2] for line in lines}


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """(folder, process, what the witness saw) of a whole run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *watched_run(folder, BUDGET)


def test_a_run_ends_with_the_summary_after_few_lines_and_leaves_the_weights_alone(run):
    folder, done, _ = run
    assert list(summary_of(done)) == SUMMARY
    assert len(done.stdout.splitlines()) <= 60 + len(SUMMARY)
    assert {path.name for path in folder.iterdir()} == {"model.pt", "witness.json"}


def test_training_learns(run):
    assert 1 < float(summary_of(run[1])["val_bpb"]) < 2.9  # a model of nothing has 3.4


def test_every_parameter_with_a_gradient_is_trained(run):
    _, done, told = run
    assert summary_of(done) and told["stuck"] == []


def test_the_saved_weights_are_those_that_are_scored(run):
    _, done, told = run
    assert summary_of(done) and told["saved"]


def test_the_text_is_read_through_the_dataloader_and_only_the_training_text(run):
    _, done, told = run
    assert summary_of(done) and set(told["splits"]) == {"train"} and told["opened"] == []
    assert told["evaluated"] == ["val"]


def test_the_clock_sees_every_step_and_the_run_ends_with_the_first_one_past_the_budget(run):
    """Training that the clock does not see would read more tokens than fit."""
    _, done, told = run
    summary = summary_of(done)
    step = told["tokens"] / int(summary["num_steps"])
    assert BUDGET <= float(summary["training_seconds"]) <= BUDGET + 2 * step / TOKENS_PER_SECOND
    assert 0 <= told["tokens"] - BUDGET * TOKENS_PER_SECOND <= 2.1 * step
    assert abs(told["tokens"] - 1e6 * float(summary["total_tokens_M"])) <= 2 * step + 50_000  # printed with one decimal


def test_the_seed_comes_from_the_environment_and_the_hold_out_is_scored_on_demand(run, tmp_path):
    done, told = watched_run(tmp_path, 2, SEED="43", AUTORESEARCH_HOLDOUT="1")
    summary = summary_of(done)
    assert list(summary) == ["val_bpb", "holdout_bpb", *SUMMARY[1:]] and summary["seed"] == "43"
    assert summary["holdout_bpb"] != summary["val_bpb"] and told["start"] != run[2]["start"]


def test_a_run_that_explodes_stops_in_one_line_and_began_without_the_weights_of_the_last(run):
    folder, _, before = run
    done, told = watched_run(folder, BUDGET, "nan")
    assert done.returncode == 1 and re.search(r"^FAIL: .*(loss|nan)", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr and told["tokens"] < before["tokens"] / 2
    assert told["start"] == before["start"]


def test_a_run_out_of_memory_ends_in_one_line(prepared, tmp_path):
    done, _ = watched_run(tmp_path, BUDGET, "memory")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("FAIL: out of memory")
    assert "Traceback" not in done.stderr


def test_a_run_without_data_ends_in_one_line(tmp_path):
    done = run_python("train.py", AUTORESEARCH_CACHE=str(tmp_path))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("FAIL: ")
    assert done.stderr.endswith("; run: uv run prepare.py\n") and "Traceback" not in done.stderr
