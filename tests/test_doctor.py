"""tools/doctor.py under simulated conditions: each finds its status, its remedy and its exit status."""

import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import train_gpt as t

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import doctor
import no_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RECORD = t.PRESETS["record80"]
DEMO = t.PRESETS["demo"]
SMALL = replace(DEMO, vocab_size=256, val_tokens=256, val_chunk=256, num_scheduled_iterations=3,
                num_extension_iterations=0, batch_unit=64, block=8)
GIB = 2**30


def examine(name, hp=RECORD, device=GPU):
    check = next(check for check in doctor.CHECKS if check.name == name)
    return doctor.examine(check, doctor.Case(hp, device))


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these GPUs."""

    def pretend(count=8, capability=(9, 0), free=70 * GIB, smi="", total=80 * GIB):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free, total))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=total))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda i: 1.0)
        for module in (doctor, no_gpu):
            monkeypatch.setattr(module, "nvidia_smi", lambda *args: smi)

    return pretend


@pytest.fixture
def shards(make_shard, tmp_path):
    """The recipe of a short run and its intact shards."""
    document = [255, *range(40)]
    make_shard("train_1.bin", document * 40)
    make_shard("val_0.bin", document * 10)
    return replace(SMALL, train_files=f"{tmp_path}/train_*.bin", val_files=f"{tmp_path}/val_*.bin")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty working folder: no shard of the default place is there yet."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["doctor.py", *args])
    with pytest.raises(SystemExit) as end:
        doctor.main()
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize("simulated, status, said", [
    (dict(), "ok", "8x NVIDIA H100 (capability 9.0), 70 GiB"),
    (dict(count=3), "warn", "1, 2, 4 or 8 GPUs"),
    (dict(count=16), "warn", "CUDA_VISIBLE_DEVICES"),
    (dict(free=3 * GIB), "warn", "nvidia-smi lists who uses the rest"),
    (dict(free=20 * GIB, total=24 * GIB), "warn", "this run takes about 21 GiB"),
    (dict(free=22 * GIB, total=24 * GIB), "ok", "22 GiB or more free"),
])
def test_gpus(machine, simulated, status, said):
    """Whether the memory suffices depends on what the run would make of the GPU's."""
    machine(**simulated)
    line = examine("GPUs", replace(RECORD, kernels="plain"))
    assert line.status == status and said in f"{line.text}; {line.remedy}"


def test_driver(machine):
    machine(smi="580.95.05\n580.95.05\n")
    assert examine("driver") == ("ok", "580.95.05", "")
    machine()
    assert examine("driver").status == "warn"


OLD = ("torch 9.9 cannot use the GPU: the driver is 550.54, but CUDA 13.0 needs 580 or newer", "CUDA 12.6 build of")


@pytest.mark.parametrize("smi, cuda, visible, said", [
    ("550.54\n550.54\n", "13.0", None, OLD), ("550.54\n", "13.0", "0", OLD),
    ("580.95\n", None, None, ("is a build for CPUs", "-m pip install -r requirements-gpu.txt")),
    ("550.54\n", "12.6", "7", ("cannot use the GPU: CUDA_VISIBLE_DEVICES=7", "must name")),
    ("580.95\n", "13.0", None, ("cannot use the GPU (driver lost)", "nvidia-smi")),
    ("[N/A]\n", "13.0", None, ("cannot use the GPU (driver lost)", "nvidia-smi")),
])
def test_gpu_that_torch_cannot_use(machine, monkeypatch, capsys, smi, cuda, visible, said):
    """The same cause and remedy from doctor.py, which fails, as from no_gpu.py, which run.sh calls."""
    def broken():
        raise RuntimeError("driver\nlost")

    machine(0, smi=smi)
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", broken)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cause, remedy = no_gpu.why()
    assert said[0] in cause and said[1] in remedy
    code, printed = main(monkeypatch, capsys, "--quick", "--quiet")
    assert code == 1 and f"fail  GPUs       {cause}; {remedy}\n" in printed.out and "driver  " not in printed.out


