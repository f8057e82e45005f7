"""Promises that any honest train.py keeps, also one that a night has rewritten: it is run as a program and watched."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import REPO, run_python
from witness import TOKENS_PER_SECOND

BUDGET = 12  # seconds of a clock that the tokens drive
SUMMARY = ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps",
           "num_params_M", "depth", "seed", "device", "attention", "profile", "dataset"]


def watched_run(folder, budget, *fault, **env):
    """(the process that has ended, what the witness saw)"""
    (folder / "witness.json").unlink(missing_ok=True)
    command = [sys.executable, str(REPO / "tests/witness.py"), str(budget), *fault]
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    told = folder / "witness.json"
    return done, json.loads(told.read_text()) if told.exists() else {}


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """{name: (process, what the witness saw)}, of a whole run, and beside it of three short ones in another folder."""
    runs = {"folder": tmp_path_factory.mktemp("whole")}

    def short_runs():
        folder = tmp_path_factory.mktemp("short")
        runs["holdout"] = watched_run(folder, 2, SEED="43", AUTORESEARCH_HOLDOUT="1")
        runs["nan"] = watched_run(folder, BUDGET, "nan")  # where the weights of the last one lie
        runs["memory"] = watched_run(folder, BUDGET, "memory")

    with ThreadPoolExecutor() as pool:
        others = pool.submit(short_runs)
        runs["whole"] = watched_run(runs["folder"], BUDGET)
    others.result()
    return runs


def ended_well(run):
    """({key: string} of what stands below the line, what the witness saw) of a run."""
    done, told = run
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [re.fullmatch(r"(\w+): +(\S.*)", line) for line in done.stdout.split("---\n")[-1].splitlines()]
    return {line[1]: line[2] for line in lines}, told


def last_line_of_failure(done):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_run_ends_with_the_summary_and_leaves_the_weights_alone(runs):
    summary, _ = ended_well(runs["whole"])
    assert list(summary) == SUMMARY
    assert 100 < float(summary["peak_vram_mb"]) < 20_000  # torch alone has several hundred
    assert {path.name for path in runs["folder"].iterdir()} == {"model.pt", "witness.json"}


def test_training_learns(runs):
    summary, _ = ended_well(runs["whole"])
    assert 1 < float(summary["val_bpb"]) < 2.9  # a model of nothing has 3.4


def test_every_parameter_with_a_gradient_is_trained(runs):
    _, told = ended_well(runs["whole"])
    assert told["stuck"] == []


def test_the_saved_weights_are_those_that_are_scored(runs):
    _, told = ended_well(runs["whole"])
    assert told["saved"]


def test_the_text_is_read_through_the_dataloader_and_only_the_training_text(runs):
    _, told = ended_well(runs["whole"])
    assert set(told["splits"]) == {"train"} and told["opened"] == []
    assert told["evaluated"] == ["val"]


def test_the_clock_sees_every_step_and_the_run_ends_with_the_first_one_past_the_budget(runs):
    """Training that the clock does not see would read more tokens than fit."""
    summary, told = ended_well(runs["whole"])
    step = told["tokens"] / int(summary["num_steps"])
    assert BUDGET <= float(summary["training_seconds"]) <= BUDGET + 2 * step / TOKENS_PER_SECOND
    assert 0 <= told["tokens"] - BUDGET * TOKENS_PER_SECOND <= 2.1 * step
    assert abs(told["tokens"] - 1e6 * float(summary["total_tokens_M"])) <= 2 * step + 50_000  # printed with one decimal


def test_the_seed_comes_from_the_environment_and_the_hold_out_is_scored_on_demand(runs):
    summary, told = ended_well(runs["holdout"])
    assert list(summary) == ["val_bpb", "holdout_bpb", *SUMMARY[1:]] and summary["seed"] == "43"
    assert summary["holdout_bpb"] != summary["val_bpb"] and told["start"] != runs["whole"][1]["start"]


def test_a_run_that_explodes_stops_in_one_line_and_began_without_the_weights_of_the_last(runs):
    done, told = runs["nan"]
    assert re.search("^FAIL: .*(loss|nan)", last_line_of_failure(done))
    assert told["tokens"] < runs["whole"][1]["tokens"] / 2
    assert told["start"] == runs["whole"][1]["start"]


def test_a_run_out_of_memory_ends_in_one_line(runs):
    assert last_line_of_failure(runs["memory"][0]).startswith("FAIL: out of memory")


def test_a_run_without_data_ends_in_one_line(tmp_path):
    done = run_python("train.py", AUTORESEARCH_CACHE=str(tmp_path))
    assert re.search("^FAIL: .*; run: uv run prepare.py$", last_line_of_failure(done))
