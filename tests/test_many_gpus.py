"""docs/many-gpus.md played by a scripted agent with a stub train.py, in one machine and on a real Slurm.

That Slurm is this machine alone: three nodes on the loopback interface, six GPUs that are links to /dev/null. It needs
Debian's packages slurmctld, slurmd, slurm-client and munge; its tests skip themselves without.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import HEADER, REPO, commands, environment, git, stub

PAGE = (REPO / "docs/many-gpus.md").read_text(encoding="utf-8")
NOISE = 0.001  # of the stub's seeds 42, 43 and 44

TRAIN = '''# stands in for train.py; an experiment puts code in the place of a "pass"
import os, signal, sys, time
from pathlib import Path
stage, seed, gain = Path(__file__).parents[3], int(os.environ["SEED"]), 0
node, gpu = os.environ.get("SLURMD_NODENAME", "here"), os.environ["CUDA_VISIBLE_DEVICES"]
if (stage / ("unprepared-" + node)).exists():
    sys.exit("no prepared data; run: uv run prepare.py")
print("ran on", node, gpu, flush=True)
%s
(stage / "met" / (node + gpu)).touch()
end = time.monotonic() + 60
while len(list((stage / "met").iterdir())) < int((stage / "meet").read_text()) or (stage / "hold").exists():
    time.sleep(0.02)
    if time.monotonic() > end:
        sys.exit("FAIL: the other runs of the round are not there at the same time, each with a GPU of its own")
print(f"---\\nval_bpb:          {1 - gain + (seed - 42) * 0.0005:.6f}\\npeak_vram_mb:     45056.0\\nnum_steps:        953")
print(f"seed:             {seed}\\ndevice:           NVIDIA H100\\nattention:        fa3")
''' % "\n\n".join(f"pass  # {number}" for number in range(20))


class Agent:
    """Follows the page. It remembers nothing: git, the ledger and the logs are its memory."""

    def __init__(self, folder, slots):
        self.folder, self.slots, self.env, self.played = folder, slots, environment(folder), set()

    def do(self, start, *swaps, slot=None, lines=None, check=True):
        """Give the page's command that begins with `start`, its examples replaced; returns what it prints."""
        command, = (command for command in commands(PAGE) if command.startswith(start))
        self.played.add(command)
        command = command.replace("seq 0 7", f"seq {self.slots[0]} {self.slots[-1]}")
        if slot is not None:
            command = re.sub(r"-C slots/\d", f"-C slots/{slot}", command)
        if lines is not None:
            command = command[:command.index("END'\n") + 5] + "\n".join([*lines, "END\n"])
        for example, value in swaps:
            assert example in command, (example, command)
            command = command.replace(example, value)
        done = subprocess.run(["bash", "-c", command], cwd=self.folder, env=self.env, capture_output=True, text=True,
                              timeout=120)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def head(self, slot):
        return (self.folder / f".git/worktrees/{slot}/HEAD").read_text()[:7]

    def log(self, slot):
        path = self.folder / f"slots/{slot}/run.log"
        return path.read_text() if path.exists() else ""

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()[1:]]

    def kept(self):
        return [row for row in self.rows() if row[3] == "keep"]

    def set_up(self):
        self.do("seq 0 7 | xargs -I@ git worktree")
        self.start([f"{slot} {42 + slot if slot < 3 else 42}" for slot in self.slots])
        first, second, third = (self.read(str(42 + slot))[slot] for slot in (0, 1, 2))
        noise = max(first, second, third) - min(first, second, third)
        self.write(0, first, "keep", f"(noise {noise:.4f}; seed 43: {second:.6f}, seed 44: {third:.6f}; 953 steps)")

    def edit(self, slot, number, code):
        path = self.folder / f"slots/{slot}/train.py"
        path.write_text(re.sub(rf".*  # {number}\n", lambda _: f"{code}  # {number}\n", path.read_text()))

    def begin(self, changes, again=()):
        """A round of changes {slot: (line, code)}; the slots of `again` take their commits along."""
        wins = {slot: self.head(slot) for slot in again}
        self.do("seq 0 7 | xargs -I@ git -C slots/@ reset")
        for slot, (number, code) in changes.items():
            self.edit(slot, number, code)
            self.do("git -C slots/3 commit train.py", ("matrix LR 0.04 -> 0.05", code), slot=slot)
        for slot, commit in wins.items():
            if "CONFLICT" in self.do("git -C slots/5 cherry-pick a1b2c3d", ("a1b2c3d", commit), slot=slot, check=False):
                self.do("git -C slots/5 cherry-pick --abort", slot=slot)

    def start(self, lines):
        return self.do("xargs -P", lines=lines, check=False)

    def read(self, seed="42"):
        """{slot: val_bpb, or None} where the log is of the slot's commit."""
        logs = {}
        for line in self.do("grep -e ^commit:", check=False).splitlines():
            slot, key, value = re.fullmatch(r"slots/(\d)/run.log:(\w+): *(.*)", line).groups()
            logs.setdefault(int(slot), {"seed": seed})[key] = value
        return {slot: float(log["val_bpb"]) if "val_bpb" in log else None for slot, log in logs.items()
                if log["commit"] == self.head(slot) and log["seed"] == seed}

    def line(self, slot, results):
        """The line that runs a slot (again), or None if there is nothing to run."""
        if results.get(slot) is None and "FAIL" not in self.log(slot).replace("FAILED", ""):
            return f"{slot} 42"

    def write(self, slot, val_bpb, status, remark="(953 steps)"):
        self.do("git -C slots/3 log", ("0.993200", f"{val_bpb:.6f}"), ("44.2", "44.0" if val_bpb else "0.0"),
                ("keep", status), ("(961 steps)", remark), slot=slot)

    def finish(self):
        """Run what has not run and write the rows, whatever was there; returns the slots of the other wins."""
        written = [row[0] for row in self.rows()]
        todo = [slot for slot in self.slots if self.head(slot) not in written]
        for _ in range(2):
            lines = [line for slot in todo if (line := self.line(slot, self.read()))]
            if lines:
                self.start(lines)
        results = {slot: self.read().get(slot) for slot in todo}
        best = min(self.kept(), key=lambda row: row[1])
        good = sorted((slot for slot in todo if results[slot]), key=results.get)
        wins = [slot for slot in good if round(float(best[1]) - results[slot], 6) > NOISE]
        for slot in todo:
            if slot not in wins[:1]:
                self.write(slot, results[slot] or 0, "discard" if results[slot] else "crash")
        if wins:
            self.keep(wins[0], results[wins[0]], best)
        return wins[1:]

    def keep(self, slot, val_bpb, best):
        status, remark, commit = "keep", "(953 steps)", self.head(slot)
        if round(float(best[1]) - val_bpb, 6) < 2 * NOISE:
            others = [other for other in self.slots if other != slot][:2]
            for other, measured in zip(others, (commit, best[0])):
                self.do("git -C slots/4 reset", ("a1b2c3d", measured), slot=other)
            self.start([f"{other} 43" for other in others])
            here, there = (self.read("43")[other] for other in others)
            status = "keep" if (float(best[1]) + there - val_bpb - here) / 2 > NOISE / 2 else "discard"
            remark = f"(953 steps; seed 43: {here:.6f}, the best {there:.6f})"
        self.write(slot, val_bpb, status, remark)
        if status == "keep":
            self.do("git merge", ("a1b2c3d", commit))

    def resume(self):
        self.finish()
        self.do("git merge", ("a1b2c3d", self.kept()[-1][0]))