def test_no_gpu_as_a_program(tmp_path):
    """One line, with the real torch: on a machine without a GPU, whose nvidia-smi claims an old driver."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 100.1\n")
    smi.chmod(0o755)
    done = subprocess.run([sys.executable, doctor.ROOT / "tools" / "no_gpu.py"], capture_output=True, text=True,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    said = "100.1" if torch.version.cuda else "a build for CPUs"
    assert done.returncode == 1 and done.stderr.startswith(f"error: torch {torch.__version__} cannot use the GPU")
    assert said in done.stderr and done.stderr.count("\n") == 1 and "--preset=demo" in done.stderr


def test_versions(machine, monkeypatch):
    """Only what the run itself needs is missed; what differs from its pin is told. GPU machines have their own pins."""
    machine(0)
    common = {pin.name: str(pin.specifier)[2:] for pin in doctor.pins("requirements-common.txt")}
    here = common | {pin.name: str(pin.specifier)[2:] for pin in doctor.pins("requirements.txt")} | {"ruff": "0"}

    def version(name):
        if name not in here:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert examine("versions").status == "ok"
    tests_torch = here["torch"]
    machine(smi="GPU 0: NVIDIA H100\n")
    pinned = {pin.name: str(pin.specifier)[2:] for pin in doctor.pins("requirements-gpu.txt")}
    assert common.items() <= pinned.items()
    line = examine("versions")
    assert line.status == "warn" and line.remedy == "pip install -r requirements-gpu.txt"
    assert f"torch {tests_torch} (pinned: =={pinned['torch']}), triton" in line.text
    here = pinned | {"torch": pinned["torch"] + "+cu126"}  # without the packages for Hopper
    assert examine("versions").status == "ok"
    here |= {"quack-kernels": "0.5.0"}
    line = examine("versions")
    assert "quack-kernels 0.5.0" in line.text and line.remedy == "pip install -r requirements-hopper.txt"
    del here["tqdm"]
    line = examine("versions")
    assert "tqdm is missing" in line.text and line.remedy.endswith("-r requirements-gpu.txt -r requirements-hopper.txt")
    monkeypatch.setattr(doctor, "MIN_PYTHON", (9, 9))
    line = examine("versions")
    assert line.status == "fail" and "9.9" in line.remedy


def test_attention_and_kernels(machine, monkeypatch):
    """The fastest is ok, a slower one by choice too; otherwise the remedy depends on the GPU."""
    for module in ("flash_attn", "quack"):
        monkeypatch.setitem(sys.modules, module, None)  # its import fails
    monkeypatch.setattr(t, "triton", None)
    machine()
    line = examine("attention")
    assert line.status == "warn" and line.text == "torch (usable here: torch, reference)"
    assert "PyTorch's attention takes 1.08 of the time; python -m pip install" in line.remedy
    assert examine("attention", replace(RECORD, attention="torch")).status == "ok"
    assert examine("attention", replace(RECORD, attention="fa4")).status == "fail"
    line = examine("kernels")
    assert line.text == "plain (usable here: plain)" and "quack-kernels, plain operations take" in line.remedy
    machine(capability=(8, 0))
    assert "Hopper" in examine("attention").remedy
    assert examine("attention", DEMO, CPU) == ("ok", "reference (usable here: reference)", "")


def test_quack_that_fails_to_import(machine, monkeypatch):
    def broken():
        raise ImportError("no cutlass\nundefined symbol")

    monkeypatch.setattr(t, "hopper_fits", lambda hp, device: True)
    monkeypatch.setattr(t, "quack_products", broken)
    machine()
    line = examine("kernels")
    assert line.status == "fail" and line.text == "ImportError: undefined symbol"
    assert "--kernels=plain" in line.remedy


def test_fp8(machine, monkeypatch):
    """A GPU without FP8 trains all the same, as choose_backends leaves it out; one that computes it wrong fails."""
    assert doctor.fp8_error(CPU) == 0
    machine(capability=(8, 0))
    assert not t.choose_backends(replace(RECORD, attention="reference"), GPU).fp8_head
    line = examine("FP8")
    assert line.status == "warn" and "8.0" in line.text and "bfloat16" in line.remedy
    assert examine("FP8", replace(RECORD, fp8_head=False)).status == "ok"
    machine()
    monkeypatch.setattr(doctor, "fp8_error", lambda device: 0.25)
    assert examine("FP8").status == "fail"


def test_an_older_gpu_is_ready(machine, shards, tmp_path, monkeypatch, capsys):
    """Nothing fails on an A100, which trains with plain kernels, PyTorch's attention and a bf16 head."""
    machine(1, capability=(8, 0), free=39 * GIB, total=40 * GIB, smi="580.95\n")
    keys = ("vocab_size", "val_tokens", "val_chunk", "num_scheduled_iterations", "num_extension_iterations",
            "batch_unit", "block", "train_files", "val_files")
    args = [f"--log_dir={tmp_path}", *(f"--{key}={getattr(shards, key)}" for key in keys)]
    code, printed = main(monkeypatch, capsys, "--quick", "--quiet", "--check", *args)
    assert code == 0 and "warn  FP8        not used" in printed.out and "fail" not in printed.out


