"""program.md played by a scripted agent: the commands are the page's, only the examples in them are replaced.

`uv`, `sleep` and train.py are stubs that end at once; git, the shell and the ledger are real. The agent's
decisions follow the page, sentence by sentence.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from itertools import groupby

import pytest

from conftest import HEADER, REPO, Player, commands, git, stub

PROGRAM = (REPO / "program.md").read_text(encoding="utf-8")
OTHER_RUN = HEADER + "0123456\t0.900000\t1.0\tkeep\tanother run's best\n"
Result = namedtuple("Result", "val_bpb memory steps seed device attention", defaults=[0] * 5)

# --- the stage: a repo with the real page and .gitignore, and stubs of what takes minutes

TRAIN = """# %s
import os, signal, time, prepare
prepare.start_watchdog(1.2)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
seed = int(os.environ.get("SEED", 42)) - 42
slow = int(os.environ.get("DRIFT", 0))  # the whole machine
first = not os.path.exists("once.log")
open("once.log", "w").close()
val_bpb = %s
print(f"---\\nval_bpb: {val_bpb + slow / 100:.6f}\\npeak_vram_mb: 45056.0\\nnum_steps: {953 - 115 * slow}")
print(f"seed: {seed + 42}\\ndevice: NVIDIA H100\\nattention: fa3")
"""


def write_train(folder, text, code):
    """A train.py whose first line is the idea; `code` gives its val_bpb."""
    (folder / "once.log").unlink(missing_ok=True)
    (folder / "train.py").write_text(TRAIN % (text, code), encoding="utf-8")


def copy(folder, parent):
    shutil.copytree(folder.parent, parent, dirs_exist_ok=True)
    return parent / folder.name


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The human and another run have left things there."""
    folder = tmp_path_factory.mktemp("stage") / "autoresearch"
    bin = folder.parent / "bin"
    for path in (bin, folder / "tests"):
        path.mkdir(parents=True)
    make_ledger = f"[ -s results.tsv ] || printf '{HEADER}' > results.tsv"
    stub(bin / "uv", f'{make_ledger}; shift; exec "{sys.executable}" "$@"')
    stub(bin / "sleep", "exec /bin/sleep 0.05")
    for name in ("program.md", ".gitignore"):
        shutil.copy(REPO / name, folder)
    for name in ("analysis.ipynb", "tests/bench_train.py"):
        (folder / name).touch()
    watchdog = re.search(r"def start_watchdog.*?\n\n", (REPO / "prepare.py").read_text(), re.DOTALL)[0]
    (folder / "prepare.py").write_text("import faulthandler, os\n" + watchdog)
    write_train(folder, "baseline", "[0.9979, 0.9999, 0.9959][seed]")  # the noise is 0.0040
    for command in ("init -q -b main", "add .", "commit -q -m start"):
        git(folder, *command.split())
    for name in ("program.md", "analysis.ipynb", "train.py", "notes.txt"):
        with (folder / name).open("a") as file:
            file.write("# by the human")
    (folder / "results.tsv").write_text(OTHER_RUN)
    return folder


# --- the agent


