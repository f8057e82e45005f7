"""The commands of docs/many-gpus.md, played with a stub of train.py in one machine and on a real Slurm.

That Slurm is this machine alone: three nodes with two GPUs each, which are links to /dev/null.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from conftest import HEADER, REPO, Player, git, stub

SLOTS = range(4)

TRAIN = '''# stands in for train.py; an experiment puts code in the place of a "pass"
import os, signal, sys, time
from pathlib import Path
stage, seed, gain = Path(__file__).parents[3], int(os.environ["SEED"]), 0
node, gpu = os.environ.get("SLURMD_NODENAME", "here"), os.environ["CUDA_VISIBLE_DEVICES"]
print("ran on", node, gpu, "with seed", seed, flush=True)
pass  # first

pass  # second
(stage / "met" / (node + gpu)).touch()
signal.alarm(60)  # the end, if not so many run at the same time, each with a GPU of its own
while len(list((stage / "met").iterdir())) < int((stage / "meet").read_text()):
    time.sleep(0.02)
if (stage / node).exists():
    exec((stage / node).read_text())
print(f"---\\nval_bpb: {1 - gain:.6f}")
'''


class Agent(Player):
    page = (REPO / "docs/many-gpus.md").read_text()

    def at(self, slot, start, **how):
        return self.do(start, **{r"slots/\d": f"slots/{slot}"}, **how)

    def head(self, slot):
        return git(self.folder / f"slots/{slot}", "rev-parse", "--short=7", "HEAD")

    def log(self, slot):
        return (self.folder / f"slots/{slot}/run.log").read_text()

    def meet(self, count):
        """From now on a run waits until so many GPUs have been used."""
        (self.folder.parent / "meet").write_text(str(count))

    def set_up(self):
        """Slots and baseline, for which all slots run at the same time."""
        for slot in SLOTS:
            self.at(slot, "git worktree add")
        self.meet(len(SLOTS))
        self.start(SLOTS)
        self.meet(0)

    def begin(self, *ideas):
        """A round of ideas (slot, place, code)."""
        for slot in SLOTS:
            self.at(slot, "git -C slots/3 reset")
        for slot, place, code in ideas:
            self.edit(slot, place, code)
            self.at(slot, "git -C slots/3 commit train.py", **{"attention output gated": code})

    def edit(self, slot, place, code):
        path = self.folder / f"slots/{slot}/train.py"
        path.write_text(re.sub(rf".*  # {place}\n", f"{code}  # {place}\n", path.read_text()))

    def start(self, slots):
        return self.do("bash docs/slots.sh", check=False, **{"0 1 2 3 4 5 6 7": " ".join(map(str, slots))})

    def read(self):
        """{slot: val_bpb} of the slots whose commit has ended well."""
        text = self.do("grep -e ^commit:", check=False)
        found = re.findall(r"slots/(.)/.*commit: (.*)\n.*:val_bpb: (.*)", text)
        return {int(slot): float(val_bpb) for slot, commit, val_bpb in found if commit == self.head(int(slot))}

    def branch(self):
        """The subjects of its commits."""
        assert git(self.folder, "status", "--porcelain") == ""
        return git(self.folder, "log", "--reverse", "--format=%s", "autoresearch/nov21").split("\n")


def make_stage(tmp_path, kind=Agent, **env):
    """An agent in a repository with a stub train.py."""
    folder, bin = tmp_path / "autoresearch", tmp_path / "bin"
    for path in (folder / "docs", bin, tmp_path / "met"):
        path.mkdir(parents=True)
    stub(bin / "uv", f'[ "$*" = "run --no-sync --project ../.. train.py" ] && exec {sys.executable} -S -E train.py')
    for name in (".gitignore", "docs/slots.sh"):
        shutil.copy(REPO / name, folder / name)
    (folder / "train.py").write_text(TRAIN)
    (folder / "results.tsv").write_text(HEADER)
    git(folder, "init", "-q", "-b", "autoresearch/nov21")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "baseline")
    return kind(folder, **env)


def test_rounds_in_one_machine_use_every_gpu_and_build_on_the_wins(tmp_path):
    agent = make_stage(tmp_path)
    agent.set_up()
    assert all(f"ran on here {slot} with seed {43 + slot}\n" in agent.log(slot) for slot in SLOTS)
    with (agent.folder / "results.tsv").open("a") as ledger:
        ledger.write("a row\n" * 4)  # so the next seeds are others
    agent.begin((0, "first", "gain += 0.012"), (1, "first", "gain += 0.016"), (2, "second", "slip"))
    agent.edit(3, "first", "gain += 0.5")
    agent.start(SLOTS)
    assert agent.read() == {0: 0.988, 1: 0.984} and "with seed 47\n" in agent.log(0)
    assert "+gain += 0.5" in agent.log(3) and "ran on here" not in agent.log(3)  # what was not committed was not run
    assert "name 'slip' is not defined" in agent.at(2, "tail -n 50 slots/3")
    agent.edit(2, "second", "gain += 0.014")
    agent.at(2, "git -C slots/3 commit --amend")
    agent.start([2])
    assert agent.read() == {0: 0.988, 1: 0.984, 2: 0.986}
    others = {slot: agent.head(slot) for slot in (0, 2)}
    agent.do("git merge", a1b2c3d=agent.head(1))
    agent.begin()
    assert "CONFLICT" in agent.at(0, "git -C slots/5 cherry-pick a1b2c3d", a1b2c3d=others[0], check=False)
    agent.at(0, "git -C slots/5 cherry-pick --abort")
    agent.at(2, "git -C slots/5 cherry-pick a1b2c3d", a1b2c3d=others[2])
    agent.start(SLOTS)
    assert agent.read() == {0: 0.984, 1: 0.984, 2: 0.97, 3: 0.984}
    agent.do("git merge", a1b2c3d=agent.head(2))
    assert agent.branch() == ["baseline", "gain += 0.016", "slip"]


def test_a_call_that_is_killed_leaves_no_result_and_its_slots_run_again(tmp_path):
    agent = make_stage(tmp_path)
    agent.set_up()
    agent.begin((0, "first", "gain += 0.012"))
    (tmp_path / "here").write_text("os.killpg(0, signal.SIGKILL)")
    agent.start(SLOTS)
    assert agent.read() == {}
    (tmp_path / "here").unlink()
    agent.start(SLOTS)
    assert agent.read() == {0: 0.988, 1: 1, 2: 1, 3: 1}


def test_another_agent_has_a_clone_and_its_branch_and_ledger_come_home(tmp_path):
    agent = make_stage(tmp_path)
    leave = "echo GPU $CUDA_VISIBLE_DEVICES: $@ | tee learned.md > results.tsv"
    stub(tmp_path / "bin/claude", f"git checkout -qb autoresearch/nov21-gpu1; {leave}")
    agent.do("git clone")
    agent.do("git fetch -q ../autoresearch-gpu1")
    assert (agent.folder / "results-nov21-gpu1.tsv").read_text().endswith("The run tag is nov21-gpu1.\n")
    assert "autoresearch/nov21-gpu1" in git(agent.folder, "branch") and not agent.rows()


# --- Slurm

NODES = "n1", "n2", "n3"  # filled in this order, with two GPUs each
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
    for number in range(2):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    node = "NodeName={} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=8 Gres=gpu:2\n"
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
    def start(self, slots, wait="--wait", exclude=""):
        command = {"0-7": ",".join(map(str, slots)), "--wait": wait, "docs/": f"{exclude} docs/"}
        return self.do("sbatch", check=False, **command)


def test_rounds_on_slurm_use_every_gpu_and_survive_every_failure(cluster, tmp_path):
    """One node has no data, one goes down, and a job is cancelled."""
    agent = make_stage(tmp_path, SlurmAgent, **cluster)
    agent.set_up()
    ran = "".join(map(agent.log, SLOTS))
    assert set(re.findall("ran on (.. .)", ran)) == {"n1 0", "n1 1", "n2 0", "n2 1"}
    assert set(re.findall("with seed (.*)", ran)) == {"43", "44", "45", "46"}
    agent.begin(*((slot, "first", f"gain += 0.00{slot}") for slot in SLOTS))
    agent.meet(9)
    (tmp_path / "n1").write_text("sys.exit('no prepared data; run: uv run prepare.py')")
    (tmp_path / "n2").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    agent.start(SLOTS, wait="")
    running = "squeue --me --noheader --states=RUNNING --format="
    until(lambda: len(output(f"{running}%K").split()) == len(SLOTS))
    job = output(f"{running}%F").split()[0]
    output(f"scancel {job}_2")
    output("scontrol update NodeName=n2 State=DOWN Reason=test")
    agent.meet(0)
    until(lambda: not agent.do("squeue").count("nov21"))
    assert agent.read() == {}
    agent.start(SLOTS, exclude="--exclude=n1")
    assert agent.read() == {0: 1, 1: 0.999, 2: 0.998, 3: 0.997}
    assert all("ran on n3" in agent.log(slot) for slot in SLOTS)
