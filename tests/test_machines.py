"""First contact with machines that are not here: what torch says of them is replaced, the rest is the real code."""

import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import prepare
import train

REPO = Path(__file__).parents[1]
BUILT_FOR = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120"  # torch's wheel for CUDA 13.0
TOO_OLD = ("CUDA initialization: The NVIDIA driver on your system is too old (found version 12020). Please update your "
           "GPU driver.")
CU126, CU128 = ("torch==2.11.0+cu126 --index-url https://download.pytorch.org/whl/cu126 && export UV_NO_SYNC=1",
                "torch==2.11.0+cu128 --index-url https://download.pytorch.org/whl/cu128 && export UV_NO_SYNC=1")
# name in README's table: (compute capability, GB, multiprocessors) of the GPU that torch sees, what else is so,
# and the profile with a part of the printed reason, or the parts of the one line that ends the run; first backend
MACHINES = {
    "no GPU": (None, {}, "tiny", ["no GPU"], "sdpa"),
    "no GPU, CUDA_VISIBLE_DEVICES hides one": (None, dict(driver="580.65.06", hidden=True), "tiny", ["no GPU"], "sdpa"),
    "old driver": (None, dict(driver="535.104.05", heard=TOO_OLD), None, [
        "built for CUDA 13.0 and driver 580 or newer, found 535.104.05", "driver on your system is too old",
        "update the driver", CU128], None),
    "container without the toolkit": (None, dict(driver="580.65.06"), None, ["no driver answers", "container"], None),
    "no driver": (None, dict(driver=""), None, ["found none", "update the driver"], None),
    "torch without CUDA": (None, dict(driver="580.65.06", cuda=None), None, ["built for CUDA none", CU128], None),
    "NVIDIA GeForce GTX 1080": ((6, 1, 8.5, 20), {}, None, ["is sm_61, built for sm_75", CU126], None),
    "Tesla V100-SXM2-16GB": ((7, 0, 16.9, 80), {}, None, ["is sm_70, built for sm_75", CU126], None),
    "V100 with torch for CUDA 12.6": ((7, 0, 16.9, 80), dict(archs="sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"),
                                      "small", ["no bf16"], "sdpa"),
    "Tesla T4": ((7, 5, 15.8, 40), {}, "small", ["Tesla T4", "no bf16"], "sdpa"),
    "NVIDIA GeForce RTX 2080 Ti": ((7, 5, 11.5, 68), {}, "small", ["no bf16"], "sdpa"),
    "NVIDIA GeForce RTX 3060": ((8, 6, 12.6, 28), {}, "small", ["13 GB, 28 multiprocessors"], "fa3"),
    "NVIDIA GeForce RTX 3090": ((8, 6, 25.3, 82), {}, "full", ["RTX 3090"], "fa3"),
    "NVIDIA GeForce RTX 4090": ((8, 9, 25.3, 128), {}, "full", ["RTX 4090"], "fa3"),
    "NVIDIA A100-SXM4-80GB": ((8, 0, 85.0, 108), {}, "full", ["A100"], "fa3"),
    "NVIDIA H100 80GB HBM3": ((9, 0, 85.0, 132), {}, "full", ["H100"], "fa3"),
    "NVIDIA H200": ((9, 0, 150.0, 132), {}, "full", ["H200"], "fa3"),
    "NVIDIA GeForce RTX 5090": ((12, 0, 33.7, 170), {}, "full", ["RTX 5090"], "varlen"),
    "NVIDIA B200": ((10, 0, 191.0, 148), {}, "full", ["B200"], "varlen"),
    "Apple": (None, dict(mps=True), "small", ["Apple GPU"], "sdpa"),
}


@pytest.fixture
def machine(monkeypatch, request):
    """This process on the machine of a name above, as far as torch and the system's files tell."""
    gpu, facts, *_ = MACHINES[request.param]

    def is_available():
        if "heard" in facts:
            warnings.warn(facts["heard"])
        return gpu is not None

    for name in ("AUTORESEARCH_PROFILE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if "hidden" in facts:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if gpu:
        properties = types.SimpleNamespace(name=request.param, major=gpu[0], minor=gpu[1], total_memory=int(gpu[2] * 1e9),
                                           multi_processor_count=gpu[3])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu[:2])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu[0] >= 8)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: facts.get("archs", BUILT_FOR).split())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in facts)
    monkeypatch.setattr(torch.version, "cuda", facts.get("cuda", "13.0"))
    monkeypatch.setattr(prepare, "nvidia_driver", lambda: facts.get("driver"))
    return request.param


