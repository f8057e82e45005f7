"""The commands of program.md and README, taken from the pages and played: only the examples in them are replaced.

`uv`, `sleep` and train.py are stubs that end at once; git, the shell and the ledger are real. A human may change the
pages: a test whose command is gone is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from conftest import HEADER, REPO, Player, commands, git, stub

PROGRAM = (REPO / "program.md").read_text(encoding="utf-8")
README = (REPO / "README.md").read_text(encoding="utf-8")
OTHER_RUN = HEADER + "0123456\t0.900000\t1.0\tkeep\tanother run's best\n"
ODD_TEXT = "wider: `ls` $HOME $(touch pwned) \\n %s \"quoted\" || git push & > train.py * ümlaut, 中文, 🙂"
TRAIN = """
import os, signal, time
import prepare
prepare.start_watchdog(1.2)
seed = int(os.environ.get("SEED", 42))
print("step 1", flush=True)
val_bpb = %s
print(f"---\\nval_bpb: {val_bpb:.6f}\\npeak_vram_mb: 45056.0\\nnum_steps: 953\\nseed: {seed}")
print("device: NVIDIA H100\\nattention: fa3")
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A clone with the real page and .gitignore, where the human and another run have left things."""
    folder = tmp_path_factory.mktemp("stage") / "autoresearch"
    bin = folder.parent / "bin"
    for path in (bin, folder / "tests"):
        path.mkdir(parents=True)
    make_ledger = f"[ -s results.tsv ] || printf '{HEADER}' > results.tsv"
    known = '[ "$1" = pytest -o "$1" = --with ]'
    stub(bin / "uv", f'{make_ledger}; shift; [ -f "$1" ] && exec "{sys.executable}" "$@"; {known}')
    stub(bin / "sleep", "exec /bin/sleep 0.05")
    for name in ("pip", "column", "claude"):
        stub(bin / name, "true")
    for name in ("program.md", ".gitignore"):
        shutil.copy(REPO / name, folder)
    for name in ("analysis.ipynb", "tests/bench_train.py", "tests/look.py"):
        (folder / name).touch()
    watchdog = re.search(r"def start_watchdog.*?\n\n", (REPO / "prepare.py").read_text(), re.DOTALL)[0]
    (folder / "prepare.py").write_text("import faulthandler\nTIME_BUDGET = 0\n" + watchdog)
    (folder / "train.py").write_text(TRAIN % "0.9979 + (seed > 42) * 0.0020")
    for command in ("init -q -b main", "add .", "commit -q -m start"):
        git(folder, *command.split())
    for name in ("program.md", "train.py", "notes.txt"):
        with (folder / name).open("a") as file:
            file.write("# by the human")
    (folder / "results.tsv").write_text(OTHER_RUN)
    return folder


def copy(folder, parent):
    shutil.copytree(folder.parent, parent, dirs_exist_ok=True)
    return parent / folder.name


class Agent(Player):
    page = PROGRAM

    def edit(self, code):
        (self.folder / "train.py").write_text(TRAIN % code)

    def commit(self, text):
        self.do("git commit train.py", **{"attention output gated": text})

    def run(self, start="uv run train.py"):
        """val_bpb, or None."""
        self.do(start, check=False)
        printed = re.search(r"^val_bpb: (.*)$", self.do("grep ", check=False), re.MULTILINE)
        return printed and printed[1]

    def row(self, val_bpb, status, text):
        values = {"a1b2c3d": self.head(), "0.993200": val_bpb, "keep": status, r"'[^']*steps\)'": f"'{text}'"}
        self.do("printf", **values)

    def head(self):
        return git(self.folder, "rev-parse", "--short=7", "HEAD")

    def set_up(self):
        assert "autoresearch/nov21" not in self.do("git branch --list")
        self.do("mv results.tsv")
        self.do("git checkout -b")
        self.do("git commit --allow-empty -am")
        self.do("uv run prepare.py")
        self.row(self.run(), "keep", "baseline")
        self.row(self.run("SEED=43"), "keep", "baseline again, seed 43")

    def experiment(self, code, status, text):
        """One turn of the loop with an edit whose fate is known."""
        best = self.head()
        self.edit(code)
        self.do("uv run tests/look.py")
        self.commit(text)
        self.row(self.run() or "0.000000", status, text)
        if status != "keep":
            self.do("git reset --keep", a1b2c3d=best)


def play_a_night(folder):
    agent = Agent(folder)
    agent.set_up()
    agent.experiment("0.9932", "keep", "a gate")
    (folder / "program.md").write_text("edited in the night")
    (folder / "learned.md").write_text("## nov21\n\nGates work.\n")
    agent.experiment("0.9990", "discard", ODD_TEXT)
    agent.experiment("1 / 0", "crash", "division")
    agent.experiment("time.sleep(60)", "crash", "hangs")
    agent.row(agent.run("SEED=43"), "keep", "a gate, again, seed 43")
    agent.experiment("0.9880", "keep", "a second gate")
    return agent


@pytest.fixture(scope="module")
def night(stage, tmp_path_factory):
    return play_a_night(copy(stage, tmp_path_factory.mktemp("night")))


def well_formed(row):
    crash, run = r"0\.000000\t[\d.]+\tcrash\t[^\t]+", r"\d\.\d{6}\t44\.\d\t(keep|discard)\t[^\t]+"
    return re.fullmatch(rf"[0-9a-f]{{7}}\t({crash}|{run})", row)


def test_each_run_has_a_good_row_and_the_wins_are_the_branch(night):
    header, *rows = (night.folder / "results.tsv").read_text().splitlines()
    assert header + "\n" == HEADER and all(map(well_formed, rows))
    assert [row.split("\t")[1:4:2] for row in rows] == [
        ["0.997900", "keep"], ["0.999900", "keep"], ["0.993200", "keep"], ["0.999000", "discard"],
        ["0.000000", "crash"], ["0.000000", "crash"], ["0.993200", "keep"], ["0.988000", "keep"]]
    assert rows[3].endswith(ODD_TEXT) and not (night.folder / "pwned").exists()
    assert git(night.folder, "log", "--reverse", "--format=%s", "main..HEAD").splitlines() == [
        "what the human left", "a gate", "a second gate"]
    assert "I expect" in git(night.folder, "log", "-1", "--format=%b")


def test_nothing_that_the_human_left_or_edits_in_the_night_is_lost(night):
    assert (night.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    for name in ("results.tsv", "learned.md"):
        assert git(night.folder, "check-ignore", name)  # no reset, stash or clean -fd loses it
    assert git(night.folder, "diff", "--name-only", "main", "HEAD~2") == "program.md\ntrain.py"
    assert git(night.folder, "diff", "--name-only", "HEAD~2", "HEAD") == "train.py"
    assert (night.folder / "program.md").read_text() == "edited in the night"
    assert git(night.folder, "status", "--short").split() == ["M", "program.md", "??", "notes.txt"]


def test_a_slip_is_mended_and_an_old_idea_is_brought_back_or_given_up_in_a_conflict(night, tmp_path):
    agent = Agent(copy(night.folder, tmp_path))
    best = agent.head()
    agent.edit("slip or 0.9800")
    agent.commit("a slip")
    assert not agent.run() and "'slip' is not defined" in agent.do("tail -n 50 run.log")
    agent.edit("0.9800")
    agent.do("git commit --amend")
    assert agent.run() == "0.980000"
    idea = agent.head()
    agent.do("git reset --keep", a1b2c3d=best)
    assert "I expect" in agent.do("git show", a1b2c3d=idea)
    agent.do("git cherry-pick a1b2c3d", a1b2c3d=idea)
    assert agent.run() == "0.980000"
    agent.do("git cherry-pick a1b2c3d", a1b2c3d=agent.rows()[3][0], check=False)
    assert "CONFLICT" in agent.done.stdout
    agent.do("git cherry-pick --abort")
    assert git(agent.folder, "status", "--short").split() == ["M", "program.md", "??", "notes.txt"]


# --- a run that goes on when the shell has returned


@pytest.mark.parametrize("code, end", [
    ("time.sleep(0.5) or 0.9800", "val_bpb: 0.98"), ("1 / (time.sleep(0.5) or 0)", "ZeroDivisionError"),
    ("exit('FAIL: loss is nan')", "FAIL"), ("time.sleep(9)", "Timeout")])
def test_a_run_is_waited_for_by_its_log_alone(night, tmp_path, code, end):
    """Processes are invisible in some sandboxes."""
    agent = Agent(copy(night.folder, tmp_path))
    agent.edit(code)
    with open(agent.folder / "run.log", "w") as log:
        run = subprocess.Popen([sys.executable, "train.py"], cwd=agent.folder, stdout=log, stderr=log)
        while "step" not in (agent.folder / "run.log").read_text():
            time.sleep(0.01)
        agent.do("until grep")
        run.wait(timeout=5)
    assert end in agent.do("tail -n 50 run.log")


def test_a_run_that_was_killed_is_not_waited_for(night, tmp_path):
    agent = Agent(copy(night.folder, tmp_path))
    log = agent.folder / "run.log"
    log.write_text("step 1\n")
    assert agent.do("find run.log")
    os.utime(log, (time.time() - 250,) * 2)
    assert not agent.do("find run.log")


# --- git as people have it


def test_where_no_commit_works_the_page_finds_out_before_the_first_run(stage, tmp_path):
    """Each idea is a commit: where git wanted a signature that needs a human, a night left no row."""
    agent = Agent(copy(stage, tmp_path))
    git(agent.folder, "config", "commit.gpgsign", "true")
    git(agent.folder, "config", "gpg.program", "/bin/false")
    before = (agent.folder / "train.py").read_text()
    with pytest.raises(AssertionError, match="what the human left"):
        agent.set_up()
    assert not agent.rows() and (agent.folder / "train.py").read_text() == before


@pytest.mark.parametrize("command", ["config core.autocrlf true", "checkout -q --detach", "config commit.verbose true"])
def test_a_night_goes_well_with_gits_other_settings(stage, tmp_path, command):
    folder = copy(stage, tmp_path)
    git(folder, *command.split())
    agent = play_a_night(folder)
    subjects = git(folder, "log", "--format=%s", "main..HEAD").splitlines()
    assert subjects == ["a second gate", "a gate", "what the human left"]
    assert len(agent.rows()) == 8


# --- the pages themselves


@pytest.mark.parametrize("command", list(dict.fromkeys(commands(PROGRAM) + commands(README))))
def test_every_command_of_the_page_and_the_readme_can_be_typed(night, tmp_path, command):
    """In a night that is under way; git may answer that it has nothing to do."""
    agent = Agent(copy(night.folder, tmp_path))
    git(agent.folder, "checkout", "-q", "program.md")
    for name in ("user.name", "user.email"):
        git(agent.folder, "config", name, "me@localhost")
    if command in commands(PROGRAM):
        agent.edit("0.9800")
    command = command.replace("a1b2c3d", agent.head()).replace("-b autoresearch/nov21", "-b autoresearch/nov22")
    done = subprocess.run(["bash", "-c", command], cwd=agent.folder, env=agent.env, capture_output=True, text=True,
                          timeout=60)
    nothing_to_do = command.startswith(("git cherry-pick", "git reset")) and "usage" not in done.stderr
    assert done.returncode == 0 or nothing_to_do, done
