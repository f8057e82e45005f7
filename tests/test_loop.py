"""program.md played by a scripted agent: the commands are the page's, only the examples in them are replaced.

`uv`, `sleep` and train.py are stubs that end at once; git, the shell and the ledger are real. A human may change the
page: what a test plays is taken from it, and a test whose command is gone is skipped.
"""

import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from conftest import HEADER, REPO, Player, commands, git, stub

PROGRAM = (REPO / "program.md").read_text(encoding="utf-8")
README = (REPO / "README.md").read_text(encoding="utf-8")
OTHER_RUN = HEADER + "0123456\t0.900000\t1.0\tkeep\tanother run's best\n"
Result = namedtuple("Result", "val_bpb memory steps seed device attention", defaults=[0] * 5)

# --- the stage: a repo with the real page and .gitignore, and stubs of what takes minutes

TRAIN = """# %s
import os, signal, time, prepare
prepare.start_watchdog(1.2)
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
seed = int(os.environ.get("SEED", 42))
slow = 0.01 * os.path.exists("busy.log")  # the whole machine
first = not os.path.exists("once.log")
open("once.log", "w").close()
val_bpb = %s
print(f"---\\nval_bpb: {val_bpb + slow + (seed > 42) * 0.002:.6f}\\npeak_vram_mb: 45056.0\\nnum_steps: 953")
print(f"seed: {seed}\\ndevice: NVIDIA H100\\nattention: fa3")
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
    stub(bin / "uv", f'{make_ledger}; shift; [ -f "$1" ] && exec "{sys.executable}" "$@"; [ "$1" = pytest -o "$1" = --with ]')
    for name in ("pip", "column", "claude"):
        stub(bin / name, "true")
    stub(bin / "sleep", "exec /bin/sleep 0.05")
    for name in ("program.md", ".gitignore"):
        shutil.copy(REPO / name, folder)
    for name in ("analysis.ipynb", "tests/bench_train.py", "tests/look.py"):
        (folder / name).touch()
    watchdog = re.search(r"def start_watchdog.*?\n\n", (REPO / "prepare.py").read_text(), re.DOTALL)[0]
    (folder / "prepare.py").write_text("import faulthandler, os\nTIME_BUDGET = 0\n" + watchdog)
    write_train(folder, "baseline", "0.9979")  # the noise is 0.0020
    for command in ("init -q -b main", "add .", "commit -q -m start"):
        git(folder, *command.split())
    for name in ("program.md", "analysis.ipynb", "train.py", "notes.txt"):
        with (folder / name).open("a") as file:
            file.write("# by the human")
    (folder / "results.tsv").write_text(OTHER_RUN)
    return folder


# --- the agent


def noise(rows):
    """How far two runs of one commit differ, on average over the pairs."""
    numbers = {}
    for commit, val_bpb, *_ in rows:
        numbers.setdefault(commit, []).append(float(val_bpb))
    return statistics.mean(abs(a - b) for runs in numbers.values() for a, b in itertools.combinations(runs, 2))


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
        here = re.search(r"^\* autoresearch/(.+)$", branches, re.MULTILINE)
        if here:
            self.tag = here[1]
            return self.resume()
        if f" autoresearch/{self.tag}\n" in branches:
            self.do("git checkout autoresearch")
            return self.resume()
        if self.rows():
            self.do("mv results.tsv")
        self.do("git checkout -b")
        self.set_up()

    def set_up(self):
        self.do("git commit --allow-empty -am")
        self.do("uv run prepare.py")
        self.write_row(self.run(), "keep", "baseline")
        self.repeat("baseline")

    def repeat(self, idea):
        seed = 43 + sum(" again, " in row[4] for row in self.rows())
        self.write_row(self.run(seed), "keep", f"{idea} again, seed {seed}")

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

    def write_row(self, result, status, text):
        values = {"0.993200": result.val_bpb, "44[.]2": f"{float(result.memory) / 1024:.1f}", "keep": status}
        text = f"{text} ({result.steps} steps)".replace("'", "").replace('"', "")
        values |= {r"'[^']*steps\)'": f"'{text}'", "a1b2c3d": git(self.folder, "rev-parse", "HEAD")[:7]}
        self.do("printf", **values)

    def remember(self):
        last = self.do("tail -n 20 results.tsv")
        if len(self.rows()) % 30 == 0:
            self.do("cat results.tsv")
            self.do("git log -n 30")
        kept = [line.split("\t") for line in last.splitlines() if "\tkeep\t" in line]
        self.best, self.bar = kept[-1][0], float(kept[-1][1])

    def ideas_since_the_repeat(self):
        ideas = itertools.takewhile(lambda row: "again, " not in row[4], reversed(self.rows()))
        return len(list(ideas))

    def idea(self):
        return (self.folder / "train.py").read_text().split("\n")[0][2:]

    def experiment(self, text, code):
        """One turn of the loop; whether it was kept."""
        self.remember()
        if self.ideas_since_the_repeat() == 8:
            self.repeat(self.idea())
            self.remember()
        self.step()
        write_train(self.folder, text, code)
        self.do("uv run tests/look.py")
        self.commit()
        return self.measure()

    def commit(self):
        self.do("git commit train.py", **{"attention output gated": self.idea()})

    def measure(self, always=False):
        """Run the last commit, write its row, keep or undo it."""
        result = self.run()
        gain = round(self.bar - float(result.val_bpb), 6) if result else -1
        keep = gain > noise(self.rows()) or "simpler" in self.idea() and gain >= 0 or always
        if result:
            self.write_row(result, "keep" if keep else "discard", self.idea())
        else:
            self.write_row(Result("0.000000"), "crash", self.idea())
        if not keep:
            self.undo()
        return keep

    def undo(self):
        self.do("git reset --keep", a1b2c3d=self.best)

    def borrow(self, commit):
        """Whether an older idea was kept; None in a conflict."""
        self.remember()
        self.do("git cherry-pick a1b2c3d", check=False, a1b2c3d=commit)
        if self.done.returncode == 0:
            return self.measure()
        self.do("git cherry-pick --abort")

    def resume(self):
        end = self.do("tail -n 50 run.log", check=False)
        over = re.search("^(---|FAIL|Traceback|Timeout)", end, re.MULTILINE)
        if end and not over:
            self.do("until grep")
        self.do("uv run prepare.py")
        if len(self.rows()) < 2:
            return self.set_up()
        if "train.py" in self.do("git diff --stat HEAD"):
            self.commit()
        self.remember()
        head = git(self.folder, "rev-parse", "HEAD")[:7]
        rows = [row for row in self.rows() if row[0] == head]
        if not rows:
            self.measure(always="+++ b/train.py" not in self.do("git show", a1b2c3d="HEAD"))
        elif rows[-1][3] != "keep":
            self.undo()


# --- a night

NIGHT = {  # idea: its status, and what train.py gives; the bar begins at 0.9999, the noise is 0.0020
    "a gate": "keep 0.9932",
    "it's a \"test\" of `ls` $HOME $(touch pwned); rm -rf . # \\n %s %h ' || git push & > train.py *": "keep 0.9880",
    "wider: ümlaut, 中文, 🙂": "discard 0.9895",  # higher
    "a gain within the noise": "discard 0.9865",
    "simpler": "keep 0.9880",  # no higher
    "simpler, a little higher": "discard 0.9881",
    "a slip": "keep slip or 0.9820",
    "hangs": "crash time.sleep(60)",  # the eighth: the best is repeated, 0.9840
    "killed, twice": "crash kill()",
    "killed, once": "discard kill() if first else 0.9900",
    "lower than the repeat alone": "keep 0.9815",
} | {f"worse {number}": "discard 0.9900" for number in range(20)}
WINS = [idea for idea in NIGHT if NIGHT[idea].startswith("keep")]


def well_formed(row):
    crash, run = r"0\.000000\t0\.0\tcrash\t[^\t]+", r"\d\.\d{6}\t44\.\d\t(keep|discard)\t[^\t]+"
    return re.fullmatch(rf"[0-9a-f]{{7}}\t({crash}|{run})", row)


def subjects(folder):
    return git(folder, "log", "--reverse", "--format=%s", "main..HEAD").splitlines()


def ledger(agent):
    """{idea: all after the commit}, without the repeats."""
    return {row[4].split(" (")[0]: row[1:] for row in agent.rows() if " again, " not in row[4]}


@pytest.fixture(scope="module")
def begun(stage, tmp_path_factory):
    """A stage with a baseline and a win of 0.9900."""
    agent = Agent(copy(stage, tmp_path_factory.mktemp("begun")))
    agent.start()
    agent.experiment("win", "0.9900")
    return agent.folder


@pytest.fixture(scope="module")
def night(stage, tmp_path_factory):
    agent = Agent(copy(stage, tmp_path_factory.mktemp("night")))
    agent.start()
    (agent.folder / "program.md").write_text("edited in the night")
    (agent.folder / "learned.md").write_text("## nov21\n\nGates work.\n")
    for idea, outcome in NIGHT.items():
        agent.experiment(idea, outcome.split(" ", 1)[1])
    return agent


def test_each_run_of_a_night_has_a_good_row_and_the_wins_are_the_branch(night):
    header, *rows = (night.folder / "results.tsv").read_text().splitlines()
    assert header + "\n" == HEADER and all(map(well_formed, rows))
    assert [row[2] for row in ledger(night).values()] == ["keep"] + [result.split()[0] for result in NIGHT.values()]
    assert subjects(night.folder) == ["what the human left", *WINS]
    assert git(night.folder, "branch", "--show-current") == "autoresearch/nov21"
    assert git(night.folder, "log", "--format=%b", "main..HEAD").count("I expect") == len(WINS)
    assert not (night.folder / "pwned").exists()


def test_the_best_is_run_again_after_eight_ideas_and_its_latest_number_is_the_bar(night):
    repeats = [number for number, row in enumerate(night.rows()) if " again, seed " in row[4]]
    assert repeats == [1, 10, 19, 28]
    rows = {row[4].split(" (")[0]: float(row[1]) for row in night.rows()}
    assert rows["a slip again, seed 44"] == 0.984 and 0.984 - rows["lower than the repeat alone"] > 0.002


def test_nothing_that_the_human_left_or_edits_in_the_night_is_lost(night):
    assert (night.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    for name in ("results.tsv", "learned.md"):
        assert git(night.folder, "check-ignore", name)  # no reset, stash or clean -fd loses it
    left = f"HEAD~{len(WINS)}"
    assert git(night.folder, "diff", "--name-only", "main", left) == "analysis.ipynb\nprogram.md\ntrain.py"
    assert git(night.folder, "diff", "--name-only", left, "HEAD") == "train.py"
    assert (night.folder / "program.md").read_text() == "edited in the night"
    assert git(night.folder, "status", "--short").split() == ["M", "program.md", "??", "notes.txt"]


def test_an_old_idea_is_brought_back_or_given_up_in_a_conflict(night, tmp_path):
    agent = Agent(copy(night.folder, tmp_path))
    discarded = [row[0] for row in agent.rows() if row[3] == "discard"]
    head = git(agent.folder, "rev-parse", "HEAD")
    assert agent.borrow(discarded[0]) is None  # it changes the line of a later win
    assert agent.borrow(discarded[-1]) is False and len(agent.rows()) == len(night.rows()) + 1
    assert git(agent.folder, "rev-parse", "HEAD") == head


# --- resuming

SCENARIOS = {
    "set-up": (Agent.start, []),
    "a win": (lambda agent: agent.experiment("idea", "0.9700"), ["win", "idea"]),
    "a loss": (lambda agent: agent.experiment("idea", "0.9990"), ["win"]),
    "a slip": (lambda agent: agent.experiment("idea", "slip or 0.9800"), ["win", "idea"]),
}


def end(agent):
    """How the agent leaves its clone."""
    questions = "branch --show-current", "log --format=%s", "status --short", "show HEAD:train.py"
    assert (agent.folder / "results-nov20.tsv").read_text() == OTHER_RUN
    answers = [git(agent.folder, *question.split()) for question in questions]
    answers[1] = re.sub(r"(?m)^(.+\n)\1+", r"\1", answers[1])  # what was committed before is completed
    return ledger(agent), *answers


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_agent_that_dies_at_any_step_is_continued(stage, begun, tmp_path, name):
    """On another day, without a tag: each idea has its row, and the branch is the same."""
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
    os.utime(log, (time.time() - 250,) * 2)
    agent.start()  # or the command that waits would not end


def test_what_the_human_did_between_two_agents_stays(begun, tmp_path):
    """Their commit on the branch is kept, and their edit of train.py is measured."""
    agent = Agent(copy(begun, tmp_path))
    (agent.folder / "program.md").write_text("a new direction")
    git(agent.folder, "commit", "-qam", "new direction")
    agent.start()
    assert not agent.experiment("idea", "1.1000")
    write_train(agent.folder, "the human's idea", "0.9800")
    agent.start()
    assert subjects(agent.folder)[1:] == ["win", "new direction", "the human's idea"]


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
    assert [row[3] for row in agent.rows()] == ["keep", "keep", "keep", "discard"]
    assert git(agent.folder, "branch", "--show-current") == "autoresearch/nov21"


# --- the pages themselves


@pytest.mark.parametrize("command", list(dict.fromkeys(commands(PROGRAM) + commands(README))))
def test_every_command_of_the_page_and_the_readme_can_be_typed(begun, tmp_path, command):
    """In a night that is under way; git may answer that it has nothing to do."""
    folder = copy(begun, tmp_path)
    (folder / "run.log").write_text("---\nval_bpb: 0.99\n")
    git(folder, "config", "user.name", "me")
    git(folder, "config", "user.email", "me@localhost")
    if command in commands(PROGRAM):
        write_train(folder, "idea", "0.9800")
    head = git(folder, "rev-parse", "HEAD")[:7]
    if "checkout -b" in command:
        command = command.replace("nov21", "nov22")
    done = subprocess.run(["bash", "-c", command.replace("a1b2c3d", head)], cwd=folder, env=Player(folder).env,
                          capture_output=True, text=True, timeout=60)
    nothing_to_do = "git cherry-pick", "git reset"
    assert done.returncode == 0 or command.startswith(nothing_to_do) and "usage" not in done.stderr, done


def test_the_pages_example_is_a_ledger_with_the_bar_and_the_noise_that_it_tells():
    example = re.search(rf"```\n{HEADER}(.*?)```\n\n(.*?)\n\n", PROGRAM, re.DOTALL)
    if example:
        rows = example[1].splitlines()
        assert all(map(well_formed, rows))
        rows = [row.split("\t") for row in rows]
        bar = [row[1] for row in rows if row[3] == "keep"][-1]
        assert not {bar, f"{noise(rows):.4f}"} - set(re.findall(r"\d\.\d+", example[2])), (bar, noise(rows))
