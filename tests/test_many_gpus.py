"""docs/many-gpus.md played by a scripted agent with a stub train.py, in one machine and on a real Slurm.

That Slurm is this machine alone: three nodes with four GPUs each, which are links to /dev/null.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HEADER, REPO, Player, commands, git, stub

PAGE = (REPO / "docs/many-gpus.md").read_text()
SLOTS = range(8)

TRAIN = '''# stands in for train.py; an experiment puts code in the place of a "pass"
import os, signal, sys, time
from pathlib import Path
stage, seed, gain = Path(__file__).parents[3], int(os.environ["SEED"]), 0
node, gpu = os.environ.get("SLURMD_NODENAME", "here"), os.environ["CUDA_VISIBLE_DEVICES"]
print("ran on", node, gpu, os.environ.get("TORCHINDUCTOR_CACHE_DIR"), flush=True)
%s
(stage / "met" / (node + gpu)).touch()
signal.alarm(60)  # the end, if not so many run at the same time, each with a GPU of its own
while len(list((stage / "met").iterdir())) < int((stage / "meet").read_text() or 9):
    time.sleep(0.02)
if (stage / node).exists():
    exec((stage / node).read_text())
print(f"---\\nval_bpb: {1 - gain + (seed - 42) * 0.0005:.6f}")
''' % "\n\n".join(f"pass  # {number}" for number in range(4))


class Agent(Player):
    """Follows the page. It remembers nothing: git, the ledger and the logs are its memory."""

    page, command = PAGE, "xargs -P"

    def at(self, slot, start, **how):
        return self.do(start, **{r"slots/\d": f"slots/{slot}"}, **how)

    def head(self, slot):
        return (self.folder / f".git/worktrees/{slot}/HEAD").read_text()[:7]

    def log(self, slot):
        return "".join(path.read_text() for path in self.folder.glob(f"slots/{slot}/run.log"))

    def kept(self):
        return [row for row in self.rows() if row[3] == "keep"]

    def set_up(self):
        """Slots and baseline, for which all slots run at the same time."""
        self.do("seq 0 7 | xargs -I@ git worktree")
        meet = self.folder.parent / "meet"
        meet.write_text("8")
        self.start(SLOTS, (42, 43, 44, 42, 42, 42, 42, 42))
        meet.write_text("0")
        first, _, third, *_ = self.read().values()
        self.write(0, first, "keep", f"noise {third - first:.4f}")

    def edit(self, slot, code):
        """Slots 0 and 1 change the same line, 2 and 3 the next one."""
        path = self.folder / f"slots/{slot}/train.py"
        path.write_text(re.sub(rf".*  # {slot // 2}\n", f"{code}  # {slot // 2}\n", path.read_text()))

    def begin(self, changes, wins=()):
        """A round of changes {slot: code}; the slots in `wins` take their commits along."""
        wins = {slot: self.head(slot) for slot in wins}
        self.do("seq 0 7 | xargs -I@ git -C slots/@ reset")
        for slot, code in changes.items():
            self.edit(slot, code)
            self.at(slot, "git -C slots/3 commit train.py", **{"matrix LR 0.04 -> 0.05": code})
        for slot, commit in wins.items():
            if "CONFLICT" in self.at(slot, "git -C slots/5 cherry-pick a1b2c3d", a1b2c3d=commit, check=False):
                self.at(slot, "git -C slots/5 cherry-pick --abort")

    def start(self, slots, seeds=(42,) * 8, avoid=""):
        lines = "".join(f"{slot} {seed}{avoid}\n" for slot, seed in zip(slots, seeds))
        return self.do(self.command, check=False, **{"(?<=END'\n)(.*\n)*(?=END)": lines})

    def read(self):
        """{slot: val_bpb, or 0 for an error} of the slots whose commit has run to an end."""
        results, text = {}, self.do("grep -e ^commit:", check=False)
        for slot, commit, val_bpb in re.findall(r"slots/(.)/.*commit:(.*)(?:\n.*:val_bpb: (.*))?", text):
            if commit == self.head(slot) and (val_bpb or re.search("FAIL:|Error:", self.log(slot))):
                results[int(slot)] = float(val_bpb or 0)
        return results

    def write(self, slot, val_bpb, status, remark="953 steps"):
        self.at(slot, "git -C slots/3 log", keep=status, **{"0.993200": f"{val_bpb:.6f}", "961 steps": remark})

    def finish(self):
        """Run what has not run, write the rows, keep one; returns the slots of the other wins."""
        written = [row[0] for row in self.rows()]
        todo = [slot for slot in SLOTS if self.head(slot) not in written]
        for _ in range(2):
            ended = self.read()
            if again := [slot for slot in todo if slot not in ended]:
                self.start(again)
        results = dict.fromkeys(todo, 0) | self.read()
        best = min(float(row[1]) for row in self.kept()) - 0.001  # the noise
        wins = sorted((slot for slot in todo if 0 < results[slot] < best), key=results.get)
        for slot in todo:
            status = "keep" if slot in wins[:1] else "discard" if results[slot] else "crash"
            self.write(slot, results[slot], status)
        self.do("git merge", a1b2c3d=self.kept()[-1][0])
        return wins[1:]


def make_stage(tmp_path, kind=Agent, **env):
    """An agent in a repository with a stub train.py."""
    folder, bin = tmp_path / "autoresearch", tmp_path / "bin"
    for path in (folder, bin, tmp_path / "met"):
        path.mkdir()
    stub(bin / "uv", f'[ "$*" = "run --no-sync --project ../.. train.py" ] && exec {sys.executable} -S -E train.py')
    shutil.copy(REPO / ".gitignore", folder)
    (folder / "train.py").write_text(TRAIN)
    (folder / "results.tsv").write_text(HEADER)
    git(folder, "init", "-q", "-b", "autoresearch/nov21")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "baseline")
    return kind(folder, **env)


def check(agent, **kept):
    """The baseline and these are kept, and are the branch."""
    branch = git(agent.folder, "log", "--reverse", "--abbrev=7", "--format=%h", "autoresearch/nov21").split()
    assert branch == [row[0] for row in agent.kept()]
    assert {row[4]: float(row[1]) for row in agent.kept()} == {"baseline (noise 0.0010)": 1} | kept
    assert len({row[0] for row in agent.rows()}) == len(agent.rows())
    assert git(agent.folder, "status", "--porcelain") == ""


def test_rounds_in_one_machine_use_every_gpu_keep_the_wins_and_survive_every_failure(tmp_path):
    """The first round's call is killed with all its runs, and another agent goes on."""
    agent = make_stage(tmp_path)
    agent.set_up()
    assert all(f"ran on here {slot} None\n" in agent.log(slot) for slot in SLOTS)
    changes = ["sys.exit('FAIL: loss is nan')", "os.kill(os.getpid(), signal.SIGKILL)", "slip", "gain -= 0.001",
               "gain += 0.006", "gain += 0.010", "gain += 0.0009"]
    agent.begin(dict(enumerate(changes)))
    agent.edit(7, "gain += 0.5")
    baseline = agent.log(7)
    (tmp_path / "here").write_text("time.sleep(1)\nos.killpg(0, signal.SIGKILL)")
    assert " train.py | 2 +-" in agent.start(SLOTS)
    assert agent.log(7) == baseline  # what was not committed was not run
    (tmp_path / "here").unlink()
    assert "name 'slip' is not defined" in agent.at(2, "tail -n 50 slots/3")
    agent.edit(2, "gain += 0.007")
    agent.at(2, "git -C slots/3 commit --amend")
    agent = Agent(agent.folder)
    assert agent.finish() == [2, 4] and agent.finish() == []
    assert [float(row[1]) for row in agent.rows()] == [1, 0, 0, 0.993, 1.001, 0.994, 0.99, 0.9991]
    agent.begin({3: "gain += 0.002"}, [2, 4])  # 4 is at rest: its line is that of the win
    assert agent.finish() == [3]
    check(agent, **{"gain += 0.010 (953 steps)": 0.99, "slip (953 steps)": 0.983})
    agent.at(0, "git -C slots/4 reset", a1b2c3d=agent.kept()[-1][0])
    agent.start([0], [43])
    assert agent.read()[0] == 0.9835  # the same change with another seed


