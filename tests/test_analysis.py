"""analysis.ipynb on good, odd and broken ledgers: the numbers it shows and the figures it draws.

Most cases run the notebook's cells in this process on the Agg backend, which takes a second. One kernel,
as the user has it, runs the whole notebook on several folders one after the other.
"""

import ast
import inspect
import json
import os
import random
import re
import subprocess
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "analysis.ipynb"
HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
IDEAS = [
    "raise EMBEDDING_LR from 0.6 to 0.8", "halve TOTAL_BATCH_SIZE to 2**18", "SwiGLU instead of ReLU squared in the MLP",
    "depth 9 at the same width", "short window T/8", "warmdown 0.5 to 0.7 of the run", "weight decay on value embeddings 0.003",
    "multi-query attention", "hashed bigram value embeddings with 65,536 rows, added before the gate on every second layer",
    "RoPE base 200k", "FINAL_LR_FRAC 0.05", "Muon momentum 0.85 to 0.92", "init scale x0.68", "label smoothing 0.05",
    "parallel attention and MLP", "softcap 15 to 20", "x0_lambda init 0.05", "tie embedding and head", "cosine schedule",
    "costs $5 and $6 of (a) 'quoted' <b>text</b>", "fp8 matmuls", "gradient clipping at 1.0", "try again with \"fresh\" idea",
]


def row(i, val_bpb, status="discard", description=None, memory_gb=44.0):
    return f"{i:07x}\t{val_bpb:.6f}\t{memory_gb:.1f}\t{status}\t{description or IDEAS[i % len(IDEAS)]}"


def night(n, seed=0, baseline=0.9979, gain=0.028):
    """The lines of a plausible ledger: a falling staircase, discards, failed ideas far off the axis, crashes."""
    rng, best, lines = random.Random(seed), baseline, [HEADER, row(1, baseline, "keep", "baseline")]
    memory, n_kept = 44.0, 0
    for i in range(2, n + 1):
        kind, memory_gb = rng.random(), memory + rng.gauss(0, 1.5)
        if kind < 0.08:
            lines.append(row(i, 0, "crash", memory_gb=0))
        elif kind < 0.08 + 0.20 * (1 if n < 500 else 0.25):
            best -= rng.expovariate(1) * gain * max(0.25 * 0.8 ** n_kept, 0.1 / n) + 1e-6  # large wins come early
            n_kept, memory = n_kept + 1, memory_gb
            lines.append(row(i, best, "keep", rng.choice(IDEAS), memory))
        else:
            worse = rng.expovariate(1) * gain / 3 if kind < 0.9 else rng.uniform(0.05, 2)
            lines.append(row(i, best + worse - 0.0005, memory_gb=max(memory_gb, 1)))
    return lines


