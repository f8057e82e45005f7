"""First contact with machines that are not here: what torch says of them is replaced, the rest is the real code."""

import re
import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
import yaml
from conftest import REPO
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import prepare
import train

CARD = "sys/bus/pci/devices/0000:01:00.0/vendor"
NVIDIA = {CARD: "0x10de\n"}
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update it."
REMEDIES = ("Update the driver|in a container pass the GPU on|export AUTORESEARCH_PROFILE=tiny|"
            "torch==2.11.0+cu126 --index-url https://download.pytorch.org/whl/cu126 && export UV_NO_SYNC=1")
# (compute capability, GB, multiprocessors) of the GPU, what else is so, words of the one line, profile, attention
MACHINES = {
    "no GPU": (None, {}, "no GPU", "tiny", "sdpa"),
    "H100": ((9, 0, 85.0, 132), {}, "bf16", "full", "fa3"),
    "H200": ((9, 0, 150.0, 132), {}, "bf16", "full", "fa3"),
    "A100": ((8, 0, 85.0, 108), {}, "bf16", "full", "fa3"),
    "RTX 3090": ((8, 6, 25.3, 82), {}, "25 GB, 82 multiprocessors, bf16", "full", "fa3"),
    "RTX 4090": ((8, 9, 25.3, 128), {}, "bf16", "full", "fa3"),
    "B200": ((10, 0, 191.0, 148), {}, "bf16", "full", "varlen"),
    "RTX 5090": ((12, 0, 33.7, 170), {}, "bf16", "full", "varlen"),
    "RTX 3060": ((8, 6, 12.6, 28), {}, "13 GB, 28 multiprocessors", "small", "fa3"),
    "T4": ((7, 5, 15.8, 40), {}, "no bf16", "small", "sdpa"),
    "RTX 2080": ((7, 5, 8.4, 46), {}, "no bf16", "small", "sdpa"),
    "Apple GPU": (None, dict(mps=True), "Apple GPU", "small", "sdpa"),
    "V100": ((7, 0, 16.9, 80), {}, "V100 (sm_70, built for sm_75 and newer)", "", ""),
    "GTX 1080": ((6, 1, 8.5, 20), {}, "GTX 1080 (sm_61, built for sm_75 and newer)", "", ""),
    "an old driver": (None, dict(files=NVIDIA, warning=TOO_OLD), "built for CUDA 13.0; nvidia-smi shows", "", ""),
    "a container without its GPU": (None, dict(files=NVIDIA), "this NVIDIA GPU", "", ""),
    "a GPU hidden by CUDA_VISIBLE_DEVICES": (None, dict(files=NVIDIA, hidden=""), "no GPU", "tiny", "sdpa"),
    "Intel's GPU": (None, dict(files={CARD: "0x8086\n"}), "no GPU", "tiny", "sdpa"),
    "AMD's GPU": (None, dict(files={CARD: "0x1002\n"}), "the AMD GPU needs a torch for ROCm", "tiny", "sdpa"),
    "WSL": (None, dict(files={"usr/lib/wsl/lib/libcuda.so.1": ""}), "this NVIDIA GPU", "", ""),
    "torch without CUDA": (None, dict(files=NVIDIA, cuda=None), "built for CUDA None", "", ""),
    "V100 after that command": ((7, 0, 16.9, 80), dict(archs="sm_60 sm_70 sm_90"), "no bf16", "small", "sdpa"),
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
                get_device_capability=lambda: (major, minor), get_device_name=lambda: name,
                is_bf16_supported=lambda including_emulation: major >= 8).items():
            monkeypatch.setattr(torch.cuda, key, value)

    return become


@pytest.mark.parametrize("name", MACHINES)
def test_each_machine_has_its_profile_and_attention_or_one_line_with_remedies(become, name, monkeypatch):
    _, _, words, profile, backend = MACHINES[name]
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
    monkeypatch.setattr(train, "PROFILE", profile)
    device, _, dtype = train.choose_device()
    assert device.type == ("cpu" if profile == "tiny" else "mps" if reason == "Apple GPU" else "cuda")
    assert train.attention_backends(device, dtype)[0][0] == backend


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_gpu_that_torch_cannot_use_ends_both_commands(become, monkeypatch, command):
    become("GTX 1080")
    monkeypatch.delitem(sys.modules, "prepare")
    with pytest.raises(SystemExit, match="GTX 1080 .sm_61"):
        runpy.run_path(REPO / command)


# --- CPUs


