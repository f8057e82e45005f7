"""The files that people and agents read agree with the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import prepare
import train

REPO = Path(__file__).parents[1]
README, PROGRAM = (REPO / name for name in ("README.md", "program.md"))


def tracked():
    return subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()


def commands(path):
    """The lines of the fenced bash blocks of a Markdown file, in lists too."""
    return [line.strip() for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL) for line in block.splitlines()]


def test_readmes_two_commands_are_there_and_ci_runs_the_second():
    assert "pip install -q uv && uv run prepare.py && uv run train.py" in commands(README)
    assert "pip install -q uv && uv run pytest" in commands(README)
    assert "uv run pytest" in (REPO / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("path", [README, PROGRAM], ids=lambda path: path.name)
def test_every_bash_block_is_valid_shell(path):
    assert subprocess.run(["bash", "-n"], input="\n".join(commands(path)), text=True).returncode == 0


@pytest.mark.parametrize("path", [README, PROGRAM], ids=lambda path: path.name)
def test_every_file_that_the_documents_name_exists(path):
    made_at_run_time = {"results.tsv", "run.log", "model.pt", "progress.png", "holdout.log"}
    names = set(re.findall(r"`([\w./]+\.(?:py|md|toml|ipynb|tsv|log|pt|png))`", path.read_text()))
    assert names and all(name in made_at_run_time or (REPO / name).exists() for name in names)


def test_the_profiles_in_the_readme_are_those_of_prepare():
    for name, (dataset, vocab_size, seq_len, eval_tokens) in prepare.PROFILES.items():
        assert re.search(rf"\| `{name}` \|.*\| `{dataset}` \| {vocab_size} \| {seq_len} \|", README.read_text()), name


def test_the_example_summary_in_the_readme_has_the_keys_of_a_run():
    block = README.read_text().split("---\nval_bpb")[1].split("```")[0]
    from test_train import SUMMARY
    assert re.findall(r"^(\w+): ", "val_bpb" + block, re.MULTILINE) == SUMMARY


def test_the_result_command_finds_the_two_lines(tmp_path):
    (tmp_path / "run.log").write_text("step 1 | loss 2\n---\nval_bpb:          1.5\ntotal_seconds:    3\npeak_vram_mb:     10.0\n")
    command = next(line for line in commands(PROGRAM) if line.startswith("grep"))
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "val_bpb:          1.5\npeak_vram_mb:     10.0\n"


def test_constants_are_upper_case_one_a_line_and_commented():
    block = (REPO / "train.py").read_text().split("# Hyperparameters")[1].split("if PROFILE")[0]
    lines = [line for line in block.splitlines() if "=" in line and not line.startswith("#")]
    assert len(lines) > 20
    assert all(re.match(r"[A-Z_]+ = \S.*  # \S", line) for line in lines), lines


def test_the_table_of_the_baseline_has_the_constants_of_the_recipe_and_of_train():
    import bench_train
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([\d*./]+)`? \| `?([\d*./]+)`? \|", README.read_text(), re.MULTILINE)
    assert {name: eval(old) for name, old, _ in rows} == bench_train.FAITHFUL
    code = (REPO / "train.py").read_text()
    for name, _, new in rows:  # the first assignment is that of the full profile
        assert eval(re.search(rf"^{name} = (.*?)  #", code, re.MULTILINE)[1]) == eval(new), name


def test_the_top_level_has_nothing_else():
    top = {name.split("/")[0] for name in tracked()}
    assert top <= {"prepare.py", "train.py", "program.md", "analysis.ipynb", "pyproject.toml", "README.md", "tests", ".ci",
                   "LICENSE", ".gitignore", ".claude", "docs"}


def test_help_of_prepare_names_its_options():
    done = subprocess.run([sys.executable, "prepare.py", "--help"], cwd=REPO, capture_output=True, text=True)
    assert "--num-shards" in done.stdout and "--download-workers" in done.stdout
    assert {"--num-shards", "--download-workers"} >= set(re.findall(r"--(?:num|down)[\w-]+", README.read_text()))


def test_the_depth_in_the_summary_is_the_models():
    assert train.DEPTH == len(train.config_from_constants(None).windows)
