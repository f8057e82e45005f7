"""analysis.ipynb on good, odd and broken ledgers. One test runs it in a kernel, the others in this process."""

import os
import random
import warnings

import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import HEADER, REPO, git
from nbclient import NotebookClient

NOTEBOOK = nbformat.read(REPO / "analysis.ipynb", as_version=4)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]
IDEAS = ["matrix LR 0.04 -> 0.05", "costs $5 and $6 of $\\frac$", "hashed bigram value embeddings " * 3]


def row(i, val_bpb, status="discard", description="x"):
    return f"{i:07x}\t{val_bpb:.6f}\t44.0\t{status}\t{description}"


def night(n):
    """The rows of a plausible ledger, whose noise is 0.0040."""
    rng = random.Random(n)
    best = 0.9979
    lines = [row(1, best, "keep", "baseline"), row(1, best + 0.004, "keep", "baseline again, seed 43")]
    for i in range(3, n + 1):
        if i % 4 == 2:
            best -= rng.expovariate(1) * 0.05 / i
        near = best + rng.uniform(-0.001, 0.008)
        kinds = [("discard", near), ("discard", best + 1), ("keep", best), ("crash", 0)]
        status, val_bpb = kinds[i % 4]
        lines.append(row(i, val_bpb, status, f"{rng.choice(IDEAS)} ({900 + i} steps)"))
    return lines


def write(path, lines):
    path.write_text(HEADER + "".join(f"{line}\n" for line in lines))
    return path


def run_page(folder):
    """What the notebook defines when it runs in `folder`, and what it shows."""
    shown = []
    space = {"display": shown.append, "print": lambda *texts: shown.append(" ".join(texts))}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(folder)
        warnings.simplefilter("error")
        exec("\n".join(CODE), space)
    plt.close("all")
    return space | {"shown": shown}


def commit(folder, name, text):
    (folder / name).write_text(text)
    git(folder, "add", name)
    git(folder, "commit", "-q", "-m", "change")
    return git(folder, "rev-parse", "--short=7", "HEAD")


def repository(folder):
    """A repository with one commit on main, and the branch autoresearch/nov21 checked out."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    commit(folder, ".gitignore", "results*.tsv\n")
    git(folder, "checkout", "-q", "-b", "autoresearch/nov21")


@pytest.fixture(autouse=True, scope="module")
def own_world(tmp_path_factory):
    """No configuration and no repository of the machine reaches a test."""
    plt.switch_backend("Agg")
    base = str(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GIT_DIR", raising=False)
        patch.delenv("MPLBACKEND", raising=False)
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CEILING_DIRECTORIES", base)
        patch.setenv("IPYTHONDIR", f"{base}/ipython")
        yield


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the notebook defines, and what it shows where no ledger is."""
    folder = tmp_path_factory.mktemp("no-ledger")
    return run_page(folder) | {"folder": folder}


