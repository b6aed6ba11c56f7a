"""Times every operation on one GPU, HOPPER's against PLAIN's and against the roofline, forward and backward together.

    python tools/bench_kernels.py --tokens=49152 --json=kernels.json

The roofline is the time that the bytes or the FLOP of an operation take at the ceilings measured first: a large copy
and a large bf16 product on this GPU. Its bytes are those of inputs and results forward, and of inputs and all gradients
backward. Times are medians in ms, with the 20 % and 80 % quantiles; shapes are the record's.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

DEVICE, DTYPE, SIZES = "cuda", torch.bfloat16, t.Recipe().sizes
FLOP = {  # of each operation's products, forward; backward takes twice as much
    "attention_inputs": lambda T, D, **_: 6 * T * D * D,
    "linear_sum": lambda T, D, L, **_: 2 * L * T * D * D,
    "mlp": lambda T, D, F, **_: 4 * T * D * F,
    "head_loss": lambda T, D, V, **_: 2 * T * D * V,
}
BATCH, DOCUMENTS = 16384, {1: 48, 2: 80, 3: 110}  # tokens of a segment and documents in it, by Stage.batch
LINE = "{:30}{:42}{:>9}{:>19}{:>10}{:>10}{:>10}{:>8}"
compiled = partial(torch.compile, fullgraph=True, dynamic=False)
COPY_BYTES, PRODUCT_SIZE, BUDGET_MS = 2**32, 8192, 30


class Row(NamedTuple):
    """An operation at one shape: functions to time, and what it moves and computes at least."""

    name: str
    shape: str
    ours: Callable
    bytes: float
    flop: float = 0
    compiled: Callable | None = None
    eager: Callable | None = None


def timed(f: Callable) -> list[float]:
    """Median, 20 % and 80 % quantile in ms."""
    return list(t.triton.testing.do_bench(f, warmup=BUDGET_MS // 3, rep=BUDGET_MS, quantiles=[0.5, 0.2, 0.8]))


def ceilings() -> tuple[float, float]:
    """Bytes per ms of a copy, read and written, and FLOP per ms of a square bf16 product."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / timed(lambda: target.copy_(source))[0]
    a, b = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE, device=DEVICE, dtype=DTYPE)
    return bandwidth, 2 * PRODUCT_SIZE**3 / timed(lambda: a @ b)[0]


def both_ways(run: Callable, ops: t.Ops, inputs: list[torch.Tensor]) -> Callable:
    """A function of no arguments that runs a case forward and, where it has gradients, backward."""
    inputs, directions = [x.detach().requires_grad_() for x in inputs], []

    def f() -> list[torch.Tensor]:
        results = [x for x in tree_leaves(run(ops, *inputs)) if x is not None]
        if not results[0].requires_grad:
            return results
        directions[:] = directions or map(torch.randn_like, results)
        return [*results, *torch.autograd.grad(results, inputs, directions, allow_unused=True)]
    return f


def operation(name: str, case: t.Case, sizes: dict[str, int]) -> Row:
    """A case of CASES. The rows of tables are added outside of compiled graphs."""
    inputs, graph = t.case_inputs(case, sizes, DTYPE, DEVICE), compiled(case.run)
    size, results = (sum(x.nbytes for x in tree_leaves(y) if x is not None) for y in (
        inputs, case.run(t.HOPPER, *inputs)))
    shape = " ".join(f"{letter}={sizes[letter]}" for letter in "TLDFV" if letter in case.shapes)
    eager = both_ways(case.run, t.PLAIN, inputs)
    if case.op == "add_rows":
        return Row(name, shape, both_ways(case.run, t.HOPPER, inputs), size + 2 * results, eager=eager)
    flop = 3 * FLOP[case.op](**sizes) if case.op in FLOP else 0
    flop /= 2 if "FP8" in name else 1  # the tensor cores' FP8 rate is twice that of bf16
    return Row(name, shape, both_ways(graph, t.HOPPER, inputs), 3 * size + 2 * results, flop,
               both_ways(graph, t.PLAIN, inputs), eager)


