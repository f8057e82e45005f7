"""program.md played by a scripted agent: the commands are the page's, only the examples in them are replaced.

`uv`, `sleep`, `pgrep` and train.py are stubs that end at once; git, the shell and the ledger are real. The agent's
decisions follow the page, sentence by sentence.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from conftest import HEADER, REPO, commands, environment, git, stub

PROGRAM = (REPO / "program.md").read_text(encoding="utf-8")
Result = namedtuple("Result", "val_bpb memory_gb steps where")


def page(start):
    """The shortest command of program.md that begins with `start`."""
    return min((command for command in commands(PROGRAM) if command.startswith(start)), key=len)


# --- the stage: a repo with the real page and .gitignore, and stubs of what takes minutes

TRAIN = """# {text!r}
from prepare import start_watchdog
import os, signal, time
values = {results!r}.split()  # by seed: val_bpb, how the run ends, or both
how, _, val_bpb = values[(int(os.environ.get("SEED", 42)) - 42) % len(values)].rpartition(":")
first = not os.path.exists("once.log")
open("once.log", "w").close()
start_watchdog(1.2)
if val_bpb == "error":
    raise RuntimeError("shape '[1, 2]' is invalid")
if val_bpb == "killed" or how == "killed" and first:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if val_bpb == "hang" else 0.6 if how == "long" else 0)
steps, worse = 953, 0
if how == "busy" and first:
    steps, worse = 800, 0.02
if os.path.exists("drift.log"):  # the whole machine has become slower
    steps, worse = 838, 0.01
