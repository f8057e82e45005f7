"""program.md played by a scripted agent: its commands are taken from the page, only the examples in them are replaced.

`uv`, `sleep` and `claude` are stubs, and train.py is a stub that ends at once with the result written in it; git,
the shell and the ledger are real. The agent's decisions follow the page, sentence by sentence.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import HEADER, REPO, commands, environment, git, stub

PROGRAM = (REPO / "program.md").read_text(encoding="utf-8")
SETTINGS = json.loads((REPO / ".claude/settings.json").read_text())


def page(start):
    """The command of program.md that is `start`, or the one that begins with it."""
    found = [command for command in commands(PROGRAM) if command.startswith(start)]
    assert start in found or len(found) == 1, f"program.md should have one command that begins with {start!r}, has {found}"
    return start if start in found else found[0]


def replaced(command, **values):
    """The command with its examples replaced, each of which must be there."""
    for example, value in values.values():
        assert example in command, (example, command)
        command = command.replace(example, value)
    return command


# ---------------------------------------------------------------------------
# The stage: a repo with the real page and .gitignore, a stub train.py, and stubs of what takes minutes

TRAIN = """# {text!r}
from prepare import start_watchdog
import os, signal, sys, time
RESULTS = {results!r}  # val_bpb by seed, or how the run ends
start_watchdog(0.3)
result = RESULTS.get(os.environ.get("SEED", "42"))
print("CPU x2 | sdpa | tiny\\nstep     1 |   0.0 % | loss 7.6", flush=True)
if result == "error":
    raise RuntimeError("shape '[1, 2]' is invalid")
if result == "hang":
    time.sleep(60)
