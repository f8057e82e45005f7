"""Machines that are not here: what torch says of them is replaced, the rest is the real code."""

import runpy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO

import prepare

CARD = "sys/bus/pci/devices/0000:01:00.0/vendor"
NVIDIA = {CARD: "0x10de\n"}
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update it."
REMEDIES = ("Update the driver|start the container with its GPU|export AUTORESEARCH_PROFILE=tiny|"
            "torch==2.11.0+cu126 --index-url https://download.pytorch.org/whl/cu126 && export UV_NO_SYNC=1")
# (compute capability, GB, multiprocessors) of the GPU, what else is so, words of the one line, profile
MACHINES = {
    "no GPU": (None, {}, "no GPU", "tiny"),
    "H100": ((9, 0, 85.0, 132), {}, "bf16", "full"),
    "A100": ((8, 0, 85.0, 108), {}, "bf16", "full"),
    "RTX 3090": ((8, 6, 25.3, 82), {}, "25 GB, 82 multiprocessors, bf16", "full"),
    "B200": ((10, 0, 191.0, 148), {}, "bf16", "full"),
    "RTX 3060": ((8, 6, 12.6, 28), {}, "13 GB, 28 multiprocessors", "small"),
    "T4": ((7, 5, 15.8, 40), {}, "no bf16", "small"),
    "Apple GPU": (None, dict(mps=True), "Apple GPU", "small"),
    "V100": ((7, 0, 16.9, 80), {}, "V100 (sm_70, built for sm_75 and newer)", ""),
    "GTX 1080": ((6, 1, 8.5, 20), {}, "GTX 1080 (sm_61, built for sm_75 and newer)", ""),
    "an old driver": (None, dict(files=NVIDIA, warning=TOO_OLD), "built for CUDA 13.0; nvidia-smi shows", ""),
    "a container without its GPU": (None, dict(files=NVIDIA), "this NVIDIA GPU", ""),
    "a GPU hidden by CUDA_VISIBLE_DEVICES": (None, dict(files=NVIDIA, hidden=""), "no GPU", "tiny"),
    "Intel's GPU": (None, dict(files={CARD: "0x8086\n"}), "no GPU", "tiny"),
    "AMD's GPU": (None, dict(files={CARD: "0x1002\n"}), "the AMD GPU needs a torch for ROCm", "tiny"),
    "WSL": (None, dict(files={"usr/lib/wsl/lib/libcuda.so.1": ""}), "this NVIDIA GPU", ""),
    "torch without CUDA": (None, dict(files=NVIDIA, cuda=None), "built for CUDA None", ""),
    "V100 after that command": ((7, 0, 16.9, 80), dict(archs="sm_60 sm_70 sm_90"), "no bf16", "small"),
}


@pytest.fixture
def become(monkeypatch, tmp_path):
    """A function that puts this process on a machine, as far as torch and the system's files tell."""

    def become(name):
        gpu, facts, *_ = MACHINES[name]

        def is_available():
            if "warning" in facts:
                warnings.warn(facts["warning"])
            return gpu is not None

        monkeypatch.setenv("AUTORESEARCH_PROFILE", "")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if "hidden" in facts:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", facts["hidden"])
        for file, text in facts.get("files", {}).items():
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).write_text(text)
        monkeypatch.setattr(prepare.gpu_makers, "__defaults__", (tmp_path,))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in facts)
        monkeypatch.setattr(torch.version, "cuda", facts.get("cuda", "13.0"))
        major, minor, gigabytes, count = gpu or (0, 0, 0, 0)
        properties = SimpleNamespace(
            name=name, major=major, minor=minor, total_memory=gigabytes * 1e9, multi_processor_count=count)
        archs = facts.get("archs", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120")  # torch's wheel for CUDA 13.0
        for key, value in dict(
                is_available=is_available, get_device_properties=lambda index: properties, get_arch_list=archs.split,
                is_bf16_supported=lambda including_emulation: major >= 8).items():
            monkeypatch.setattr(torch.cuda, key, value)

    return become


@pytest.mark.parametrize("name", MACHINES)
def test_each_machine_has_its_profile_or_one_line_with_remedies(become, name, monkeypatch):
    _, _, words, profile = MACHINES[name]
    become(name)
    if not profile:
        with pytest.raises(SystemExit) as refused:
            prepare.choose_profile()
        line = refused.value.code
        assert "\n" not in line and all(part in line for part in [words, *REMEDIES.split("|")])
        monkeypatch.setenv("AUTORESEARCH_PROFILE", "tiny")  # the last remedy
        assert prepare.choose_profile()[0] == "tiny"
        return
    chosen, reason = prepare.choose_profile()
    assert chosen == profile and words in reason


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_gpu_that_torch_cannot_use_ends_both_commands(become, monkeypatch, command):
    become("GTX 1080")
    monkeypatch.delitem(sys.modules, "prepare")
    with pytest.raises(SystemExit, match="GTX 1080 .sm_61"):
        runpy.run_path(REPO / command)


# --- CPUs


V2, V1 = "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu/cpu.cfs_{}_us"


@pytest.mark.parametrize("name, files, omp, cpus", [
    ("a bare machine", {}, "", 64),
    ("docker --cpus=2", {V2: "200000 100000\n"}, "", 2),
    ("docker --cpus=1.5", {V2: "150000 100000\n"}, "", 2),
    ("docker without a limit", {V2: "max 100000\n"}, "", 64),
    ("cgroup version 1", {V1.format("quota"): "300000\n", V1.format("period"): "100000\n"}, "", 3),
    ("version 1 without a limit", {V1.format("quota"): "-1\n", V1.format("period"): "100000\n"}, "", 64),
    ("a limit of a parent", {"proc/self/cgroup": "0::/user.slice/a.scope\n",
                             "sys/fs/cgroup/user.slice/cpu.max": "400000 100000\n",
                             "sys/fs/cgroup/user.slice/a.scope/cpu.max": "max 100000\n"}, "", 4),
    ("OMP_NUM_THREADS", {V2: "200000 100000\n"}, "5", 5),
    ("OMP_NUM_THREADS of OpenMP's own kind", {}, "4,2", 64)])
def test_a_container_uses_the_cpus_that_it_may(monkeypatch, tmp_path, name, files, omp, cpus):
    """In one with two CPUs of a host with 64 torch started 64 threads that waited for each other."""
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    for file, text in ({"proc/self/cgroup": "0::/\n"} | files).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    assert prepare.available_cpus(tmp_path) == cpus
