"""Checks before a costly run: a line each, with ok, warn or fail, and what to do about it.

    python tools/doctor.py                     # everything, in about a minute
    python tools/doctor.py --quick --quiet     # what takes seconds, and only warnings and failures
    python tools/doctor.py --quick --quiet --check    # and what train_gpt.py --check does: run.sh begins so
    python tools/doctor.py --train_files='data/mine/fineweb_train_*.bin' --val_files='data/mine/fineweb_val_*.bin'

Every other argument is one of train_gpt.py: the checks are for the run that it would make with them. Exit status: 0 if
nothing failed, 1 if something did, 2 for a bad argument.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cached_fineweb10B as downloader
import no_gpu
from no_gpu import nvidia_smi

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]

MIN_PYTHON = (3, 11)  # numpy's pinned version asks for it
RUN_PACKAGES = ("torch", "triton", "numpy", "tqdm")
RUN_SHARDS = 9  # train shards that run.sh downloads
SHARD_BYTES = 200_001_024  # a downloaded shard: 100M tokens
LOG_BYTES = 10 * 2**20  # more than a log takes
HUB_SECONDS, NCCL_SECONDS = 5, 120  # patience
REDUCED = 2**20  # floats that every GPU brings to the all-reduce


class Case(NamedTuple):
    """What is checked: a run, and where it would be."""

    hp: t.Recipe
    device: torch.device


class Line(NamedTuple):
    """What a check found: ok, warn or fail, and what to do about it."""

    status: str
    text: str
    remedy: str = ""  # empty: the check's own, from CHECKS


def check_gpus(case: Case) -> Line:
    """There are GPUs, of a number that a run takes, with enough free memory."""
    if case.hp.device == "cpu":
        if torch.cuda.is_available():
            return Line("ok", "not used: --device=cpu")
        return Line("warn", "no NVIDIA GPU here: only the demo runs", "./run.sh starts it, on the CPU")
    if case.device.type == "cpu":
        return Line("fail", *no_gpu.why())
    count = torch.cuda.device_count()
    names = Counter("{} (capability {}.{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
                    for i in range(count))
    free = min(torch.cuda.mem_get_info(i)[0] for i in range(count))
    text = f"{', '.join(f'{n}x {name}' for name, n in names.items())}, {free / 2**30:.0f} GiB or more free on each"
    if t.SEGMENTS % count:
        return Line("warn", text, f"a run takes 1, 2, 4 or 8 GPUs, and run.sh the first of these {count}; choose them "
                    "with CUDA_VISIBLE_DEVICES")
    # memory does not depend on attention, whose own check tells what is wrong with it
    chosen = t.choose_backends(replace(case.hp, attention="reference"), case.device)
    if free < (need := t.memory_needed(chosen)):
        return Line("warn", text, f"this run takes about {need / 2**30:.0f} GiB; nvidia-smi lists who uses the rest, "
                    "and a smaller --micro_tokens or --graphs=false needs less")
    return Line("ok", text)


def check_driver(case: Case) -> Line:
    """nvidia-smi tells it; where it is too old for torch, check_gpus says so."""
    if case.device.type == "cpu":
        return Line("ok", "not needed on the CPU")
    if version := no_gpu.driver_version():
        return Line("ok", version)
    return Line("warn", "nvidia-smi does not answer", "without it a log cannot say what the machine was")


def pins(file: str) -> Iterator[Requirement]:
    """What a requirements file and those that it names ask for."""
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            yield from pins(line.removeprefix("-r "))
        elif not line.startswith("#"):
            yield Requirement(line)


def differences(file: str) -> Iterator[str]:
    """Each package of the file whose version is another. What only other GPUs, data/ or tests need may be missing."""
    optional = "hopper" in file
    for pin in pins(file):
        if not optional and (pin.name not in RUN_PACKAGES or pin.marker and not pin.marker.evaluate()):
            continue
        try:
            version = importlib.metadata.version(pin.name)
        except importlib.metadata.PackageNotFoundError:
            if not optional:
                yield f"{pin.name} is missing (pinned: {pin.specifier})"
            continue
        if not pin.specifier.contains(version, prereleases=True):
            yield f"{pin.name} {version} (pinned: {pin.specifier})"


def check_versions(case: Case) -> Line:
    """Python and the packages are those of the requirements files that run.sh would take."""
    python = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        return Line("fail", f"Python {python}", "use Python {}.{} or newer".format(*MIN_PYTHON))
    gpu_files = "requirements-gpu.txt", "requirements-hopper.txt"
    found = {file: list(differences(file)) for file in (gpu_files if nvidia_smi("-L") else ("requirements.txt",))}
    if any(found.values()):
        return Line("warn", ", ".join([f"Python {python}", *itertools.chain(*found.values())]),
                    "pip install" + "".join(f" -r {file}" for file in found if found[file]))
    return Line("ok", f"Python {python}, torch {torch.__version__}, CUDA {torch.version.cuda}; the others as pinned")


def choice(case: Case, key: str, names: Iterable[str]) -> Line:
    """What the run takes of the names in order of speed, and which others could be asked for."""
    def choose(name: str) -> str:
        return t.choose_backends(replace(auto, **{key: name}), case.device)

    auto = replace(case.hp, attention="auto", kernels="auto")
    usable = []
    for name in names:
        with contextlib.suppress(t.UserError):
            usable.append(getattr(choose(name), key))
    recipe = choose(getattr(case.hp, key))
    chosen = getattr(recipe, key)
    text = f"{chosen} (usable here: {', '.join(usable)})"
    if case.device.type == "cpu" or getattr(case.hp, key) != "auto" or chosen == next(iter(names)):
        return Line("ok", text)
    if t.gpu_generation(case.device) != t.HOPPER_GPU:
        return Line("warn", text, "faster ones need a Hopper GPU")
    return Line("warn", text, t.missing_packages(replace(recipe, **{key: "auto"}), recipe, case.device))


def check_attention(case: Case) -> Line:
    """The attention backend is the fastest there is."""
    return choice(case, "attention", t.ATTENTION_BACKENDS)


def check_kernels(case: Case) -> Line:
    """The kernels are the fastest there are, and can be imported."""
    line = choice(case, "kernels", ("hopper", "plain"))
    if line.text.startswith("hopper"):
        t.quack_products()  # a package that is there may still fail to import
    return line


def fp8_error(device: torch.device) -> float:
    """The largest error of a small FP8 product whose numbers FP8 and bf16 hold exactly."""
    a, b = (torch.full((64, 64), value, device=device).to(torch.float8_e4m3fn) for value in (1.5, 2.0))
    product = t.fp8_product(a, b.t(), torch.tensor(0.5, device=device), torch.bfloat16)
    return (product.float() - 0.5 * 64 * 1.5 * 2.0).abs().max().item()


def check_fp8(case: Case) -> Line:
    """The GPU can compute the head's FP8 products."""
    if not case.hp.fp8_head:
        return Line("ok", "not used: --fp8_head=false")
    if case.device.type == "cpu":
        return Line("fail", "the head's products need a GPU")
    capability = torch.cuda.get_device_capability()
    if capability < t.FP8_CAPABILITY:  # choose_backends leaves FP8 out
        return Line("warn", "not used: capability {}.{}, but FP8 begins with {}.{}".format(
            *capability, *t.FP8_CAPABILITY), f"the head computes in {case.hp.dtype}, which is slower")
    error = fp8_error(case.device)
    return Line("fail" if error else "ok", f"a small product on the GPU is off by {error}")