print(f"---\\nval_bpb:          {{float(val_bpb) + worse:.6f}}\\ntotal_seconds:    325.9\\npeak_vram_mb:     45056.0")
print(f"num_steps:        {{steps}}\\ndevice:           NVIDIA H100\\nattention:        fa3")
"""


def write_train(folder, results, text="baseline"):
    (folder / "once.log").unlink(missing_ok=True)
    (folder / "train.py").write_text(TRAIN.format(results=results, text=text), encoding="utf-8")


def make_stage(parent):
    """A fresh clone in `parent`/autoresearch."""
    origin, folder, bin = parent / "origin", parent / "autoresearch", parent / "bin"
    for path in (bin, origin / "tests"):
        path.mkdir(parents=True)
    stub(bin / "uv", f'shift; exec "{sys.executable}" "$@"')
    stub(bin / "sleep", "exec /bin/sleep 0.05")
    here = '[ "$(readlink /proc/$pid/cwd)" = "$PWD" ] && echo $pid'
    stub(bin / "pgrep", f'for pid in $({shutil.which("pgrep")} "$@"); do {here}; done; true')
    for name in ("program.md", ".gitignore"):
        shutil.copy(REPO / name, origin / name)
    (origin / "analysis.ipynb").write_text("not executed")
    (origin / "tests/bench_train.py").write_text("print('| matmul | 38 % |')")
    source = (REPO / "prepare.py").read_text(encoding="utf-8")
    watchdog = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "start_watchdog")
    (origin / "prepare.py").write_text(
        f"import faulthandler, os\n{ast.get_source_segment(source, watchdog)}\n"
        "if __name__ == '__main__' and not os.path.exists('results.tsv'):\n"
        f"    open('results.tsv', 'w').write({HEADER!r})\n")
    write_train(origin, "0.997900 0.999900 0.995900")  # the noise is 0.0040
    for command in ("init -q -b main", "add .", "commit -q -m start", f"clone -q . {folder}"):
        git(origin, *command.split())
    return folder


def copy_stage(folder, parent):
    """The same stage elsewhere."""
    shutil.copytree(folder.parent, parent)
    return parent / folder.name


# --- the agent


class Agent:
    """Does what program.md says, command by command; before each, copies the stage to `deaths`/<number>."""

    def __init__(self, folder, today="nov21", deaths=None):
        self.folder, self.today, self.deaths = folder, today, deaths
        self.tag, self.steps, self.played, self.log = "nov21", 0, set(), []

    def step(self):
        if self.deaths:
            copy_stage(self.folder, self.deaths / str(self.steps))
        self.steps += 1

    def do(self, start, *, check=True, **examples):
        """Give the page's command that begins with `start`, each (example, value) replaced; what it prints."""
        self.step()
        command = page(start)
        self.played.add(command)
        command = command.replace("nov21", self.tag)
        for example, value in examples.values():
            assert example in command, (example, command)
            command = command.replace(example, value)
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, capture_output=True, text=True, timeout=30,
                              env=environment(self.folder))
        self.log.append((command, done.returncode, done.stdout))
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    # Set-up

    def start(self):
        branches = self.do("git branch --list")
        here = re.search(r"^\* (?:autoresearch|side|control)/(.+)$", branches, re.MULTILINE)
        self.tag = here[1] if here else self.today
        if re.search(rf"^[*+ ] autoresearch/{self.tag}$", branches, re.MULTILINE):
            return self.resume()
        if self.rows():
            self.do("mv results.tsv")
        self.do("git checkout -b")
        self.set_up()

    def set_up(self):
        if self.do("git diff --stat HEAD"):
            self.do("git commit -am")
        self.do("uv run prepare.py")
        first, *others = [self.run(seed) for seed in (None, 43, 44)]
        values = [result.val_bpb for result in (first, *others)]
        self.write_row(first, "keep", f"baseline (noise {max(values) - min(values):.4f}; seed 43: {values[1]:.6f}, "
                       f"seed 44: {values[2]:.6f}; {first.steps} steps; {first.where})")

    # One run

    def run(self, seed=None):
        """A Result, or None for a crash."""
        for _ in range(2):
            if seed:
                self.do("SEED=43", check=False, seed=("43", str(seed)))
            else:
                self.do("uv run train.py", check=False)
            printed = re.findall(r"^\w+: +(.+)$", self.do("grep ", check=False), re.MULTILINE)
            if printed:
                return Result(float(printed[0]), float(printed[1]) / 1024, int(printed[2]), ", ".join(printed[3:]))
            if re.search("Error|Timeout|FAIL", self.do("tail -n 50 run.log")):
                return None
        return None

    def control(self, commit, seed=None):
        self.do("git checkout -B control", commit=("a1b2c3d", commit))
        result = self.run(seed)
        self.do("git checkout autoresearch/nov21")
        return result

    # The ledger

    def write_row(self, result, status, text):
        """`text` is all that follows the status; %s in it is the first line of the commit."""
        self.do("git log -1 --abbrev=7", val=("0.993200", f"{result.val_bpb:.6f}"),
                memory=("44.2", f"{result.memory_gb:.1f}"), status=("keep", status), text=("%s (961 steps)", text))

    def rows(self):
        ledger = self.folder / "results.tsv"
        return [line.split("\t") for line in ledger.read_text().splitlines()[1:]] if ledger.exists() else []

    def remember(self):
        """The noise, the best row, and the last kept one, where the branch stands."""
        kept = [line.split("\t") for line in self.do("awk ").splitlines()]
        self.last_rows = self.do("tail -n 20 results.tsv")
        if len(self.rows()) % 30 == 0:
            assert self.do("cat results.tsv").count("\n") == 31
            assert "I expect" in self.do("git log -n 30")
        self.noise = float(re.search(r"noise (\d+\.\d+)", kept[0][4])[1])
        self.best, self.last = min(kept, key=lambda row: float(row[1])), kept[-1]

    # The loop

    def undo(self):
        self.do("git reset --keep", last=("a1b2c3d", self.last[0]))

    def experiment(self, text, results, **how):
        """Steps 1 to 4; whether it was kept."""
        self.remember()
        self.step()
        write_train(self.folder, results, text)
        self.commit(text)
        return self.measure(**how)

    def commit(self, text):
        self.do("git commit train.py", text=("matrix LR 0.04 -> 0.05", text))

    def bar(self, result):
        """The val_bpb to compare `result` with; None if no row and no control has about as many steps."""
        known = [(self.best[1], re.search(r"(\d+) steps", self.best[4])[1]),
                 (self.last[1], re.search(r"(\d+) steps", self.last[4])[1]),
                 *re.findall(r"control (\S+), (\d+) steps", self.since(self.last))]
        found = [val_bpb for val_bpb, steps in known if abs(result.steps - int(steps)) <= int(steps) / 10]
        return float(found[0]) if found else None

    def since(self, row):
        """The ledger from this row on."""
        return self.last_rows[self.last_rows.find("\n" + row[0]):]

    def measure(self, simpler=False, mended=None, side=False, always=False):
        """Steps 3 and 4 for the commit that is there; whether it was kept."""
        self.remember()
        result = self.run()
        if mended:
            self.step()
            write_train(self.folder, mended)
            self.do("git commit --amend")
            result = self.run()
        if result and not self.bar(result):
            result = self.run()
        keep = result and self.judge(result, simpler, side, always)
        if not result:
            self.write_row(Result(0, 0, 0, ""), "crash", "%s (out of memory)")
        if not keep and not side:
            self.undo()
        return keep

    def judge(self, result, simpler, side, always):
        bar, remark = self.bar(result), ""
        if not bar:
            control = self.control(self.last[0])
            bar, remark = control.val_bpb, f"; control {control.val_bpb:.6f}, {control.steps} steps"
        gain = round(bar - result.val_bpb, 6)
        keep = gain > self.noise or always or simpler and gain >= -self.noise / 2
        if not keep and gain > 0 and not side:
            keep, remark = self.another_seed(result)
        self.write_row(result, "keep" if keep else "discard", f"%s ({result.steps} steps{remark})")
        return keep

    def another_seed(self, result):
        """(Whether the mean of two seeds is lower than the best's by half the noise, both in words)."""
        other = self.run(43).val_bpb
        known = re.search(r"\A\n.*seed 43: (\S+?)[,;)]|the best (\S+?)[,;)]", self.since(self.best))
        best_other = float(known[1] or known[2]) if known else self.control(self.best[0], 43).val_bpb
        gain = (float(self.best[1]) + best_other - result.val_bpb - other) / 2
        return gain > self.noise / 2, f"; seed 43: {other:.6f}, the best {best_other:.6f}"

    def side_branch(self, ideas):
        self.do("git checkout -B side")
        for text, results in ideas.items():
            if self.experiment(text, results, side=True):
                self.do("git checkout autoresearch/nov21")
                self.do("git merge")
                return
        self.do("git checkout autoresearch/nov21")

    def borrow(self, commit):
        """Whether another's idea was kept; None in a conflict."""
        self.remember()
        self.do("git cherry-pick a1b2c3d", check=False, commit=("a1b2c3d", commit))
        if not self.log[-1][1]:
            return self.measure()
        self.do("git cherry-pick --abort")

    # Resuming

    def resume(self):
        for _ in range(10):
            if not self.do("sleep 60; pgrep"):
                break
        self.do("uv run prepare.py")
        if not any(row[3] == "keep" for row in self.rows()):
            self.do("git checkout autoresearch/nov21")
            return self.set_up()
        if "train.py" in self.do("git diff --stat HEAD"):
            if self.has_row():
                self.commit(ast.literal_eval((self.folder / "train.py").read_text().splitlines()[0][2:]))
            else:
                self.do("git commit --amend")
        self.do("git checkout autoresearch/nov21", check=False)
        if self.log[-1][1]:
            self.do("git commit -am")
            self.do("git checkout autoresearch/nov21")
        self.remember()
        if self.has_row():
            self.undo()
        else:
            self.measure(always="+++ b/train.py" not in self.do("git show", commit=("a1b2c3d", "HEAD")))

    def has_row(self):
        head = self.do("git log -n 30").split()[1]
        return any(head.startswith(row[0]) for row in self.rows())