def test_in_a_kernel_the_page_stands_without_a_warning(tmp_path):
    write(tmp_path / "results.tsv", night(40))
    write(tmp_path / "results-header.tsv", [])
    write(tmp_path / "results-crash.tsv", [row(1, 0, "crash"), "just words"])
    write(tmp_path / "results-discard.tsv", [row(1, 1.5)])
    notebook = nbformat.from_dict(NOTEBOOK)  # a copy
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = sum((cell.get("outputs", []) for cell in notebook.cells), [])
    assert all(output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert (tmp_path / "progress.png").exists()
    text = "".join(output.get("text") or output.data["text/plain"] for output in outputs)
    assert "just words" in text and "results-discard.tsv" in text and "results-header.tsv" not in text
    assert str(tmp_path) not in text


def test_without_a_ledger_the_page_says_so_in_one_line_and_writes_nothing(names):
    assert names["shown"] == [
        "No experiments yet: the first one will be a row of results.tsv beside this notebook.",
        "Hold-out not measured yet."]
    assert list(names["folder"].iterdir()) == []


def test_the_tables_are_those_of_the_ledger_without_git_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = [row(1, 1.0, "keep", "baseline"), row(1, 1.004, "keep", "baseline again"), row(3, 0.95, "keep"),
             row(4, 0, "crash"), row(5, 0.949, "keep", "simpler"), row(6, 0.9491), row(5, 0.951, "keep", "again"),
             row(8, 5.0), row(9, 0.94, "keep"), "a", "b"]
    write(tmp_path / "results.tsv", lines)
    bad, glance, kept, _, missed = run_page(tmp_path)["shown"]
    assert list(bad.commit) == ["a", "b"] and list(bad.index.get_level_values("row")) == [10, 11]
    assert glance["results.tsv"].to_dict() == {
        "keep": 6, "discard": 2, "crash": 1, "repeats": 2, "noise": "0.0030", "first": "1.000000", "last": "0.940000",
        "gain": "0.060000 (6.0%)", "clear gains": "2 of 3 kept changes", "kept commits on the branch": "0 of 4 on HEAD"}
    assert list(kept.index.get_level_values("run")) == [3, 5, 9]
    assert list(kept.gain) == pytest.approx([0.054, 0.001, 0.011]), "against the latest number of the best"
    assert list(missed.index.get_level_values("run")) == [6, 8, 4], "all, the nearest first, crashes last"


def test_the_hold_out_is_compared_within_a_dataset_and_a_budget_by_means_of_seeds(tmp_path):
    path = write(tmp_path / "results.tsv", night(6))
    logs = {"a": (1, 1.01, 1, 300), "b": (0.9, 0.93, 1, 301), "b-43": (0.7, 0.87, 1, 300), "c": (2, 3, 2, 300),
            "long": (0.5, 0.6, 1, 1200), "run": (0.1, "", 1, 300)}
    for name, values in logs.items():
        block = "---\nval_bpb:    {}\nholdout_bpb:  {}\ndataset:      {}\ntraining_seconds: {}\n".format(*values)
        path.with_name(f"{name}.log").write_text(block)
    page = run_page(tmp_path)
    files = [f"{name}.log" for name in logs]
    assert page["holdout"].gap.to_dict() == pytest.approx(dict(zip(files, (0.01, 0.03, 0.17, 1, 0.1))))
    sentences = [item for item in page["shown"] if isinstance(item, str)]
    assert sentences == [f"{files[0]} to {files[1]}: val_bpb improved by 0.2000, and 55% of that carried over."]


def test_rows_that_cannot_be_read_are_listed_and_good_rows_load(tmp_path, names):
    good = [row(1, 1.0, "keep"), row(2, 0.99, "keep", '"quoted" $\\frac$ idea'),
            "0000003\t-\t\tcrash\tno numbers", "0000004\t1.0\tlots\tdiscard\ta stray\ttab"]
    bad = ["a\t0.9\t40\tkeep\tx" .replace("0.9", "about 1"), "b\t0.9", "c\t\t0.9\t40\tkeep\ttab too many",
           "d\tinf\t1\tkeep\tx", "e\t1.0\t1\tKEPT\tx"]
    path = tmp_path / "results.tsv"
    path.write_bytes(("\ufeff" + HEADER + "\r\n".join([*good, "", *bad])).encode() + b" caf\xe9\r\n")
    run, listed = names["read_ledger"](path)
    assert list(run.commit) == [f"{i:07x}" for i in range(1, 5)]
    assert run.val_bpb.fillna(0).to_list() == [1.0, 0.99, 0, 1.0]
    assert list(run.description[1:]) == ['"quoted" $\\frac$ idea', "no numbers", "a stray tab"]
    assert list(listed.commit) == list("abcde")


def draw(names, path):
    """Draws one ledger. Returns its rows, the axes, and {experiment: height} of all dots and ticks."""
    run, _ = names["read_ledger"](path)
    figure, ax = plt.subplots(figsize=(14, 6.5), layout="constrained")
    names["draw_staircase"](ax, "results-nov21.tsv", run)
    figure.canvas.draw()
    plt.close(figure)
    dots = {}
    for marks in ax.collections:
        if type(marks).__name__ == "PathCollection":
            dots |= {int(x): float(y) for x, y in marks.get_offsets()}
    return run, ax, dots


@pytest.mark.parametrize("n", [40, 2000])
def test_the_staircase_shows_every_run_and_names_the_largest_gains(tmp_path, names, n):
    run, ax, dots = draw(names, write(tmp_path / "results.tsv", night(n)))
    assert sorted(dots) == list(range(1, n + 1))
    low, high = ax.get_ylim()
    assert low < run.bar.min() < 0.9979 < high < 1.1
    scored = run.val_bpb.dropna()
    assert [dots[i] for i in scored.index] == pytest.approx(list(scored.clip(low, high)))
    largest = names["changes_of"](run).nlargest(names["LABELS"], "gain").sort_index()
    *numbers, listed = [text.get_text() for text in ax.texts]
    assert numbers == list(map(str, largest.index))
    assert [line.split()[:2] for line in listed.splitlines()] == [
        [str(i), f"{-gain:+.4f}"] for i, gain in largest.gain.items()]


def test_the_axis_holds_all_runs_of_the_baseline_but_not_a_bad_run(tmp_path, names):
    lines = [row(1, 1.0, "keep"), row(1, 1.2, "keep"), *[row(2, 0.9, "keep")] * 4, row(3, 5.0)]
    _, ax, _ = draw(names, write(tmp_path / "results.tsv", lines))
    low, high = ax.get_ylim()
    assert 0.8 < low < 0.9 and 1.2 < high < 1.3


@pytest.mark.parametrize("repeats, clear, band", [(True, [4, 5, 6], [0.7955, 1.008]), (False, [], [])])
def test_clear_is_more_than_the_noise_of_that_time_between_runs_of_one_commit_and_so_wide_is_the_band(
        tmp_path, names, repeats, clear, band):
    lines = [row(1, 1.0, "keep")]
    if repeats:  # the noise is 0.004
        lines += [row(1, 1.004, "keep"), row(2, 1.001)]
    lines += [row(3, 0.9, "keep"), row(4, 0.89, "keep"), row(5, 0.7995, "keep")]
    if repeats:  # now it is 0.027
        lines += [row(5, 0.8495, "keep"), row(6, 0.84, "keep")]
    run, ax, _ = draw(names, write(tmp_path / "results.tsv", lines))
    assert list(run.index[run.clear]) == clear
    bands = [marks for marks in ax.collections if type(marks).__name__ != "PathCollection"]
    heights = [height for marks in bands for height in marks.get_paths()[0].vertices[:, 1]]
    assert [edge(heights) for edge in (min, max) if heights] == pytest.approx(band)


def test_trust_counts_kept_commits_on_the_branch_and_names_other_files(tmp_path, names, monkeypatch):
    folder = tmp_path / "here"
    repository(folder)
    baseline = commit(folder, "program.md", "before the baseline")
    kept = commit(folder, "train.py", "1")
    reset = commit(folder, "train.py", "2")
    git(folder, "reset", "-q", "--hard", kept)
    lines = [f"{sha}\t1.0\t44.0\tkeep\tx" for sha in (baseline, kept, reset, "fffffff")]
    path = write(folder / "results.tsv", lines)
    run, _ = names["read_ledger"](path)
    monkeypatch.chdir(folder)
    trust = names["trust"]
    assert trust("results.tsv", run) == {"kept commits on the branch": "2 of 4 on autoresearch/nov21",
                                         "files touched besides train.py": "none"}

    commit(folder, "prepare.py", "easier")
    git(folder, "rm", "-q", "prepare.py")
    git(folder, "commit", "-q", "-m", "back")  # a diff of both ends does not show it
    (folder / "program.md").write_text("edited and not committed")
    run.loc[4, "commit"] = commit(folder, "train.py", "3")
    assert trust("results.tsv", run)["files touched besides train.py"] == "prepare.py, program.md"
    assert trust("results-nov21.tsv", run)["files touched besides train.py"] == "prepare.py"  # its branch alone