def write(folder, lines, name="results.tsv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_cells(folder):
    """Executes the code cells in this process inside `folder`; returns their names, what they displayed and printed."""
    matplotlib.use("Agg")
    plt.close("all")
    shown, here = [], os.getcwd()
    space = {"display": shown.append, "print": lambda *args: shown.append(" ".join(map(str, args)))}
    os.chdir(folder)
    try:
        with matplotlib.rc_context(), pd.option_context("display.max_rows", 60), warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, cell in enumerate(nbformat.read(NOTEBOOK, as_version=4).cells):
                if cell.cell_type == "code":
                    tree = ast.parse(cell.source)
                    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
                    exec(compile(tree, f"<cell {i}>", "exec"), space)
                    if last is not None:
                        value = eval(compile(ast.Expression(last.value), f"<cell {i}>", "eval"), space)
                        shown.extend([] if value is None else [value])
    finally:
        os.chdir(here)
    space["shown"] = shown
    return space


def run_kernel(folders, extra):
    """Executes the notebook in one kernel in each folder in turn, with one more cell that prints JSON of `extra`.

    Returns, folder by folder, the outputs of the notebook's own cells and the value of `extra`."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    notebook, new_cell = nbformat.v4.new_notebook(), nbformat.v4.new_code_cell
    for folder in folders:
        notebook.cells += [new_cell(f"%reset -f\n%cd -q {folder}"), *(new_cell(cell.source) for cell in cells),
                           new_cell(f"import json\n{inspect.getsource(measure)}\nprint(json.dumps({extra}))")]
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folders[0])}}).execute()
    size, results = len(cells) + 2, []
    for i in range(0, len(notebook.cells), size):
        *own, last = notebook.cells[i:i + size]
        printed = "".join(output.text for output in last.outputs if output.get("name") == "stdout")  # may come in parts
        results.append(([output for cell in own for output in cell.outputs], json.loads(printed)))
    return results


def measure(figure):
    """What a figure shows, panel by panel, and every pair of its texts that overlap or leave the picture."""
    figure.canvas.draw()
    panels, boxes = [], []
    for ax in figure.axes:
        labels = [text.get_text() for text in ax.texts]
        dots = [c for c in ax.collections if type(c).__name__ == "PathCollection"]
        panels.append({"x": ax.get_xlim(), "y": ax.get_ylim(), "labels": labels,
                       "legend": [text.get_text() for text in ax.get_legend().get_texts()] if ax.get_legend() else [],
                       "points": [[float(v) for v in point] for c in dots for point in c.get_offsets()]})
        texts = [child for child in ax.get_children() if hasattr(child, "get_text")] + [ax.xaxis.label, ax.yaxis.label]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes += [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return {"panels": panels,
            "overlaps": [[a, b] for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)],
            "outside": [text for text, box in boxes if box.x0 < 0 or box.y0 < 0
                        or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]}


def printed(space):
    return [item for item in space["shown"] if isinstance(item, str)]


def facts(space, run="results"):
    return space["glance"][run].to_dict()


def commit(folder, files, message="change"):
    for name, text in files.items():
        (folder / name).write_text(text)
    subprocess.run(["git", "add", *files], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-q", "-m", message], cwd=folder, check=True)
    return subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=folder, check=True, text=True,
                          capture_output=True).stdout.strip()


def repository(folder, branch="autoresearch/mar5"):
    """A repository with one commit on main, and `branch` checked out."""
    folder.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=folder, check=True)
    start = commit(folder, {"train.py": "0", "prepare.py": "0", ".gitignore": "*.tsv\n*.log\n*.png\n"})
    subprocess.run(["git", "checkout", "-q", "-b", branch], cwd=folder, check=True)
    return start


@pytest.fixture(autouse=True, scope="module")
def own_world(tmp_path_factory):
    """No configuration and no repository of the machine reaches a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "MPLBACKEND"):
            patch.delenv(name, raising=False)
        for name in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{name}_NAME", "a")
            patch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp()))
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        yield


# ---- in a kernel, as the user runs it


@pytest.fixture(scope="module")
def in_kernel(own_world, tmp_path_factory):
    """{case: (folder, outputs, [names of the runs, staircase, memory])} of several folders, run in one kernel."""
    base = tmp_path_factory.mktemp("kernel")
    repository(base / "worktrees")
    subprocess.run(["git", "worktree", "add", "-q", "-b", "autoresearch/mar6", "../other"], cwd=base / "worktrees", check=True)
    write(base / "worktrees", night(30, seed=1))
    write(base / "other", night(20, seed=2, baseline=1.9))
    os.symlink(base / "worktrees" / "results.tsv", base / "other" / "results-copy.tsv")  # the same ledger: not a third run
    (base / "none").mkdir()
    write(base / "header", [HEADER])
    write(base / "crashes", [HEADER, row(1, 0, "crash"), row(2, 0, "crash")])
    write(base / "malformed", ["\ufeff" + HEADER + "\r", 'x\t"', row(1, 1.0, "keep") + "\r", row(2, 0.9, "keep") + "\tstray"])
    write(base / "long", night(126, seed=1))
    cases = ["none", "header", "crashes", "malformed", "long", "worktrees"]
    extra = "[list(runs)] + ([measure(staircase), measure(memory)] if runs else [])"
    results = run_kernel([base / case for case in cases], extra)
    return {case: (base / case, *result) for case, result in zip(cases, results)}