def check_nvlink(case: Case) -> Line:
    """All GPUs are linked by NVLink."""
    if case.device.type == "cpu" or torch.cuda.device_count() == 1:
        return Line("ok", "not needed: no second GPU")
    rows = [line.split()[1:] for line in nvidia_smi("topo", "-m").splitlines() if line.startswith("GPU")]
    links = {link for row in rows for link in row[: len(rows)]} - {"X"}
    if not links:
        return Line("warn", "nvidia-smi topo -m does not say how the GPUs are linked")
    return Line("ok" if all(link.startswith("NV") for link in links) else "warn",
                f"the GPUs are linked by {', '.join(sorted(links))}")


def reduce_once(rank: int, world: int, kind: str, store: str) -> None:
    """One process of all_reduce."""
    device = torch.device(kind, rank if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=f"file://{store}", rank=rank,
                            world_size=world)
    x = torch.full((REDUCED,), rank + 1.0, device=device)
    dist.all_reduce(x)
    if not (x == world * (world + 1) / 2).all():
        raise RuntimeError(f"rank {rank} holds a wrong sum")
    dist.destroy_process_group()


def all_reduce(world: int, kind: str) -> None:
    """Sum a small tensor over `world` processes, on a device of that kind each; raises what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.spawn(reduce_once, (world, kind, f"{folder}/store"), world, join=False)
        end = time.monotonic() + NCCL_SECONDS
        try:
            while not processes.join(end - time.monotonic()):
                if time.monotonic() > end:
                    raise TimeoutError(f"no sum over {world} processes within {NCCL_SECONDS} s")
        finally:
            for process in processes.processes:
                process.kill()
                process.join()


def check_nccl(case: Case) -> Line:
    """All GPUs can sum a tensor."""
    if case.device.type == "cpu":
        return Line("ok", "not needed on the CPU")
    count, start = torch.cuda.device_count(), time.monotonic()
    all_reduce(count, "cuda")
    return Line("ok", f"the sum over {count} GPUs is right, after {time.monotonic() - start:.0f} s")


def missing_shards(hp: t.Recipe) -> list[Path]:
    """The shards that run.sh would download; none if the run reads other files."""
    if hp.train_files != t.Recipe.train_files:
        return []
    paths = [Path(hp.train_files).with_name(downloader.shard_name("fineweb", i)) for i in range(RUN_SHARDS + 1)]
    return [path for path in paths if not downloader.intact(path)]


def checkpoint_bytes(hp: t.Recipe) -> int:
    """The most that one checkpoint takes."""
    one = t.Ranks(0, 1, torch.device("meta"))
    with one.device:
        return sum(state.tensor.nbytes for state in t.NorMuonAdam(t.GPT(hp), hp, one).states())


def check_disk(case: Case) -> Line:
    """There is room for the log, for checkpoints, and for shards that are still to come."""
    hp = case.hp
    saves = sum(t.checkpoint_due(step, hp) for step in range(1, hp.num_steps + 1))
    needs = [(Path(hp.log_dir), LOG_BYTES + (saves and saves * checkpoint_bytes(hp)), "--log_dir")]
    if missing := missing_shards(hp):
        needs.append((missing[0].parent, len(missing) * SHARD_BYTES, "--train_files"))
    texts = []
    for folder, need, key in needs:
        there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
        if not os.access(there, os.W_OK):
            return Line("fail", f"{there} cannot be written", f"make it writable, or choose another place with {key}")
        free = shutil.disk_usage(there).free
        texts.append(f"{free / 1e9:.1f} GB free for {folder}, which needs {need / 1e9:.2f}")
        if free < need:
            return Line("fail", texts[-1], f"free some space, or choose another place with {key}")
    return Line("ok", "; ".join(texts))


def check_shards(case: Case) -> Line:
    """The shards are intact and last the whole schedule."""
    hp = case.hp
    files = t.check_files(hp)
    held = sum(Path(path).stat().st_size - 4 * t.HEADER_INTS for path in files) // 2
    shards = f"{len(files)} train shard{'s' * (len(files) != 1)} of {held:,} tokens"
    needed = sum(t.plan(step, hp).batch_tokens for step in range(hp.num_steps))
    if held < needed:
        return Line("fail", f"{shards}; the schedule reads {needed:,}")
    return Line("ok", f"{shards} for {needed:,} or more; val tokens are there")


def check_run(case: Case) -> Line:
    """What train_gpt.py --check looks at: all documents of the schedule, and the checkpoint of --resume."""
    hp = case.hp
    t.check_data(hp)
    t.read_checkpoint(hp.resume, hp)
    return Line("ok", f"the train shards last all {hp.num_steps} steps{'; the checkpoint fits' if hp.resume else ''}")


def check_hub(case: Case) -> Line:
    """The hub answers, if shards are missing."""
    missing = missing_shards(case.hp)
    if not missing:
        return Line("ok", "not needed: nothing to download")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo, name = downloader.DATASETS["fineweb10B"][0], missing[0].name
    with downloader.hub_errors(repo, name):
        get_hf_file_metadata(hf_hub_url(repo, name, repo_type="dataset"), timeout=HUB_SECONDS)
    return Line("ok", f"answers; run.sh will download {len(missing)} shard{'s' * (len(missing) != 1)}")


class Check(NamedTuple):
    """A row of CHECKS."""

    name: str
    run: Callable[[Case], Line]
    remedy: str = ""  # where the check's line has none, or the check raises
    slow: bool = False  # left out by --quick


CHECKS = (
    Check("GPUs", check_gpus, "look at nvidia-smi"),
    Check("driver", check_driver),
    Check("versions", check_versions),
    Check("attention", check_attention, "pip install -r requirements-hopper.txt, or ask for --attention=torch"),
    Check("kernels", check_kernels, "pip install -r requirements-hopper.txt, or ask for --kernels=plain"),
    Check("FP8", check_fp8, "--fp8_head=false computes the head in the weights' type, which is slower"),
    Check("NVLink", check_nvlink, "gradients travel slower without NVLink: expect longer steps"),
    Check("NCCL", check_nccl, "run again with NCCL_DEBUG=INFO to see where it stops; a container needs --shm-size=8g",
          slow=True),
    Check("disk", check_disk),
    Check("shards", check_shards, "data/cached_fineweb10B.py downloads more, or lower --num_scheduled_iterations"),
    Check("run", check_run, slow=True),
    Check("hub", check_hub, slow=True),
)


def examine(check: Check, case: Case) -> Line:
    """The check's line; whatever it raises is a failure."""
    try:
        line = check.run(case)
    except (t.UserError, downloader.DataError) as e:  # they tell the remedy themselves
        return Line("fail", str(e))
    except Exception as e:  # a broken driver or package may raise anything, and to tell it is the purpose
        return Line("fail", f"{type(e).__name__}: {(str(e).splitlines() or [''])[-1]}", check.remedy)
    return line if line.remedy or line.status == "ok" else line._replace(remedy=check.remedy)


def main() -> None:
    """Run the command line; exits with the status that the module's text tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out NCCL, the hub, and the walk over all documents")
    parser.add_argument("--check", action="store_true", help="with --quick: that walk, and the checkpoint of --resume")
    parser.add_argument("--quiet", action="store_true", help="print warnings and failures only")
    args, rest = parser.parse_known_args()
    try:
        hp, _ = t.parse_args(rest)
        cuda = torch.cuda.is_available()
        if hp.device == "auto" and not cuda and not nvidia_smi("-L"):
            hp, _ = t.parse_args(["--preset=demo", *rest])  # as run.sh does
    except t.UserError as e:
        parser.exit(2, f"error: {e}\n")
    case = Case(hp, torch.device("cuda" if cuda and hp.device != "cpu" else "cpu"))
    failed = set()
    for check in CHECKS:
        walk = check.run is check_run
        if check.slow and args.quick and not (walk and args.check) or walk and "shards" in failed:  # told by then
            continue
        line = examine(check, case)
        if line.status == "fail":
            failed.add(check.name)
        if line.status != "ok" or not args.quiet:
            print(f"{line.status:5} {check.name:10} {line.text}{line.remedy and '; ' + line.remedy}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