class Agent(Player):
    """Does what program.md says, command by command; before each step, copies the stage to `deaths`/<number>."""

    page, deaths, steps = PROGRAM, None, 0

    def step(self):
        if self.deaths:
            copy(self.folder, self.deaths / str(self.steps))
        self.steps += 1

    def do(self, start, **examples):
        self.step()
        return super().do(start, **examples)

    def start(self):
        branches = self.do("git branch --list")
        here = re.search(r"^\* \w+/(.+)$", branches, re.MULTILINE)
        if here:
            self.tag = here[1]
        if f" autoresearch/{self.tag}\n" in branches:
            return self.resume()
        if self.rows():
            self.do("mv results.tsv")
        self.do("git checkout -b")
        self.set_up()

    def set_up(self):
        self.do("git commit --allow-empty -am")
        self.do("uv run prepare.py")
        first, *others = [self.run(seed) for seed in (None, 43, 44)]
        values = [float(result.val_bpb) for result in (first, *others)]
        self.write_row(first, "keep", f"baseline (noise {max(values) - min(values):.4f}; seed 43: {others[0].val_bpb}, "
                       f"seed 44: {others[1].val_bpb}; {first.steps} steps; {first.device}, {first.attention})")

    def run(self, seed=None):
        """A Result, or None for a crash."""
        for _ in range(2):
            if seed:
                self.do("SEED=43", check=False, **{"43": str(seed)})
            else:
                self.do("uv run train.py", check=False)
            printed = re.findall(r"^\w+: +(.+)$", self.do("grep ", check=False), re.MULTILINE)
            if printed:
                return Result(*printed)
            end = self.do("tail -n 50 run.log")
            if "'slip' is not defined" in end:
                self.step()
                train = self.folder / "train.py"
                train.write_text(train.read_text().replace("slip or ", ""))
                self.do("git commit --amend")
            elif re.search("Error|Timeout|FAIL", end):
                return None

    def control(self, commit, seed=None):
        self.do("git checkout -B control", a1b2c3d=commit)
        result = self.run(seed)
        self.do("git checkout autoresearch/nov21")
        return result

    def write_row(self, result, status, text):
        values = {"0.993200": result.val_bpb, "44[.]2": f"{float(result.memory) / 1024:.1f}", r"%s \(961 steps\)": text}
        self.do("git log -1 --abbrev=7", keep=status, **values)

    def remember(self):
        """The noise, the best row, and the last kept one, where the branch stands."""
        kept = [line.split("\t") for line in self.do("awk ").splitlines()]
        self.last_rows = self.do("tail -n 20 results.tsv")
        if len(self.rows()) % 30 == 0:
            self.do("cat results.tsv")
            self.do("git log -n 30")
        self.noise = float(re.search(r"noise (\d+\.\d+)", kept[0][4])[1])
        self.best, self.last = min(kept, key=lambda row: float(row[1])), kept[-1]

    def since(self, row):
        return self.last_rows[self.last_rows.find("\n" + row[0]):]

    def idea(self):
        return (self.folder / "train.py").read_text().split("\n")[0][2:]

    def commit(self):
        self.do("git commit train.py", **{"matrix LR 0.04 -> 0.05": self.idea()})

    def undo(self):
        self.do("git reset --keep", a1b2c3d=self.last[0])

    def experiment(self, text, code, **how):
        """Steps 1 to 4; whether it was kept."""
        self.remember()
        self.step()
        write_train(self.folder, text, code)
        self.commit()
        return self.measure(**how)

    def measure(self, side=False, always=False):
        """Steps 3 and 4 for the last commit."""
        result = self.run()
        if result and not self.bar(result):
            result = self.run()
        keep = result and self.judge(result, side, always)
        if not result:
            self.write_row(Result("0.000000"), "crash", "%s (out of memory)")
        if not keep and not side:
            self.undo()
        return keep

    def bar(self, result):
        """The val_bpb of a row or a control with about as many steps, if there is one."""
        known = [(row[1], re.search(r"(\d+) steps", row[4])[1]) for row in (self.best, self.last)]
        known += re.findall(r"control (\S+), (\d+) steps", self.since(self.last))
        found = [val_bpb for val_bpb, steps in known if abs(int(result.steps) - int(steps)) <= int(steps) / 10]
        return float(found[0]) if found else None

    def judge(self, result, side, always):
        bar, remark = self.bar(result), ""
        if not bar:
            control = self.control(self.last[0])
            bar, remark = float(control.val_bpb), f"; control {control.val_bpb}, {control.steps} steps"
        gain = round(bar - float(result.val_bpb), 6)
        keep = gain > self.noise or always or "simpler" in self.idea() and gain >= -self.noise / 2
        if not keep and gain > 0 and not side:
            keep, remark = self.another_seed(result)
        self.write_row(result, "keep" if keep else "discard", f"%s ({result.steps} steps{remark})")
        return keep

    def another_seed(self, result):
        """(Whether the mean of two seeds is good enough, the numbers in words)."""
        other = self.run(43).val_bpb
        known = re.search(r"(?:\A\n.*seed 43:|the best) (\d\.\d+)", self.since(self.best))
        best_other = known[1] if known else self.control(self.best[0], 43).val_bpb
        gain = float(self.best[1]) + float(best_other) - float(result.val_bpb) - float(other)
        return gain / 2 > self.noise / 2, f"; seed 43: {other}, the best {best_other}"

    def side_branch(self, ideas):
        self.do("git checkout -B side")
        kept = any(self.experiment(*idea, side=True) for idea in ideas.items())
        self.do("git checkout autoresearch/nov21")
        if kept:
            self.do("git merge")

    def borrow(self, commit):
        """Whether another's idea was kept; None in a conflict."""
        self.remember()
        self.do("git cherry-pick a1b2c3d", check=False, a1b2c3d=commit)
        if self.done.returncode == 0:
            return self.measure()
        self.do("git cherry-pick --abort")

    def resume(self):
        end = self.do("tail -n 50 run.log", check=False)
        over = re.search("^(---|FAIL|Traceback|Timeout)", end, re.MULTILINE)
        if end and not over and self.do("find run.log -mmin -3"):
            self.do("until grep")
        self.do("uv run prepare.py")
        if not any(row[3] == "keep" for row in self.rows()):
            self.do("git checkout autoresearch/nov21")
            return self.set_up()
        if "train.py" in self.do("git diff --stat HEAD"):
            if self.has_row():
                self.commit()
            else:
                self.do("git commit --amend")
        self.do("git checkout autoresearch/nov21", check=False)
        if self.done.returncode:
            self.do("git commit --allow-empty -am")
            self.do("git checkout autoresearch/nov21")
        self.remember()
        if self.has_row():
            self.undo()
        else:
            self.measure(always="+++ b/train.py" not in self.do("git show", a1b2c3d="HEAD"))

    def has_row(self):
        head = self.do("git log -n 30").split()[1]
        return any(head.startswith(row[0]) for row in self.rows())


