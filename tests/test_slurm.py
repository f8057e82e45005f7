"""README's section "Many GPUs", its commands as they stand there, played by a scripted agent on a real Slurm.

The cluster is this machine alone: three nodes on the loopback interface, ten GPUs that are links to /dev/null. It needs
Debian's packages slurmctld, slurmd, slurm-client and munge, and skips itself without them. `pytest -s` shows the timeline.
"""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SECTION = (REPO / "README.md").read_text().split("\n## Many GPUs\n")[1].split("\n## ")[0]
SLOTS = range(1, 9)
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}

TRAIN = '''"""Stands in for train.py: the val_bpb is 1 minus the knobs; "crash" and "hang" do what they say."""
import json, os, sys, time
from pathlib import Path

KNOBS = [
%s]

node, hold = os.environ["SLURMD_NODENAME"], Path(os.environ["AUTORESEARCH_CACHE"])
print("NVIDIA H100 80GB HBM3 | fa3 | full | climbmix-01234567 | 50.3 M parameters", flush=True)
print("job", json.dumps(dict(os.environ)), flush=True)
if not (hold / node).exists():  # this node's mount of the cache
    sys.exit("no prepared data for climbmix (manifest.json is missing); run: uv run prepare.py")
if "crash" in KNOBS:
    sys.exit("FAIL: loss is nan at step 7")
(hold / "together" / os.environ["SLURM_JOB_NAME"]).touch()
while "hang" in KNOBS or any((hold / name).exists() for name in ("hold", "hold-" + os.environ["SLURM_JOB_NAME"])):
    time.sleep(0.05)
for _ in range(1200):
    if len(list((hold / "together").iterdir())) >= int(os.environ.get("TOGETHER", 0)):
        break
    time.sleep(0.05)
else:
    sys.exit("the other jobs of the round did not run at the same time")
print(f"---\\nval_bpb:          {1 - sum(KNOBS) + 0.0005 * (int(os.environ.get('SEED', 42)) - 42):.6f}")
print("peak_vram_mb:     45060.2\\ndevice:           NVIDIA H100 80GB HBM3\\nattention:        fa3")
''' % "".join(f"    0.0,  # {i}\n    # the next one\n" for i in range(40))


def fenced(marker):
    """The command of the section that has `marker` in its first line: one line, or a whole loop."""
    for block in re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL):
        for command in re.findall(r"^\S.*\n(?:  .*\n)+done\n|^.*\n", block, re.MULTILINE):
            if marker in command.splitlines()[0] or marker in command:
                return command
    raise AssertionError(f"README has no command with {marker!r}")


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """munged, slurmctld and one slurmd a node, configured in `folder`; n1 and n2 rest until a test resumes them."""

    def __init__(self, folder):
        self.folder = folder
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.processes = {}
        paths = os.pathsep.join((str(folder / "bin"), os.environ["PATH"], "/usr/sbin", "/sbin"))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "UV_", "SEED"))}
        self.env |= dict(PATH=paths, SLURM_CONF=str(folder / "slurm.conf"), USER=self.user, GIT_CONFIG_GLOBAL=os.devnull,
                         **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")})
        for name in ("bin", "state", "gpu"):
            (folder / name).mkdir()
        uv = folder / "bin" / "uv"  # `uv run train.py` with this interpreter and no environment
        uv.write_text(f'#!/bin/sh\n[ "$1" = run ] && shift && exec {sys.executable} -S "$@"\n')
        uv.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        gpus = {"n0": 8, "n1": 1, "n2": 1}
        ports = dict(zip(gpus, free_ports(3)))
        for i in range(8):
            (folder / "gpu" / str(i)).symlink_to("/dev/null")
        (folder / "gres.conf").write_text("".join(
            f"NodeName={node} Name=gpu Type=h100 File={folder}/gpu/[0-{n - 1}]\n" for node, n in gpus.items()))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_ports(1)[0]}