# idea: (what train.py gives, is it on the branch at the end, what else is so); the best starts at 0.9979
NIGHT = {
    "embedding LR 0.6 -> 0.8": ("0.9932", True),
    "GeLU": ("1.0050", False),
    "it's a \"test\" of `ls` and $HOME and $(touch pwned); rm -rf . # \\n %s %h": ("0.9880", True),
    "100 % wider: ümlaut, 中文, 🙂, and\ta tab": ("0.9895", False),  # higher, within the noise, not simpler
    "tie with luck": ("0.9860 0.9920", False),  # means 0.9890 and 0.9880
    "tie that holds": ("0.9865 0.9835", True),  # means 0.9850 and 0.9880
    "simpler": ("0.9884", True, {"simpler": True}),  # 0.0019 above the best
    "simpler again": ("0.9886", False, {"simpler": True}),  # 0.0021 above the best
    "model twice as wide": ("error", False),
    "a slip": ("error", True, {"mended": "0.9820"}),
    "hangs": ("hang", False),
    "killed, twice": ("killed", False),
    "' || git push & > train.py < /dev/null * ?": ("0.9770", True),
    "exactly as good": ("0.9770", False),
    "worse": ("0.9771", False),
    "much worse": ("1.1000", False),
    "optimizer for the norms": ("0.9720", True),
    "a busy machine, once": ("busy:0.9670", True),
    "side, first half": ("1.0000", True, {"side": 2}),
    "side, second half": ("0.9600", True),
    "side, error": ("error", False, {"side": 3}),
    "side, hopeless": ("0.9900", False),
    "side, given up": ("0.9580", False),  # within the noise
    "after the side branch": ("0.9550", True),
    "killed, once": ("killed:0.9800", False),
    "drift, no gain": ("0.9550", False, {"drift": True}),  # 0.9650, as its control
    "drift, a gain": ("0.9500", True, {"drift": True}),  # 0.9600, and the control of the row before
    "drift, no second gain": ("0.9500", False, {"drift": True}),  # 0.9600 as the last kept row
    "the last win": ("0.9450", True),
    "the very last": ("0.9490", False),
}
BASELINE = "baseline (noise 0.0040; seed 43: 0.999900, seed 44: 0.995900; 953 steps; NVIDIA H100, fa3)"
OTHER_RUN = HEADER + "0123456\t0.900000\t1.0\tkeep\tanother run's best\n"


