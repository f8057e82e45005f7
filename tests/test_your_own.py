"""The example of docs/your-own.md, built from the page in an empty folder, and a short night with it."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from conftest import REPO, git

JUDGE, SOLUTION = re.findall(r"```python\n(.*?)```", (REPO / "docs/your-own.md").read_text(), re.DOTALL)
TURN_BACK = '''    (x, y), turn = points.T, 6 * np.hypot(*points.T)
    points = np.column_stack([x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)])
    return np.column_stack'''
LOOK_UP = "\nnp.save('answers.npy', np.load({!r})['arm'][1000:])\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spiral")
    (folder / "judge.py").write_text(JUDGE.replace("SECONDS = 10", "SECONDS = 5"))
    (folder / "solution.py").write_text(SOLUTION)
    (folder / ".gitignore").write_text("results*.tsv\nlearned.md\n*.log\ndata.npz\n")
    git(folder, "init", "-q", "-b", "autoresearch/nov21")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first solution")
    return folder


def run(folder, **env):
    """{key: string} of the summary, or the line that ends a failure."""
    command = [sys.executable, "judge.py"]
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    if done.returncode:
        assert done.stdout == "" and done.stderr.splitlines()[-1].startswith("FAIL: ")
        return done.stderr.splitlines()[-1]
    return dict(re.findall(r"^(\w+): (.+)$", done.stdout.split("---\n")[1], re.MULTILINE))


def experiment(folder, old, new, text):
    """Edit, commit, run, write the row, and keep it or undo it, as program.md says; the result."""
    code = (folder / "solution.py").read_text()
    assert old in code
    (folder / "solution.py").write_text(code.replace(old, new))
    git(folder, "commit", "-qam", text)
    result = run(folder)
    rows = [line.split("\t") for line in (folder / "results.tsv").read_text().splitlines()]
    bar = float([row[1] for row in rows if row[3] == "keep"][-1])
    number = result["accuracy"] if isinstance(result, dict) else "0.000000"
    status = "crash" if isinstance(result, str) else "keep" if float(number) > bar + 0.02 else "discard"
    write_row(folder, number, status, text)
    if status != "keep":
        git(folder, "reset", "-q", "--keep", "HEAD~1")
    return result


def write_row(folder, number, status, text):
    with (folder / "results.tsv").open("a") as ledger:
        ledger.write(f"{git(folder, 'rev-parse', '--short=7', 'HEAD')}\t{number}\t0.0\t{status}\t{text}\n")


def test_a_win_is_kept_a_loss_undone_a_cheat_refused_and_the_notebook_shows_it(project):
    for seed in ("42", "43"):
        first = run(project, SEED=seed)
        assert first["seed"] == seed
        write_row(project, first["accuracy"], "keep", f"first solution, seed {seed}")
    kept = experiment(project, "    return np.column_stack", TURN_BACK, "arms turned back")
    lost = experiment(project, "STEPS = 300", "STEPS = 1", "fewer steps")
    assert float(kept["accuracy"]) > 0.85 > float(lost["accuracy"])
    end = "\nwhile True:\n    pass\n"
    assert "timed out" in experiment(project, ".argmax(1))\n", f".argmax(1)){end}", "never ends")
    assert "shape" in experiment(project, ".argmax(1))\n", ".argmax(0))\n", "answers of another shape")
    look_up = LOOK_UP.format(str(project / "data.npz"))
    assert "looked them up" in experiment(project, ".argmax(1))\n", f".argmax(1)){look_up}", "answers looked up")
    assert git(project, "log", "--format=%s").split("\n") == ["arms turned back", "first solution"]
    assert git(project, "status", "--porcelain") == ""
    held_out = run(project, HOLDOUT="1")
    assert list(held_out) == ["accuracy", "holdout_accuracy", "seed"] and float(held_out["holdout_accuracy"]) > 0.85

    shutil.copy(REPO / "analysis.ipynb", project)
    notebook = nbformat.read(project / "analysis.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    names = '"train.py", "val_bpb", "holdout_bpb", True'
    assert names in code
    code = code.replace(names, '"solution.py", "accuracy", "holdout_accuracy", False')
    shown = "import matplotlib; matplotlib.use('Agg')\ndisplay = lambda table: print(table.to_string())\n"
    done = subprocess.run([sys.executable, "-c", shown + code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"clear gains +1 of 1 kept changes", done.stdout) and (project / "progress.png").exists()