SlurmUser={self.user}
SlurmdUser={self.user}
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
ReturnToService=2
KillWait=1
SlurmdTimeout=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
""" + "".join(f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[node]} CPUs=8 Gres=gpu:h100:{n} "
              f"Weight={3 if node == 'n0' else node[1]}\n" for node, n in gpus.items()) + """
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=urgent Nodes=n0 MaxTime=60 PriorityTier=10 PreemptMode=OFF
""")

    def sh(self, command, cwd=None, **env):
        """stdout of a shell command; CalledProcessError when it fails."""
        return subprocess.run(["bash", "-c", command], cwd=cwd or self.folder, env=self.env | env, check=True,
                              capture_output=True, text=True).stdout

    def start(self, name, *command):
        log = open(self.folder / f"{name}.out", "ab")
        self.processes[name] = subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=log, stderr=log,
                                                start_new_session=True)

    def start_controller(self, *options):
        self.start("slurmctld", "slurmctld", "-D", *options)

    def start_node(self, node):
        self.start(node, "slurmd", "-D", "-N", node)

    def up(self):
        self.start("munged", "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
                   f"--socket={self.folder}/munge", f"--pid-file={self.folder}/munged.pid",
                   f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed")
        self.until(lambda: (self.folder / "munge").exists(), "munged to open its socket")
        self.start_controller()
        for node in ("n0", "n1", "n2"):
            self.start_node(node)
        self.until(lambda: self.states() == dict.fromkeys(("n0", "n1", "n2"), "idle"), "three idle nodes")
        self.rest("n1", "n2")

    def until(self, condition, what, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, f"waited {seconds} s for {what}; {self.states()}\n{logs}"
            time.sleep(0.1)

    def states(self):
        try:
            return dict(line.split() for line in self.sh("sinfo -h -N -p batch -o '%N %t'").splitlines())
        except subprocess.CalledProcessError:  # the controller is not there
            return {}

    def rest(self, *nodes):
        for node in nodes:
            self.sh(f"scontrol update NodeName={node} State=DRAIN Reason=resting")

    def resume(self, *nodes):
        for node in nodes:
            self.sh(f"scontrol update NodeName={node} State=RESUME")
        self.until(lambda: all(self.states()[node] == "idle" for node in nodes), "the nodes to resume")

    def crash(self, node):
        """A power cut: slurmd, its step daemons and their jobs end at once; the controller finds the node down.

        (It would by itself after SlurmdTimeout, which must be long here: a busy machine answers late.)
        """
        self.processes[node].kill()
        self.processes.pop(node).wait()
        tree = {}
        for line in subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines():
            pid, parent, args = line.split(None, 2)
            tree[int(pid)] = int(parent), args
        doomed = {pid for pid, (_, args) in tree.items() if f"{self.folder}/spool-{node}/" in args}  # the batch scripts
        steps = {tree[pid][0] for pid in doomed}
        for pid in steps:
            assert "slurmstepd" in tree[pid][1], tree[pid]  # ours: it runs a script of our folder
        for _ in range(5):
            doomed |= {pid for pid, (parent, _) in tree.items() if parent in doomed}
        for pid in steps | doomed:
            os.kill(pid, signal.SIGKILL)
        self.sh(f"scontrol update NodeName={node} State=DOWN Reason='power cut'")

    def tidy(self):
        """For the next test: no jobs, every node up, n1 and n2 at rest."""
        for name, start in {"slurmctld": self.start_controller, "n1": lambda: self.start_node("n1")}.items():
            if name not in self.processes:
                start()
        self.until(lambda: set(self.states()) == {"n0", "n1", "n2"}, "the controller")
        self.sh("scancel --me")
        self.until(lambda: not self.sh("squeue -h --me"), "the jobs to end")
        self.rest("n1", "n2")
        self.until(lambda: list(self.states().values()) == ["idle", "drain", "drain"], "the nodes to be ready")

    def stop(self, name):
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def down(self):
        for name in reversed(list(self.processes)):  # munged last
            self.stop(name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's slurmctld slurmd slurm-client munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


class Agent:
    """Follows the section. It remembers nothing: git, the ledger, the logs and squeue are its memory."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder, self.env = cluster, folder, {"AUTORESEARCH_CACHE": str(folder.parent / "cache")}
        self.begin, self.seen, self.submitted = time.monotonic(), {}, {}

    def say(self, *what):
        print(f"{time.monotonic() - self.begin:6.1f} s ", *what)

    def sh(self, command):
        return self.cluster.sh(command, self.folder, **self.env)

    def for_slots(self, marker, slots):
        """Run one of the section's loops for some of its slots."""
        loop = fenced(marker)
        assert "for i in 1 2 3 4 5 6 7 8;" in loop
        return loop.replace("1 2 3 4 5 6 7 8", " ".join(map(str, slots)))

    def head(self, slot):
        return self.sh(f"git -C ../nov21-{slot} rev-parse --short=7 HEAD").strip()

    def reset(self, slots):
        if slots:
            self.sh(self.for_slots("reset -q --hard", slots))

    def propose(self, slot, knob, value):
        path = self.folder.parent / f"nov21-{slot}" / "train.py"
        new = re.sub(rf"    .*,  # {knob}\n", f"    {value!r},  # {knob}\n", path.read_text())
        path.write_text(new)
        self.sh(fenced("commit -qam").replace("nov21-3", f"nov21-{slot}").replace("matrix LR 0.04 -> 0.05", f"knob {knob} {value}"))

    def submit(self, slots, exclude="", seed=""):
        command = self.for_slots("sbatch", slots)
        if exclude:
            command = command.replace("--gres=gpu:1", f"--gres=gpu:1 --exclude={exclude}")
        ids = re.findall(r"Submitted batch job (\d+)", self.sh(command.replace("sbatch", f"{seed} sbatch")))
        assert len(ids) == len(slots)
        for slot in slots:
            self.submitted[slot] = self.submitted.get(slot, 0) + 1
        self.say("submitted", dict(zip(slots, ids)))

    def squeue(self):
        """{slot: (state, node)} of the latest job of each slot that Slurm still knows."""
        jobs = {}
        for line in self.sh(fenced("squeue")).splitlines():
            job, name, state, *rest = line.split(None, 4)
            node = rest[0] if len(rest) == 2 else ""
            if name.startswith("nov21-"):
                jobs[int(name[6:])] = state, node
                if self.seen.get(job) != state:
                    self.seen[job] = state
                    self.say(f"job {job:3} {name} {state} {' '.join(rest)}")
        return jobs

    def wait(self, slots, seconds=90):
        end = time.monotonic() + seconds
        while True:
            jobs = self.squeue()
            if not any(jobs[slot][0] in ACTIVE for slot in jobs.keys() & set(slots)):
                return jobs
            assert time.monotonic() < end, jobs
            time.sleep(0.3)

    def read(self):
        """{slot: {commit, message, val_bpb, ...}} of the slots whose commit has no row."""
        found = {}
        for line in self.sh(self.for_slots("grep -q", SLOTS).rstrip() + "; true").splitlines():
            if line.startswith("slot "):
                _, slot, commit, message = line.split(None, 3)
                found[int(slot)] = dict(commit=commit, message=message)
                current = found[int(slot)]
            else:
                key, value = line.split(":", 1)
                current[key] = value.strip()
        return found

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()[1:]]

    def row(self, slot, status, description, bpb=0.0, gb=0.0, device="NVIDIA H100 80GB HBM3"):
        command = fenced("printf").replace("i=3", f"i={slot}").replace(" keep ", f" {status} ")
        command = command.replace("0.993200", f"{bpb:.6f}").replace("44.2", f"{gb:.1f}")
        self.sh(command.replace("matrix LR 0.04 -> 0.05 [H100]", f"{description} [{device}]"))
        self.say("row", *self.rows()[-1])

    def row_of(self, slot, log, status, note=""):
        self.row(slot, status, log["message"] + note, float(log["val_bpb"]), float(log["peak_vram_mb"]) / 1024, log["device"])

    def baseline(self):
        """Three seeds of the commit as it is, as three jobs; their range is the noise."""
        for seed in (42, 43, 44):
            self.submit([seed - 41], seed=f"SEED={seed}")
        self.wait(SLOTS)
        logs = self.read()
        bpbs = [float(logs[slot]["val_bpb"]) for slot in (1, 2, 3)]
        self.row_of(1, logs[1], "keep", f" (noise {max(bpbs) - min(bpbs):.4f})")
        self.submitted.clear()

    def settle(self, slots):
        """Wait for a round until every slot has a result, a crash row or its third failure; returns the results."""
        while True:
            jobs, open_slots, again = self.wait(slots), self.read(), {}
            results = {slot: log for slot, log in open_slots.items() if "val_bpb" in log and slot in slots}
            for slot in open_slots.keys() & set(slots) - results.keys():
                state, node = jobs.get(slot, ("", ""))
                log = self.folder.parent / f"nov21-{slot}" / "run.log"
                text = log.read_text() if log.exists() else ""
                bad_node = state == "FAILED" and ("prepare.py" in text or not text)
                if (bad_node or state in ("NODE_FAIL", "PREEMPTED", "")) and self.submitted.get(slot, 0) < 3:
                    again[slot] = node if bad_node else ""  # Slurm itself avoids a node that is down
                else:
                    self.row(slot, "crash", f"{open_slots[slot]['message']} ({state})")
            if not again:
                return results
            for slot, node in again.items():
                self.submit([slot], exclude=node)

    def keep_best(self, results):
        """Rows of a round's results; the best that beats the noise moves the branch, others that do are rebased."""
        kept = [row for row in self.rows() if row[3] == "keep"]
        noise = float(re.search(r"noise (\S+)\)", kept[0][4])[1])
        best = float(kept[-1][1])
        better = [slot for slot in results if best - float(results[slot]["val_bpb"]) > noise]
        better.sort(key=lambda slot: float(results[slot]["val_bpb"]))
        for slot, log in sorted(results.items()):
            self.row_of(slot, log, "keep" if slot in better[:1] else "discard")
        rebased = []
        for slot in better[:1]:
            self.sh(fenced("git merge").replace("nov21-3", f"nov21-{slot}"))
        for slot in better[1:]:
            try:
                self.sh(fenced("rebase -q").replace("nov21-5", f"nov21-{slot}"))
                rebased.append(slot)
            except subprocess.CalledProcessError:
                self.sh(f"git -C ../nov21-{slot} rebase --abort")
                self.say(f"slot {slot}: conflict, dropped")
        self.submitted.clear()
        return rebased