def topology(link):
    return f"\t\x1b[4mGPU0\tGPU1\tNIC0\x1b[0m\nGPU0\t X \t{link}\tPIX\nGPU1\t{link}\t X \tSYS\nNIC0\tPIX\tSYS\t X \n"


THREE = "GPU0\t X \tNV4\tSYS\nGPU1\tNV4\t X \tNV4\nGPU2\tSYS\tNV4\t X \n"  # one pair without NVLink


@pytest.mark.parametrize("smi, status", [(topology("NV18"), "ok"), (topology("SYS"), "warn"), (THREE, "warn"),
                                         ("", "warn")])
def test_nvlink(machine, smi, status):
    machine(2, smi=smi)
    assert examine("NVLink").status == status
    machine(1)
    assert examine("NVLink").status == "ok"


def test_all_reduce(machine, monkeypatch):
    """Two processes sum over gloo; what stops a sum is told, and none of its processes lives on."""
    doctor.all_reduce(2, "cpu")
    machine(2)
    sum_on_cpu = doctor.all_reduce
    monkeypatch.setattr(doctor, "all_reduce", lambda count, kind: sum_on_cpu(count, "cpu"))
    monkeypatch.setattr(doctor, "NCCL_SECONDS", 0.01)
    line = examine("NCCL")
    assert line.status == "fail" and "within 0.01 s" in line.text and "NCCL_DEBUG" in line.remedy
    assert not torch.multiprocessing.active_children()


def test_disk(fresh, monkeypatch):
    """Shards that are still to come need room, for files of one's own only the log does."""
    own = replace(RECORD, train_files="mine/*.bin")
    free = 10 * doctor.SHARD_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    line = examine("disk")
    assert line.status == "fail" and "2.00" in line.text and "--train_files" in line.remedy
    assert examine("disk", own).status == "ok"
    saving = replace(own, save_every=500, save_final=True)  # at 500, 1000 and the end
    assert examine("disk", saving).status == "fail" and "needs 21.5" in examine("disk", saving).text
    free = 1000
    line = examine("disk", own)
    assert line.status == "fail" and "--log_dir" in line.remedy
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in examine("disk", own).text


def test_shards(shards):
    assert examine("shards", shards).status == examine("run", shards).status == "ok"
    held = 41 * 40
    assert f"1 train shard of {held:,} tokens" in examine("shards", shards).text
    assert examine("run", shards).text == "the train shards last all 3 steps"


def test_shards_missing(fresh):
    line = examine("shards")
    assert line.status == "fail" and "data/cached_fineweb10B.py 9" in line.text