def well_formed(row):
    return re.fullmatch(r"[0-9a-f]{7}\t\d\.\d{6}\t\d+\.\d\t(keep|discard|crash)\t[^\t\n]+", row)


def subjects(folder):
    return git(folder, "log", "--reverse", "--format=%s", "main..HEAD").splitlines()


def ledger(agent):
    """{idea: (val_bpb, status, what stands in the brackets)}."""
    rows = [(*re.fullmatch(r"(.*) \(([^()]*)\)", row[4]).groups(), row[1], row[3]) for row in agent.rows()]
    return {idea: (val_bpb, status, remark) for idea, remark, val_bpb, status in rows}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage") / "here")


@pytest.fixture(scope="module")
def begun(stage, tmp_path_factory):
    """A stage with a baseline and a win of 0.9900."""
    agent = Agent(copy_stage(stage, tmp_path_factory.mktemp("begun") / "here"))
    agent.start()
    agent.experiment("win", "0.9900")
    return agent.folder


@pytest.fixture(scope="module")
def night(stage, tmp_path_factory):
    """The baseline and 30 experiments, where the human and another run had left things."""
    agent = Agent(copy_stage(stage, tmp_path_factory.mktemp("night") / "here"))
    (agent.folder / "results.tsv").write_text(OTHER_RUN)
    for name in ("program.md", "analysis.ipynb", "notes.txt"):
        (agent.folder / name).write_text("by the human")
    agent.start()
    (agent.folder / "program.md").write_text("edited in the night")
    ideas = iter(NIGHT.items())
    for idea, (results, _, *how) in ideas:
        how = dict(*how)
        (agent.folder / "drift.log").unlink(missing_ok=True)
        if how.pop("drift", False):
            (agent.folder / "drift.log").touch()
        if "side" in how:
            more = [next(ideas) for _ in range(how["side"] - 1)]
            agent.side_branch({idea: results} | {idea: results for idea, (results, *_) in more})
        else:
            agent.experiment(idea, results, **how)
    return agent


def test_a_night_ends_with_exactly_the_wins_on_the_branch_each_with_its_reason(night):
    wins = [idea for idea, (_, kept, *_) in NIGHT.items() if kept]
    assert subjects(night.folder) == ["what the human left", *wins]
    assert git(night.folder, "branch", "--show-current") == "autoresearch/nov21"
    assert git(night.folder, "log", "--format=%b", "main..HEAD").count("I expect") == len(wins)