if result == "killed" or result == "killed once" and not os.path.exists("once.log"):
    open("once.log", "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
if result == "slow":
    time.sleep(0.25)
    result = "0.990000"
if result == "killed once":
    result = "0.990000"
print(f"---\\nval_bpb:          {{result}}\\ntotal_seconds:    325.9\\npeak_vram_mb:     45056.0\\ndepth:            8")
"""


def write_train(folder, results, text="baseline"):
    (folder / "train.py").write_text(TRAIN.format(results=results, text=text), encoding="utf-8")


def make_stage(parent):
    """A fresh clone in `parent`/autoresearch."""
    (parent / "bin").mkdir(parents=True)
    stub(parent / "bin/uv", f'shift; exec "{sys.executable}" -S -E "$PWD/$@"')
    stub(parent / "bin/sleep", "exec /bin/sleep 0.05")
    stub(parent / "bin/claude", 'echo "$CUDA_VISIBLE_DEVICES in $PWD: $@"')
    # the real command would find every train.py of the machine
    stub(parent / "bin/pgrep", f'exec "{shutil.which("pgrep") or "false"}" "$1" "$PWD/$2"')
    origin, folder = parent / "origin", parent / "autoresearch"
    (origin / "tests").mkdir(parents=True)
    for name in ("program.md", "README.md", ".gitignore", "tests/conftest.py", ".claude/settings.json"):
        (origin / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, origin / name)
    source = (REPO / "prepare.py").read_text(encoding="utf-8")
    watchdog = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "start_watchdog")
    (origin / "prepare.py").write_text(
        f"import faulthandler, os\n{ast.get_source_segment(source, watchdog)}\n"
        f"if __name__ == '__main__' and not os.path.exists('results.tsv'):\n    open('results.tsv', 'w').write({HEADER!r})\n")
    write_train(origin, {"42": "0.997900", "43": "0.999900", "44": "0.995900"})  # the noise is 0.0040
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", ".")
    git(origin, "commit", "-q", "-m", "start")
    git(parent, "clone", "-q", str(origin), str(folder))
    return folder


def copy_stage(folder, parent):
    """The same stage elsewhere; git keeps no absolute path but the remote's."""
    shutil.copytree(folder.parent, parent)
    return parent / folder.name


# ---------------------------------------------------------------------------
# The agent


class Agent:
    """Does what program.md says, one command after the other; before each, copies the stage to `deaths`/<number>."""

    def __init__(self, folder, tag="nov21", deaths=None):
        self.folder, self.tag, self.deaths, self.steps, self.played, self.log = folder, tag, deaths, 0, set(), []
        self.background = False

    def step(self):
        if self.deaths:
            copy_stage(self.folder, self.deaths / str(self.steps))
        self.steps += 1

    def do(self, start, *, line=None, check=True, **values):
        """Give the command of the page that begins with `start`; returns what it prints."""
        self.step()
        command = page(start)
        self.played.add(command)
        command = command.splitlines()[line] if line is not None else command
        if "nov21" in command:
            command = command.replace("nov21", self.tag)
        command = replaced(command, **values)
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, capture_output=True, text=True, timeout=30,
                              env=environment(self.folder))
        self.log.append((command, done.returncode, done.stdout, done.stderr))
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    # Set-up

    def start(self):
        if f"autoresearch/{self.tag}\n" in self.do("git branch --list").replace("* ", "").replace("+ ", "").replace("  ", ""):
            return self.resume()
        assert self.do("git diff --stat HEAD") == ""
        if self.rows():
            self.do("mv results.tsv")
        self.do("git checkout -b")
        self.set_up()

    def set_up(self):
        for name in ("README.md", "prepare.py", "train.py"):
            assert (self.folder / name).read_text()
        self.do("uv run prepare.py")
        self.baseline()

    def baseline(self):
        runs = [self.run()] + [self.run(seed) for seed in (43, 44)]
        noise = max(val for val, _ in runs) - min(val for val, _ in runs)
        self.write_row(*runs[0], "keep", text=f"baseline (noise {noise:.4f})")

    # One run

    def run(self, seed=None):
        """(val_bpb, memory in GB), or None for a crash."""
        for _ in range(2):
            if seed:
                self.do("SEED=43 uv run", check=False, seed=("43", str(seed)))
            elif self.background:
                self.do("nohup sh -c", line=0)
                for _ in range(20):
                    if self.do("nohup sh -c", line=1).startswith("exit code"):
                        break
                else:
                    raise AssertionError("the run never ended")
            else:
                self.do("uv run train.py", check=False)
            lines = self.do("grep ", check=False).split()
            if lines:
                assert [lines[0], lines[2]] == ["val_bpb:", "peak_vram_mb:"] and len(lines) == 4, lines
                return float(lines[1]), float(lines[3]) / 1024
            if re.search("Error|Timeout|FAIL", self.do("tail -n 50 run.log")):
                break
        return None

    # The ledger

    def write_row(self, val_bpb, memory_gb, status, text=None, remark=""):
        self.do("git log -1 --abbrev=7 --format='", val=("0.993200", f"{val_bpb:.6f}"), memory=("44.2", f"{memory_gb:.1f}"),
                status=("keep", status), text=("%s", text or "%s" + remark))

    def rows(self):
        ledger = self.folder / "results.tsv"
        return [line.split("\t") for line in ledger.read_text().splitlines()[1:]] if ledger.exists() else []

    def remember(self):
        """The best, as in the page: (commit, val_bpb) of the last kept row; and the noise."""
        kept = [line.split("\t") for line in self.do("awk ").splitlines()]
        assert self.do("tail -n 20 results.tsv").splitlines() == (self.folder / "results.tsv").read_text().splitlines()[-20:]
        self.noise = float(re.search(r"\(noise (\S+)\)", kept[0][4])[1])
        self.best, self.best_bpb = kept[-1][0], float(kept[-1][1])

    # The loop

    def go_back(self):
        self.do("git reset --hard a1b2c3d", best=("a1b2c3d", self.best))

    def commit(self, text, results):
        self.step()
        write_train(self.folder, results, text)
        self.do("git commit train.py", text=("matrix LR 0.04 -> 0.05", text))

    def experiment(self, text, results, simpler=False, mended=None, side=False):
        """Steps 1 to 5; True if it was kept."""
        self.remember()
        self.commit(text, results)
        return self.measure(simpler, mended, side)

    def measure(self, simpler=False, mended=None, side=False):
        """Steps 3 to 5 for the commit that is there."""
        self.remember()
        result = self.run()
        if not result and mended:
            self.step()
            write_train(self.folder, mended)
            self.do("git commit --amend")
            result = self.run()
        if not result:
            self.write_row(0, 0, "crash", remark=" (out of memory)")
            if not side:
                self.go_back()
            return False
        gain, remark = self.best_bpb - result[0], ""
        if side:
            keep = gain > self.noise
        else:
            keep = gain > self.noise or abs(gain) <= self.noise and simpler
            if not keep and 0 < gain <= self.noise:
                keep, remark = self.compare_means(result[0])
        self.write_row(*result, "keep" if keep else "discard", remark=remark)
        if not keep and not side:
            self.go_back()
        return keep

    def compare_means(self, val_bpb):
        other = self.run(43)[0]
        self.do("git checkout --detach", best=("a1b2c3d", self.best))
        best_other = self.run(43)[0]
        self.do("git checkout autoresearch/nov21")
        mean, best_mean = (val_bpb + other) / 2, (self.best_bpb + best_other) / 2
        return best_mean - mean > self.noise / 2, f" (means {mean:.4f} and {best_mean:.4f})"

    def side_branch(self, ideas):
        self.do("git checkout -B")
        for text, results in ideas:
            if self.experiment(text, results, side=True):
                self.do("git checkout autoresearch/nov21")
                self.do("git merge")
                return
        self.do("git checkout autoresearch/nov21")

    # When you resume

    def resume(self):
        for _ in range(10):
            if not self.do("sleep 60", check=False):
                break
        changed = self.do("git diff --stat HEAD")
        assert not changed or re.fullmatch(r" train\.py .*\n 1 file changed.*\n", changed), changed
        self.do("git reset --hard")
        self.do("git checkout autoresearch/nov21")
        self.do("uv run prepare.py")
        head = self.do("git log -1 --abbrev=7 --format=%h").strip()
        rows = self.rows()
        kept = [row for row in rows if row[3] == "keep"]
        if not kept:
            self.set_up()
        elif head not in [row[0] for row in rows]:
            self.measure()
        else:
            self.best = kept[-1][0]
            self.go_back()

    # Other agents beside you

    def borrow(self):
        """Try the last kept idea of the agent in the first other worktree; True if it was kept, None in a conflict."""
        other = next(line.split()[0] for line in self.do("git worktree list").splitlines() if str(self.folder) + " " not in line)
        rows = self.do("tail -n 20 ../", other=(f"../autoresearch-{self.tag}-gpu1", f"../{Path(other).name}"))
        theirs = [row.split("\t") for row in rows.splitlines() if "\tkeep\t" in row][-1]
        self.remember()
        self.do("git cherry-pick a1b2c3d", check=False, commit=("a1b2c3d", theirs[0]))
        if self.log[-1][1]:
            self.do("git cherry-pick --abort")
            return None
        return self.measure()


