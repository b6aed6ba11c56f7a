"""Times every kernel on one GPU against the plain PyTorch version and against the roofline.

    python tools/bench_kernels.py --tokens=49152 --json=kernels.json

The roofline is the time that the bytes or the FLOP of a kernel take at the ceilings measured first: a large copy and a
large bf16 product on this GPU. Times are medians in ms, with the 20 % and 80 % quantiles; shapes are the record run's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

DEVICE, DTYPE, E5M2 = "cuda", torch.bfloat16, torch.float8_e5m2
VOCABULARY, DIM, WIDTH, HEADS, HEAD_DIM = 50304, 768, 3072, 6, 128
LAYERS = len(t.ATTN_INDEX)
BANKS = {"qk": (60, 256, 768), "vo": (20, 768, 768), "mlp": (24, 3072, 768)}
ATTENTION = tuple((tokens, window, documents) for tokens, documents, windows in (
    (16384, 48, (128, 384)), (32768, 80, (384, 896)), (49152, 110, (640, 1408))) for window in windows)
LINE = "{:38}{:36}{:>9}{:>19}{:>10}{:>10}{:>10}{:>8}"
compiled = partial(torch.compile, fullgraph=True, dynamic=False)
COPY_BYTES, PRODUCT_SIZE, BUDGET_MS = 2**32, 8192, 30


class Row(NamedTuple):
    """A kernel at one shape: functions to time, and what it moves and computes at least."""

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


def randn(*shape: int) -> torch.Tensor:
    """Normal random numbers in bf16 on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def backward(f: Callable, inputs: list, direction: torch.Tensor | list[torch.Tensor]) -> Callable:
    """A function of no arguments that runs f forward and backward for the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(f(*inputs), inputs, direction)


def ceilings() -> tuple[float, float]:
    """Bytes per ms of a copy, read and written, and FLOP per ms of a square bf16 product."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / timed(lambda: target.copy_(source))[0]
    a, b = randn(PRODUCT_SIZE, PRODUCT_SIZE), randn(PRODUCT_SIZE, PRODUCT_SIZE)
    return bandwidth, 2 * PRODUCT_SIZE**3 / timed(lambda: a @ b)[0]


def products(T: int) -> Iterator[Row]:
    """Products with each epilogue, and the MLP; T tokens."""
    x, up, down, dy = randn(T, DIM), randn(WIDTH, DIM) * DIM**-0.5, randn(WIDTH, DIM) * DIM**-0.5, randn(T, DIM)
    o, scale = randn(DIM, DIM) * DIM**-0.5, torch.full((T,), 0.7, device=DEVICE)
    r = t.inverse_rms(x.float().square(), DIM)
    h, moved, work = t.product_reference(x, up.mT, r), 2 * (T * DIM + T * WIDTH + DIM * WIDTH), 2 * T * DIM * WIDTH
    for name, a, b, *more in (
        ("product", x, up.mT), ("product, relu square", x, up.mT, r), ("product_root", dy, down.mT, h, r),
        ("product_norm_grad", h, up, dy, x, scale[0], r),
        ("product_sum, 1 term", h, down, [x], [scale[0]]),
        ("product_sum, 3 terms", x, o.mT, [x, dy, x], [scale[0]] * 3),
    ):
        ours, plain = (partial(getattr(t, name.split(",")[0] + suffix), a, b, *more) for suffix in ("", "_reference"))
        size = sum(c.nbytes for c in tree_leaves((a, b, more)))
        yield Row(name, f"{T} x {len(b)} x {b.size(1)}", ours, size + T * b.size(1) * a.itemsize, 2 * T * b.numel(),
                  compiled(plain), plain)
    inputs, shape = [x, up, down, scale], f"{T} x {DIM} x {WIDTH}"
    ours, plain = lambda x, *y: t.ReluSquareMLP.apply(x, r, *y)[0], lambda x, *y: t.mlp_reference(x, None, *y)[0]
    yield Row("MLP forward + backward", shape, backward(compiled(ours), inputs, dy), 6 * moved, 6 * work,
              backward(compiled(plain), inputs, dy), backward(plain, inputs, dy))
    scales, grads = torch.rand(2, LAYERS, device=DEVICE), [randn(T, DIM) for _ in range(LAYERS)]
    ours, plain = (backward(f, [x, dy, *scales], grads) for f in (
        t.EmbeddingSums.apply, compiled(t.embedding_sums_reference)))
    yield Row("embedding sums backward", f"{LAYERS} x {T} x {DIM}", ours, 2 * (4 + LAYERS) * T * DIM, compiled=plain)
    dqkv = randn(T, 3 * DIM)
    yield Row("weight gradient of QKV", f"{3 * DIM} x {T} x {DIM}", partial(compiled(t.weight_grad), dqkv, x),
              2 * (4 * T * DIM + 3 * DIM * DIM), 6 * T * DIM * DIM, eager=lambda: dqkv.mT @ x)