def make_stage(kind, parent, *args):
    """An agent after the baseline, in a repository of its own with a stub train.py."""
    folder = parent / "autoresearch"
    for path in (folder, parent / "bin", parent / "met"):
        path.mkdir()
    stub(parent / "bin/uv",
         f'[ "$*" = "run --no-sync --project ../.. train.py" ] && exec {sys.executable} -S -E train.py')
    shutil.copy(REPO / ".gitignore", folder)
    (folder / "train.py").write_text(TRAIN)
    (folder / "results.tsv").write_text(HEADER)
    git(folder, "init", "-q", "-b", "autoresearch/nov21")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "baseline")
    agent = kind(folder, *args)
    meet(agent, len(agent.slots))
    agent.set_up()
    return agent


def meet(agent, number):
    """From now on runs end when so many of them have run at the same time, each on a GPU of its own."""
    stage = agent.folder.parent
    for path in (stage / "met").iterdir():
        path.unlink()
    (stage / "meet").write_text(str(number))


def check(agent, kept, rows):
    """The kept rows are the branch; every row is whole and of a commit of its own; git sees nothing else."""
    branch = git(agent.folder, "log", "--reverse", "--abbrev=7", "--format=%h", "autoresearch/nov21").split()
    assert branch == [row[0] for row in agent.kept()]
    assert [row[4].split(" (")[0] for row in agent.kept()] == ["baseline", *kept]
    assert len(agent.rows()) == rows == len({row[0] for row in agent.rows()})
    row = r"[0-9a-f]{7}\t\d\.\d{6}\t(44|0)\.0\t(keep|discard|crash)\t[^\t]+\(.*953 steps.*\)"
    assert all(re.fullmatch(row, "\t".join(cells)) for cells in agent.rows())
    assert git(agent.folder, "status", "--porcelain") == ""


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """Five rounds on eight GPUs of one machine."""
    agent = make_stage(Agent, tmp_path_factory.mktemp("night"), range(8))
    wins, agent.wins = [], []
    for ideas in (
        {0: (0, "gain += 0.010"), 1: (1, "gain += 0.006"), 2: (2, "gain += 0.0009")},
        {0: (3, "gain += 0.002"), 2: (3, "gain += 0.003")},  # the same line
        {},
        {3: (4, "gain += 0.0015")},  # less than twice the noise
        {4: (5, "gain += 0.0015 if seed == 42 else -0.001")},  # luck
    ):
        number = len(agent.wins)
        rest = {slot: (10 + slot, f"gain -= 0.01{number}") for slot in range(8) if slot not in wins}
        agent.begin(rest | ideas, wins)
        running = [slot for slot in range(8) if agent.head(slot) != agent.kept()[-1][0]]
        meet(agent, len(running))
        agent.start([f"{slot} 42" for slot in running])
        assert all(f"ran on here {slot}\n" in agent.log(slot) for slot in running)
        meet(agent, 1)
        wins = agent.finish()
        agent.wins.append(wins)
    return agent


def test_rounds_in_one_machine_use_every_gpu_and_end_with_the_wins_on_the_branch(night):
    assert night.wins == [[1], [2, 0], [0], [], []]
    check(night, ["gain += 0.010", "gain += 0.006", "gain += 0.003", "gain += 0.0015"], 1 + 4 * 8 + 7)
    assert [row[1] for row in night.kept()] == ["1.000000", "0.990000", "0.984000", "0.981000", "0.979500"]
    seeds = [(row[3], row[4].split("; ", 1)[1]) for row in night.rows()[1:] if "seed 43" in row[4]]
    assert seeds == [("keep", "seed 43: 0.980000, the best 0.981500)"), ("discard", "seed 43: 0.981000, the best 0.980000)")]
