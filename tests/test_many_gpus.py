"""docs/many-gpus.md played by a scripted agent with a stub of train.py, in one machine and on a real Slurm.

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
print("ran on", node, gpu, flush=True)
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

    page = PAGE

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
        meet = self.folder.parent / "meet"
        meet.write_text("8")
        for slot in SLOTS:
            self.at(slot, "git worktree add")
        self.start(SLOTS)
        meet.write_text("0")
        for slot, val_bpb in self.read().items():
            self.write(slot, val_bpb, "keep", "baseline")

    def edit(self, slot, code):
        """Slots 0 and 1 change the same line, 2 and 3 the next one."""
        path = self.folder / f"slots/{slot}/train.py"
        path.write_text(re.sub(rf".*  # {slot // 2}\n", f"{code}  # {slot // 2}\n", path.read_text()))

    def begin(self, changes, wins=()):
        """A round of changes {slot: code}; the slots in `wins` take their commits along."""
        wins = {slot: self.head(slot) for slot in wins}
        for slot in SLOTS:
            self.at(slot, "git -C slots/3 reset")
        for slot, code in changes.items():
            self.edit(slot, code)
            self.at(slot, "git -C slots/3 commit train.py", **{"attention output gated": code})
        for slot, commit in wins.items():
            if "CONFLICT" in self.at(slot, "git -C slots/5 cherry-pick a1b2c3d", a1b2c3d=commit, check=False):
                self.at(slot, "git -C slots/5 cherry-pick --abort")

    def start(self, slots):
        return self.do("bash docs/slots.sh", check=False, **{"0 1 2 3 4 5 6 7": " ".join(map(str, slots))})

    def read(self):
        """{slot: val_bpb, or 0 for an error} of the slots whose commit has run to an end."""
        results, text = {}, self.do("grep -e ^commit:", check=False)
        for slot, commit, val_bpb in re.findall(r"slots/(.)/.*commit: (.*)(?:\n.*:val_bpb: (.*))?", text):
            if commit == self.head(slot) and (val_bpb or re.search("FAIL:|Error:", self.log(slot))):
                results[int(slot)] = float(val_bpb or 0)
        return results

    def write(self, slot, val_bpb, status, text):
        """A row, as in program.md."""
        with (self.folder / "results.tsv").open("a") as file:
            file.write(f"{self.head(slot)}\t{val_bpb:.6f}\t44.2\t{status}\t{text}\n")

    def finish(self):
        """Run what has not run, write the rows, keep one; returns the slots of the other wins."""
        todo = [slot for slot in SLOTS if not any(row[0] == self.head(slot) for row in self.rows())]
        for _ in range(2):
            ended = self.read()
            if again := [slot for slot in todo if slot not in ended]:
                self.start(again)
        results = dict.fromkeys(todo, 0) | self.read()
        bar = float(self.kept()[-1][1]) - 0.0015  # the noise
        wins = sorted((slot for slot in todo if 0 < results[slot] < bar), key=results.get)
        for slot in todo:
            status = "keep" if slot in wins[:1] else "discard" if results[slot] else "crash"
            self.write(slot, results[slot], status, git(self.folder, "log", "-1", "--format=%s", self.head(slot)))
        self.do("git merge", a1b2c3d=self.kept()[-1][0])
        return wins[1:]


def make_stage(tmp_path, kind=Agent, **env):
    """An agent in a repository with a stub train.py."""
    folder, bin = tmp_path / "autoresearch", tmp_path / "bin"
    for path in (folder, bin, tmp_path / "met"):
        path.mkdir()
    stub(bin / "uv", f'[ "$*" = "run --no-sync --project ../.. train.py" ] && exec {sys.executable} -S -E train.py')
    (folder / "docs").mkdir()
    for name in (".gitignore", "docs/slots.sh"):
        shutil.copy(REPO / name, folder / name)
    (folder / "train.py").write_text(TRAIN)
    (folder / "results.tsv").write_text(HEADER)
    git(folder, "init", "-q", "-b", "autoresearch/nov21")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "baseline")
    return kind(folder, **env)


def check(agent, *kept):
    """These commits are kept, and are the branch."""
    assert git(agent.folder, "log", "--reverse", "--format=%s", "autoresearch/nov21").split("\n") == ["baseline", *kept]
    assert list(dict.fromkeys(row[4] for row in agent.kept())) == ["baseline", *kept]
    assert git(agent.folder, "status", "--porcelain") == ""


def test_rounds_in_one_machine_use_every_gpu_keep_the_wins_and_survive_every_failure(tmp_path):
    """The first round's call is killed with all its runs, and another agent goes on."""
    agent = make_stage(tmp_path)
    agent.set_up()
    assert all(f"ran on here {slot}\n" in agent.log(slot) for slot in SLOTS)
    assert len({row[1] for row in agent.rows()}) == 8  # each has a seed of its own
    changes = ["sys.exit('FAIL: loss is nan')", "os.kill(os.getpid(), signal.SIGKILL)", "slip", "gain -= 0.001",
               "gain += 0.012", "gain += 0.016", "gain -= 0.002"]
    agent.begin(dict(enumerate(changes)))
    agent.edit(7, "gain += 0.5")
    (tmp_path / "here").write_text("time.sleep(1)\nos.killpg(0, signal.SIGKILL)")
    agent.start(SLOTS)
    assert "+gain += 0.5" in agent.log(7) and "ran on" not in agent.log(7)  # what was not committed was not run
    git(agent.folder / "slots/7", "checkout", "train.py")
    (tmp_path / "here").unlink()
    assert "name 'slip' is not defined" in agent.at(2, "tail -n 50 slots/3")
    agent.edit(2, "gain += 0.014")
    agent.at(2, "git -C slots/3 commit --amend")
    agent = Agent(agent.folder)
    assert agent.finish() == [2, 4] and agent.finish() == []
    assert [float(row[1]) for row in agent.rows()[8:]] == [0, 0, 0.9915, 1.007, 0.9945, 0.991, 1.0095]
    agent.begin({3: "gain += 0.006"}, [2, 4])  # 4 stays as it is: its line is that of the win
    assert agent.finish() == [3]
    check(agent, "gain += 0.016", "slip")
    agent.start([5])  # the repeat
    assert agent.read()[5] == 0.9955


