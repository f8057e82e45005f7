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
print("ran on", node, gpu, os.environ.get("TORCHINDUCTOR_CACHE_DIR"), flush=True)
%s
(stage / "met" / (node + gpu)).touch()
end = time.monotonic() + 60
while len(list((stage / "met").iterdir())) < int((stage / "meet").read_text()) or (stage / "hold").exists():
    time.sleep(0.02)
    if time.monotonic() > end:
        sys.exit("FAIL: the other runs of the round are not there at the same time, each with a GPU of its own")
if (stage / ("unprepared-" + node)).exists():
    sys.exit("no prepared data; run: uv run prepare.py")
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
                              timeout=120, start_new_session=True)
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
        if results.get(slot) is None and not re.search("FAIL:|Error:", self.log(slot) if slot in results else ""):
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
        assert all(f"ran on here {slot} None\n" in agent.log(slot) for slot in running)
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


def test_every_failure_is_one_crash_row_or_one_more_run_after_a_restart_too(tmp_path):
    agent = make_stage(Agent, tmp_path, range(6))
    agent.begin({0: (0, "sys.exit('FAIL: loss is nan')"), 1: (1, "os.kill(os.getpid(), signal.SIGKILL)"), 2: (2, "slip"),
                 3: (3, "gain += 0.005"),
                 # ends the whole call with all its runs, once, when they have begun
                 4: (4, "(stage / 'once').exists() or ((stage / 'once').touch(), time.sleep(1), os.killpg(0, signal.SIGKILL))")})
    agent.edit(5, 5, "gain += 0.5")
    before = agent.log(5)
    meet(agent, 6)
    assert " train.py | 2 +-" in agent.start([f"{slot} 42" for slot in range(6)])
    assert agent.log(5) == before and "val_bpb" not in agent.log(3)  # the uncommitted edit did not run, the call is dead
    meet(agent, 1)
    assert "name 'slip' is not defined" in agent.do("tail -n 50 slots/3", ("slots/3", "slots/2"))
    agent.edit(2, 2, "gain -= 0.005")
    agent.do("git -C slots/3 commit --amend", slot=2)
    heir = Agent(agent.folder, agent.slots)
    heir.resume()
    heir.resume()
    check(heir, ["gain += 0.005"], 6)
    assert [row[1] for row in heir.rows()] == ["1.000000", "0.000000", "0.000000", "1.005000", "1.000000", "0.995000"]
    agent.played |= heir.played


# ---------------------------------------------------------------------------
# Slurm


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


GPUS = {"n0": 4, "n1": 1, "n2": 1}  # n1 and n2 are filled first


def configuration(folder):
    user = pwd.getpwuid(os.getuid()).pw_name
    control, *ports = free_ports(4)
    nodes = "".join(f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:{gpus} Weight={weight}\n"
                    for node, gpus, weight, port in zip(GPUS, GPUS.values(), (3, 1, 2), ports))
    return f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
