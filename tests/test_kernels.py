"""Every operation and kernel against float64, in fp32 by Triton's interpreter on a CPU."""

import itertools
from functools import partial

import kernel_tools as k
import pytest
import torch
from kernel_tools import EPS, FP32, FP64, gradients, to, within

import train_gpt as t

SIZES = {
    "odd": dict(T=30, D=64, H=4, d=16, F=100, V=131, G=12, L=3),  # but for T, which is two segments
    "tiny": dict(T=6, D=32, H=2, d=16, F=4, V=50, G=12, L=1),
}


def run_ungated(ops, x, qkv, gate, ve, angles):
    """Attention inputs whose value embedding has no gate."""
    tables, weights = (angles.detach().cos(), angles.detach().sin()), t.AttentionWeights(qkv, gate, None)
    layer = t.Layer("short", value_table=0, value_gate=False)
    return ops.attention_inputs(ops.normed(ops.stream(x)), weights, ve, *tables, layer, None)


CASES = t.CASES | {"ungated": t.Case("attention_inputs", run_ungated, "T D, 3*D D, H G, T D, T 8"),
                   "head over candidates in FP8": t.CASES["head over candidates"]._replace(
                       run=partial(t.run_head_loss, True, True))}


def check_operation(op, args):
    """opcheck without shapes that are symbols, which it compiles for seconds: the script compiles for each shape."""
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@k.needs_interpreter
def test_interpreted():
    k.run_interpreted(__file__)


@pytest.mark.parametrize("name", ["head in FP8", "head over candidates in FP8", "MLP in FP8"])
def test_fp8(name):
    """With the references of HOPPER's kernels, which the interpreter cannot run, its numbers are PLAIN's."""
    torch.manual_seed(0)
    case = CASES[name]
    inputs = t.case_inputs(case, SIZES["odd"] | (dict(T=32, F=112) if "MLP" in name else {}), FP32, "cpu")
    for ours, plain in zip(*(t.case_results(case, ops, inputs) for ops in (t.HOPPER, t.PLAIN)), strict=True):
        # logits are rounded once by one and twice by the other
        assert (ours - plain).norm() <= (2**-8 if "head" in name else 0) * plain.norm() and ours.abs().max() > 0


def test_inverse_rms_of_products(T=7, D=500):
    """The stream after a product comes with the 1 / rms of its own rows."""
    x, w = torch.randn(T, D), torch.randn(D, D)
    resid, lambdas = torch.full((T,), 0.5), torch.tensor([0.3, -0.2])
    ops, stream = t.HOPPER, t.HOPPER.stream(x)
    for y in (ops.linear_sum(x, w, stream, resid, ops.injections(x, -x, lambdas, lambdas)[0]),
              ops.mlp(stream, w, w, resid, None), stream):
        torch.testing.assert_close(y.rstd[:, None] * y.x, t.norm(y.x))