def test_another_agent_has_a_clone_and_its_branch_and_ledger_come_home(tmp_path):
    agent = make_stage(tmp_path)
    claude = 'git checkout -qb autoresearch/nov21-gpu1; echo "GPU $CUDA_VISIBLE_DEVICES: $@" > results.tsv'
    stub(tmp_path / "bin/claude", claude)
    agent.do("git clone")
    agent.do("git fetch -q ../autoresearch-gpu1 autoresearch/nov21-gpu1:")
    assert (agent.folder / "results-nov21-gpu1.tsv").read_text().endswith("The run tag is nov21-gpu1.\n")
    assert "autoresearch/nov21-gpu1" in git(agent.folder, "branch") and not agent.rows()
    agent.do("git fetch -q ../autoresearch-gpu1 autoresearch/nov21-gpu1")  # what another agent reads of it
    agent.do("tail -n 20 ../autoresearch-gpu1")


def test_every_command_of_the_page_is_played():
    played = tuple(re.findall(r'(?:do\(|at\(\w+, |command = .*)"(.+?)"', Path(__file__).read_text()))
    others = "uv run prepare.py", "git cherry-pick", "find slots/"
    assert all(command.startswith(played + others) for command in commands(PAGE))


# --- Slurm

NODES = "n1", "n2", "n3"  # filled in this order
CONFIGURATION = """ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
PartitionName=batch Nodes=ALL Default=YES
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def output(command):
    return subprocess.run(command.split(), capture_output=True, text=True).stdout


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    """munged, slurmctld and three slurmd; gives the environment in which Slurm's commands find them."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not all(shutil.which(tool) for tool in ("munged", "slurmctld", "slurmd")):
        pytest.skip("no Slurm: install Debian's slurmctld slurmd slurm-client munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    for number in range(4):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    node = "NodeName={} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=8 Gres=gpu:4\n"
    nodes = "".join(node.format(name, free_port()) for name in NODES)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(port=free_port(), user=os.getuid(), folder=folder) + nodes)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    munged = "munged -Ff -S {0}/munge --key-file={0}/key --pid-file={0}/pid --log-file={0}/log --seed-file={0}/seed"
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    processes = []
    try:
        for command in (munged.format(folder), "slurmctld -D", *(f"slurmd -D -N {node}" for node in NODES)):
            processes.append(subprocess.Popen(command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            until((folder / "munge").exists)
        until(lambda: output("sinfo -h -o %D_%t") == "3_idle\n")
        yield dict(SLURM_CONF=os.environ["SLURM_CONF"], USER="tester")
    finally:
        output("scancel --me")
        until(lambda: not output("squeue -h --me"))
        for process in processes:
            process.kill()
            process.wait()


class SlurmAgent(Agent):
    command = "xargs -L"

    def start(self, slots, *seeds, wait=True, **avoid):
        assert super().start(slots, *seeds, **avoid).count("Submitted batch job") == len(slots)
        until(lambda: not wait or not {"PENDING", "RUNNING", "COMPLETING"} & {*self.states()})

    def states(self):
        """The states of the slots' last jobs."""
        jobs = re.findall(r"^\d+ autoresearch/nov21-(\d) (\S+)", self.do("squeue"), re.MULTILINE)
        return [state for _, state in sorted(dict(jobs).items())]


def test_rounds_on_slurm_use_every_gpu_and_survive_every_failure(cluster, tmp_path):
    """One node has no data, one goes down; a job is cancelled, one fails, one slot is submitted twice."""
    agent = make_stage(tmp_path, SlurmAgent, **cluster)
    agent.set_up()
    assert all(f" /tmp/tester-{slot}\n" in agent.log(slot) for slot in SLOTS)  # the folder of compiled code
    changes = [f"gain += 0.00{slot}" for slot in SLOTS]
    changes[3] = "sys.exit('FAIL: loss is nan')"
    agent.begin(dict(enumerate(changes)))
    (tmp_path / "meet").write_text("9")
    (tmp_path / "n1").write_text("sys.exit('no prepared data; run: uv run prepare.py')")
    (tmp_path / "n2").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    agent.start(SLOTS, wait=False)
    until(lambda: all("ran on" in agent.log(slot) for slot in SLOTS))
    agent.start([4], avoid=" n1", wait=False)
    until(lambda: "Dependency" in agent.do("squeue"))  # the second job of a slot waits for the first
    output("scancel --name=autoresearch/nov21-2")
    output("scontrol update NodeName=n2 State=DOWN Reason=test")
    until(lambda: agent.states()[2] == "CANCELLED")
    (tmp_path / "meet").write_text("0")
    until(lambda: agent.states() == ["FAILED", "FAILED", "CANCELLED", "FAILED", "COMPLETED"] + ["NODE_FAIL"] * 3)
    assert all("prepare.py" in agent.log(slot).splitlines()[-1] for slot in (0, 1))
    agent.start((0, 1, 5, 6, 7), avoid=" n1")
    assert all("ran on n3" in agent.log(slot) for slot in (0, 1, 4, 5, 6, 7))
    agent.write(2, 0, "crash")
    agent.finish()
    assert [float(row[1]) for row in agent.rows()] == [1, 0, 1, 0.999, 0, 0.996, 0.995, 0.994, 0.993]
    check(agent, **{"gain += 0.007 (953 steps)": 0.993})
