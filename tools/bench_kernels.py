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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

DEVICE, DTYPE, E5M2 = "cuda", torch.bfloat16, torch.float8_e5m2
VOCABULARY, DIM, WIDTH, HEADS, HEAD_DIM = 50304, 768, 3072, 6, 128
BANKS = {"qk": (60, 256, 768), "vo": (20, 768, 768), "mlp": (24, 3072, 768)}
ATTENTION = ((16384, 128, 48), (16384, 384, 48), (32768, 384, 80), (32768, 896, 80), (49152, 640, 110),
             (49152, 1408, 110))  # tokens, window, documents: the short and long windows of the stages
LINE = "{:38}{:36}{:>9}{:>19}{:>10}{:>10}{:>10}{:>8}"
COPY_BYTES, PRODUCT_SIZE, BUDGET_MS = 2**32, 8192, 30


@dataclass
class Row:
    """One kernel at one shape: functions to time, and what it moves and computes at least."""

    name: str
    shape: str
    ours: Callable
    bytes: float
    flop: float = 0
    compiled: Callable | None = None
    eager: Callable | None = None


def timed(f: Callable) -> list[float]:
    """Median, 20 % and 80 % quantile in ms."""
    from triton.testing import do_bench

    return [float(x) for x in do_bench(f, warmup=BUDGET_MS // 3, rep=BUDGET_MS, quantiles=[0.5, 0.2, 0.8])]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def compiled(f: Callable) -> Callable:
    return torch.compile(f, fullgraph=True, dynamic=False)


def followed_by(f: Callable, *options) -> Callable:
    return lambda *inputs: f(*inputs, *options)


def backward(f: Callable, inputs: list, direction) -> Callable:
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


def mlp(T: int) -> Iterator[Row]:
    x, up, down, dy = randn(T, DIM), randn(WIDTH, DIM) * DIM**-0.5, randn(WIDTH, DIM) * DIM**-0.5, randn(T, DIM)
    h, shape, args = t.relu_square_product(x, up, None), f"{T} x {DIM} x {WIDTH}", ([x, up, down], dy)
    moved, product, plain = 2 * (T * DIM + T * WIDTH + DIM * WIDTH), 2 * T * DIM * WIDTH, t.relu_square_product_reference
    yield Row("relu_square_product", shape, lambda: t.relu_square_product(x, up, None), moved, product,
              eager=lambda: plain(x, up, None))
    yield Row("relu_square_product backward", shape, lambda: t.relu_square_product(dy, down, h), moved + 2 * T * WIDTH,
              product, eager=lambda: plain(dy, down, h))
    yield Row("MLP forward + backward", shape, backward(t.ReluSquareMLP.apply, *args), 6 * moved, 6 * product,
              backward(compiled(t.mlp_reference), *args), backward(t.mlp_reference, *args))


def attention_inputs(T: int) -> Iterator[Row]:
    inputs = [randn(T, 3, HEADS, HEAD_DIM), randn(T, DIM), randn(T, HEADS)]
    angles, grads = 6 * torch.rand(2 * T, HEAD_DIM // 4, device=DEVICE), [randn(T, HEADS, HEAD_DIM) for _ in range(3)]
    options, shape = (angles.cos().to(DTYPE), angles.sin().to(DTYPE), False, True), f"{T} x {HEADS} x {HEAD_DIM}"
    ours, plain = (followed_by(f, *options) for f in (t.AttentionInputs.apply, t.attention_inputs_reference))
    graph, size = compiled(plain), 2 * T * DIM
    yield Row("attention inputs forward", shape, lambda: ours(*inputs), 7 * size, 0, lambda: graph(*inputs),
              lambda: plain(*inputs))
    yield Row("attention inputs forward + backward", shape, backward(ours, inputs, grads), 17 * size, 0,
              backward(graph, inputs, grads), backward(plain, inputs, grads))


def loss(T: int) -> Iterator[Row]:
    logits, targets = randn(T, VOCABULARY).mul_(4), torch.randint(0, VOCABULARY, (T,), device=DEVICE)
    for count in (1, 3):  # targets in the last stage and the first
        weights = torch.tensor([1.0, 0.5, 0.25][:count], device=DEVICE) / 8
        args, graph = (logits, targets, weights, E5M2, t.GRAD_SCALE / 8), compiled(t.softcapped_mtp_loss_reference)
        yield Row(f"loss, targets: {count}", f"{T} x {VOCABULARY}", partial(t.softcapped_mtp_loss, *args),
                  3 * T * VOCABULARY, compiled=partial(graph, *args) if count == 1 else None)


def transposes(T: int) -> Iterator[Row]:
    grad = torch.randint(0, 256, (T, VOCABULARY), dtype=torch.uint8, device=DEVICE)
    graph = compiled(lambda x: x.mT.contiguous())
    yield Row("transposed e5m2", f"{T} x {VOCABULARY}", lambda: t.transposed(grad.view(E5M2)), 2 * T * VOCABULARY, 0,
              lambda: graph(grad), lambda: grad.mT.contiguous())
    head, table = randn(DIM, VOCABULARY), randn(VOCABULARY, DIM)
    for source, target, add in ((head, table, False), (head, table, True), (table, head, False), (table, head, True)):
        yield Row(f"transpose_into, {'add' if add else 'copy'}", " x ".join(map(str, source.shape)),
                  partial(t.transpose_into, source, target, add), (6 if add else 4) * head.numel(),
                  eager=partial(t.transpose_into_reference, source, target, add))


def scatter(T: int) -> Iterator[Row]:
    rows, ids = randn(T, DIM), (VOCABULARY * torch.rand(T, device=DEVICE) ** 4).int()  # some rows much more often
    args = rows, ids, torch.zeros(VOCABULARY, DIM, device=DEVICE)
    yield Row("scatter_add_rows", f"{T} x {DIM}", partial(t.scatter_add_rows, *args), 10 * T * DIM,
              eager=partial(t.scatter_add_rows_reference, *args))


def symmetric(_T: int) -> Iterator[Row]:
    """Half of a symmetric product need be computed: n^2 k FLOP."""
    for name, shape in BANKS.items():
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
    if backend == "fa4":
        import flash_attn.cute.interface  # noqa: F401, without it one line says so
    for T, window, documents in ATTENTION:
        ends = torch.randperm(T - 1, generator=torch.Generator().manual_seed(0))[: documents - 1].sort().values + 1
        ends = [0, *ends.tolist()] + [T] * (t.max_docs(T) - documents)
        lengths = torch.tensor(ends).diff()
        # a document's query i sees min(i, window) + 1 keys; the two forward products are 4 d FLOP for each, backward 10 d
        inside = lengths.clamp_max(window + 1)
        seen = (inside * (inside + 1) // 2 + (lengths - inside) * (window + 1)).sum().item()
        work, size = 4 * DIM * seen, 2 * T * DIM
        run = followed_by(t.ATTENTION_BACKENDS[backend], torch.tensor(ends, dtype=torch.int32, device=DEVICE),
                          lengths.max().item(), window, 0.1)
        inputs, shape = [randn(T, HEADS, HEAD_DIM) for _ in range(3)], f"{T}, window {window}, documents {documents}"
        yield Row(f"attention {backend} forward", shape, partial(run, *inputs), 4 * size, work)
        yield Row(f"attention {backend} forward + backward", shape, backward(run, inputs, randn(T, HEADS, HEAD_DIM)),
                  12 * size, 3.5 * work)


GROUPS = {"mlp": mlp, "attention inputs": attention_inputs, "loss": loss, "transposes": transposes, "scatter": scatter,
          "symmetric": symmetric, "attention torch": partial(attention, "torch"),
          "attention fa4": partial(attention, "fa4")}


def failure(name: str, error: Exception) -> dict:
    text = " ".join(str(error).split())[:140]
    print(f"{name}: failed, {type(error).__name__}: {text}", flush=True)
    return {"name": name, "error": f"{type(error).__name__}: {text}"}


def measure(row: Row, bandwidth: float, rate: float) -> dict:
    ours, low, high = timed(row.ours)
    roofline = max(row.bytes / bandwidth, row.flop / rate)
    result = {"name": row.name, "shape": row.shape, "ours_ms": ours, "ours_20_ms": low, "ours_80_ms": high,
              "compiled_ms": None, "eager_ms": None, "roofline_ms": roofline, "ours_over_roofline": ours / roofline}
    for kind in ("compiled", "eager"):
        try:
            result[f"{kind}_ms"] = getattr(row, kind) and timed(getattr(row, kind))[0]
        except Exception as error:
            failure(f"{row.name} {kind}", error)
    plain = ("-" if result[key] is None else f"{result[key]:.4f}" for key in ("compiled_ms", "eager_ms"))
    print(LINE.format(row.name, row.shape, f"{ours:.4f}", f"{low:.4f}-{high:.4f}", *plain, f"{roofline:.4f}",
                      f"{ours / roofline:.2f}"), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=49152, help="tokens of a micro-batch (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    args = parser.parse_args()
    if args.tokens < 16 or args.tokens % 16:
        parser.error("--tokens must be a positive multiple of 16")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json: no folder {Path(args.json).parent}")
    if t.triton is None or not torch.cuda.is_available() or not t.is_hopper(torch.device(DEVICE)):
        print("bench_kernels: needs Triton and a Hopper or newer NVIDIA GPU", file=sys.stderr)
        return 1
    began = time.monotonic()
    torch.manual_seed(0)
    bandwidth, rate = ceilings()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {t.triton.__version__}: copies {bandwidth / 1e9:.2f} TB/s, "
          f"bf16 products {rate / 1e9:.0f} TFLOP/s")
    print(LINE.format("kernel", "shape", "ours ms", "20 % - 80 %", "compiled", "eager", "roofline", "ratio"))
    results = []
    for name, group in GROUPS.items():
        try:
            for row in group(args.tokens):
                try:
                    results.append(measure(row, bandwidth, rate))
                except Exception as error:
                    results.append(failure(f"{row.name} {row.shape}", error))
        except Exception as error:  # in making the group's inputs
            results.append(failure(name, error))
        torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s")
    if args.json:
        report = {"device": device, "torch": torch.__version__, "triton": t.triton.__version__, "tokens": args.tokens,
                  "bytes_per_s": bandwidth * 1e3, "flop_per_s": rate * 1e3, "rows": results}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
