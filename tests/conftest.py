"""Shared set-up: the script importable as a module, a process group of one, small shards."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
# Threads that wait for each other take ten times as long on a busy machine: one here, and in what tests start
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files that take longest, which begin first, so that two processes end at about the same time
SLOW = ("test_run.py", "test_tables.py", "test_checkpoint.py", "test_kernels_model.py", "test_kernels.py",
        "test_failures.py", "test_fineweb.py", "test_loader.py", "test_golden_demo.py", "test_ablate.py",
        "test_ab.py", "test_find_nan.py", "test_downloader.py", "test_trials.py", "test_sparse.py", "test_doctor.py",
        "test_candidates.py", "test_optimizer.py", "test_compare.py", "test_security.py", "test_hellaswag.py",
        "test_generate.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """The group of one rank that a run without torchrun makes, and its use of memory; at the end no forks are left."""
    import train_gpt as t

    t.reuse_cpu_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    forks.close()


@pytest.fixture
def make_shard(tmp_path):
    """Write tokens as a shard file, with any header field replaced."""

    def write(name, tokens, magic=20240520, version=1, count=None):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, len(tokens) if count is None else count
        path = tmp_path / name
        path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
        return str(path)

    return write


@pytest.fixture(scope="session")
def byte_files(tmp_path_factory):
    """The bundled shards with a vocabulary of 256, so that runs take little more than their start; keys of a recipe."""
    folder, files = tmp_path_factory.mktemp("bytes"), {}
    for kind, number in (("train", 1), ("val", 0)):
        path = folder / f"fineweb_{kind}_{number:06}.bin"
        raw = np.fromfile(ROOT / "data" / "sample" / path.name, "<u2")
        raw[512:] = np.where(raw[512:] == 50256, 255, raw[512:] % 255)
        raw.tofile(path)
        files[f"{kind}_files"] = str(path)
    return files


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Checkpoints of a small model with GPT-2's vocabulary, after 3 of 4 steps and at the end, by number of steps."""
    import train_gpt as t

    folder = tmp_path_factory.mktemp("checkpoint")
    data = {f"{kind}_files": f"{ROOT}/data/sample/fineweb_{kind}_*.bin" for kind in ("train", "val")}
    hp = replace(t.PRESETS["demo"], **data, model_dim=16, num_heads=2, head_dim=8, batch_unit=64, val_tokens=256,
                 val_chunk=256, val_every=0, num_scheduled_iterations=3, num_extension_iterations=1, save_every=3,
                 save_final=True, run_id="run", log_dir=str(folder), seed=3)
    ranks = t.Ranks(0, 1, torch.device("cpu"))
    log = t.Log(hp, ranks)
    t.train(t.Run(hp, ranks), log, t.Watch(ranks, log), None)
    log.close()
    return {step: str(folder / f"run_step{step}.pt") for step in (3, 4)}


@pytest.fixture
def unmeasured(monkeypatch):
    """Keep coverage out of the processes that a test starts: its own files would meet the limits set there."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
