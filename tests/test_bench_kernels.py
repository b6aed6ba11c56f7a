"""tools/bench_kernels.py without a GPU: what it times agrees, what it counts and what it prints is right."""

import json
import sys

import bench_kernels as b
import pytest
import torch

t, T = b.t, 32


@pytest.fixture
def small(monkeypatch):
    """Small shapes on the CPU in fp32, without compilation, and every operation and backend PLAIN's."""
    sizes = dict(A=2, V=64, D=32, F=64, H=2, d=16, G=t.GATE_INPUTS)
    changed = dict(DEVICE="cpu", DTYPE=torch.float32, SIZES=sizes, BATCH=T, DOCUMENTS={1: 3, 2: 5, 3: 4},
                   compiled=lambda f: f, COPY_BYTES=1024, PRODUCT_SIZE=8)
    for name, value in changed.items():
        monkeypatch.setattr(b, name, value)
    monkeypatch.setattr(t, "HOPPER", t.PLAIN)
    monkeypatch.setattr(t, "ATTENTION_BACKENDS", dict.fromkeys(("torch", "fa4"), lambda: t.attention_reference))
    torch.manual_seed(0)


def test_rows(small):
    """Every case has its row, which runs both ways for the gradients of all inputs that count, and has work to do."""
    made = {name: make() for name, make in b.rows(T)}
    assert made.keys() == t.CASES.keys() - {"attention"} | {"attention, torch", "attention, fa4"}
    for name, row in made.items():
        results = [x for x in row.ours() if x is not None]
        assert row.bytes > 0 and row.eager is not None or "attention, " in name
        assert len(results) > 1 or name == "rows of a table"
        assert not (row.compiled is None and name in t.CASES and name != "rows of a table")
        assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("name,flop,numbers", [
    ("MLP", 3 * 2 * 2 * T * 32 * 64, 3 * (T * 32 + 2 * 64 * 32 + 1) + 2 * T * 32),
    ("linear sum", 3 * 2 * 2 * T * 32 * 32, 3 * (4 * T * 32 + 32 * 32 + 2 * 2) + 2 * T * 32),
    ("head", 3 * 2 * T * 32 * 64, 3 * (T * 32 + 32 * 64) + 2), ("head in FP8", 3 * T * 32 * 64, None),
    ("attention inputs", 3 * 2 * T * 32 * 96, None), ("rows of a table", 0, T * 32 + 2 * 37 * 32)])
def test_work(small, name, flop, numbers):
    """Two FLOP for each factor, and each number when it must be read or written, in fp32 here."""
    row = dict(b.rows(T))[name]()
    assert row.flop == flop and numbers in (None, row.bytes / 4)


def test_attention_counts_what_a_query_sees(small, monkeypatch):
    """Pairs of query and key, one by one, of the documents and the window that the backend gets."""
    def attend(q, k, v, ends, longest, window, scale, gate):
        document = [sum(e <= i for e in ends.tolist()) for i in range(len(q))]
        pairs.append(sum(document[i] == document[j] and 0 <= i - j <= window
                         for i in range(len(q)) for j in range(len(q))))
        seen.append((len(q), window, len(set(document))))
        assert longest == ends.diff().max() and scale == 0.1 and gate.shape == q.shape[:2]
        return t.attention_reference(q, k, v, ends, longest, window, scale, gate)

    monkeypatch.setattr(t, "ATTENTION_BACKENDS", dict.fromkeys(("torch", "fa4"), lambda: attend))
    monkeypatch.setattr(t, "STAGES", [stage._replace(short=stage.batch, long=3) for stage in t.STAGES])
    monkeypatch.setattr(t, "Recipe", lambda: t.PRESETS["demo"])
    pairs, seen = [], []
    for row in (make() for name, make in b.rows(T) if name == "attention, fa4"):
        row.ours()
        assert row.flop == 3.5 * 4 * 32 * pairs[-1]
    assert seen == [(32, 16, 3), (32, 48, 3), (64, 32, 5), (64, 48, 5), (96, 48, 4), (96, 48, 4)]


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *args])
    return b.main()


def test_table_and_json(small, tmp_path, monkeypatch, capsys):
    """A line a row and the same in the file; a kernel that fails costs one line."""
    def broken():
        raise RuntimeError("out of\nmemory")

    def rows(tokens):
        yield "good", lambda: b.Row("good", "T=1", lambda: "ours", 1024.0, compiled=broken, eager=lambda: "eager")
        yield "bad", lambda: b.Row("bad", f"{tokens}", broken, 1)
        yield "missing", lambda: __import__("no package")

    times = {"ours": [2.0, 1.5, 2.5], "eager": [8.0, 8.0, 8.0]}
    monkeypatch.setattr(b, "timed", lambda f: times.get(f(), [1.0, 1.0, 1.0]))
    monkeypatch.setattr(b, "rows", rows)
    monkeypatch.setattr(b.t, "gpu_generation", lambda device: t.HOPPER_GPU)
    for name, value in (("is_available", True), ("get_device_name", "a GPU"), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(b, "ceilings", lambda: (1024.0, 1.0))
    assert run(monkeypatch, "--tokens=48", f"--json={tmp_path}/k.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # median, quantiles, compiled, eager, roofline (1 KiB at 1 KiB a ms), ratio
    assert lines[3] == ["good", "T=1", "2.0000", "1.5000-2.5000", "-", "8.0000", "1.0000", "2.00"]
    assert lines[2] == "good: failed, RuntimeError: out of memory".split()
    assert lines[4] == "bad: failed, RuntimeError: out of memory".split()
    assert lines[5][:3] == "missing: failed, ModuleNotFoundError:".split()
    saved = json.loads((tmp_path / "k.json").read_text())
    assert saved["bytes_per_s"] == 1024e3 and [row["name"] for row in saved["rows"]] == ["good", "bad", "missing"]
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
    assert capsys.readouterr().err == "bench_kernels: needs Triton and a Hopper NVIDIA GPU\n"