def score(val_bpb, other=None):
    return {"42": val_bpb, "43": other or val_bpb}


HOSTILE = [
    "it's a \"test\" of `ls` and $HOME and $(touch pwned); rm -rf . # \\n %s %h %n",
    "100 % wider: ümlaut, 中文, 🙂, and\ta tab",
    "' || git push & > train.py < /dev/null * ?",
    "# looks like a comment",
]
# (text, what train.py gives, what else is so, whether it must be on the branch at the end); the best starts at 0.9979
NIGHT = [
    ("embedding LR 0.6 -> 0.8", score("0.993200"), {}, True),
    ("GeLU", score("1.005000"), {}, False),
    (HOSTILE[0], score("0.988000"), {}, True),
    (HOSTILE[1], score("0.989500"), {}, False),  # higher, inside the noise, not simpler
    ("tie with luck", score("0.986000", "0.992000"), {}, False),  # means 0.9890 and 0.9880
    ("tie that holds", score("0.986500", "0.983500"), {}, True),  # means 0.9850 and 0.9880
    ("simpler and as good", score("0.988900"), {"simpler": True}, True),
    ("simpler and worse", score("0.994000"), {"simpler": True}, False),
    ("model twice as wide", score("error"), {}, False),
    ("a slip, mended", score("error"), {"mended": score("0.984000")}, True),
    ("hangs", score("hang"), {}, False),
    ("is killed each time", score("killed"), {}, False),
    (HOSTILE[2], score("0.979000"), {}, True),
    ("exactly as good as the best", score("0.979000"), {}, False),
    ("worse", score("0.979001"), {}, False),
    (HOSTILE[3], score("1.100000"), {}, False),
    ("five", score("1.200000"), {}, False),
    ("optimizer for the norms", score("0.974000"), {}, True),
    ("side, first half", score("1.000000"), {"side": 2}, True),
    ("side, second half", score("0.960000"), {}, True),
    ("side, error", score("error"), {"side": 3}, False),
    ("side, hopeless", score("0.990000"), {}, False),
    ("side, given up", score("0.958000"), {}, False),  # inside the noise
    ("after the side branch", score("0.955000"), {}, True),
    ("a crash again", score("error"), {}, False),
    ("loss", score("0.970000"), {}, False),
    ("last win", score("0.950000"), {}, True),
    ("loss again", score("0.970000"), {}, False),
    ("the very last", score("0.945000"), {}, True),
]