def test_without_a_ledger_the_notebook_says_so_in_one_line_and_draws_nothing(in_kernel):
    folder, outputs, (names,) = in_kernel["none"]
    lines = [line for output in outputs if output.output_type == "stream" for line in output.text.splitlines()]
    assert [line for line in lines if "ledger" in line.lower()] == [
        "No ledger yet: results.tsv appears beside this notebook with the first experiment."]
    assert names == []
    assert not any("image/png" in output.get("data", {}) for output in outputs)
    assert list(folder.iterdir()) == []


def test_in_a_kernel_every_ledger_runs_without_a_warning_or_a_machine_path(in_kernel):
    n_images = {"none": 0, "header": 0, "crashes": 3, "malformed": 3, "long": 3, "worktrees": 3}
    for case, (folder, outputs, (names, *figures)) in in_kernel.items():
        assert [output.text for output in outputs if output.get("name") == "stderr"] == [], case
        assert str(folder.parent) not in json.dumps(outputs), case
        assert sum("image/png" in output.get("data", {}) for output in outputs) == n_images[case], case
        assert (folder / "progress.png").exists() == bool(names), case
        for figure in figures:
            assert figure["overlaps"] == figure["outside"] == [], case


def test_two_worktrees_are_two_runs_each_with_its_own_panel_and_axis(in_kernel):
    _, _, (names, staircase, memory) = in_kernel["worktrees"]
    assert names == ["mar5", "mar6"]
    for figure in (staircase, memory):
        first, second = figure["panels"]
        assert first["y"][0] < 0.99 < first["y"][1] < 1.1 and second["y"][0] < 1.89 < second["y"][1] < 2.0
    assert [len(panel["points"]) for panel in staircase["panels"]] == [30, 20]


# ---- the numbers


def test_at_a_glance_counts_and_gains_are_those_of_the_ledger(tmp_path):
    write(tmp_path, [HEADER, row(1, 1.0, "keep", "baseline", 40), row(2, 1.01), row(3, 0.95, "keep", "wider model", 44),
                     row(4, 0, "crash"), row(5, 0.9499, "keep", "simpler", 43.5), row(6, 0.99)])
    (tmp_path / "run.log").write_text("step 1\n---\nval_bpb:          0.990000\ntraining_seconds: 300.0\n"
                                      "device:           NVIDIA H200\nattention:        fa3\n"
                                      "profile:          full\ndataset:          climbmix\n")
    space = run_cells(tmp_path)
    assert facts(space) == {
        "experiments": 6, "kept": 3, "discarded": 2, "crashed": 1, "unreadable rows": 0, "baseline": "1.000000",
        "best": "0.949900", "best commit": "0000005", "best idea": "simpler", "gain over baseline": "0.050100 (5.01%)",
        "gain per hour": "0.100200", "kept changes clear of the noise": "1 of 2", "device": "NVIDIA H200",
        "dataset": "climbmix", "profile": "full", "attention": "fa3"}
    kept = space["kept_table"]
    assert list(kept["experiment"]) == [3, 5]
    assert list(kept["gain"]) == pytest.approx([0.05, 0.0001])
    assert list(kept["clear"]) == [True, False]
    assert list(kept["memory change (GB)"]) == [4.0, -0.5]
    assert space["trust_table"]["results"]["kept changes inside the noise"] == "1 of 2"


def test_a_gain_is_clear_only_above_what_two_equal_runs_can_differ_by(tmp_path):
    space = run_cells(tmp_path)
    noise, add_gains, columns = space["NOISE"], space["add_gains"], space["COLUMNS"]
    threshold = 2 * 2**0.5 * noise
    for gain, clear in ((0.99 * threshold, False), (1.01 * threshold, True), (-0.01, False)):
        rows = pd.DataFrame([["a", 1.0, 40.0, "keep", "baseline"], ["b", 1.0 - gain, 40.0, "keep", "x"]], columns=columns)
        assert bool(add_gains(rows).clear.iloc[1]) is clear
        assert rows.best.iloc[1] == min(1.0, 1.0 - gain), "the best never rises"