def test_a_night_of_30_experiments_leaves_31_good_rows(night):
    header, *rows = (night.folder / "results.tsv").read_text().splitlines()
    assert header + "\n" == HEADER and len(rows) == 31 and all(map(well_formed, rows))
    statuses = {"baseline": "keep"}
    for idea, (results, kept, *_) in NIGHT.items():
        crashes = results in ("error", "hang", "killed")
        statuses[idea.replace("\t", " ")] = "keep" if kept else "crash" if crashes else "discard"
    statuses["side, first half"] = "discard"
    assert {idea: status for idea, (_, status, _) in ledger(night).items()} == statuses
    for _, val_bpb, memory_gb, status, description in night.rows():
        if status == "crash":
            assert (val_bpb, memory_gb) == ("0.000000", "0.0")
        else:
            assert memory_gb == "44.0" and re.search(r"\b\d{3} steps[;)]", description)
    assert not (night.folder / "pwned").exists()


def test_what_else_was_measured_stands_in_the_row_and_is_not_measured_again(night):
    """Other seeds, and a control if the machine drifts; a busy moment is one more run."""
    remarks = {idea: remark for idea, (_, _, remark) in ledger(night).items()}
    assert night.rows()[0][4] == BASELINE
    assert remarks["tie with luck"] == "953 steps; seed 43: 0.992000, the best 0.988000"
    assert remarks["tie that holds"] == "953 steps; seed 43: 0.983500, the best 0.988000"
    assert remarks["a busy machine, once"] == "953 steps"
    assert remarks["drift, no gain"] == "838 steps; control 0.965000, 838 steps"
    assert remarks["drift, a gain"] == remarks["drift, no second gain"] == "838 steps"
    ran = [command for command, *_ in night.log]
    assert sum(command.startswith("SEED=43") for command in ran) == 4
    assert sum(command.startswith("git checkout -B control") for command in ran) == 2


