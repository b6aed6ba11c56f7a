"""HOPPER and the kernels on a Hopper GPU: errors in bf16 against float64 at most twice those of the plain version."""

import importlib.util
import itertools
from functools import partial

import kernel_tools as k
import pytest
import torch
from kernel_tools import BF16, CAP, E5M2, FP32, FP64, gradients, to

import train_gpt as t

CUDA = torch.device("cuda")
TANH_ERROR = 2.0**-11  # of tanh.approx.f32, which the loss kernel uses for e5m2 gradients
RECORD = t.Recipe().sizes | dict(T=1002, L=3)  # T: two segments
OTHER = RECORD | dict(T=77, D=136, F=328)
FP8 = RECORD | dict(T=1008)  # which takes multiples of 16
CASES = [name for name, case in t.CASES.items() if case.op not in ("head_loss", "attention")]
NARROW = [(name, (FP8 if "FP8" in name else RECORD) | dict(d=64)) for name in CASES if "attention inputs" in name]


def installed(name):
    return importlib.util.find_spec(name) is not None


needs_fa4 = pytest.mark.skipif(not installed("flash_attn"), reason="flash_attn is not installed")
needs_quack = pytest.mark.skipif(not installed("quack"), reason="needs the package quack-kernels")


def error(x, exact):
    """Relative, in the Frobenius norm."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def as_good(ours, plain, exact, slack=1e-6):
    """Our errors are at most twice those of the plain bf16 version; false for NaN."""
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == b.shape == c.shape and a.dtype in (b.dtype, FP32)
        assert not c.any() and not a.any() or error(a, c) <= 2 * error(b, c) + slack, (i, error(a, c), error(b, c))


def randn(*shape):
    return torch.randn(shape, device="cuda").to(BF16)


def document_ends(T, lengths):
    """cu_seqlens of documents of these lengths, repeated as long as T has room, and padding with T."""
    ends = list(itertools.takewhile(lambda e: e < T, itertools.accumulate(itertools.cycle(lengths))))
    return torch.tensor([0, *ends] + 3 * [T], dtype=torch.int32, device="cuda")


def in_one_graph(case):
    return case._replace(run=torch.compile(case.run, fullgraph=True, dynamic=False))


@pytest.mark.skipif(t.INTERPRETED or t.triton is None or not torch.cuda.is_available()
                    or t.gpu_generation(CUDA) != t.HOPPER_GPU, reason="needs Triton and a Hopper GPU")
class TestGPU:
    @pytest.fixture(autouse=True)
    def unwritten_is_nan(self):
        """The memory that a test gets was NaN."""
        torch.manual_seed(0)
        torch.full((2**30,), float("nan"), dtype=BF16, device="cuda")
        yield
        torch.cuda.empty_cache()

    @needs_quack
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("name,sizes", [*((name, FP8 if "FP8" in name else RECORD) for name in CASES),
                                            *NARROW, ("linear sum", OTHER), ("MLP", OTHER)])
    def test_cases(self, name, sizes, compiled):
        """Eagerly and as one compiled graph; the rows of tables, which are added outside of graphs, eagerly."""
        case = t.CASES[name]
        inputs = t.case_inputs(case, sizes, BF16, CUDA)
        exact = case._replace(run=partial(case.run.func, *case.run.args[:-1], None)) if "FP8" in name else case
        plain, exact = t.case_results(case, t.PLAIN, inputs), t.case_results(exact, t.PLAIN, to(FP64, *inputs))
        ours = in_one_graph(case) if compiled and case.op != "add_rows" else case
        slack = 1e-6 if case.op in ("first_columns", "add_rows") else 2.0**-8  # cuBLAS or quack: other orders of sums
        as_good(t.case_results(ours, t.HOPPER, inputs), plain, exact, slack)

    @needs_quack
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("fp8,sampled", itertools.product((False, True), repeat=2))
    def test_head(self, fp8, sampled, compiled, T=512):
        """Loss as with the reference to the loss kernel's bound; gradients no less exact than the reference's."""
        plain_case, sizes = t.CASES["head over candidates" if sampled else "head"], RECORD | dict(T=T)
        case = plain_case._replace(run=partial(t.run_head_loss, fp8, sampled))
        inputs = t.case_inputs(case, sizes, BF16, CUDA)
        ours, plain = (t.case_results(x, ops, inputs) for x, ops in (
            (in_one_graph(case) if compiled else case, t.HOPPER), (case, t.PLAIN)))
        relative = k.rounding(CAP[0]) + (1.01 * CAP[0] / 2 * TANH_ERROR if fp8 else 0)
        assert (ours[0] - plain[0]).abs() <= T * (0.125 + 0.0625) * relative
        exact = t.case_results(plain_case, t.PLAIN, to(FP64, *inputs))
        as_good(ours[1:], plain[1:], exact[1:], slack=1e-4)

    @needs_quack
    @pytest.mark.parametrize("d", [128, 64])
    @pytest.mark.parametrize("attention", ["torch", pytest.param("fa4", marks=needs_fa4)])
    def test_check_ops(self, attention, d):
        t.check_ops(t.HOPPER._replace(attention=t.ATTENTION_BACKENDS[attention]()), CUDA, [d])

    @pytest.mark.parametrize("d", [128, 64])
    @pytest.mark.parametrize("T,S,paired,offset,mix", [(1001, 1001, *kind) for kind in k.KINDS] + [
        (4096, 1024, True, True, True), (3003, 1001, False, True, True)])
    def test_attention_inputs(self, T, S, paired, offset, mix, d):
        *inputs, grads = k.qkv_inputs(T, 6, d, mix, device="cuda")
        tables = k.rotation(S, d, paired, device="cuda")
        inputs, grads, tables = to(BF16, *inputs), to(BF16, *grads), to(BF16, *tables)
        r = k.row_factors(T, offset == mix, device="cuda")

        def results(f, dtype=BF16):
            c, s = to(dtype, *tables)
            return gradients(lambda qkv, *x: f(qkv, r, *x, c, s, paired, offset), to(dtype, *inputs), to(dtype, *grads))

        as_good(results(k.Inputs.apply), results(t.attention_inputs_reference),
                results(t.attention_inputs_reference, FP64))

    @pytest.mark.parametrize("d", [128, 64])
    @pytest.mark.parametrize("T,paired,offset,mix", [(1001, *kind) for kind in k.KINDS])
    def test_attention_inputs_in_fp8(self, T, paired, offset, mix, d, unit=2.0**-7):
        """The same gradients, rounded once more, and transposed."""
        *inputs, grads = k.qkv_inputs(T, 6, d, mix, device="cuda")
        inputs, grads = [x if x is None else x.to(BF16) for x in inputs], to(BF16, *grads)
        args = inputs[0], None, *inputs[1:], *to(BF16, *k.rotation(T, d, paired, device="cuda")), *grads
        plain, _, *rest = t.attention_inputs_backward(*args, paired, offset, 0.0)
        ours, turned, *others = t.attention_inputs_backward(*args, paired, offset, unit)
        rounded, _ = t.quantized_reference(plain, None, unit, E5M2)
        assert torch.equal(turned.view(torch.uint8), ours.view(torch.uint8).T) and rounded.float().any()
        # the programs have other numbers of rows, so sums have other orders, and some results the next number
        exact = (plain.float() / unit).double()
        assert error(ours, exact) <= 1.001 * error(rounded, exact)
        for a, b in zip(rest, others):
            assert a.shape == b.shape and (not b.any() or error(a, b) <= 2**-8)

    @pytest.mark.parametrize("dtype", [t.E4M3, E5M2])
    @pytest.mark.parametrize("T,n,scaled", [(1001, 768, True), (130, 2304, False), (128, 72, True)])
    def test_quantized(self, T, n, scaled, dtype):
        """The reference's numbers, also what is cut and a nan."""
        x, r = 50 * randn(T, n), torch.rand(T, device="cuda") if scaled else None
        x[1, 2], x[3, 4] = 1e9, torch.nan
        for a, b in zip(t.quantized(x, r, 2.0**-4, dtype), t.quantized_reference(x, r, 2.0**-4, dtype), strict=True):
            assert torch.equal(a.float().nan_to_num(-1), b.float().nan_to_num(-1)) and a.shape == b.shape

    @pytest.mark.parametrize("n,S,V,count,spread,dtype,cap", [
        (1, 512, 50304, 3, 4, E5M2, CAP), (1, 37, 1002, 2, 8, E5M2, (30.0, 0.0, 12.0)), (1, 5, 50258, 1, 4, BF16, CAP),
        (1, 300, 1003, 3, 4, FP32, CAP), (4, 128, 50304, 3, 4, E5M2, CAP),
        (3, 100, 1003, 3, 4, FP32, (15.0, -2.0, 4.0))])
    def test_loss(self, n, S, V, count, spread, dtype, cap):
        """fp32 and bf16 gradients to the bound of the arithmetic; e5m2 ones, with a short tanh, to e5m2's own error."""
        logits, targets = spread * randn(n * S, V), torch.randint(0, V, (n, S), device="cuda")
        logits = logits.to(FP32) if dtype == FP32 else logits
        targets[:, 2:5] = targets[:, 2:3]
        weights, scale = torch.tensor([1.0, 0.5, 0.25][:count], device="cuda") / 8, t.GRAD_SCALE / 8
        loss, grad = t.softcapped_mtp_loss(logits, t.next_targets(targets, count), weights, dtype, scale, *cap)
        exact, exact_grad, bound = k.exact_loss(logits, targets, weights, scale, *cap)
        relative = k.rounding(cap[0]) + (1.01 * cap[0] / 2 * TANH_ERROR if dtype == E5M2 else 0)
        assert (loss - exact).abs().max() <= weights.sum() * relative
        if dtype != E5M2:
            rounding = 2 * 2.0**-8 * exact_grad.abs() if dtype == BF16 else 0  # as kept, and as stored
            assert ((grad.double() - exact_grad).abs() <= bound + rounding).all()
            return
        plain = exact_grad.to(FP32).to(E5M2).double()
        away = torch.ones_like(plain).scatter_(1, targets.view(-1, 1), 0)
        for part in (1, away):  # the few large numbers at the targets would hide the others
            as_good([grad.double() * part], [plain * part], [exact_grad * part], slack=1e-4)

    @pytest.mark.parametrize("m,n", [(768, 50304), (77, 131), (1, 5), (64, 50257)])
    def test_transposed(self, m, n):
        x = randn(m, n).to(E5M2)
        assert torch.equal(t.transposed(x).view(torch.uint8), x.view(torch.uint8).T)

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("T,D,rows", [(4096, 768, 50304), (999, 100, 37)])
    def test_scatter_add_rows(self, T, D, rows, ordered):
        """Sums of bf16 rows in fp32, with many repeated ids."""
        x, ids = randn(T, D), (rows * torch.rand(T, device="cuda") ** 4).int()
        out = torch.randn(rows, D, device="cuda")
        plain, exact = out.clone(), out.double()
        t.scatter_add_rows_reference(x, ids, plain)
        t.scatter_add_rows_reference(x, ids, exact)
        t.scatter_add_rows(x, ids, out, ids.argsort().int() if ordered else None)
        as_good([out], [plain], [exact])

    @pytest.mark.parametrize("has_gate", [False, True])
    @pytest.mark.parametrize("d", [128, 64])
    @pytest.mark.parametrize("backend", ["torch", pytest.param("fa4", marks=needs_fa4)])
    @pytest.mark.parametrize("T,H,window,lengths", [
        (2048, 6, 384, (700, 300, 1)), (1537, 3, 128, (513, 90, 1, 2, 333)), (1001, 6, 2000, (1001,))])
    def test_attention(self, backend, T, H, window, lengths, d, has_gate):
        """Output and gradients: windows inside and beyond the documents, which are many, of one token, or one."""
        inputs, dy, ends = [randn(T, H, d) for _ in range(3)], randn(T, H, d), document_ends(T, lengths)
        inputs += [torch.rand(T, H, device="cuda")] if has_gate else []

        def results(f, dtype=BF16):
            gate = to(FP64 if dtype == FP64 else FP32, *inputs[3:])
            return gradients(lambda q, k, v, *gate: f(q, k, v, ends, max(lengths), window, 0.1, *gate),
                             [*to(dtype, *inputs[:3]), *gate], dy.to(dtype))

        as_good(results(t.ATTENTION_BACKENDS[backend]()), results(t.attention_reference),
                results(t.attention_reference, FP64))

    @needs_quack
    def test_compiled(self):
        """torch.compile takes the MLP and the attention inputs into one graph, which gives what they give eagerly."""
        mlp, inputs = t.CASES["MLP"], t.CASES["attention inputs, key offset"]
        both = t.Case("mlp", lambda ops, *x: (mlp.run(ops, *x[:4]), *inputs.run(ops, *x[4:])),
                      f"{mlp.shapes}, {inputs.shapes}")
        numbers = t.case_inputs(both, RECORD | dict(T=1024), BF16, CUDA)
        for eager, ours in zip(*(t.case_results(case, t.HOPPER, numbers) for case in (both, in_one_graph(both)))):
            # a rounding in bf16: the graph may choose other matrix products
            assert not eager.any() and not ours.any() or error(ours, eager) <= 2.0**-8