def test_every_experiment_but_the_baseline_is_in_one_family(tmp_path):
    space = run_cells(write(tmp_path, [HEADER, row(1, 1.0, "keep", "baseline"), row(2, 0.9, "keep", "EMBEDDING_LR 0.8"),
                                       row(3, 1.1, "discard", "head LR x2"), row(4, 0, "crash", "hashed bigram table"),
                                       row(5, 0.8999, "keep", "Weight Decay 0.1"), row(6, 1.2, "discard", "zzz")]))
    tried = space["tried"]
    assert tried.tries.to_dict() == {"learning rate": 2, "weight decay": 1, "n-gram tables": 1, "other": 1}
    assert tried.loc["learning rate", "kept, clear"] == 1 and tried.loc["learning rate", "not kept"] == 1
    assert tried.loc["weight decay", "kept, in the noise"] == 1 and tried.loc["n-gram tables", "crashed"] == 1
    assert tried.gain["learning rate"] == pytest.approx(0.1)


def test_hold_out_is_shown_for_every_log_that_has_both_numbers(tmp_path):
    write(tmp_path, [HEADER, row(1, 1.0, "keep", "baseline")])
    (tmp_path / "run.log").write_text("holdout_bpb: 7\n---\nval_bpb:          1.000000\n")
    (tmp_path / "holdout.log").write_text("---\nval_bpb:          0.950000\nholdout_bpb:      0.953000\n")
    holdout = run_cells(tmp_path)["holdout"]
    assert holdout.log.to_list() == ["holdout.log"]
    assert holdout.gap.to_list() == pytest.approx([0.003])


# ---- odd and broken ledgers


@pytest.mark.parametrize("lines, message", [
    ([HEADER], "results: results.tsv has no experiments yet."),
    ([], "results: results.tsv has no experiments yet."),
])
def test_a_ledger_without_rows_is_named_in_one_line_and_nothing_is_drawn(tmp_path, lines, message):
    space = run_cells(write(tmp_path, lines))
    assert printed(space)[0] == message
    assert not plt.get_fignums()


@pytest.mark.parametrize("lines, counts, baseline, best, n_labels", [
    ([row(1, 0, "crash"), row(2, 1.5, "keep"), row(3, 1.4, "keep")], (3, 2, 0, 1), "1.500000", "1.400000", 1),
    ([row(1, 1.7), row(2, 1.5, "keep"), row(3, 1.4, "keep")], (3, 2, 1, 0), "1.500000", "1.400000", 1),
    ([row(1, 0, "crash"), row(2, 0, "crash")], (2, 0, 0, 2), "nan", None, 0),
    ([row(1, 1.5), row(2, 1.6), row(3, 1.45)], (3, 0, 3, 0), "1.500000", None, 0),
    ([row(1, 1.5, "keep")], (1, 1, 0, 0), "1.500000", "1.500000", 0),
    ([row(1, 1.5, "discard")], (1, 0, 1, 0), "1.500000", None, 0),
], ids=["first row a crash", "first row discarded", "all crashes", "nothing kept", "one row", "one row, discarded"])
def test_a_short_ledger_shows_every_row_and_only_the_numbers_it_has(tmp_path, lines, counts, baseline, best, n_labels):
    space = run_cells(write(tmp_path, [HEADER, *lines]))
    shown = facts(space)
    assert tuple(shown[key] for key in ("experiments", "kept", "discarded", "crashed")) == counts
    assert shown["baseline"] == baseline and shown.get("best") == best
    figure = measure(space["staircase"])
    assert len(figure["panels"][0]["points"]) == len(lines)
    assert len(figure["panels"][0]["labels"]) == n_labels
    assert "nan" not in space["staircase"].axes[0].get_title(loc="left")
    assert figure["overlaps"] == figure["outside"] == []