# --- a night

NIGHT = {  # idea: its status, and what train.py gives; the best starts at 0.9979
    "embedding LR 0.6 -> 0.8": "keep 0.9932",
    "it's a \"test\" of `ls` $HOME $(touch pwned); rm -rf . # \\n %s %h ' || git push & > train.py *": "keep 0.9880",
    "100 % wider: ümlaut, 中文, 🙂, and\ta tab": "discard 0.9895",  # higher, within the noise, not simpler
    "tie with luck": "discard [0.9860, 0.9920][seed]",  # means 0.9890 and 0.9880
    "tie that holds": "keep [0.9865, 0.9835][seed]",  # means 0.9850 and 0.9880
    "simpler": "keep 0.9884",  # 0.0019 above the best
    "simpler again": "discard 0.9886",  # 0.0021 above the best
    "a slip": "keep slip or 0.9820",
    "hangs": "crash time.sleep(60)",
    "killed, twice": "crash kill()",
    "killed, once": "discard kill() if first else 0.9900",
    "a busy machine, once": "keep 0.9670; slow = first",
    "side A: first half": "discard 1.0000",
    "side A: second half": "keep 0.9600",
    "side B: error": "crash 1 / 0",
    "side B: given up": "discard 0.9580",  # within the noise
    "after the side branches": "keep 0.9550",
    "drift, no gain": "discard 0.9550",  # 0.9650, as its control
    "drift, a gain": "keep 0.9500",  # 0.9600, and the control of the row before
    "drift, no second gain": "discard 0.9500",  # 0.9600 as the last kept row
    "no drift": "keep 0.9450",
} | {f"worse {number}": "discard 0.9500" for number in range(9)}
WINS = [idea for idea in NIGHT if NIGHT[idea].startswith("keep") or idea == "side A: first half"]
BASELINE = "baseline (noise 0.0040; seed 43: 0.999900, seed 44: 0.995900; 953 steps; NVIDIA H100, fa3)"


