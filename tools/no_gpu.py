"""Why PyTorch cannot use the GPU that nvidia-smi lists: python tools/no_gpu.py prints it in a line, and fails."""

import os
import subprocess
import sys
from pathlib import Path

import torch

MIN_DRIVER = {"12": 525, "13": 580}  # by the major version of the CUDA that torch was built with
SMI_SECONDS = 20  # patience
PINNED = (Path(__file__).resolve().parents[1] / "requirements-gpu.txt").read_text()
TORCH = next(line for line in PINNED.splitlines() if line.startswith("torch=="))


def nvidia_smi(*args: str) -> str:
    """What nvidia-smi prints, or nothing where it is missing, fails or hangs."""
    try:
        return subprocess.run(["nvidia-smi", *args], capture_output=True, text=True, timeout=SMI_SECONDS,
                              check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def driver_version() -> str:
    """The driver's, or nothing where nvidia-smi does not tell."""
    return nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def why() -> tuple[str, str]:
    """The cause, and what to do about it."""
    cause, cuda, driver = f"torch {torch.__version__} cannot use the GPU", torch.version.cuda, driver_version()
    if cuda is None:
        return (f"{cause}, as it is a build for CPUs", f"{sys.executable} -m pip uninstall -y torch, then "
                f"{sys.executable} -m pip install -r requirements-gpu.txt")
    major, needed = driver.partition(".")[0], MIN_DRIVER.get(cuda.partition(".")[0], 0)
    if major.isdigit() and int(major) < needed:
        return (f"{cause}: the driver is {driver}, but CUDA {cuda} needs {needed} or newer",
                f"install such a driver; or the CUDA 12.6 build of {TORCH} from pytorch.org's install page, for driver "
                f"{MIN_DRIVER['12']} or newer, and run with --attention=torch --kernels=plain, as the fused packages "
                "here are for CUDA 13")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return (f"{cause}: CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}",
                "it must name GPUs that nvidia-smi -L lists")
    try:
        torch.cuda.init()
    except Exception as e:  # a broken driver may raise anything, and to tell it is the purpose
        cause += f" ({' '.join(str(e).split())})"
    return cause, "look at nvidia-smi"


if __name__ == "__main__":
    sys.exit(f"error: {'; '.join(why())}; python train_gpt.py --preset=demo trains on the CPU")