@pytest.mark.parametrize("machine", MACHINES, indirect=True)
def test_the_profile_is_what_the_machine_can_do_or_one_line_with_remedies(machine, monkeypatch):
    _, _, profile, words, backend = MACHINES[machine]
    if profile is None:
        with pytest.raises(SystemExit) as refused:
            prepare.choose_profile()
        line = refused.value.code
        assert line.count("\n") == 0 and "AUTORESEARCH_PROFILE=tiny" in line and all(word in line for word in words), line
        monkeypatch.setenv("AUTORESEARCH_PROFILE", "tiny")  # the last remedy
        assert prepare.choose_profile()[0] == "tiny"
        return
    chosen, reason = prepare.choose_profile()
    assert chosen == profile and all(word in reason for word in words), reason
    monkeypatch.setattr(train, "PROFILE", profile)
    device, _, dtype = train.choose_device()
    assert device.type == {"no GPU": "cpu", "Apple GPU": "mps"}.get(reason, "cuda")
    assert train.attention_backends(device, dtype)[0][0] == backend


def test_readmes_table_of_machines_has_the_profiles_and_backends_of_the_code():
    rows = re.findall(r"^\| ([^|]+) \| `?(\w+)`? \| `?(\w+)`? \|", (REPO / "README.md").read_text(), re.MULTILINE)
    table = {name: (profile, backend) for names, profile, backend in rows for name in names.split(", ")}
    for short, long in {"RTX 3060": "NVIDIA GeForce RTX 3060", "RTX 3090": "NVIDIA GeForce RTX 3090", "T4": "Tesla T4",
                        "RTX 4090": "NVIDIA GeForce RTX 4090", "A100": "NVIDIA A100-SXM4-80GB", "H200": "NVIDIA H200",
                        "H100": "NVIDIA H100 80GB HBM3", "RTX 5090": "NVIDIA GeForce RTX 5090", "B200": "NVIDIA B200",
                        "Apple GPU": "Apple", "no GPU": "no GPU"}.items():
        assert table[short] == (MACHINES[long][2], MACHINES[long][4]), short