@pytest.mark.parametrize("release, fraction", [("6.6.87.2-microsoft-standard-WSL2", 0.9), ("6.8.0-generic", None)])
def test_under_wsl_cuda_fails_where_it_would_spill_into_the_systems_memory(monkeypatch, release, fraction):
    """64 rows "fitted" a card of 24 GB there, and ran several times slower."""
    limits = []
    monkeypatch.setattr(train.platform, "release", lambda: release)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    train.set_memory_limits(torch.device("cuda"))
    assert limits == ([fraction] if fraction else [])


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


# --- Apple's GPU


class OnMPS(torch.Tensor):
    """A CPU tensor that says it is on MPS."""
    device = property(lambda self: torch.device("mps"))


class MPS(TorchFunctionMode):
    """Refuses what torch 2.11 refuses or gets wrong on MPS."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args)
        places = [str(x) for x in [*args, *kwargs.values()] if isinstance(x, (str, torch.device))]
        there = "mps" in places
        if func is torch.Tensor.to and (there or isinstance(args[0], OnMPS)):
            assert not kwargs.get("non_blocking"), "a pageable copy that is not waited for"
            there = True  # .to("cpu", float64) too: it converts first
        result = func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})
        if isinstance(result, torch.Tensor):
            assert not (there or isinstance(result, OnMPS)) or result.dtype not in (torch.float64, torch.uint16), func
            if {"mps", "cpu"} & {*places}:
                result = result.as_subclass(OnMPS if "mps" in places else torch.Tensor)
        return result


def on_cpu(x):
    return "cpu" if isinstance(x, (str, torch.device)) and str(x) == "mps" else x


class Operators(TorchDispatchMode):
    names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.names.add(func._schema.name[6:] + ("." + func._schema.overload_name).rstrip("."))
        return func(*args, **(kwargs or {}))


def run_on(device, tokenizer, monkeypatch):
    """Rows, a step of training and the evaluation of a small model; returns bits per byte and the weights."""
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 8 * prepare.MAX_SEQ_LEN)
    torch.manual_seed(0)
    model = train.GPT(train.sdpa_attention, torch.float32)
    optimizer = train.MuonAdamW(*train.parameter_groups(model), torch.float32)
    parameters = list(model.parameters())
    if device == "mps":
        monkeypatch.setattr(model, "parameters", lambda: (p.detach().as_subclass(OnMPS) for p in parameters))
    train.set_schedules(optimizer, 0.0, 0)
    loader = prepare.make_dataloader(tokenizer, 2, prepare.MAX_SEQ_LEN, "train", device)
    inputs, targets, _ = next(loader)
    assert str(inputs.device) == str(targets.device) == device
    train.backward(model, inputs, targets, 1.0)
    optimizer.step()
    return prepare.evaluate_bpb(model, tokenizer, 4), parameters


def test_nothing_runs_on_mps_that_torch_lacks_there(prepared, tokenizer, monkeypatch):
    """float64 and uint16, copies that are not waited for, operators without a kernel; the results are the CPU's."""
    with monkeypatch.context() as patch:
        bpb, weights = run_on("cpu", tokenizer, patch)
    with MPS(), Operators() as ran:
        mps_bpb, mps_weights = run_on("mps", tokenizer, monkeypatch)
    assert mps_bpb == pytest.approx(bpb, abs=1e-5)
    for ours, theirs in zip(weights, mps_weights):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    native = {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(table.read_text())}
    lacking = set()
    for name in ran.names:
        entry = native[native[name].get("structured_delegate", name)]
        kernels = " ".join(entry.get("dispatch", ["CompositeImplicitAutograd"]))
        if not re.search(r"\bMPS\b|Composite", kernels):
            lacking.add(name)
    cpus_own = "_scaled_dot_product_flash_attention_for_cpu"  # stands in for _scaled_dot_product_attention_math_for_mps
    assert len(ran.names) > 50 and lacking <= {cpus_own, cpus_own + "_backward"}


# --- an NVIDIA GPU that is not there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_pass_and_optimizer_run_on_fake_cuda_tensors(dtype):
    """FakeTensorMode checks devices, dtypes and shapes, and raises where the host would read a value."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = train.GPT(train.sdpa_attention, dtype)
        optimizer = train.MuonAdamW(*train.parameter_groups(model), dtype)
        inputs = torch.zeros(2, train.MAX_SEQ_LEN, dtype=torch.int64, device="cuda")
        with torch.no_grad():
            logits = model(inputs)
        assert (logits.device.type, logits.dtype) == ("cuda", torch.float32)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        train.set_schedules(optimizer, 0.0, 0)
        optimizer.step()
        assert all(tensor.is_cuda for state in optimizer.state.values() for tensor in state.values())