def attention_inputs(T: int) -> Iterator[Row]:
    """What attention reads, from QKV, with a key offset and a value embedding; T tokens."""
    inputs = [randn(T, 3, HEADS, HEAD_DIM), randn(T, DIM), randn(T, HEADS)]
    angles, grads = 6 * torch.rand(T, HEAD_DIM // 4, device=DEVICE), [randn(T, HEADS, HEAD_DIM) for _ in range(3)]
    more, shape = (angles.cos().to(DTYPE), angles.sin().to(DTYPE), False, True), f"{T} x {HEADS} x {HEAD_DIM}"
    ours, plain = (
        lambda qkv, *x, f=f: f(qkv, None, *x, *more) for f in (t.AttentionInputs.apply, t.attention_inputs_reference))
    graph, size = compiled(plain), 2 * T * DIM
    yield Row("attention inputs forward", shape, partial(ours, *inputs), 7 * size, 0, partial(graph, *inputs))
    yield Row("attention inputs forward + backward", shape, backward(ours, inputs, grads), 17 * size, 0,
              backward(graph, inputs, grads), backward(plain, inputs, grads))


def gates(T: int) -> Iterator[Row]:
    """Gates of heads and of a value embedding; T tokens."""
    n, half = t.GATE_INPUTS, t.GATE_INPUTS // 2
    inputs, dgates = [randn(T, n), randn(T, half), randn(HEADS, n), randn(HEADS, n)], [
        torch.randn(T, HEADS, device=DEVICE) for _ in range(2)]
    ours = lambda seen, *x: t.Gates.apply(seen, None, *x)
    plain = lambda seen, *x: tuple(y.float() for y in t.gates_reference(seen, None, *x))
    yield Row("gates forward + backward", f"{T} x {HEADS} x {n}", backward(compiled(ours), inputs, dgates),
              T * (2 * 3 * (n + half) + 4 * 2 * 3 * HEADS), 0, backward(compiled(plain), inputs, dgates),
              backward(plain, inputs, dgates))


def logits(T: int) -> Iterator[Row]:
    """The head's product of T tokens, in FP8 with the shorter sums."""
    x, w = (randn(n, DIM).to(torch.float8_e4m3fn) for n in (T, VOCABULARY))
    args = x, w.mT, torch.ones((), device=DEVICE)
    # the tensor cores' FP8 rate is twice that of bf16
    yield Row("FP8 logits", f"{T} x {DIM} x {VOCABULARY}", partial(t.quick_fp8_product, *args),
              T * DIM + DIM * VOCABULARY + 2 * T * VOCABULARY, T * DIM * VOCABULARY,
              eager=partial(t.quick_fp8_product_reference, *args))


def loss(T: int) -> Iterator[Row]:
    """Loss and gradient from the logits of T tokens, for one predicted token."""
    logits, targets = randn(T, VOCABULARY).mul_(4), torch.randint(0, VOCABULARY, (1, T), device=DEVICE)
    args = logits, targets, torch.tensor([1 / 8], device=DEVICE), E5M2, t.GRAD_SCALE / 8
    yield Row("loss", f"{T} x {VOCABULARY}", partial(t.softcapped_mtp_loss, *args), 3 * T * VOCABULARY,
              compiled=partial(compiled(t.softcapped_mtp_loss_reference), *args))


def tables(T: int) -> Iterator[Row]:
    """Transposes of the gradient of T tokens' logits and of the head, and the gradient of an embedding table."""
    grad = torch.randint(0, 256, (T, VOCABULARY), dtype=torch.uint8, device=DEVICE)
    graph = compiled(lambda x: x.mT.contiguous())
    yield Row("transposed e5m2", f"{T} x {VOCABULARY}", partial(t.transposed, grad.view(E5M2)), 2 * T * VOCABULARY, 0,
              partial(graph, grad), lambda: grad.mT.contiguous())
    head, table = randn(DIM, VOCABULARY), randn(VOCABULARY, DIM)
    for source, target, add in ((head, table, False), (head, table, True), (table, head, False), (table, head, True)):
        yield Row(f"transpose_into, {'add' if add else 'copy'}", " x ".join(map(str, source.shape)),
                  partial(t.transpose_into, source, target, add), (6 if add else 4) * head.numel(),
                  eager=partial(t.transpose_into_reference, source, target, add))
    rows, ids = randn(T, DIM), (VOCABULARY * torch.rand(T, device=DEVICE) ** 4).int()  # some rows much more often
    touched = len(ids.unique())
    for order in (None, ids.argsort().int()):
        args = rows, ids, torch.zeros(VOCABULARY, DIM, device=DEVICE), order
        yield Row(f"scatter_add_rows, {'any order' if order is None else 'ordered'}", f"{T} x {DIM}",
                  partial(t.scatter_add_rows, *args), (2 * T + 8 * touched) * DIM,
                  eager=partial(t.scatter_add_rows_reference, *args))


def symmetric(_T: int) -> Iterator[Row]:
    """Symmetric products and Polar Express at the shapes of the banks."""
    for name, shape in BANKS.items():  # half of a symmetric product need be computed: n^2 k FLOP
        x, K, (n, k) = randn(*shape), shape[0], sorted(shape[1:])
        wide = x.mT if shape[1] > shape[2] else x
        s = t.symmetric_product_reference(wide, 0.0, 1.0) / k
        for what, depth, *args in (("x x^T", k, wide, 0.0, 1.0), ("b s + c s s^T", n, s, -2.8, 0.5)):
            yield Row(f"{what}, bank {name}", f"{K} x {n} x {depth}", partial(t.symmetric_product, *args),
                      2 * K * n * (depth + n), K * n * n * depth, eager=partial(t.symmetric_product_reference, *args))
        yield Row(f"Polar Express, bank {name}", " x ".join(map(str, shape)), partial(t.polar_express, x, True),
                  4 * x.numel(), len(t.POLAR_COEFFICIENTS) * K * n * n * (3 * k + n),
                  eager=partial(t.polar_express, x, False))


def attention(backend: str, _T: int) -> Iterator[Row]:
    """A backend of attention at the shapes of ATTENTION; raises what its import raises."""
    attend = t.ATTENTION_BACKENDS[backend]()  # without the package one line says so
    for T, window, documents in ATTENTION:
        ends = torch.randperm(T - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].sort().values + 1
        ends = [0, *ends.tolist()] + [T] * (t.max_docs(T) - documents)
        lengths = torch.tensor(ends).diff()
        # query i of a document sees min(i, window) + 1 keys, at 4 d FLOP forward and 10 d backward each
        inside = lengths.clamp_max(window + 1)
        seen = (inside * (inside + 1) // 2 + (lengths - inside) * (window + 1)).sum().item()
        work, size = 4 * DIM * seen, 2 * T * DIM
        options = torch.tensor(ends, dtype=torch.int32, device=DEVICE), lengths.max().item(), window, 0.1
        run = lambda *x, options=options: attend(*x, *options)
        inputs, shape = [randn(T, HEADS, HEAD_DIM) for _ in range(3)], f"{T}, window {window}, documents {documents}"
        yield Row(f"attention {backend} forward", shape, partial(run, *inputs), 4 * size, work)
        both = backward(run, inputs, randn(T, HEADS, HEAD_DIM))
        yield Row(f"attention {backend} forward + backward", shape, both, 12 * size, 3.5 * work)


GROUPS = {f.__name__: f for f in (products, attention_inputs, gates, logits, loss, tables, symmetric)} | {
    f"attention {backend}": partial(attention, backend) for backend in ("torch", "fa4")}


def attempt(name: str, f: Callable, *args: object) -> object:
    """What f returns; an error costs one line and returns {"name", "error"}."""
    try:
        return f(*args)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        print(f"{name}: failed, {text}", flush=True)
        return {"name": name, "error": text}


def measure(row: Row, bandwidth: float, rate: float) -> dict:
    """Time a row, in ms, beside its roofline for bandwidth in bytes per ms and rate in FLOP per ms; print its line."""
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
    if t.triton is None or not torch.cuda.is_available() or t.gpu_generation(torch.device(DEVICE)) < t.HOPPER:
        print("bench_kernels: needs Triton and a Hopper or newer NVIDIA GPU", file=sys.stderr)
        return 1
    began, results = time.monotonic(), []
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {t.triton.__version__}"
    print(f"{about}: copies {bandwidth / 1e9:.2f} TB/s, bf16 products {rate / 1e9:.0f} TFLOP/s")
    print(LINE.format("kernel", "shape", "ours ms", "20 % - 80 %", "compiled", "eager", "roofline", "ratio"))

    def run(group: Callable) -> None:
        results.extend(attempt(f"{x.name} {x.shape}", measure, x, bandwidth, rate) for x in group(args.tokens))

    for name, group in GROUPS.items():
        results += filter(None, [attempt(name, run, group)])
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s")
    if args.json:
        ceiling = {"bytes_per_s": bandwidth * 1e3, "flop_per_s": rate * 1e3}
        args.json.write_text(json.dumps({"about": about, **ceiling, "rows": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