@pytest.fixture
def agent(cluster, tmp_path):
    """An agent in a repository of its own, with a stub train.py, eight worktrees and the baseline's row."""
    folder, cache = tmp_path / "repo", tmp_path / "cache"
    folder.mkdir()
    (cache / "together").mkdir(parents=True)
    for node in ("n0", "n1"):  # n2 does not have the cache
        (cache / node).touch()
    shutil.copy(REPO / ".gitignore", folder)
    (folder / "train.py").write_text(TRAIN)
    (folder / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    agent = Agent(cluster, folder)
    agent.sh("git init -q -b autoresearch/nov21 && git add . && git commit -qm baseline")
    agent.sh(fenced("git worktree add"))
    agent.baseline()
    yield agent
    cluster.tidy()


def together(agent, n):
    """From now on the jobs of a round end only when `n` of them have run at the same time."""
    for mark in (agent.folder.parent / "cache" / "together").iterdir():
        mark.unlink()
    agent.env["TOGETHER"] = str(n)


def check_ledger(agent, rows):
    """Every row is whole and of another commit, and the kept ones are the branch."""
    assert len(agent.rows()) == rows
    assert all(len(row) == 5 and row[4].endswith("[NVIDIA H100 80GB HBM3]") for row in agent.rows())
    assert len({row[0] for row in agent.rows()}) == rows
    branch = agent.sh("git log --reverse --format=%h --abbrev=7 autoresearch/nov21").split()
    assert branch == [row[0] for row in agent.rows() if row[3] == "keep"]
    assert agent.sh("git status --porcelain") == "" and agent.sh("git branch --show-current") == "autoresearch/nov21\n"


def test_four_rounds_of_eight_end_with_the_right_branch_and_a_complete_ledger(agent):
    """Winners of one round are combined in the next; the last two winners change the same line."""
    bad = [-0.002, -0.003, 0.0, 0.0009, -0.01]  # 0.0009 is within the noise
    rounds = [
        {1: 0.0009, 2: 0.010, 3: 0.006, 4: "crash", **dict(zip(range(5, 9), bad))},  # keeps 2, rebases 3
        {1: 0.004, **dict(zip((2, 4, 5, 6, 7), bad)), 8: 0.0},  # keeps 3 on 2, rebases 1
        {2: 0.003, 3: 0.002, **dict(zip(range(4, 9), bad))},  # keeps 1, rebases 2 and 3, which turn the same knob
        dict(zip((1, 4, 5, 6, 7, 8), bad + [0.0])),  # keeps 2; 3 conflicts
    ]
    rebased = []
    for number, changes in enumerate(rounds):
        agent.say(f"round {number + 1}")
        fresh = [slot for slot in SLOTS if slot not in rebased]
        agent.reset(fresh)
        for slot in fresh:
            same = number == 2 and slot in (2, 3)
            agent.propose(slot, 39 if same else 8 * number + slot, changes[slot] or -0.001 * slot)
        together(agent, 7 if number == 0 else 8)  # the job that crashes does not wait for the others
        agent.submit(SLOTS)
        results = agent.settle(SLOTS)
        jobs = [json.loads((agent.folder.parent / f"nov21-{slot}" / "run.log").read_text().split("\njob ")[1].splitlines()[0])
                for slot in SLOTS]
        for key in ("CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR", "PWD"):
            assert len({job[key] for job in jobs if job["SLURM_JOB_NAME"] != "nov21-4" or number}) == 8 - (number == 0), key
        assert {(job["UV_NO_SYNC"], job["UV_PROJECT_ENVIRONMENT"]) for job in jobs} == {("1", f"{agent.folder}/.venv")}
        rebased = agent.keep_best(results)
        assert rebased == [[3], [1], [2, 3], []][number]
    check_ledger(agent, 1 + 4 * 8)
    kept = [(row[1], row[4].split(" [")[0]) for row in agent.rows() if row[3] == "keep"]
    assert kept == [("1.000000", "baseline (noise 0.0010)"), ("0.990000", "knob 2 0.01"), ("0.984000", "knob 3 0.006"),
                    ("0.980000", "knob 9 0.004"), ("0.977000", "knob 39 0.003")]
    assert [row[3] for row in agent.rows()].count("crash") == 1


def test_every_failure_of_a_job_is_one_crash_row_or_a_new_submission(agent):
    """A node dies, a node lacks the cache, a job is cancelled, one runs into its time limit, one is submitted twice,
    one crashes by itself, and the agent is restarted in between."""
    cluster, cache = agent.cluster, agent.folder.parent / "cache"
    cluster.resume("n1", "n2")
    (cache / "hold").touch()
    agent.reset(SLOTS)
    for slot in SLOTS:
        agent.propose(slot, slot, {3: "crash", 4: "hang", 5: "hang"}.get(slot, 0.001 * slot))
    agent.submit(SLOTS)
    logs = [agent.folder.parent / f"nov21-{slot}" / "run.log" for slot in SLOTS]
    cluster.until(lambda: all(log.exists() and "\njob {" in log.read_text() for log in logs), "eight jobs to write")
    cluster.until(lambda: agent.squeue()[2][0] == agent.squeue()[3][0] == "FAILED", "two of them to fail")
    nodes = {slot: node for slot, (_, node) in agent.squeue().items()}
    assert [nodes[slot] for slot in SLOTS] == ["n1", "n2"] + ["n0"] * 6
    agent.submit([6], exclude="n2")  # once more, by mistake: waits until the first has ended
    agent.submitted.clear()
    cluster.crash("n1")
    job_of = {name: job for job, name in map(str.split, cluster.sh("squeue -h --me -o '%i %j'").splitlines())}
    cluster.sh(f"scancel {job_of['nov21-4']}; scontrol update JobId={job_of['nov21-5']} EndTime=now")
    assert "Dependency" in cluster.sh("squeue -h --me --name=nov21-6 -o '%T %r'")
    (cache / "hold").unlink()
    ended = agent.wait(SLOTS)
    assert [ended[slot][0] for slot in SLOTS] == ["NODE_FAIL", "FAILED", "FAILED", "CANCELLED", "TIMEOUT"] + ["COMPLETED"] * 3
    agent.row(4, "crash", "knob 4 hang (CANCELLED)")
    restarted = Agent(cluster, agent.folder)
    restarted.say("the agent is restarted")
    results = restarted.settle(SLOTS)
    assert sorted(results) == [1, 2, 6, 7, 8] and restarted.settle(SLOTS) == results
    assert restarted.submitted == {1: 2, 2: 1}  # slot 1 met the node without the cache too
    assert {restarted.squeue()[slot][1] for slot in (1, 2)} == {"n0"}
    restarted.keep_best(results)
    check_ledger(restarted, 1 + 8)
    assert {row[4].split(" [")[0] for row in restarted.rows() if row[3] == "crash"} == {
        "knob 3 crash (FAILED)", "knob 4 hang (CANCELLED)", "knob 5 hang (TIMEOUT)"}


def test_preempted_jobs_are_not_requeued_behind_the_agents_back_but_submitted_again(agent):
    """Somebody with priority takes all eight GPUs; Slurm is set to requeue, and no job may run twice by itself."""
    cluster, cache = agent.cluster, agent.folder.parent / "cache"
    agent.reset(SLOTS)
    for slot in SLOTS:
        agent.propose(slot, slot, 0.001 * slot)
    (cache / "hold").touch()
    agent.submit(SLOTS)
    cluster.until(lambda: all(state == "RUNNING" for state, _ in agent.squeue().values()), "eight running jobs")
    first = cluster.sh("squeue -h --me -o %i").split()
    with pytest.raises(subprocess.CalledProcessError):
        cluster.sh(f"scontrol requeue {first[0]}")
    cluster.sh("sbatch -p urgent --gres=gpu:8 --time=1 --output=/dev/null --wrap 'sleep 1'")
    assert {state for state, _ in agent.wait(SLOTS).values()} == {"PREEMPTED"}
    (cache / "hold").unlink()
    results = agent.settle(SLOTS)
    assert sorted(results) == list(SLOTS) and set(agent.submitted.values()) == {2}
    agent.keep_best(results)
    check_ledger(agent, 1 + 8)


def test_a_controller_that_does_not_answer_is_not_an_empty_queue(agent):
    """slurmctld goes away while jobs run and squeue fails. It comes back with their records; later it has lost them."""
    cluster, cache = agent.cluster, agent.folder.parent / "cache"
    agent.reset([1, 2])
    for slot in (1, 2):
        agent.propose(slot, slot, 0.002 / slot)
    (cache / "hold").touch()
    (cache / "hold-nov21-2").touch()
    agent.submit([1, 2])
    cluster.until(lambda: [agent.squeue()[slot][0] for slot in (1, 2)] == ["RUNNING"] * 2, "two running jobs")
    cluster.stop("slurmctld")
    with pytest.raises(subprocess.CalledProcessError):
        agent.squeue()
    (cache / "hold").unlink()
    cluster.start_controller()
    cluster.until(cluster.states, "the controller to return")
    agent.wait([1])
    assert "val_bpb" in agent.read()[1] and agent.squeue()[2][0] == "RUNNING"
    cluster.stop("slurmctld")
    cluster.start_controller("-c")  # forgets every job
    cluster.until(lambda: "idle" in cluster.states().values(), "the nodes to register again")
    assert agent.squeue() == {}
    cluster.until(lambda: f"{cluster.folder}/spool-n0/job" not in cluster.sh("ps -eo args="), "n0 to end the forgotten job")
    (cache / "hold-nov21-2").unlink()
    results = agent.settle([1, 2])
    assert sorted(results) == [1, 2] and agent.submitted == {1: 1, 2: 2}
    agent.keep_best(results)
    check_ledger(agent, 3)


def on_read_only(path, code, folder):
    """Run Python code in `folder` with `path` mounted read-only, as on a node that may not write to the shared cache."""
    mount = f"mount --bind {path} {path} && mount -o remount,bind,ro {path}"
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let its user mount a folder read-only")
    folder.mkdir()
    env = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled"))  # as in README's sbatch: its default is in the cache
    return subprocess.Popen([*unshare, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code], cwd=folder, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_jobs_train_at_the_same_time_from_one_read_only_cache(prepared, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
import prepare, train
try:
    (prepare.CACHE / "mark").touch()
    sys.exit("the cache is writable")
except OSError:
    pass
prepare.EVAL_TOKENS = 2**13
train.TIME_BUDGET, train.DEPTH, train.TOTAL_BATCH_SIZE, train.DEVICE_BATCH_SIZE, train.BIGRAM_ROWS = 0.5, 1, 2**11, 8, 2**10
train.main()
"""
    before = sorted(path.name for path in prepared.CACHE.rglob("*"))
    jobs = [on_read_only(prepared.CACHE, code, tmp_path / name) for name in ("one", "two")]
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert all(re.search(r"^val_bpb: +\d", output, re.MULTILINE) for output in outputs)
    assert sorted(path.name for path in prepared.CACHE.rglob("*")) == before


def test_two_nodes_that_prepare_at_once_do_not_corrupt_the_cache_even_without_a_working_lock(monkeypatch, tmp_path, capsys):
    """Some network file systems keep no lock between nodes: a second node begins, and is killed, while the first is
    about to finish. The first must not publish, or lose, what the second has just begun."""
    import contextlib

    import prepare

    class Killed(BaseException):
        pass

    monkeypatch.setattr(prepare, "locked", contextlib.nullcontext)
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    write, rmtree = prepare.write_token_files, shutil.rmtree

    def second_node_begins(*args):
        counts = write(*args)
        with monkeypatch.context() as second, pytest.raises(Killed):
            def killed(*args):
                raise Killed
            second.setattr(socket, "gethostname", lambda: "another-node")
            second.setattr(prepare.Tokenizer, "train", killed)
            second.setattr(prepare, "write_token_files", write)
            calls = []  # a killed process removes nothing: only the removal at its start happens
            second.setattr(shutil, "rmtree", lambda *a, **k: calls.append(a) or len(calls) > 1 or rmtree(*a, **k))
            prepare.prepare(10, 1)
        return counts

    monkeypatch.setattr(prepare, "write_token_files", second_node_begins)
    prepare.prepare(10, 1)
    assert len(prepare.load_manifest()["files"]) == 8  # the tokenizer's two, tokens and lengths of three splits
    assert prepare.verified(1)