def well_formed(row):
    return re.fullmatch(r"[0-9a-f]{7}\t\d\.\d{6}\t\d+\.\d\t(keep|discard|crash)\t[^\t\n]+", row)


def subjects(folder, ref="HEAD"):
    return git(folder, "log", "--reverse", "--format=%s", f"main..{ref}").splitlines()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("stage") / "here")


@pytest.fixture(scope="module")
def night(stage, tmp_path_factory):
    """The agent after a baseline and the 29 experiments above; an older run's ledger lay in the folder."""
    agent = Agent(copy_stage(stage, tmp_path_factory.mktemp("night") / "here"))
    (agent.folder / "results.tsv").write_text(HEADER + "0123456\t0.900000\t1.0\tkeep\tanother run's best\n")
    agent.start()
    ideas = iter(NIGHT)
    for number, (text, results, how, _) in enumerate(ideas):
        agent.background = number % 2 == 1
        if "side" in how:
            more = [next(ideas)[:2] for _ in range(how["side"] - 1)]
            agent.side_branch([(text, results), *more])
        else:
            agent.experiment(text, results, **how)
    return agent


@pytest.fixture(scope="module")
def pair(stage, tmp_path_factory):
    """Two agents in two worktrees made as the README says; each has a win of its own and tries the other's."""
    first = Agent(copy_stage(stage, tmp_path_factory.mktemp("pair") / "here"))
    block = next(command for command in commands((REPO / "README.md").read_text()) if "worktree add" in command)
    shown = subprocess.run(["bash", "-ec", block], cwd=first.folder, env=environment(first.folder), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    second = Agent(first.folder.parent / "autoresearch-nov21-gpu1", tag="nov21-gpu1")
    for agent in (first, second):
        agent.start()
    first.experiment("first's win", score("0.990000"))
    assert first.folder.joinpath("results.tsv").read_text() != second.folder.joinpath("results.tsv").read_text()
    borrowed = second.borrow()
    second.experiment("second's win", score("0.980000"))
    first.experiment("first's other win", score("0.984000"))  # the same line of train.py: a conflict
    return first, second, borrowed, first.borrow(), shown.stdout


# ---------------------------------------------------------------------------


def test_a_night_of_30_experiments_ends_with_exactly_the_wins_on_the_branch(night):
    assert subjects(night.folder) == [text for text, _, _, kept in NIGHT if kept]
    assert git(night.folder, "branch", "--show-current") == "autoresearch/nov21"
    assert git(night.folder, "diff", "--name-only", "main") == "train.py"
    assert git(night.folder, "status", "--short") == ""


def test_a_night_of_30_experiments_leaves_30_well_formed_rows(night):
    header, *rows = (night.folder / "results.tsv").read_text().splitlines()
    assert header + "\n" == HEADER and len(rows) == 30 and all(map(well_formed, rows))
    cells = [row.split("\t") for row in rows]
    texts = [re.sub(r" \((means|out of memory).*", "", row[4]) for row in cells]
    assert texts == ["baseline (noise 0.0040)", *(text.replace("\t", " ") for text, *_ in NIGHT)]
    assert len({row[0] for row in cells}) == 30
    for commit, val_bpb, memory_gb, status, _ in cells:
        assert git(night.folder, "cat-file", "-t", commit) == "commit"
        assert (val_bpb, memory_gb) == ("0.000000", "0.0") if status == "crash" else memory_gb == "44.0"
    statuses = [row[3] for row in cells[1:]]
    expected = ["crash" if results["42"] in ("error", "hang", "killed") and "mended" not in how else "keep" if kept else "discard"
                for _, results, how, kept in NIGHT]
    expected[18] = "discard"  # the first half of the side branch
    assert statuses == expected
    assert not (night.folder / "pwned").exists()


def test_another_runs_ledger_is_kept_under_its_own_name(night):
    assert (night.folder / "results-nov20.tsv").read_text().endswith("another run's best\n")


def test_no_git_command_that_undoes_loses_a_row(night, tmp_path):
    folder = copy_stage(night.folder, tmp_path / "copy")
    ledger = (folder / "results.tsv").read_bytes()
    for command in ("reset --hard HEAD~1", "stash -u", "checkout -f main", "clean -fd", "checkout -f -B other HEAD~0"):
        (folder / "train.py").write_text("edited")
        (folder / "untracked.py").write_text("untracked")
        git(folder, *command.split())
        assert (folder / "results.tsv").read_bytes() == ledger, command


def test_a_run_that_was_killed_from_outside_is_run_once_more(stage, tmp_path):
    agent = Agent(copy_stage(stage, tmp_path / "copy"))
    agent.start()
    assert agent.experiment("killed once", score("killed once"))
    assert [row[1:4] for row in agent.rows()[1:]] == [["0.990000", "44.0", "keep"]]


# --- resuming: whatever step the agent dies at, another one comes to the same end


def scenario(agent, name):
    """What the agent does before it dies, given a baseline and a win."""
    if name == "discard":
        agent.experiment("idea", score("1.100000"))
    if name == "two seeds":
        agent.experiment("idea", score("0.989000", "0.980000"))
    if name == "mended":
        agent.experiment("idea", score("error"), mended=score("0.980000"))
    if name == "side branch":
        agent.side_branch([("half", score("1.100000")), ("idea", score("0.970000"))])


def ledger_of(agent):
    return [(row[4], row[1], row[3]) for row in agent.rows()]


SCENARIOS = {"set-up": [], "discard": [], "two seeds": ["idea"], "mended": ["idea"], "side branch": ["half", "idea"]}


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_agent_that_dies_at_any_step_is_continued_by_the_next(stage, tmp_path, name):
    """No row is lost or doubled, nothing that was not kept stays; at most the experiment in hand is run again."""
    before = Agent(copy_stage(stage, tmp_path / "before"))
    if name != "set-up":
        before.start()
        before.experiment("win", score("0.990000"))
    begun = subjects(before.folder) if name != "set-up" else []
    whole = Agent(copy_stage(before.folder, tmp_path / "whole"), deaths=tmp_path)
    whole.start() if name == "set-up" else scenario(whole, name)
    assert subjects(whole.folder) == begun + SCENARIOS[name]
    for k in range(whole.steps):
        second = Agent(tmp_path / str(k) / whole.folder.name)  # as the first left it when it died before step k
        second.start()
        assert git(second.folder, "branch", "--show-current") == "autoresearch/nov21"
        assert git(second.folder, "status", "--short") == "", k
        for text, val_bpb, status in ledger_of(whole):  # an idea that left no row is lost with its agent: it has it again
            if text.split(" (")[0] not in [row[0].split(" (")[0] for row in ledger_of(second)]:
                scenario(second, name)
                break
        ledger = ledger_of(second)
        texts = [row[0].split(" (")[0] for row in ledger if row[0] != "half"]  # a side branch is begun anew
        assert len(texts) == len(set(texts)), (k, ledger)
        commits = [row[0] for row in second.rows() if row[4] != "half"]
        assert len(commits) == len(set(commits)), (k, second.rows())
        assert all(map(well_formed, ["\t".join(row) for row in second.rows()]))
        as_without_death = set(ledger_of(whole)) | ({("idea (out of memory)", "0.000000", "crash")} if name == "mended" else set())
        assert set(ledger) <= as_without_death, (k, ledger)  # what the first would have mended is a crash to the second
        assert subjects(second.folder) == begun + (SCENARIOS[name] if ledger[-1][2] == "keep" else []), (k, ledger)
        head, kept = git(second.folder, "rev-parse", "HEAD"), [row for row in second.rows() if row[3] == "keep"][-1][0]
        assert head.startswith(kept), k
        shutil.rmtree(second.folder.parent)


@pytest.mark.skipif(not shutil.which("pgrep"), reason="needs pgrep, which finds the old run")
def test_a_run_that_outlives_its_agent_is_waited_for_and_not_believed(stage, tmp_path):
    agent = Agent(copy_stage(stage, tmp_path / "copy"))
    agent.start()
    agent.remember()
    agent.commit("slow idea", score("slow"))
    agent.do("nohup sh -c", line=0)
    time.sleep(0.1)  # it runs
    heir = Agent(agent.folder)
    heir.start()
    waits = [out for command, _, out, _ in heir.log if command.startswith("sleep 60")]
    assert len(waits) > 1 and waits[0] and not waits[-1]
    assert ledger_of(heir)[1:] == [("slow idea", "0.990000", "keep")]


def test_a_stale_log_is_never_the_result(stage, tmp_path):
    """The old log names a great result; the agent died between its commit and its run, and uv is broken too."""
    agent = Agent(copy_stage(stage, tmp_path / "copy"))
    agent.start()
    agent.remember()
    agent.commit("never run", score("0.999000"))
    (agent.folder / "run.log").write_text("---\nval_bpb:          0.100000\npeak_vram_mb:     1.0\n")
    heir = Agent(agent.folder)
    heir.start()
    assert ledger_of(heir)[-1] == ("never run", "0.999000", "discard")
    (agent.folder / "run.log").write_text("---\nval_bpb:          0.100000\npeak_vram_mb:     1.0\n")
    stub(agent.folder.parent / "bin/uv", "echo 'Error: uv is broken'; exit 2")
    assert not heir.experiment("without uv", score("0.900000"))
    assert ledger_of(heir)[-1] == ("without uv (out of memory)", "0.000000", "crash")


def test_a_human_edit_is_never_destroyed(stage, tmp_path):
    """The page lets the agent begin only where `git diff --stat HEAD` prints nothing, or train.py in a resumed run."""
    folder = copy_stage(stage, tmp_path / "copy")
    (folder / "program.md").write_text("the human's edit\n")
    (folder / "CLAUDE.md").write_text("the human's own file\n")
    with pytest.raises(AssertionError, match="program.md"):
        Agent(folder).start()
    git(folder, "branch", "autoresearch/nov21")
    with pytest.raises(AssertionError, match="program.md"):
        Agent(folder).start()
    assert (folder / "program.md").read_text() == "the human's edit\n"


# --- two agents on one repository


def test_two_agents_in_two_worktrees_mix_neither_ledgers_nor_branches(pair):
    first, second, borrowed, conflict, shown = pair
    assert shown.endswith(f"1 in {second.folder}: Read program.md and follow it. The run tag is nov21-gpu1.\n")
    assert [row[4] for row in first.rows()] == ["baseline (noise 0.0040)", "first's win", "first's other win"]
    assert [row[4] for row in second.rows()] == ["baseline (noise 0.0040)", "first's win", "second's win"]
    for agent in (first, second):
        assert subjects(agent.folder) == [row[4] for row in agent.rows()[1:]]
        on_branch = git(agent.folder, "log", "--abbrev=7", "--format=%h").splitlines()
        assert all(row[0] in on_branch for row in agent.rows())
        assert git(agent.folder, "status", "--short") == ""


def test_a_win_of_one_agent_is_measured_again_by_the_other(pair):
    first, second, borrowed, conflict, _ = pair
    assert borrowed is True and conflict is None  # the conflict left the first agent's branch as it was
    one, other = first.rows()[1], second.rows()[1]
    assert one[1:] == other[1:]
    ran = [command for command, *_ in second.log]
    assert ran.index(f"git cherry-pick {one[0]}") < len(ran) - 1 - ran[::-1].index("uv run train.py > run.log 2>&1\n")


def test_a_worktree_that_is_removed_leaves_its_ledger(pair):
    """git worktree remove deletes ignored files without a word; the README copies the ledger first."""
    first, second, *_ = pair
    ledger = second.folder.joinpath("results.tsv").read_text()
    block = next(command for command in commands((REPO / "README.md").read_text()) if "worktree remove" in command)
    done = subprocess.run(["bash", "-ec", block], cwd=first.folder, env=environment(first.folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not second.folder.exists()
    assert (first.folder / "results-nov21-gpu1.tsv").read_text() == ledger


# --- the page and the settings


def test_every_command_of_the_page_is_played(night, pair):
    heir = Agent(night.folder)
    heir.resume()
    assert set(commands(PROGRAM)) == night.played | pair[0].played | pair[1].played | heir.played


def simple_commands(command):
    """The parts of a command that Claude Code checks one by one: here-document and redirections taken off."""
    command = re.sub(r" <<'END'\n.*", "", command, flags=re.DOTALL)
    command = re.sub(r" (2>&1|>>? ?\S+)", "", command)
    return [part.strip() for part in re.split(r"&&|;|\n|(?<!\\)\|", command) if part.strip()]


def matches(rule, command):
    """Claude Code's Bash rules: * stands for anything, and :* at the end for nothing or further words."""
    words = rule.removesuffix(":*")
    pattern = ".*".join(map(re.escape, words.split("*"))) + ("( .*)?" if words != rule else "")
    return re.fullmatch(pattern, command, re.DOTALL) is not None


def rules(kind, tool):
    return [rule[len(tool) + 1:-1] for rule in SETTINGS["permissions"][kind] if rule.startswith(f"{tool}(")]


def test_the_settings_allow_every_command_of_the_page():
    background = page("nohup sh -c").splitlines()[0]  # Claude Code asks about every &; it has a switch of its own
    for command in [line for block in commands(PROGRAM) for line in ([block] if "<<" in block else block.splitlines())]:
        for part in simple_commands(command) if command != background else []:
            assert any(matches(rule, part) for rule in rules("allow", "Bash")), part
            assert not any(matches(rule, part) for rule in rules("deny", "Bash")), part
    for target in re.findall(r">>? ?([a-z]+\.[a-z]+)", "\n".join(commands(PROGRAM))):
        assert f"./{target}" in rules("allow", "Edit"), target  # a redirection needs the right to edit its file


def test_every_allowed_command_is_one_of_the_page():
    parts = [part for block in commands(PROGRAM) for command in ([block] if "<<" in block else block.splitlines())
             for part in simple_commands(command)] + ["SEED=44 uv run train.py"]
    for rule in rules("allow", "Bash"):
        assert any(matches(rule, part) for part in parts), rule


@pytest.mark.parametrize("command", [
    "uv add numpy", "uv pip install numpy", "uv sync", "uv run python", "uv run pytest", "pip install numpy", "rm -rf .", "rm results.tsv",
    "git push", "git push --force", "git stash", "git clean -fdx", "git checkout main", "git checkout HEAD prepare.py",
    "git commit -a -m x", "git commit prepare.py -m x", "git add .", "git branch -D main", "git config user.name x", "git rebase main",
    "sed -i s/a/b/ prepare.py", "tee prepare.py", "sudo ls", "curl localhost", "python3 x.py", "mv prepare.py x", "nvidia-smi",
    "AUTORESEARCH_HOLDOUT=1 uv run train.py", "env AUTORESEARCH_HOLDOUT=1 uv run train.py", "export AUTORESEARCH_PROFILE=tiny",
])
def test_the_settings_allow_nothing_else(command):
    assert not any(matches(rule, command) for rule in rules("allow", "Bash"))


def test_the_settings_let_the_agent_edit_train_py_alone():
    assert rules("allow", "Edit") == ["./train.py", "./run.log", "./results.tsv"] and not rules("allow", "Write")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout.split()
    denied = rules("deny", "Edit")
    for name in tracked or ["prepare.py", "tests/x.py", "pyproject.toml"]:
        covered = f"./{name}" in denied or any(rule.endswith("/**") and f"./{name}".startswith(rule[:-2]) for rule in denied)
        assert covered or name in ("train.py", "LICENSE"), name
    assert not {"Bash", "Edit", "Write", "WebFetch"} & set(SETTINGS["permissions"]["allow"])
    assert "defaultMode" not in SETTINGS["permissions"]


def test_the_settings_raise_the_shells_time_limit_above_the_watchdogs():
    default, longest = (int(SETTINGS["env"][f"BASH_{which}_TIMEOUT_MS"]) for which in ("DEFAULT", "MAX"))
    watchdog = int(re.search(r"def start_watchdog\(seconds=(\d+)\)", (REPO / "prepare.py").read_text())[1])
    assert longest >= default > 1000 * watchdog


def test_the_settings_are_committed_and_no_users_file_is():
    ignored = subprocess.run(["git", "check-ignore", ".claude/settings.json"], cwd=REPO, capture_output=True, text=True)
    assert ignored.stdout == ""
    assert not (REPO / "CLAUDE.md").exists() and not (REPO / "AGENTS.md").exists()