def test_another_agent_has_a_clone_and_its_branch_and_ledger_come_home(tmp_path):
    agent = make_stage(tmp_path)
    leave = "echo GPU $CUDA_VISIBLE_DEVICES: $@ | tee learned.md > results.tsv"
    stub(tmp_path / "bin/claude", f"git checkout -qb autoresearch/nov21-gpu1; {leave}")
    agent.do("git clone")
    agent.do("git fetch -q ../autoresearch-gpu1")
    assert (agent.folder / "results-nov21-gpu1.tsv").read_text().endswith("The run tag is nov21-gpu1.\n")
    assert "autoresearch/nov21-gpu1" in git(agent.folder, "branch") and not agent.rows()


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
    def start(self, slots, wait="--wait", exclude=""):
        command = {"0-7": ",".join(map(str, slots)), "--wait": wait, "docs/": f"{exclude} docs/"}
        return self.do("sbatch", check=False, **command)

    def states(self):
        """{slot: the state of its last job}."""
        text = output("squeue --me --states=all --noheader --sort=V --format=%K:%T --name=nov21")
        return dict(line.split(":") for line in text.split())


def test_rounds_on_slurm_use_every_gpu_and_survive_every_failure(cluster, tmp_path):
    """One node has no data, one goes down; a job is cancelled, one fails."""
    agent = make_stage(tmp_path, SlurmAgent, **cluster)
    agent.set_up()
    assert {gpu for slot in SLOTS for gpu in re.findall("ran on (.*)", agent.log(slot))} == {
        f"{node} {gpu}" for node in ("n1", "n2") for gpu in range(4)}
    changes = [f"gain += 0.00{slot}" for slot in SLOTS]
    changes[3] = "sys.exit('FAIL: loss is nan')"
    agent.begin(dict(enumerate(changes)))
    (tmp_path / "meet").write_text("9")
    (tmp_path / "n1").write_text("sys.exit('no prepared data; run: uv run prepare.py')")
    (tmp_path / "n2").write_text("os.kill(os.getpid(), signal.SIGKILL)")
    agent.start(SLOTS, wait="")
    until(lambda: len(output("squeue --me --noheader --states=RUNNING --format=%K").split()) == 8)
    job = output("squeue --me --noheader --states=RUNNING --format=%F").split()[0]
    output(f"scancel {job}_2")
    output("scontrol update NodeName=n2 State=DOWN Reason=test")
    (tmp_path / "meet").write_text("0")
    until(lambda: not agent.do("squeue").count("nov21"))
    agent.start((0, 1, 5, 6, 7), exclude="--exclude=n1")
    assert all("ran on n3" in agent.log(slot) for slot in (0, 1, 5, 6, 7))
    agent.finish()
    check(agent, "gain += 0.007")
