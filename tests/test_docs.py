"""The files that people and agents read agree with the code."""

import importlib.metadata
import re

import pytest

import prepare
from conftest import REPO, commands

README = REPO / "README.md"


def test_readmes_three_commands_come_first_and_ci_runs_the_tests_as_it_says():
    assert commands(README.read_text())[0] == "pip install -q uv\nuv run prepare.py\nuv run train.py\n"
    assert "`uv run pytest`" in README.read_text()
    assert "uv run pytest" in (REPO / ".ci/run").read_text().splitlines()


def test_python_is_bounded_by_what_the_pinned_torch_has_wheels_for():
    """With a newer Python, which uv would take, README's first command failed."""
    torch = importlib.metadata.metadata("torch")
    listed = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line) for line in torch.get_all("Classifier")]
    minors = [int(line[1]) for line in listed if line]
    bounds = f'requires-python = ">=3.{min(minors)},<3.{max(minors) + 1}"'
    assert bounds in (REPO / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", [README, *sorted(REPO.glob("docs/*.md"))], ids=lambda path: path.name)
def test_every_file_that_the_documents_name_exists(path):
    made_later = {"results.tsv", "learned.md", "run.log", "holdout-first.log", "model.pt", "progress.png",
                  "judge.py", "solution.py"}
    names = set(re.findall(r"`([\w./-]+\.(?:py|sh|md|toml|ipynb|tsv|log|pt|png))`", path.read_text()))
    links = re.findall(r'(?:\]\(|src(?:set)?=")(?!https?:)([\w./-]+)', path.read_text())
    assert all(name in made_later or name.startswith("slots/") or (REPO / name).exists() for name in names), names
    assert all((path.parent / link).exists() for link in links)


def test_the_profiles_in_the_table_are_those_of_prepare():
    text = (REPO / "docs/baseline.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) == 3
    for name, dataset, vocab_size, seq_len in rows:
        assert prepare.PROFILES[name][:3] == (dataset, int(vocab_size), int(seq_len))