def test_malformed_rows_are_listed_with_their_reason_and_good_rows_load(tmp_path):
    good = [row(1, 1.0, "keep", "baseline"), row(2, 0.99, "KEEP", '"quoted" $\\frac$ idea'),
            '"0000003"\t"0.98"\t"40.0"\t"keep"\t"all fields quoted"', "0000004\t-\t\tcrash\tno numbers",
            "0000005\t1.0\t40\tdiscard\ta stray\ttab"]
    bad = ["0000006\t0.9\t40\tkeep", "0000007\tabout 0.9\t40\tkeep\ttext in a number", "0000008\t0.9\tlots\tkeep\tx",
           "0000009\t0.9\t40\tkept?\tx", "000000a\tnan\t40\tkeep\tx", "000000b\t0.000000\t40\tdiscard\tx",
           "000000c\t\t0.9\t40\tkeep\ttab too many", "just words", "000000d\tinf\t40\tdiscard\tx", "000000e\t0.9\t-1\tkeep\tx"]
    text = "\ufeff" + "\r\n".join([HEADER, *good, "", *bad, ""])
    write(tmp_path, []).joinpath("results.tsv").write_bytes(text.encode())
    space = run_cells(tmp_path)
    rows, listed = space["runs"]["results"], space["bad_rows"]
    assert list(rows.commit) == [f"{i:07x}" for i in range(1, 6)]
    assert list(rows.status) == ["keep", "keep", "keep", "crash", "discard"]
    assert list(rows.val_bpb[:3]) == [1.0, 0.99, 0.98]
    assert list(rows.description[1:]) == ['"quoted" $\\frac$ idea', "all fields quoted", "no numbers", "a stray tab"]
    assert list(listed.text) == [good[4], *bad]
    assert list(listed.line) == [6, *range(8, 8 + len(bad))]
    assert list(listed.reason) == [
        "stray tab, read as part of the description", "4 columns instead of 5", "val_bpb 'about 0.9'", "memory_gb 'lots'",
        "status 'kept?'", "val_bpb 'nan'", "val_bpb '0.000000'", "status '40'", "1 columns instead of 5", "val_bpb 'inf'",
        "memory_gb '-1'"]
    assert facts(space)["unreadable rows"] == len(bad)
    assert any(item is listed for item in space["shown"]), "the list is on the page"
    labels = measure(space["staircase"])["panels"][0]["labels"]
    assert any('"quoted" $\\frac$ idea' in label for label in labels), "a dollar sign is not mathematics"


def test_utf16_old_macintosh_line_ends_and_a_missing_header_load_too(tmp_path):
    lines = [row(1, 1.0, "keep", "baseline"), row(2, 0.9, "keep")]
    for name, data in (("results-w.tsv", "\n".join([HEADER, *lines]).encode("utf-16")),
                       ("results-m.tsv", "\r".join([HEADER, *lines]).encode()), ("results-h.tsv", "\n".join(lines).encode()),
                       ("results-b.tsv", "\n".join([HEADER, *lines]).encode() + b" caf\xe9\n")):
        (tmp_path / name).write_bytes(data)
    space = run_cells(tmp_path)
    assert {name: list(run.val_bpb) for name, run in space["runs"].items()} == dict.fromkeys("bhmw", [1.0, 0.9])
    assert len(space["bad_rows"]) == 0


# ---- the figures


@pytest.fixture(scope="module", params=[6, 30, 126, 2000])
def long_night(request, tmp_path_factory):
    lines = night(request.param, seed=3)
    space = run_cells(write(tmp_path_factory.mktemp("night"), lines))
    return [line.split("\t") for line in lines[1:]], space, measure(space["staircase"]), measure(space["memory"])


def test_the_staircase_has_one_point_per_experiment_and_its_legend_counts_them(long_night):
    rows, space, staircase, _ = long_night
    panel, = staircase["panels"]
    assert len(panel["points"]) == len(rows)
    assert sorted(x for x, _ in panel["points"]) == list(range(1, len(rows) + 1))
    assert sum(int(n) for n in re.findall(r"\((\d+)\)", " ".join(panel["legend"]))) == len(rows)