class TestInterpreted(k.Interpreted):
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("name", [name for name in CASES if "FP8" not in name])
    def test_cases(self, monkeypatch, name, sizes):
        """HOPPER's results and gradients are PLAIN's in float64 but for a rounding for each term of the longest sum."""
        monkeypatch.setattr(t, "WEIGHT_GRAD_ROWS", 100)
        case, sizes = CASES[name], SIZES[sizes]
        if name == "ungated":
            case = case._replace(shapes=case.shapes.replace("8", str(sizes["d"] // 4)))
        inputs = t.case_inputs(case, sizes, FP32, "cpu")
        exact = t.case_results(case, t.PLAIN, to(FP64, *inputs))
        terms = sizes["T"] + sizes["D"] + sizes["F"] + (sizes["V"] if case.op == "head_loss" else 0)
        for ours, b in zip(t.case_results(case, t.HOPPER, inputs), exact, strict=True):
            within(ours, b, b.abs().max(), terms)

    @pytest.mark.parametrize("paired,offset,mix", k.KINDS)
    @pytest.mark.parametrize("T,S,H,d", [
        (22, 11, 4, 16), (3, 1, 2, 32)])
    def test_attention_inputs(self, T, S, H, d, paired, offset, mix):
        """q, k, v and the gradients of qkv, value embedding and gate, with incomplete blocks of rows, and segments."""
        (*inputs, grads), (cos, sin) = k.qkv_inputs(T, H, d, mix), k.rotation(S, d, paired)
        r = k.row_factors(T, offset == mix)

        def results(f, *sources):
            *x, c, s = sources
            return gradients(lambda qkv, *y: f(qkv, *to(c.dtype, r), *y, c, s, paired, offset), x, direction)

        direction = grads
        ours = results(k.Inputs.apply, *inputs, cos, sin)
        direction = to(FP64, *grads)
        exact = results(t.attention_inputs_reference, *to(FP64, *inputs, cos, sin))
        # q and k have length sqrt(d), their gradients own (dy - y mean(dy y)); token 0 of k has two in its half
        own = inputs[0].double().square().mean(-1).add(EPS).rsqrt()[:, :2].max()
        dqkv = 4 * own * torch.stack(grads[:2]).norm(dim=-1).max()
        sizes = [d**0.5, d**0.5]
        direction = [x.double().abs() for x in grads]
        sizes += results(t.attention_inputs_reference, *(x if x is None else x.double().abs()
                                                         for x in (*inputs, cos, sin)))[2:]
        sizes[3] = dqkv
        for a, b, c in zip(ours, exact, sizes, strict=True):
            within(a, b, c, d + 8)

    @pytest.mark.parametrize("scaled,of", itertools.product((False, True), ("heads", "values", "mixed")))
    @pytest.mark.parametrize("T,H,n", [(300, 3, 12), (1, 2, 6)])
    def test_gates(self, T, H, n, scaled, of):
        """Gates of heads and values, and all gradients, of views of wider tensors."""
        gate_in, ve_first, *w = (torch.randn(m, 2 * n)[:, :n] for m in (T, T, H, H))
        w_gate, w_value = (x.contiguous() for x in w)
        r = k.row_factors(T, not scaled)
        ve_first, w_value = ve_first[:, : n // 2] if of == "mixed" else None, w_value if of != "heads" else None
        inputs = [gate_in, r, ve_first, w_gate, w_value]
        dgates = [torch.randn(T, H), torch.randn(T, H) if of != "heads" else None]
        exact = [x.double().requires_grad_() if i != 1 else x.double() for i, x in enumerate(inputs) if x is not None]
        exact = [exact.pop(0) if x is not None else None for x in inputs]
        results = t.gates_reference(*exact)[: 2 if of != "heads" else 1]
        leaves = [x for i, x in enumerate(exact) if x is not None and i != 1]
        plain = [*results, *torch.autograd.grad(results, leaves, [x.double() for x in dgates if x is not None])]
        gates = t.gates(*inputs)
        dgate_in, dve_first, dw = t.gates_backward(*inputs, *gates, *dgates)
        dw = dw.sum(0).split(H)
        ours = [*gates[: len(results)], dgate_in, *([dve_first] if of == "mixed" else []), *dw]
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a.double(), b.detach(), rtol=0,
                                       atol=(T + n + 8) * EPS * max(b.abs().max().item(), 1))
        if T == 1:
            check_operation(t.gates, tuple(inputs))
            check_operation(t.gates_backward, (*inputs, *gates, *dgates))

    @pytest.mark.parametrize("T,width,k", [(130, 20, 12), (64, 16, 16), (1, 5, 1)])
    def test_add_columns(self, T, width, k):
        y, c = torch.randn(T, width), torch.randn(T, 2 * k)[:, :k]
        exact, size = y.double(), y.double().abs()
        t.add_columns_reference(exact, c.double())
        t.add_columns_reference(size, c.double().abs())
        t.add_columns(y, c)
        within(y, exact, size, 1)

    @pytest.mark.parametrize("n,S,V,count,cap", [
        (1, 5, 48, 3, k.CAP), (1, 4, 77, 2, (30.0, 0.5, 12.0)), (1, 3, 16, 1, (15.0, -2.0, 4.0)), (1, 2, 130, 2, k.CAP),
        (1, 3, 33, 3, k.CAP), (1, 2, 5001, 2, (30.0, 0.0, 7.5)), (3, 4, 48, 3, k.CAP), (2, 1, 20, 2, k.CAP)])
    def test_loss(self, n, S, V, count, cap):
        """Loss and gradient, also with equal targets at neighbouring positions and more than one block of columns."""
        logits, targets = 8 * torch.randn(n * S, V), torch.randint(0, V, (n, S))
        targets[:, : S - 1] = targets[:, :1]
        weights = torch.tensor([1.0, 0.5, 0.25][:count])
        exact, exact_grad, bound = k.exact_loss(logits, targets, weights, 0.03, *cap)
        for f in (t.softcapped_mtp_loss, t.softcapped_mtp_loss_reference):
            loss, grad = f(logits, t.next_targets(targets, count), weights, FP32, 0.03, *cap)
            assert (loss - exact).abs().max() <= weights.sum() * k.rounding(cap[0])
            assert ((grad - exact_grad).abs() <= bound).all()

    @pytest.mark.parametrize("m,n", [(64, 128), (37, 300), (1, 1)])
    def test_transposed(self, m, n):
        """Every byte of an e5m2 matrix, NaN and infinities too."""
        src = torch.randint(0, 256, (m, n), dtype=torch.uint8).view(k.E5M2)
        ours = t.transposed(src)
        assert ours.dtype == k.E5M2 and ours.is_contiguous()
        assert torch.equal(ours.view(torch.uint8), src.view(torch.uint8).T)

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("T,D,rows", [(40, 24, 7), (9, 100, 50), (50, 16, 1), (1, 1, 1)])
    def test_scatter_add_rows(self, T, D, rows, ordered):
        """Repeated ids add up, and other rows stay."""
        x, ids, out = torch.randn(T, D), torch.randint(0, rows, (T,), dtype=torch.int32), torch.randn(rows, D)
        exact, size = out.double(), out.double().abs()
        t.scatter_add_rows_reference(x.double(), ids, exact)
        t.scatter_add_rows_reference(x.double().abs(), ids, size)
        t.scatter_add_rows(x, ids, out, ids.argsort().int() if ordered else None)
        within(out, exact, size, T)

    def test_operations(self):
        """Schemas and shapes that torch.compile relies on; without a value embedding its gradients are empty."""
        check = check_operation
        a, b, c, r, scale = torch.randn(8, 4), torch.randn(4, 12), torch.rand(8, 12), torch.rand(8), torch.tensor(0.5)
        for kind, operands in (("none", []), ("relu_square", [r]), ("sum1", [c, scale]), ("root", [c, r]),
                               ("sum3", [c, scale, c + 1, scale, c + 2, scale]), ("norm_grad", [c, c + 1, scale, r])):
            check(t.product, (kind, a, b, operands, FP32))
        check(t.add_columns, (c.clone(), c[:, :5]))
        check(t.injections_backward, (c, c + 1, torch.rand(3), torch.rand(3), [c, c - 1, c - 2]))
        targets = torch.tensor([[1, 2], [2, 3], [3, -1]])
        check(t.softcapped_mtp_loss, (torch.randn(3, 16), targets, torch.ones(2), FP32, 0.5, *k.CAP))
        for mix in (False, True):
            qkv, *inputs, grads = k.qkv_inputs(5, 2, 16, mix)
            inputs = [qkv, k.row_factors(5, mix), *inputs, *k.rotation(5, 16, False)]
            check(t.attention_inputs, (*inputs, False, True))
            check(t.attention_inputs_backward, (*inputs, *grads, False, True, 0.0))
            _, _, dve, dgate = t.attention_inputs_backward(*inputs, *grads, False, True, 0.0)
            assert mix or dve.numel() == dgate.numel() == 0
        check(t.transposed, (torch.ones(4, 8, dtype=torch.int8),))  # opcheck itself cannot do fp8
