"""Shared set-up: the script importable as a module, a process group of one, small shards."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """The group of one rank that a run without torchrun makes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