def attention(backend: str, stage: t.Stage, long: bool) -> Row:
    """The case of attention by a backend, with a stage's window and documents in place of the case's own."""
    attend, T, documents = t.ATTENTION_BACKENDS[backend](), BATCH * stage.batch, DOCUMENTS[stage.batch]
    case, window = t.CASES["attention"], t.Recipe().block * (stage.long if long else stage.short)
    cuts = torch.randperm(T - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].sort().values + 1
    ends = torch.tensor([0, *cuts.tolist()] + [T] * (t.max_docs(T) - documents), dtype=torch.int32)
    lengths = ends.diff()
    # query i of a document sees min(i, window) + 1 keys, at 4 d FLOP forward and 10 d backward each
    inside = lengths.clamp_max(window + 1)
    seen = (inside * (inside + 1) // 2 + (lengths - inside) * (window + 1)).sum().item()
    options = ends.to(DEVICE), lengths.max().item(), window
    ops = t.HOPPER._replace(attention=lambda q, k, v, _ends, _longest, _window, *more: attend(q, k, v, *options, *more))
    inputs = t.case_inputs(case, SIZES | dict(T=T), DTYPE, DEVICE)
    size = 3 * sum(x.nbytes for x in inputs) + 2 * inputs[0].nbytes
    return Row(f"attention, {backend}", f"T={T} window={window} documents={documents}",
               both_ways(case.run, ops, inputs), size, 14 * SIZES["D"] * seen)


def rows(tokens: int) -> Iterator[tuple[str, Callable]]:
    """Names, and functions that make the Row of each case; attention at the windows of the record's stages."""
    for name, case in t.CASES.items():
        if case.op != "attention":
            yield name, partial(operation, name, case, SIZES | dict(T=tokens, L=SIZES["A"]))
    for backend, stage, long in itertools.product(("torch", "fa4"), t.STAGES[:3], (False, True)):
        yield f"attention, {backend}", partial(attention, backend, stage, long)


def attempt(name: str, f: Callable, *args: object) -> object:
    """What f returns; an error costs one line and returns {"name", "error"}."""
    try:
        return f(*args)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        print(f"{name}: failed, {text}", flush=True)
        return {"name": name, "error": text}


def measure(make: Callable, bandwidth: float, rate: float) -> dict:
    """Time a row, in ms, beside its roofline for bandwidth in bytes per ms and rate in FLOP per ms; print its line."""
    row = make()
    ours, low, high = timed(row.ours)
    roofline = max(row.bytes / bandwidth, row.flop / rate)
    plain = [f and attempt(row.name, timed, f) for f in (row.compiled, row.eager)]
    compiled_ms, eager_ms = (x[0] if isinstance(x, list) else None for x in plain)
    cells = ["-" if x is None else f"{x:.4f}" for x in (compiled_ms, eager_ms, roofline)] + [f"{ours / roofline:.2f}"]
    print(LINE.format(row.name, row.shape, f"{ours:.4f}", f"{low:.4f}-{high:.4f}", *cells), flush=True)
    return {"name": row.name, "shape": row.shape, "ours_ms": ours, "ours_20_ms": low, "ours_80_ms": high,
            "compiled_ms": compiled_ms, "eager_ms": eager_ms, "roofline_ms": roofline, "ratio": ours / roofline}


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=49152, help="tokens of a micro-batch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    if args.tokens < 16 or args.tokens % 16 or (args.json and not args.json.resolve().parent.is_dir()):
        parser.error("--tokens must be a positive multiple of 16, and the folder of --json must exist")
    if t.triton is None or not torch.cuda.is_available() or t.gpu_generation(torch.device(DEVICE)) != t.HOPPER_GPU:
        print("bench_kernels: needs Triton and a Hopper NVIDIA GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {t.triton.__version__}"
    print(f"{about}: copies {bandwidth / 1e9:.2f} TB/s, bf16 products {rate / 1e9:.0f} TFLOP/s")
    print(LINE.format("operation", "sizes", "ours ms", "20 % - 80 %", "compiled", "eager", "roofline", "ratio"))
    results = []
    for name, make in rows(args.tokens):
        results.append(attempt(name, measure, make, bandwidth, rate))
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if args.json:
        text = dict(about=about, bytes_per_s=bandwidth * 1e3, flop_per_s=rate * 1e3, rows=results)
        args.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