def test_nothing_that_the_human_left_or_edits_in_the_night_is_lost(night):
    assert (night.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    assert git(night.folder, "check-ignore", "results.tsv")  # no reset, stash or clean -fd loses a row
    assert git(night.folder, "diff", "--name-only", "main").split() == ["analysis.ipynb", "program.md", "train.py"]
    assert git(night.folder, "show", "HEAD:program.md") == "by the human"
    assert (night.folder / "program.md").read_text() == "edited in the night"
    assert git(night.folder, "status", "--short").split() == ["M", "program.md", "??", "notes.txt"]


# --- resuming

SCENARIOS = {
    "set-up": (lambda agent: agent.start(), []),
    "two seeds": (lambda agent: agent.experiment("idea", "0.9890 0.9990"), []),
    "mended": (lambda agent: agent.experiment("idea", "error", mended="0.9800"), ["idea"]),
    "side branch": (lambda agent: agent.side_branch({"half": "1.1000", "idea": "0.9700"}), ["half", "idea"]),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_agent_that_dies_at_any_step_is_continued(stage, begun, tmp_path, name):
    """Another day, without a tag: no row is lost or doubled, what was not kept goes."""
    play, wins = SCENARIOS[name]
    whole = Agent(copy_stage(stage if name == "set-up" else begun, tmp_path / "whole"), deaths=tmp_path)
    if name == "set-up":
        (whole.folder / "results.tsv").write_text(OTHER_RUN)
        with (whole.folder / "train.py").open("a") as file:
            file.write("# the human's edit")
    before = subjects(whole.folder) or ["what the human left"]
    play(whole)
    assert subjects(whole.folder) == before + wins
    for k in range(whole.steps):
        heir = Agent(tmp_path / str(k) / whole.folder.name, today="nov21" if name == "set-up" else "nov22")
        heir.start()  # where the first died before step k
        if "idea" not in ledger(heir) and name != "set-up":
            play(heir)  # an idea that left no trace is had again
        commits = [row[0] for row in heir.rows()]
        assert len(commits) == len(set(commits)), k
        assert git(heir.folder, "branch", "--show-current") == "autoresearch/nov21", k
        assert git(heir.folder, "status", "--short") == "", k
        if "crash" in ledger(heir).get("idea", ()):  # the heir knew of no slip
            assert name == "mended" and subjects(heir.folder) == before, k
        else:
            assert ledger(heir) == ledger(whole) and subjects(heir.folder) == before + wins, k
        if name == "set-up":
            assert (heir.folder / "results-nov20.tsv").exists(), k
            assert git(heir.folder, "show", "HEAD:train.py").endswith("# the human's edit"), k
        shutil.rmtree(heir.folder.parent)


@pytest.mark.skipif(not shutil.which("pgrep") or not os.path.exists("/proc"), reason="needs pgrep and /proc")
def test_a_run_that_outlives_its_agent_is_waited_for_and_an_editor_is_not(begun, tmp_path):
    agent = Agent(copy_stage(begun, tmp_path / "copy"))
    write_train(agent.folder, "long:0.9800", "idea")
    agent.commit("idea")
    editor = subprocess.Popen(["bash", "-c", "exec -a 'vim train.py' sleep 30"], cwd=agent.folder)
    subprocess.Popen(["bash", "-c", page("uv run train.py")], cwd=agent.folder, env=environment(agent.folder))
    while not (agent.folder / "once.log").exists():  # it begins
        time.sleep(0.01)
    agent.start()
    editor.kill()
    editor.wait()
    waits = [printed for command, _, printed in agent.log if command.startswith("sleep")]
    assert len(waits) > 1 and waits[0] and not waits[-1]
    assert ledger(agent)["idea"][:2] == ("0.980000", "keep")


def test_what_the_human_did_between_two_agents_stays(begun, tmp_path):
    """Their commit on the branch is kept, their edit of train.py measured, another edit in the way committed."""
    agent = Agent(copy_stage(begun, tmp_path / "copy"))
    (agent.folder / "program.md").write_text("a new direction")
    git(agent.folder, "commit", "-qam", "new direction")
    agent.start()
    assert not agent.experiment("idea", "1.1000")
    write_train(agent.folder, "0.9800", "the human's idea")
    agent.start()
    git(agent.folder, "checkout", "-q", "main")
    (agent.folder / "program.md").write_text("edited on main")
    agent.start()
    assert subjects(agent.folder) == ["win", "new direction", "the human's idea"]
    assert git(agent.folder, "show", "main:program.md") == "edited on main"


# --- two agents on one repository


@pytest.fixture(scope="module")
def pair(begun, tmp_path_factory):
    """In two worktrees: one measures the other's win, one finds a conflict in it."""
    first = Agent(copy_stage(begun, tmp_path_factory.mktemp("pair") / "here"))
    folder = first.folder.parent / "autoresearch-nov21-gpu1"
    git(first.folder, "worktree", "add", "-q", "-b", "autoresearch/nov21-gpu1", str(folder), "main")
    second = Agent(folder)
    first.start()
    second.start()
    assert second.borrow(first.rows()[-1][0])
    second.experiment("second's win", "0.9800")
    first.experiment("first's win", "0.9840")
    assert first.borrow(second.rows()[-1][0]) is None  # both changed the same line
    return first, second


def test_two_agents_in_two_worktrees_mix_neither_ledgers_nor_branches(pair):
    for agent, win in zip(pair, ("first's win", "second's win")):
        assert list(ledger(agent)) == ["baseline", "win", win]
        assert subjects(agent.folder) == ["win", win]
    first, second = (agent.rows()[1] for agent in pair)
    assert first[0] != second[0] and first[1:] == second[1:]  # measured again, as a commit of its own


# --- the page itself


def test_every_command_of_the_page_is_played(begun, night, pair):
    heir = Agent(begun)
    heir.start()
    heir.do("uv run tests/bench_train.py profile")
    heir.do("git show", commit=("a1b2c3d", "HEAD"))
    assert set(commands(PROGRAM)) == night.played | pair[0].played | heir.played


def test_the_page_is_short_and_its_example_is_a_ledger():
    assert len(PROGRAM.encode()) <= 7000
    rows = PROGRAM.split(f"```\n{HEADER}")[1].split("```")[0].splitlines()
    assert len(rows) == 4 and all(map(well_formed, rows))
    assert rows[0].endswith(BASELINE)