@pytest.mark.parametrize("files, driver", [
    ({}, None),
    ({"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n"}, "535.104.05"),
    ({"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n"}, "580.65.06"),
    ({"usr/lib/wsl/lib/libcuda.so.1": ""}, ""),
    ({"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n", "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n"}, ""),
    ({"sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n"}, None),
], ids=["nothing", "driver", "open driver", "WSL", "card without driver", "another vendor"])
def test_an_nvidia_gpu_is_found_in_the_systems_files(tmp_path, files, driver):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert prepare.nvidia_driver(tmp_path) == driver


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_gpu_that_torch_cannot_use_ends_both_commands_with_one_line(command):
    code = ("import sys, warnings, runpy, pathlib, torch\n"
            "torch.cuda.is_available = lambda: False\n"
            "exists, read = pathlib.Path.exists, pathlib.Path.read_text\n"
            "proc = pathlib.Path('/proc/driver/nvidia/version')\n"
            "pathlib.Path.exists = lambda path: path == proc or exists(path)\n"
            "pathlib.Path.read_text = lambda path, **_: 'Module  535.104.05  ' if path == proc else read(path)\n"
            f"sys.argv = ['{command}']; sys.path.insert(0, '.'); runpy.run_path('{command}', run_name='__main__')")
    env = {name: value for name, value in os.environ.items() if name not in ("AUTORESEARCH_PROFILE", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "found 535.104.05" in done.stderr and "AUTORESEARCH_PROFILE=tiny" in done.stderr


# What a run takes on the slowest cards of each profile: (bf16 or float32 TFLOP/s, GB/s), published by their makers
SLOWEST = {"full": {"NVIDIA GeForce RTX 3090": (71, 936), "NVIDIA A10": (125, 600)},
           "small": {"NVIDIA GeForce GTX 1650": (3.0, 128), "Tesla T4": (8.1, 320), "NVIDIA GeForce RTX 3060": (12.7, 360),
                     "Apple M1": (2.6, 68)}}


def train_of(profile, monkeypatch):
    """train.py as it is on a machine of `profile`."""
    _, vocab_size, seq_len, eval_tokens = prepare.PROFILES[profile]
    for name, value in dict(PROFILE=profile, VOCAB_SIZE=vocab_size, MAX_SEQ_LEN=seq_len, EVAL_TOKENS=eval_tokens).items():
        monkeypatch.setattr(prepare, name, value)
    spec = importlib.util.spec_from_file_location(f"train_{profile}", REPO / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("profile", SLOWEST)
def test_a_whole_run_ends_within_ten_minutes_on_the_slowest_cards(profile, monkeypatch):
    """By arithmetic: a third of the peak for matmuls, half of the bandwidth for float32 logits read and written ten
    times, and 100 s for start-up with compilation. On a T4 the evaluation of `full` alone would pass the limit."""
    train = train_of(profile, monkeypatch)
    with torch.device("meta"):
        forward = train.flops_per_token(train.GPT(torch.bfloat16)) / 3
    seconds = {}
    for card, (tflops, bandwidth) in SLOWEST[profile].items():
        a_token = forward / (tflops * 1e12 / 3) + prepare.VOCAB_SIZE * 4 * 10 / (bandwidth * 1e9 / 2)
        seconds[card] = 100 + prepare.TIME_BUDGET + prepare.EVAL_TOKENS * a_token
    assert max(seconds.values()) < 600, seconds


# --- Apple's GPU


class OnMPS(torch.Tensor):
    """A CPU tensor that says it is on MPS."""
    device = property(lambda self: torch.device("mps"))


class MPS(TorchFunctionMode):
    """Refuses what torch 2.11 refuses or gets wrong on MPS, and notes which operators ran there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        there = [t for t in args if isinstance(t, OnMPS)]
        if name in ("to", "type", "double", "float", "bfloat16"):
            wanted = [*args[1:], *kwargs.values()]
            to_mps = any(str(x) == "mps" for x in wanted if isinstance(x, (str, torch.device)))
            to_cpu = any(str(x) == "cpu" for x in wanted if isinstance(x, (str, torch.device)))
            dtype = next((x for x in wanted if isinstance(x, torch.dtype)), torch.float64 if name == "double" else None)
            if (there or to_mps) and (dtype or args[0].dtype) in (torch.float64, torch.uint16):
                raise TypeError(f"MPS has no {dtype or args[0].dtype}")  # also in .to("cpu", float64): it converts first
            if kwargs.get("non_blocking") and (there or to_mps):
                raise RuntimeError("a pageable copy that is not waited for reads memory that may be gone")
            if to_mps or to_cpu:
                tensor = args[0].as_subclass(torch.Tensor)
                tensor = tensor if dtype is None else tensor.to(dtype)
                return tensor.as_subclass(OnMPS) if to_mps else tensor
        if str(kwargs.get("device")) == "mps":
            kwargs["device"] = "cpu"
            result = func(*args, **kwargs).as_subclass(OnMPS)
            assert result.dtype not in (torch.float64, torch.uint16), name
            return result
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

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
    native = yaml.safe_load((Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text())
    native = {entry["func"].split("(")[0]: entry for entry in native}
    lacking = set()
    for name in ran.names:
        entry = native[name]
        entry = native[entry.get("structured_delegate", name)]
        kernels = " ".join(entry.get("dispatch", {"CompositeImplicitAutograd": ""}))
        if not re.search(r"\bMPS\b|Composite", kernels):
            lacking.add(name)
    # the CPU's own kernel of attention and what only the CPU stands in for; MPS has one of its own in its place
    on_cpu_alone = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
    assert lacking <= on_cpu_alone and "_scaled_dot_product_attention_math_for_mps" in native
    assert len(ran.names) > 50


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