def well_formed(row):
    crash, run = r"0\.000000\t0\.0\tcrash\t[^\t]+", r"\d\.\d{6}\t44\.\d\t(keep|discard)\t[^\t]+ steps[;)][^\t]*"
    return re.fullmatch(rf"[0-9a-f]{{7}}\t({crash}|{run})", row)


def subjects(folder):
    return git(folder, "log", "--reverse", "--format=%s", "main..HEAD").splitlines()


def ledger(agent):
    """{idea: all after the commit}."""
    return {row[4].split(" (")[0]: row[1:] for row in agent.rows()}


@pytest.fixture(scope="module")
def begun(stage, tmp_path_factory):
    """A stage with a baseline and a win of 0.9900."""
    agent = Agent(copy(stage, tmp_path_factory.mktemp("begun")))
    agent.start()
    agent.experiment("win", "0.9900")
    return agent.folder


@pytest.fixture(scope="module")
def night(stage, tmp_path_factory):
    """The baseline and 30 experiments."""
    agent = Agent(copy(stage, tmp_path_factory.mktemp("night")))
    agent.start()
    (agent.folder / "program.md").write_text("edited in the night")
    for name, ideas in groupby(NIGHT, lambda idea: idea.split(":")[0]):
        ideas = {idea: NIGHT[idea].split(" ", 1)[1] for idea in ideas}
        agent.env["DRIFT"] = str(name.count("drift,"))
        if name.startswith("side"):
            agent.side_branch(ideas)
        else:
            agent.experiment(*ideas.popitem())
    return agent


def test_a_night_of_30_experiments_leaves_31_good_rows_and_the_wins_each_with_its_reason(night):
    header, *rows = (night.folder / "results.tsv").read_text().splitlines()
    assert header + "\n" == HEADER and len(rows) == 31 and all(map(well_formed, rows))
    assert {idea: row[2] for idea, row in ledger(night).items()} == {"baseline": "keep"} | {
        idea.replace("\t", " "): result.split()[0] for idea, result in NIGHT.items()}
    assert subjects(night.folder) == ["what the human left", *WINS]
    assert git(night.folder, "branch", "--show-current") == "autoresearch/nov21"
    assert git(night.folder, "log", "--format=%b", "main..HEAD").count("I expect") == len(WINS)
    assert not (night.folder / "pwned").exists()


def test_what_else_was_measured_stands_in_the_row_and_is_not_measured_again(night):
    """Other seeds, and a control if the machine drifts; a busy moment is one more run."""
    assert {row[4] for row in night.rows()} >= {
        BASELINE,
        "tie with luck (953 steps; seed 43: 0.992000, the best 0.988000)",
        "tie that holds (953 steps; seed 43: 0.983500, the best 0.988000)",
        "a busy machine, once (953 steps)",
        "drift, no gain (838 steps; control 0.965000, 838 steps)",
        "drift, a gain (838 steps)",
        "drift, no second gain (838 steps)",
    }
    played = "".join(night.played)
    assert played.count("SEED=43 ") == 5 and played.count("-B control") == 2


