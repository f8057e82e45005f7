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
# name (in README's table, where it stands there): (compute capability, GB, multiprocessors) of the GPU that torch sees,
# what else is so; the profile, or None for the end of the run; words of the printed line; first attention backend
MACHINES = {
    "no GPU": (None, {}, "tiny", "no GPU", "sdpa"),
    "a GPU hidden by CUDA_VISIBLE_DEVICES": (None, dict(driver="580.65.06", hidden=""), "tiny", "no GPU", "sdpa"),
    "an old driver": (None, dict(driver="535.104.05", heard=TOO_OLD), None,
                      f"CUDA 13.0 and driver 580 or newer, found 535.104.05|too old|update the driver|{CU128}", None),
    "a container without its GPU": (None, dict(driver="580.65.06"), None, "no driver answers|container", None),
    "no driver": (None, dict(driver=""), None, "found none|update the driver", None),
    "torch without CUDA": (None, dict(driver="580.65.06", cuda=None), None, f"built for CUDA none|{CU128}", None),
    "GTX 1080": ((6, 1, 8.5, 20), {}, None, f"is sm_61, built for sm_75|{CU126}", None),
    "V100": ((7, 0, 16.9, 80), {}, None, f"is sm_70, built for sm_75|{CU126}", None),
    "V100 after that command": ((7, 0, 16.9, 80), dict(archs="sm_60 sm_70 sm_90"), "small", "no bf16", "sdpa"),
    "T4": ((7, 5, 15.8, 40), {}, "small", "no bf16", "sdpa"),
    "RTX 2080": ((7, 5, 8.4, 46), {}, "small", "no bf16", "sdpa"),
    "RTX 3060": ((8, 6, 12.6, 28), {}, "small", "13 GB, 28 multiprocessors", "fa3"),
    "RTX 3090": ((8, 6, 25.3, 82), {}, "full", "82 multiprocessors, bf16", "fa3"),
    "RTX 4090": ((8, 9, 25.3, 128), {}, "full", "bf16", "fa3"),
    "A100": ((8, 0, 85.0, 108), {}, "full", "bf16", "fa3"),
    "H100": ((9, 0, 85.0, 132), {}, "full", "bf16", "fa3"),
    "H200": ((9, 0, 150.0, 132), {}, "full", "bf16", "fa3"),
    "RTX 5090": ((12, 0, 33.7, 170), {}, "full", "bf16", "varlen"),
    "B200": ((10, 0, 191.0, 148), {}, "full", "bf16", "varlen"),
    "Apple GPU": (None, dict(mps=True), "small", "Apple GPU", "sdpa"),
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
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", facts["hidden"])
    if gpu:
        major, minor, gigabytes, multiprocessors = gpu
        properties = types.SimpleNamespace(name=request.param, major=major, minor=minor, total_memory=gigabytes * 1e9,
                                           multi_processor_count=multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: major >= 8)
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


def test_readmes_table_of_machines_is_that_of_the_code():
    rows = re.findall(r"^\| (.+) \| (?:`(\w+)`|-) \| (?:`(\w+)`|-) \|", (REPO / "README.md").read_text(), re.MULTILINE)
    told = {name: (profile or None, backend or None) for names, profile, backend in rows for name in names.split(", ")}
    there = {name: (profile, backend) for name, (_, _, profile, _, backend) in MACHINES.items() if name in told}
    assert len(there) == 16 and there == {name: told[name] for name in there}


@pytest.mark.parametrize("file, text, driver", [
    ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05\n", "535.104.05"),
    ("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n", "580.65.06"),
    ("usr/lib/wsl/lib/libcuda.so.1", "", ""),
    ("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n", ""),
    ("sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n", None),
], ids=["driver", "open driver", "WSL", "card without driver", "another maker's card"])
def test_an_nvidia_gpu_is_found_in_the_systems_files(tmp_path, file, text, driver):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
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
    env = dict(os.environ, AUTORESEARCH_PROFILE="")
    env.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert "found 535.104.05" in done.stderr and "AUTORESEARCH_PROFILE=tiny" in done.stderr


# The slowest cards of each profile: (bf16 or float32 TFLOP/s, GB/s), published by their makers
SLOWEST = {"full": {"RTX 3090": (71, 936), "A10": (125, 600)},
           "small": {"GTX 1650": (3.0, 128), "T4": (8.1, 320), "RTX 3060": (12.7, 360), "Apple M1": (2.6, 68)}}


def train_of(profile, monkeypatch):
    """train.py as it is on a machine of `profile`."""
    _, vocab_size, seq_len, eval_tokens = prepare.PROFILES[profile]
    values = dict(PROFILE=profile, VOCAB_SIZE=vocab_size, MAX_SEQ_LEN=seq_len, EVAL_TOKENS=eval_tokens)
    for name, value in values.items():
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
    """Refuses what torch 2.11 refuses or gets wrong on MPS."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.double):
            wanted = [*args[1:], *kwargs.values()]
            places = [str(x) for x in wanted if isinstance(x, (str, torch.device))]
            dtypes = [x for x in wanted if isinstance(x, torch.dtype)] + [torch.float64] * (func is torch.Tensor.double)
            dtype = (dtypes or [args[0].dtype])[0]
            if isinstance(args[0], OnMPS) or "mps" in places:
                if dtype in (torch.float64, torch.uint16):
                    raise TypeError(f"MPS has no {dtype}")  # .to("cpu", float64) too: it converts first
                if kwargs.get("non_blocking"):
                    raise RuntimeError("a pageable copy that is not waited for reads memory that may be gone")
            if places:
                there = OnMPS if "mps" in places else torch.Tensor
                return args[0].as_subclass(torch.Tensor).to(dtype).as_subclass(there)
        if str(kwargs.get("device")) == "mps":
            result = func(*args, **kwargs | dict(device="cpu"))
            assert result.dtype not in (torch.float64, torch.uint16), func
            return result.as_subclass(OnMPS)
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