@pytest.mark.parametrize("name", ["train_1.bin", "val_0.bin"])
def test_shards_damaged(shards, tmp_path, name):
    with open(tmp_path / name, "r+b") as file:
        file.truncate(2000)
    line = examine("shards", shards)
    assert line.status == "fail" and name in line.text and "delete it" in line.text


def test_shards_too_few(shards, make_shard):
    """Too few tokens show in the headers; enough of them, but lost to cuts, only in the walk of the full check."""
    line = examine("shards", replace(shards, num_scheduled_iterations=30))
    assert line.status == "fail" and "--num_scheduled_iterations" in line.remedy
    tokens = sum(t.plan(step, shards).batch_tokens for step in range(3))
    make_shard("train_1.bin", ([255, *range(40)] * 40)[:tokens])
    assert examine("shards", shards).status == "ok"
    line = examine("run", shards)
    assert line.status == "fail" and "of 3 steps" in line.text


def test_hub(fresh, monkeypatch, shards):
    """It is asked only while shards are missing, once and with little patience."""
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout)))
    assert examine("hub", shards).status == "ok" and not asked
    line = examine("hub")
    assert line.status == "ok" and "10 shards" in line.text
    [(url, timeout)] = asked
    assert url.endswith("fineweb_val_000000.bin") and timeout == doctor.HUB_SECONDS

    def unreachable(url, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    line = examine("hub")
    assert line.status == "fail" and "no route" in line.text and "HF_ENDPOINT" in line.text


def test_without_a_gpu(machine, monkeypatch, capsys):
    """Only the demo runs there; its own data is checked, and nothing fails."""
    machine(0)
    monkeypatch.chdir(doctor.ROOT)
    code, printed = main(monkeypatch, capsys, "--quick", "--quiet")
    assert code == 0 and "only the demo runs" in printed.out
    code, printed = main(monkeypatch, capsys, "--quick")
    names = [line.split()[1] for line in printed.out.splitlines()]
    assert code == 0 and names == [check.name for check in doctor.CHECKS if not check.slow]
    assert "608,837 tokens" in printed.out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert examine("GPUs", DEMO, CPU).status == "ok"


def test_exit_status(shards, tmp_path, monkeypatch, capsys):
    """0 with warnings, 1 with a failure, 2 for a bad argument; --quick leaves out what is slow."""
    keys = ("vocab_size", "val_tokens", "val_chunk", "num_scheduled_iterations", "num_extension_iterations",
            "batch_unit", "block", "train_files", "val_files")
    args = ["--preset=demo", f"--log_dir={tmp_path}", *(f"--{key}={getattr(shards, key)}" for key in keys)]
    assert main(monkeypatch, capsys, *args)[0] == 0
    missing = f"--resume={tmp_path}/none.pt"
    assert main(monkeypatch, capsys, "--quick", missing, *args)[0] == 0
    code, printed = main(monkeypatch, capsys, "--quick", "--quiet", "--check", missing, *args)
    assert code == 1 and "fail  run" in printed.out and "none.pt" in printed.out and "hub" not in printed.out
    (tmp_path / "val_0.bin").unlink()
    code, printed = main(monkeypatch, capsys, "--quiet", *args)
    assert code == 1 and "fail  shards" in printed.out and "\nok" not in printed.out and "fail  run" not in printed.out
    code, printed = main(monkeypatch, capsys, "--muonlr=1")
    assert code == 2 and printed.err.startswith("error: unknown key --muonlr") and printed.err.count("\n") == 1


def test_nvidia_smi(tmp_path, monkeypatch):
    """Missing, failing and hanging ones all say nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvidia_smi("-L") == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho $1\nexit $2\n")
    program.chmod(0o755)
    assert doctor.nvidia_smi("-L", "0") == "-L\n"
    assert doctor.nvidia_smi("-L", "9") == ""

    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", no_gpu.SMI_SECONDS)

    monkeypatch.setattr(subprocess, "run", hang)
    assert doctor.nvidia_smi("-L") == ""
