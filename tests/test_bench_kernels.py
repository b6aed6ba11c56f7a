"""tools/bench_kernels.py without a GPU: what it times agrees, in Triton's interpreter, and what it prints is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import bench_kernels as b

t, T = b.t, 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when the kernels are defined
GROUPS = [name for name in b.GROUPS if name not in ("attention fa4", "logits")]  # these need a GPU


@pytest.mark.skipif(t.triton is None, reason="Triton is not installed")
def test_interpreted():
    """The class below passes in a process whose Triton interprets the kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__)}::TestInterpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=b.Path(t.__file__).parent,
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(GROUPS)} passed" in done.stdout, done.stdout


@pytest.fixture
def small(monkeypatch):
    """Small shapes on the CPU in fp32, without compilation, and torch's attention by the reference."""
    changed = dict(DEVICE="cpu", DTYPE=torch.float32, VOCABULARY=64, DIM=32, WIDTH=64, HEADS=2, HEAD_DIM=16,
                   BANKS={"qk": (2, 16, 32), "mlp": (2, 64, 32)}, ATTENTION=((T, 4, 3), (T, 9, 5)),
                   compiled=lambda f: f, COPY_BYTES=1024, PRODUCT_SIZE=8)
    for name, value in changed.items():
        monkeypatch.setattr(b, name, value)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "torch", lambda: t.attention_reference)
    torch.manual_seed(0)


def flat(results):
    results = results if isinstance(results, tuple | list) else [results]
    return [x.view(torch.uint8) if x.element_size() == 1 else x for x in results if x is not None]


class TestInterpreted:
    """fp32, as the interpreter's bf16 and fp8 arithmetic is wrong."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("group", GROUPS)
    def test_rows_compute_the_same(self, small, group, monkeypatch):
        """Each row's kernel gives what its compiled and its eager version give, and has work to be measured against."""
        if group == "loss":  # its gradients would be fp8
            monkeypatch.setattr(b, "E5M2", torch.float32)
        rows = list(b.GROUPS[group](T))
        assert rows and all(row.bytes > 0 and row.flop >= 0 for row in rows)
        for row in rows:
            ours = flat(row.ours())
            for other in filter(None, (row.compiled, row.eager)):
                torch.testing.assert_close(ours, [x.view(y.shape) for x, y in zip(flat(other()), ours)],
                                           rtol=1e-4, atol=1e-4)


def test_work_of_a_product(small):
    """Two FLOP for each factor, and each matrix once, in fp32 here."""
    row = next(b.products(T))
    assert row.flop == 2 * T * 32 * 64 and row.bytes == 4 * (T * 32 + 32 * 64 + T * 64)


def test_attention_counts_what_a_query_sees(small):
    """Pairs of query and key, one by one."""
    for row in b.attention("torch", T):
        if "backward" in row.name:
            continue
        ends, _, window, scale = row.ours.func.__kwdefaults__["options"]
        document = [sum(e <= i for e in ends.tolist()) for i in range(T)]
        pairs = sum(document[i] == document[j] and 0 <= i - j <= window for i in range(T) for j in range(T))
        assert row.flop == 4 * 32 * pairs and scale == 0.1


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *args])
    return b.main()


def test_table_and_json(small, tmp_path, monkeypatch, capsys):
    """A line a row and the same in the file; a kernel that fails costs one line."""
    def broken():
        raise RuntimeError("out of\nmemory")

    def group(tokens):
        yield b.Row("good", "1 x 1", lambda: "ours", 1024.0, compiled=broken, eager=lambda: "eager")
        yield b.Row("bad", f"{tokens}", broken, 1)

    def unusable(tokens):
        raise ImportError("no package")
        yield

    times = {"ours": [2.0, 1.5, 2.5], "eager": [8.0, 8.0, 8.0]}
    monkeypatch.setattr(b, "timed", lambda f: times.get(f(), [1.0, 1.0, 1.0]))
    monkeypatch.setattr(b, "GROUPS", {"made up": group, "missing": unusable})
    monkeypatch.setattr(b.t, "gpu_generation", lambda device: t.HOPPER)
    for name, value in (("is_available", True), ("get_device_name", "a GPU"), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(b, "ceilings", lambda: (1024.0, 1.0))
    assert run(monkeypatch, "--tokens=48", f"--json={tmp_path}/k.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # median, quantiles, compiled, eager, roofline (1 KiB at 1 KiB a ms), ratio
    assert lines[3] == ["good", "1", "x", "1", "2.0000", "1.5000-2.5000", "-", "8.0000", "1.0000", "2.00"]
    assert lines[2] == "good: failed, RuntimeError: out of memory".split()
    assert lines[4] == "bad 48: failed, RuntimeError: out of memory".split()
    assert lines[5] == "missing: failed, ImportError: no package".split()
    saved = json.loads((tmp_path / "k.json").read_text())
    assert saved["bytes_per_s"] == 1024e3 and [row["name"] for row in saved["rows"]] == ["good", "bad 48", "missing"]
    assert saved["rows"][0]["ratio"] == 2.0 and saved["rows"][0]["compiled_ms"] is None


def test_ceilings(small, monkeypatch):
    """Bytes read and written, and two FLOP a factor, in a millisecond."""
    monkeypatch.setattr(b, "timed", lambda f: f() is None or [2.0, 2.0, 2.0])
    assert b.ceilings() == (2 * 1024 / 2, 2 * 8**3 / 2)


def test_timed(monkeypatch):
    class Testing:
        @staticmethod
        def do_bench(f, warmup, rep, quantiles):
            assert quantiles == [0.5, 0.2, 0.8] and f() == 7
            return (2, 1, 3)

    monkeypatch.setattr(t, "triton", type("Triton", (), {"testing": Testing}))
    assert b.timed(lambda: 7) == [2, 1, 3]


@pytest.mark.parametrize("args", [["--tokens=8"], ["--tokens=100"], ["--json=nowhere/x.json"]])
def test_bad_arguments(args, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *args)
    assert error.value.code == 2 and "must be a positive multiple of 16" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu(monkeypatch, capsys):
    assert run(monkeypatch) == 1
    assert capsys.readouterr().err == "bench_kernels: needs Triton and a Hopper or newer NVIDIA GPU\n"