KillWait=1
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=60
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """munged, slurmctld and a slurmd for each node; gives the environment that finds them."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's slurmctld slurmd slurm-client munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    for number in range(4):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    (folder / "gres.conf").write_text("".join(f"NodeName={n} Name=gpu File={folder}/gpu[0-{k - 1}]\n" for n, k in GPUS.items()))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "slurm.conf").write_text(configuration(folder))
    env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "USER": "tester"}
    munged = ["munged", "--foreground", "--force"] + [
        f"--{option}={folder}/{name}" for option, name in (("key-file", "key"), ("socket", "munge"), ("pid-file", "munge.pid"),
                                                            ("log-file", "munge.log"), ("seed-file", "seed"))]
    processes = []
    with open(folder / "output", "w") as output:
        try:
            for command in (munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in GPUS)):
                processes.append(subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True))
                until(lambda: (folder / "munge").exists(), "munged")
            until(lambda: subprocess.run(["sinfo", "-h", "-o", "%D %t"], env=env, capture_output=True, text=True).stdout == "3 idle\n", "three idle nodes")
            yield env
        finally:
            for process in reversed(processes):
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def until(condition, what):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"waited a minute for {what}"
        time.sleep(0.1)


class SlurmAgent(Agent):
    def __init__(self, folder, slots, cluster):
        super().__init__(folder, slots)
        self.cluster = cluster
        self.env |= cluster | {"PATH": f"{folder.parent}/bin:{cluster['PATH']}"}

    def submit(self, lines):
        assert self.do("xargs -L", lines=lines).count("Submitted batch job") == len(lines)

    def jobs(self):
        """{slot: (state, node, job, reason)} of the slots' last jobs."""
        lines = re.findall(r"^(\d+) autoresearch/nov21-(\d) (\S+) (\S*) (.*)$", self.do("squeue"), re.MULTILINE)
        return {int(slot): (state, node, job, reason) for job, slot, state, node, reason in lines}

    def start(self, lines):
        if lines:
            self.submit(lines)
        until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & {state for state, *_ in self.jobs().values()}, "the jobs to end")

    def line(self, slot, results):
        state, node, *_ = self.jobs().get(slot, ("", ""))
        if state == "FAILED" and (not self.log(slot) or "prepare.py" in self.log(slot).splitlines()[-1]):
            return f"{slot} 42 {node}"
        return super().line(slot, results) if state not in ("CANCELLED", "TIMEOUT") or slot not in results else None


def test_a_round_on_slurm_uses_every_gpu_and_ends_with_the_win_on_the_branch(cluster, tmp_path):
    agent = make_stage(SlurmAgent, tmp_path, range(6), cluster)  # a baseline of six runs that meet
    agent.begin({slot: (slot, f"gain += 0.00{slot}") for slot in range(6)})
    meet(agent, 6)
    agent.start([f"{slot} 42" for slot in range(6)])
    runs = [re.search("ran on (n. .) (.*)", agent.log(slot)).groups() for slot in range(6)]
    assert {gpu for gpu, _ in runs} == {"n0 0", "n0 1", "n0 2", "n0 3", "n1 0", "n2 0"}
    assert [folder for _, folder in runs] == [f"/tmp/tester-{slot}" for slot in range(6)]
    assert agent.finish() == [4, 3, 2]
    check(agent, ["gain += 0.005"], 7)


def test_every_failure_on_slurm_is_one_crash_row_or_one_more_run(cluster, tmp_path):
    """A node lacks the data, one dies, a job is cancelled, one fails by itself, one is submitted twice."""
    agent = make_stage(SlurmAgent, tmp_path, range(6), cluster)
    agent.begin({slot: (slot, f"gain += 0.00{slot}" if slot != 3 else "sys.exit('FAIL: loss is nan')") for slot in range(6)})
    meet(agent, 1)
    (tmp_path / "hold").touch()
    (tmp_path / "unprepared-n1").touch()
    agent.submit([f"{slot} 42" for slot in range(6)])
    until(lambda: all("ran on" in agent.log(slot) for slot in range(6)), "six runs")
    agent.submit(["4 42 n1"])
    until(lambda: agent.jobs()[4][3] == "Dependency", "the second job of a slot to wait for the first")
    for command in (f"scancel {agent.jobs()[2][2]}", "scontrol update NodeName=n2 State=DOWN Reason=test"):
        subprocess.run(command.split(), env=agent.env, check=True)
    (tmp_path / "hold").unlink()
    heir = SlurmAgent(agent.folder, agent.slots, cluster)
    heir.start([])
    assert [heir.jobs()[slot][0] for slot in range(6)] == ["FAILED", "NODE_FAIL", "CANCELLED", "FAILED", "COMPLETED", "COMPLETED"]
    assert heir.line(0, heir.read()) == "0 42 n1"
    heir.finish()
    assert heir.jobs()[0][:2] == ("COMPLETED", "n0")
    check(heir, ["gain += 0.005"], 7)
    assert [row[1] for row in heir.rows()] == ["1.000000", "1.000000", "0.999000", "0.000000", "0.000000", "0.996000", "0.995000"]
    subprocess.run("scontrol update NodeName=n2 State=RESUME".split(), env=agent.env, check=True)