def test_nothing_that_the_human_left_or_edits_in_the_night_is_lost(night):
    assert (night.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    assert git(night.folder, "check-ignore", "results.tsv")  # no reset, stash or clean -fd loses a row
    left = f"HEAD~{len(WINS)}"
    assert git(night.folder, "diff", "--name-only", "main", left) == "analysis.ipynb\nprogram.md\ntrain.py"
    assert git(night.folder, "diff", "--name-only", left, "HEAD") == "train.py"
    assert (night.folder / "program.md").read_text() == "edited in the night"
    assert git(night.folder, "status", "--short").split() == ["M", "program.md", "??", "notes.txt"]


# --- resuming

SCENARIOS = {
    "set-up": (Agent.start, []),
    "two seeds": (lambda agent: agent.experiment("idea", "[0.9890, 0.9990][seed]"), ["win"]),
    "slip": (lambda agent: agent.experiment("idea", "slip or 0.9800"), ["win", "idea"]),
    "side branch": (lambda agent: agent.side_branch({"half": "1.1", "idea": "0.9700"}), ["win", "half", "idea"]),
}


def end(agent):
    """How the agent leaves its clone."""
    questions = "branch --show-current", "log --format=%s", "status --short", "show HEAD:train.py"
    assert len({row[0] for row in agent.rows()}) == len(agent.rows())
    assert (agent.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    answers = [git(agent.folder, *question.split()) for question in questions]
    answers[1] = re.sub("(what the human left\n)+", "what the human left\n", answers[1])  # empty where it was there
    return ledger(agent), *answers


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_agent_that_dies_at_any_step_is_continued(stage, begun, tmp_path, name):
    """On another day, without a tag: no row is lost or doubled."""
    play, wins = SCENARIOS[name]
    fresh = name == "set-up"
    whole = Agent(copy(stage if fresh else begun, tmp_path / "whole"))
    whole.deaths = tmp_path
    play(whole)
    assert subjects(whole.folder) == ["what the human left", *wins]
    goal = end(whole)
    assert goal[1] == "autoresearch/nov21"
    for k in range(whole.steps):
        heir = Agent(tmp_path / str(k) / whole.folder.name, tag="nov21" if fresh else "nov22")
        heir.start()  # where the first died before step k
        if "idea" not in ledger(heir) and not fresh:
            play(heir)  # an idea that left no trace is had again
        assert end(heir) == goal, k
        shutil.rmtree(heir.folder.parent)


@pytest.mark.parametrize("code, row", [
    ("time.sleep(0.6) or 0.9800", "0.980000"), ("1 / (time.sleep(0.6) or 0)", "0.000000"),
    ("time.sleep(9)", "0.000000")])
def test_a_run_that_outlives_its_agent_is_waited_for_by_its_log_alone(begun, tmp_path, code, row):
    """Processes are invisible in some sandboxes: a second run began beside the first. This one ends, fails or hangs."""
    agent = Agent(copy(begun, tmp_path))
    write_train(agent.folder, "idea", code)
    agent.commit()
    with open(agent.folder / "run.log", "w") as log:
        print("step 1", file=log, flush=True)
        run = subprocess.Popen([sys.executable, "train.py"], cwd=agent.folder, stdout=log, stderr=log)
        while not (agent.folder / "once.log").exists():  # it begins
            time.sleep(0.01)
        agent.start()
        assert run.poll() is not None
    assert "until" in "".join(agent.played) and ledger(agent)["idea"][0] == row


def test_a_run_that_was_killed_is_not_waited_for(begun, tmp_path):
    agent = Agent(copy(begun, tmp_path))
    log = agent.folder / "run.log"
    log.write_text("step 1\n")
    os.utime(log, (time.time() - 200,) * 2)
    agent.start()
    assert "until" not in "".join(agent.played)


def test_what_the_human_did_between_two_agents_stays(begun, tmp_path):
    """Their commit on the branch is kept, their edit of train.py measured, another edit in the way committed."""
    agent = Agent(copy(begun, tmp_path))
    (agent.folder / "program.md").write_text("a new direction")
    git(agent.folder, "commit", "-qam", "new direction")
    agent.start()
    assert not agent.experiment("idea", "1.1000")
    write_train(agent.folder, "the human's idea", "0.9800")
    agent.start()
    git(agent.folder, "checkout", "-q", "main")
    (agent.folder / "program.md").write_text("edited on main")
    agent.start()
    assert subjects(agent.folder)[1:] == ["win", "new direction", "the human's idea"]
    assert git(agent.folder, "show", "main:program.md") == "edited on main"


# --- git as people have it


def no_identity(folder):
    for name in ("user.name", "user.email"):
        git(folder, "config", name, "")


def signer(folder):
    git(folder, "config", "commit.gpgsign", "true")
    git(folder, "config", "gpg.program", "/bin/false")


def hook(folder):
    (folder / ".git/hooks").mkdir(exist_ok=True)
    stub(folder / ".git/hooks/pre-commit", "echo no; exit 1")


@pytest.mark.parametrize("spoil", [no_identity, signer, hook])
def test_where_no_commit_works_the_page_finds_out_before_the_first_run(stage, tmp_path, spoil):
    """Each idea is a commit: without a signature, an author or a passing hook a night left no row."""
    agent = Agent(copy(stage, tmp_path))
    spoil(agent.folder)
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            agent.env.pop(f"GIT_{who}_{what}", None)
    if spoil is not no_identity:
        git(agent.folder, "config", "user.name", "me")
        git(agent.folder, "config", "user.email", "me@localhost")
    before = (agent.folder / "train.py").read_text()
    with pytest.raises(AssertionError, match="what the human left"):
        agent.start()
    assert not agent.rows() and (agent.folder / "train.py").read_text() == before


def crlf(folder):
    git(folder, "config", "core.autocrlf", "true")


def another_name(folder):
    git(folder, "branch", "-m", "trunk")


def detached(folder):
    git(folder, "checkout", "-q", "--detach")


@pytest.mark.parametrize("change", [crlf, another_name, detached])
def test_a_night_goes_well_with_gits_other_settings(stage, tmp_path, change):
    agent = Agent(copy(stage, tmp_path))
    start = git(agent.folder, "rev-parse", "HEAD")
    change(agent.folder)
    agent.start()
    assert agent.experiment("win", "0.9900") and not agent.experiment("loss", "1.1000")
    assert git(agent.folder, "log", "--reverse", "--format=%s", f"{start}..").splitlines() == [
        "what the human left", "win"]
    assert [row[3] for row in agent.rows()] == ["keep", "keep", "discard"]
    assert git(agent.folder, "branch", "--show-current") == "autoresearch/nov21"


# --- two agents, each in its clone


@pytest.fixture(scope="module")
def pair(begun, tmp_path_factory):
    """One measures the other's win, one finds a conflict in it."""
    first = Agent(copy(begun, tmp_path_factory.mktemp("pair")))
    second = Agent(first.folder.parent / "autoresearch-nov21-gpu1")
    git(first.folder, "clone", "-q", "-b", "main", ".", str(second.folder))
    git(second.folder, "checkout", "-q", "-b", "autoresearch/nov21-gpu1", "origin/autoresearch/nov21~")
    second.start()
    assert second.borrow(first.rows()[-1][0])
    second.experiment("second's win", "0.9800")
    first.experiment("first's win", "0.9840")
    git(first.folder, "fetch", "-q", str(second.folder), "autoresearch/nov21-gpu1")
    assert first.borrow(second.rows()[-1][0]) is None  # both changed the same line
    return first, second


def test_two_agents_in_two_clones_mix_neither_ledgers_nor_branches(pair):
    for agent, win in zip(pair, ("first's win", "second's win")):
        assert list(ledger(agent)) == ["baseline", "win", win]
        assert [subject for subject in subjects(agent.folder) if subject != "what the human left"] == ["win", win]
    first, second = (agent.rows()[1] for agent in pair)
    assert first[0] != second[0] and first[1:] == second[1:]  # measured again, as a commit of its own


# --- the page itself


def test_every_command_of_the_page_is_played(night, pair):
    first, second = pair
    first.do("uv run tests/bench_train.py profile")
    first.do("git show", a1b2c3d="HEAD")
    log = first.folder / "run.log"
    log.write_text("step 1\n")  # of a run that ends while the next agent looks
    threading.Timer(1, lambda: log.write_text("step 1\n---\n")).start()
    first.start()
    assert set(commands(PROGRAM)) == {*night.played, *first.played, *second.played}


def test_the_pages_example_is_a_ledger():
    rows = PROGRAM.split(f"```\n{HEADER}")[1].split("```")[0].splitlines()
    assert len(rows) == 4 and all(map(well_formed, rows))
    assert rows[0].endswith(BASELINE)
