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

VERSION, CARD = "proc/driver/nvidia/version", "sys/bus/pci/devices/0000:01:00.0/vendor"
NEW = {VERSION: "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n"}
OLD = {VERSION: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05\n"}
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update it."
CU126, CU128 = (f"torch==2.11.0+{cuda} --index-url https://download.pytorch.org/whl/{cuda} && export UV_NO_SYNC=1"
                for cuda in ("cu126", "cu128"))
# Those of README's table: (compute capability, GB, multiprocessors) of the GPU, what else is so, words of the one line
LISTED = {
    "no GPU": (None, {}, "no GPU"),
    "H100": ((9, 0, 85.0, 132), {}, "bf16"),
    "H200": ((9, 0, 150.0, 132), {}, "bf16"),
    "A100": ((8, 0, 85.0, 108), {}, "bf16"),
    "RTX 3090": ((8, 6, 25.3, 82), {}, "25 GB, 82 multiprocessors, bf16"),
    "RTX 4090": ((8, 9, 25.3, 128), {}, "bf16"),
    "B200": ((10, 0, 191.0, 148), {}, "bf16"),
    "RTX 5090": ((12, 0, 33.7, 170), {}, "bf16"),
    "RTX 3060": ((8, 6, 12.6, 28), {}, "13 GB, 28 multiprocessors"),
    "T4": ((7, 5, 15.8, 40), {}, "no bf16"),
    "RTX 2080": ((7, 5, 8.4, 46), {}, "no bf16"),
    "Apple GPU": (None, dict(mps=True), "Apple GPU"),
    "V100": ((7, 0, 16.9, 80), {}, f"is sm_70, built for sm_75|{CU126}"),
    "GTX 1080": ((6, 1, 8.5, 20), {}, f"is sm_61, built for sm_75|{CU126}"),
    "an old driver": (None, dict(files=OLD, heard=TOO_OLD),
                      f"CUDA 13.0 and driver 580 or newer, found 535.104.05|too old|update the driver|{CU128}"),
    "a container without its GPU": (None, dict(files=NEW), "found 580.65.06|no driver answers|container"),
}
# ... and others, with their profile and attention backend
OTHERS = {
    "a GPU hidden by CUDA_VISIBLE_DEVICES": (None, dict(files=NEW, hidden=""), "no GPU", "tiny", "sdpa"),
    "another maker's GPU": (None, dict(files={CARD: "0x8086\n"}), "no GPU", "tiny", "sdpa"),
    "no driver": (None, dict(files={CARD: "0x10de\n"}), "found none|update the driver", "", ""),
    "WSL": (None, dict(files={"usr/lib/wsl/lib/libcuda.so.1": ""}), "found none|no driver answers", "", ""),
    "torch without CUDA": (None, dict(files=NEW, cuda=None), f"built for CUDA none|{CU128}", "", ""),
    "V100 after that command": ((7, 0, 16.9, 80), dict(archs="sm_60 sm_70 sm_90"), "no bf16", "small", "sdpa"),
}


def readme_table():
    """{machine: (profile, backend)}"""
    rows = re.findall(r"^\| (.+) \| (?:`(\w+)`|-) \| (?:`(\w+)`|-) \|", (REPO / "README.md").read_text(), re.MULTILINE)
    return {name: (profile, backend) for names, profile, backend in rows for name in names.split(", ")}


@pytest.fixture
def become(monkeypatch, tmp_path):
    """A function that puts this process on a machine, as far as torch and the system's files tell."""

    def become(name):
        gpu, facts, *_ = (LISTED | OTHERS)[name]

        def is_available():
            if "heard" in facts:
                warnings.warn(facts["heard"])
            return gpu is not None

        monkeypatch.setenv("AUTORESEARCH_PROFILE", "")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if "hidden" in facts:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", facts["hidden"])
        for file, text in facts.get("files", {}).items():
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).write_text(text)
        monkeypatch.setattr(prepare.nvidia_driver, "__defaults__", (tmp_path,))
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


@pytest.mark.parametrize("name", [*LISTED, *OTHERS])
def test_profile_and_attention_are_those_of_readmes_table_or_one_line_has_remedies(become, name, monkeypatch):
    _, _, words, profile, backend = LISTED[name] + readme_table()[name] if name in LISTED else OTHERS[name]
    become(name)
    if not profile:
        with pytest.raises(SystemExit) as refused:
            prepare.choose_profile()
        line = refused.value.code
        assert "\n" not in line and all(part in line for part in ["AUTORESEARCH_PROFILE=tiny", *words.split("|")])
        monkeypatch.setenv("AUTORESEARCH_PROFILE", "tiny")  # the last remedy
        assert prepare.choose_profile()[0] == "tiny"
        return
    chosen, reason = prepare.choose_profile()
    assert chosen == profile and words in reason
    monkeypatch.setattr(train, "PROFILE", profile)
    device, _, dtype = train.choose_device()
    assert device.type == {"no GPU": "cpu", "Apple GPU": "mps"}.get(reason, "cuda")
    assert train.attention_backends(device, dtype)[0][0] == backend


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_gpu_that_torch_cannot_use_ends_both_commands(become, monkeypatch, command):
    become("GTX 1080")
    monkeypatch.delitem(sys.modules, "prepare")
    with pytest.raises(SystemExit, match="GTX 1080 is sm_61"):
        runpy.run_path(REPO / command)


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
    monkeypatch.setattr(train, "BIGRAM_ROWS", 0)
    torch.manual_seed(0)
    model = train.GPT(torch.float32)
    optimizer = train.MuonAdamW(*train.parameter_groups(model), torch.float32)
    parameters = list(model.parameters())
    if device == "mps":
        monkeypatch.setattr(model, "parameters", lambda: (p.detach().as_subclass(OnMPS) for p in parameters))
    train.set_schedules(optimizer, 0.0, 0)
    loader = prepare.make_dataloader(tokenizer, 2, prepare.MAX_SEQ_LEN, "train", device)
    inputs, targets, _ = next(loader)
    assert str(inputs.device) == str(targets.device) == device
    model.loss_backward(inputs, targets)
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
def test_forward_pass_and_optimizer_run_on_fake_cuda_tensors(dtype, monkeypatch):
    """FakeTensorMode checks devices, dtypes and shapes, and raises where the host would read a value."""
    monkeypatch.setattr(train, "WINDOW_PATTERN", "SL")
    with FakeTensorMode():
        with torch.device("cuda"):
            model = train.GPT(dtype)
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