def test_the_axis_holds_baseline_and_best_and_far_runs_are_marked_at_its_edge(long_night):
    rows, space, staircase, memory = long_night
    best = min(float(r[1]) for r in rows if r[3] == "keep")
    low, high = staircase["panels"][0]["y"]
    assert low < best < 0.9979 < high < 1.1
    for r, y in ((rows[int(x) - 1], y) for x, y in staircase["panels"][0]["points"]):
        if r[3] != "crash":
            assert y == pytest.approx(min(float(r[1]), high))
    far = sum(float(r[1]) > high for r in rows)
    assert far and f"discard, worse than the axis ({far})" in staircase["panels"][0]["legend"]
    assert len(memory["panels"][0]["points"]) == sum(r[3] != "crash" for r in rows)


def test_no_texts_overlap_or_leave_the_picture_and_the_largest_gains_are_named(long_night):
    rows, space, staircase, memory = long_night
    changes, n_labels = space["kept_table"], space["LABELS"]
    named = set(changes.nlargest(n_labels, "gain").experiment)
    for figure in (staircase, memory, measure(space["families"])):
        assert figure["overlaps"] == figure["outside"] == []
    for figure in (staircase, memory):
        assert {int(label.split()[0]) for label in figure["panels"][0]["labels"]} == named


def test_as_many_names_as_the_comment_promises_fit_without_overlap(tmp_path, monkeypatch):
    lines = [HEADER] + [row(i, 1 - i * 1e-6, "keep", "W" * 60) for i in range(1, 30)]
    source = NOTEBOOK.read_text()
    default, promised = re.search(r"(LABELS = \d+) .*?(\d+) fit", source).groups()
    (tmp_path / "n.ipynb").write_text(source.replace(default, f"LABELS = {promised}"))
    monkeypatch.setattr(f"{__name__}.NOTEBOOK", tmp_path / "n.ipynb")
    figure = measure(run_cells(write(tmp_path, lines))["staircase"])
    assert len(figure["panels"][0]["labels"]) == int(promised)
    assert figure["overlaps"] == figure["outside"] == []


# ---- the ledger against git


def test_trust_counts_commits_in_git_and_names_files_other_than_train_py(tmp_path):
    folder = tmp_path / "repo"
    start = repository(folder)
    kept = commit(folder, {"train.py": "1"})
    reset = commit(folder, {"train.py": "2"})
    subprocess.run(["git", "reset", "-q", "--hard", kept], cwd=folder, check=True)
    lines = [HEADER, row(0, 1.0, "keep", "baseline"), row(0, 0.9, "keep"), row(0, 0.95), row(0, 0.8, "keep")]
    for i, sha in enumerate([start, kept, reset, "fffffff"]):
        lines[i + 1] = sha + lines[i + 1][7:]
    space = run_cells(write(folder, lines))
    trust = space["trust_table"]["mar5"]
    assert trust["commits that exist"] == "3 of 4"
    assert trust["kept rows on the branch"] == "2 of 3"
    assert trust["files touched besides train.py"] == "none"
    assert "train.py" in trust.iloc[-1] and "1 file changed" in trust.iloc[-1]

    commit(folder, {"prepare.py": "easier"})
    commit(folder, {"prepare.py": "0"})  # put back, so that the diff no longer shows it
    (folder / ".gitignore").write_text("*.tsv\n")  # edited and not committed
    touched = run_cells(folder)["trust_table"]["mar5"]["files touched besides train.py"]
    assert touched == ".gitignore, prepare.py"


def test_without_git_the_page_still_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    space = run_cells(write(tmp_path, night(6)))
    assert facts(space)["experiments"] == 6
    assert space["trust_table"]["results"]["git"] == "no repository here"


# ---- the file


def test_the_notebook_is_committed_clean_and_needs_only_pandas_and_matplotlib():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not re.search(r"/(home|Users|root|work|tmp)/|[A-Z]:\\\\", NOTEBOOK.read_text()), "a machine path"
    nodes = [node for cell in code for node in ast.walk(ast.parse(cell.source))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert modules == {"math", "re", "subprocess", "pathlib", "matplotlib.pyplot", "pandas"}
