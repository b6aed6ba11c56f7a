"""The Triton kernels against float64: in fp32 by Triton's interpreter on a CPU, and in bf16 on a Hopper GPU."""

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when the kernels are defined
HOPPER = (not INTERPRETED and t.triton is not None and torch.cuda.is_available()
          and t.gpu_generation(torch.device("cuda")) >= t.HOPPER)
EPS = torch.finfo(torch.float32).eps
TANH_ERROR = 2.0**-11  # of tanh.approx.f32, which the loss kernel uses for e5m2 gradients
ROUNDING = 8 * t.CAP * EPS  # of exp(z), z in (0, CAP): some roundings of the exponent
BF16, FP32, FP64, E5M2 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2
KINDS = list(itertools.product((False, True), repeat=3))  # paired, key offset, value embedding
# of gates: whether the norm's factor is apart; whether there are gates of values, and a half that only they see
GATE_KINDS = list(itertools.product((False, True), ("heads", "values", "mixed")))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.skipif(t.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(
    t.triton is not None and t.triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="the interpreter of Triton 3.6 fails with NumPy 2.4")
def test_interpreted():
    """The class below passes in a process whose Triton interprets the kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(__file__)}::TestInterpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=Path(t.__file__).resolve().parent,
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


def gradients(f, inputs, direction):
    """The outputs of f and the gradients of those inputs that are tensors, for the gradient `direction` of the outputs.

    f: takes copies of the inputs. Other inputs are passed on as they are.
    """
    inputs = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad(outputs, tensors, direction)
    return [x.detach() for x in (*outputs, *grads)]


def to(dtype, *values):
    """The tensors among the values in another dtype; the rest as it is."""
    return [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in values]


def exact_loss(logits, targets, weights, grad_scale):
    """Loss and gradient of softcapped_mtp_loss in float64, by autograd, and the bound of the gradient's error, segment
    by segment.

    The gradient is (mass p - hits) du, p = softmax: the error of p is relative and that of du = u (1 - u), a difference
    of numbers up to 1, is absolute.
    """
    if len(targets) > 1:
        parts = zip(logits.chunk(len(targets)), targets.split(1))
        return [torch.cat(x) for x in zip(*(exact_loss(*part, weights, grad_scale) for part in parts))]
    x, T, targets = logits.double().requires_grad_(), targets.size(1), targets[0]
    z = t.CAP * torch.sigmoid((x + t.CAP_SHIFT) / t.CAP_WIDTH)
    hits, parts = torch.zeros_like(z), z.new_zeros(T)
    for k, weight in enumerate(weights.double()):
        n = T - k
        parts[:n] += weight * F.cross_entropy(z[:n], targets[k:], reduction="none")
        hits[torch.arange(n, device=x.device), targets[k:]] += weight
    (grad,) = torch.autograd.grad(parts.sum(), x)
    u, p = (z / t.CAP).detach(), hits.sum(1, keepdim=True) * z.detach().softmax(1)
    bound = p * u * (1 - u) * ROUNDING + (p + hits) * 8 * EPS
    return parts.detach(), grad / grad_scale, bound * t.CAP / t.CAP_WIDTH / grad_scale


def rotation(S, d, paired, **kwargs):
    angles = 6 * torch.rand((1 + paired) * S, d // 4, **kwargs)
    return angles.cos(), angles.sin()


def qkv_inputs(T, H, d, mix, **kwargs):
    """qkv, value embedding, gate and the gradients of q, k, v."""
    qkv, *grads = torch.randn(T, 3, H, d, **kwargs), *(torch.randn(T, H, d, **kwargs) for _ in range(3))
    return qkv, *((torch.randn(T, H * d, **kwargs), torch.rand(T, H, **kwargs)) if mix else (None, None)), grads


def through_inputs(u, gate, value_gate, r):
    """A scalar of NormedLinear's results, used as attention uses them: the first times r, if that is left out."""
    u = u if r is None else r[:, None] * u
    return (u.sin() + 0.1 * u.square()).sum() + (gate * value_gate).sum()


def normed_linear_reference(x, w, other, w_gate, w_value):
    h = t.norm(x)
    return F.linear(h, w), *t.gates_reference(h[:, : t.GATE_INPUTS], None, other, w_gate, w_value)


def gates_inputs(T, H, n, kind, **kwargs):
    """Inputs of gates but for r, views of wider ones as in the model; r; and the gradients of its results."""
    scaled, of = kind
    seen, other, *w = (torch.randn(m, 2 * n, **kwargs)[:, :n] for m in (T, T, H, H))
    w, w_value = (x.contiguous() for x in w)
    inputs = [seen, other[:, : n // 2] if of == "mixed" else None, w, w_value if of != "heads" else None]
    directions = [torch.randn(T, H, **kwargs) for _ in range(1 if of == "heads" else 2)]
    return inputs, row_factors(T, not scaled, **kwargs), directions


def gates_of(f, r):
    """f with that r, its results in fp32, or fp64, and without None."""
    return lambda seen, *x: tuple(y.to(torch.promote_types(y.dtype, FP32)) for y in f(seen, r, *x) if y is not None)


def row_factors(T, absent, **kwargs):
    return None if absent else 0.5 + torch.rand(T, **kwargs)


def layers(linear_sum, embedding_sums):
    """The stream after layers that add the embeddings, by these functions; n as many as s0 and s1 are long."""
    def stream(y, w, x, s, x0, bigram, s0, s1):
        for added, a, b in zip(embedding_sums(x0, bigram, s0, s1), s0.unbind(), s1.unbind(), strict=True):
            x, _ = linear_sum(y, w, x, s, added, x0.detach(), bigram.detach(), a.detach(), b.detach())
        return x
    return stream


class TestInterpreted:
    """fp32 on a CPU: the interpreter's bf16 and fp8 arithmetic is wrong. What a kernel leaves unwritten is NaN here."""

    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def unwritten_is_nan(self):
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    @staticmethod
    def within(ours, exact, size, terms):
        """Each number is off by at most `terms` roundings of its `size`, of the sum without cancellation."""
        assert ours.shape == exact.shape and ours.dtype == FP32
        excess = (ours.double() - exact).abs() - terms * EPS * size
        assert (excess <= 0).all(), excess.max()

    @pytest.mark.parametrize("T,width,D", [(32, 64, 32), (20, 36, 12), (150, 300, 68), (2, 4, 4)])
    def test_products(self, monkeypatch, T, width, D):
        """ReluSquareMLP, NormedLinear, LinearSum and EmbeddingSums, by the products' references, and their gradients.

        r is the norm's own, so that the gradients that fold it in can be compared with those of the norm in float64.
        """
        monkeypatch.setattr(t, "WEIGHT_GRAD_ROWS", 100)
        x, up, down = torch.randn(T, D), torch.randn(width, D), torch.randn(width, D)
        r, scale = t.inverse_rms(x.square(), D), torch.full((T,), 0.7)
        seen = min(D, t.GATE_INPUTS)
        gate_inputs = other, *_ = torch.randn(T, seen // 2), torch.randn(2, seen), torch.randn(2, seen)
        streams = [torch.randn(T, width), torch.full((T,), -0.4), torch.randn(T, width), torch.randn(T, width)]
        for ours, plain, inputs in [
            (lambda x, *y: t.ReluSquareMLP.apply(x, r, *y)[0], lambda x, *y: t.mlp_reference(x, None, *y)[0],
             [x, up, down, scale]),
            (lambda x, *y: through_inputs(*t.NormedLinear.apply(t.FoldedNorm.apply(x, r), r, *y), r),
             lambda *y: through_inputs(*normed_linear_reference(*y), None), [x, up, *gate_inputs]),
            *((layers(t.LinearSum.apply, t.EmbeddingSums.apply),
               layers(t.linear_sum_reference, t.embedding_sums_reference),
               [x, up, *streams, torch.randn(n), torch.randn(n)]) for n in (1, 3)),
        ]:
            dy = None if inputs[2] is other else torch.randn(T, D if inputs[2] is down else width)
            exact = gradients(plain, to(FP64, *inputs), None if dy is None else dy.double())
            for a, b in zip(gradients(ours, inputs, dy), exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=0, atol=(T + width + D) * EPS * b.abs().max().item())

    @pytest.mark.parametrize("T,width,k", [(130, 20, 12), (64, 16, 16), (1, 5, 1)])
    def test_add_columns(self, T, width, k):
        y, c = torch.randn(T, width), torch.randn(T, 2 * k)[:, :k]
        exact, size = y.double(), y.double().abs()
        t.add_columns_reference(exact, c.double())
        t.add_columns_reference(size, c.double().abs())
        t.add_columns(y, c)
        self.within(y, exact, size, 1)

    def test_first_columns(self, T=70, width=12, k=5):
        """And its gradient, where both results are used."""
        x, direction = torch.randn(T, width), torch.randn(T, width)

        def use(first_columns):
            def f(x):
                y, first = first_columns(x)
                return y.sin() * torch.cat([first.cos(), y[:, k:]], dim=1)
            return f
        ours, plain = use(lambda x: t.FirstColumns.apply(x, k)), use(lambda x: (x, x[:, :k]))
        torch.testing.assert_close(gradients(ours, [x], direction), gradients(plain, [x], direction))

    def test_inverse_rms_of_products(self, T=7, width=500, D=12):
        """The second result of LinearSum and ReluSquareMLP belongs to the first."""
        x, w, scale = torch.randn(T, D), torch.randn(width, D), torch.full((T,), 0.5)
        c = torch.randn(T, width)
        y, r = t.LinearSum.apply(x, w, c, scale, c, c, c, scale[0], scale[0])
        torch.testing.assert_close(r[:, None] * y, t.norm(y))
        y, r = t.ReluSquareMLP.apply(x, t.inverse_rms(x.square(), D), w, w, scale)
        torch.testing.assert_close(r[:, None] * y, t.norm(y))

    @pytest.mark.parametrize("paired,offset,mix", KINDS)
    @pytest.mark.parametrize("T,S,H,d", [
        (37, 37, 6, 16), (16, 16, 2, 32), (1, 1, 2, 16), (40, 20, 2, 16), (3, 1, 2, 16)])
    def test_attention_inputs(self, T, S, H, d, paired, offset, mix):
        """q, k, v and the gradients of qkv, value embedding and gate, with incomplete blocks of rows, and segments."""
        (*inputs, grads), (cos, sin) = qkv_inputs(T, H, d, mix), rotation(S, d, paired)
        r = row_factors(T, offset == mix)

        def results(f, *sources):
            *x, c, s = sources
            return gradients(lambda qkv, *y: f(qkv, *to(c.dtype, r), *y, c, s, paired, offset), x, direction)

        direction = grads
        ours = results(t.AttentionInputs.apply, *inputs, cos, sin)
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
            self.within(a, b, c, d + 8)

    @pytest.mark.parametrize("kind", GATE_KINDS)
    @pytest.mark.parametrize("T,H,n", [(37, 6, 12), (300, 2, 16), (1, 2, 6)])
    def test_gates(self, T, H, n, kind):
        inputs, r, directions = gates_inputs(T, H, n, kind)
        exact = gradients(gates_of(t.gates_reference, r if r is None else r.double()), to(FP64, *inputs),
                          to(FP64, *directions))
        for a, b in zip(gradients(gates_of(t.Gates.apply, r), inputs, directions), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=(T + n + 8) * EPS * max(b.abs().max().item(), 1))
        inputs.insert(1, r)
        torch.library.opcheck(t.gates, tuple(inputs))
        dgates = directions if len(directions) == 2 else [*directions, None]
        torch.library.opcheck(t.gates_backward, (*inputs, *t.gates(*inputs), *dgates))

    @pytest.mark.parametrize("T,block,ends", [(200, 64, [0, 70, 71, 71, 128, 199, 200, 200]), (5, 8, [0, 5])])
    def test_flash4_preprocess(self, T, block, ends, h=3, d=16):
        """Kernel and reference write the same numbers in the same places; what neither writes stays NaN."""
        out, dout, lse, cu_seqlens = torch.randn(T, h, d), torch.randn(T, h, d), torch.randn(h, T), torch.tensor(ends)
        gate = torch.rand(T, h)
        gate[0, 0], out[0, 0] = 0.0, 0.0
        room = (T + len(ends) * block - 1) // block * block  # what the package gives

        def results(f):
            kept = [torch.full((h, n), float("nan")) for n in (room, room, room * d)]
            return [f(out, dout, lse, gate, cu_seqlens.int(), block, *kept), *kept]
        ours, plain = results(t.flash4_preprocess), results(t.flash4_preprocess_reference)
        torch.testing.assert_close(ours, plain, equal_nan=True, rtol=1e-5, atol=1e-5)
        dots, sums, lse2, _ = ours
        assert dots[0, 0] == 0
        torch.testing.assert_close(dots[1:], (out * dout).sum(-1)[1:] / gate[1:])
        i, last = 3, ends[4] - ends[3] if len(ends) > 4 else 0  # one document, found by itself
        if last:
            at = (ends[i] // block + i) * block
            torch.testing.assert_close(sums[:, at : at + last], dots[ends[i] : ends[i + 1]].mT)
            assert (sums[:, at + last : at + block] == 0).all() and lse2[:, at + last : at + block].isinf().all()

    @pytest.mark.parametrize("has_gate", [False, True])
    def test_flash4(self, monkeypatch, has_gate, T=70, block=16):
        """Output and gradients, with a stand-in for the package that uses what our first kernel writes."""
        def forward(q, k, v, lse, softmax_scale, **_):
            assert interface.FlashAttentionForwardSm90 == "gated" and forward.compile_cache == "kept"
            score, gate = softmax_scale * torch.einsum("qhd,khd->hqk", q, k) + mask, lse.mT[..., None].clone()
            lse.copy_(score.logsumexp(2))
            return (gate * torch.einsum("hqk,khd->qhd", score.softmax(2), v)).contiguous(), lse

        def backward(q, k, v, out, dout, lse, cu_seqlens_q, softmax_scale, **_):
            (_, h, d), room = q.shape, (T + len(cu_seqlens_q) * block - 1) // block * block
            sums, lse2, zero = (torch.full((h, n), float("nan")) for n in (room, room, room * d))
            interface._bwd_preprocess(out, dout, sums, lse, lse2, zero, cu_seqlens_q, None, None, None, d, d, block,
                                      cu_total_m_blocks=None, fake_mode=False, hdim_multiple_of=32)
            at = torch.cat([torch.arange(b - a) + (a // block + i) * block for i, (a, b) in enumerate(
                itertools.pairwise(cu_seqlens_q.tolist()))])
            score = softmax_scale * torch.einsum("qhd,khd->hqk", q, k) + mask
            p = torch.exp2(score / np.log(2) - lse2[:, at, None])
            ds = softmax_scale * p * (torch.einsum("qhd,khd->hqk", dout, v) - sums[:, at, None])
            return (torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, q),
                    torch.einsum("hqk,qhd->khd", p, dout))

        interface = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward, _bwd_preprocess=None,
                                    FlashAttentionForwardSm90=None)
        forward.compile_cache = None
        monkeypatch.setattr(t, "gated_flash4", lambda: ("gated", "kept"))
        package = SimpleNamespace(interface=interface)
        for name, module in (("", package), (".cute", package), (".cute.interface", interface)):
            monkeypatch.setitem(sys.modules, "flash_attn" + name, module)
        inputs, dy = [*torch.randn(3, T, 2, 16)] + [torch.rand(T, 2)] * has_gate, torch.randn(T, 2, 16)
        ends, position = torch.tensor([0, 17, 18, T, T], dtype=torch.int32), torch.arange(T)
        document, back = torch.searchsorted(ends, position.int(), right=True), position[:, None] - position
        mask = torch.where((back >= 0) & (back <= 9) & (document[:, None] == document), 0.0, -torch.inf)

        def results(f, dtype):
            return gradients(lambda q, k, v, *gate: f(q, k, v, ends, 52, 9, 0.3, *gate), to(dtype, *inputs),
                             dy.to(dtype))
        for a, b in zip(results(t.attention_flash4, FP32), results(t.attention_reference, FP64), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("paired,offset,mix", KINDS)
    def test_attention_inputs_operations(self, paired, offset, mix):
        """The operations alone give what AttentionInputs gives, and empty gradients without a value embedding."""
        (qkv, ve, gate, grads), tables = qkv_inputs(19, 2, 16, mix), rotation(19, 16, paired)
        r = row_factors(19, offset == mix)
        outputs = gradients(lambda x, *y: t.AttentionInputs.apply(x, r, *y, *tables, paired, offset), (qkv, ve, gate),
                            grads)
        inputs = qkv, r, ve, gate, *tables
        alone = [*t.attention_inputs_forward(*inputs, paired, offset),
                 *t.attention_inputs_backward(*inputs, *grads, paired, offset)]
        assert all(torch.equal(a, b) for a, b in zip(outputs, alone))
        assert mix or alone[4].numel() == alone[5].numel() == 0

    @pytest.mark.parametrize("n,S,V,count", [(1, 5, 48, 3), (1, 4, 77, 2), (1, 3, 16, 1), (1, 2, 130, 2), (1, 3, 33, 3),
                                             (1, 2, 5001, 2), (3, 4, 48, 3), (2, 1, 20, 2)])
    def test_loss(self, n, S, V, count):
        """Loss and gradient, also with equal targets at neighbouring positions and more than one block of columns."""
        logits, targets = 8 * torch.randn(n * S, V), torch.randint(0, V, (n, S))
        targets[:, : S - 1] = targets[:, :1]
        weights = torch.tensor([1.0, 0.5, 0.25][:count])
        loss, grad = t.softcapped_mtp_loss(logits, targets, weights, FP32, 0.03)
        exact, exact_grad, bound = exact_loss(logits, targets, weights, 0.03)
        assert (loss - exact).abs().max() <= weights.sum() * ROUNDING
        assert ((grad - exact_grad).abs() <= bound).all()
        reference, reference_grad = t.softcapped_mtp_loss_reference(logits, targets, weights, FP32, 0.03)
        assert (reference - exact).abs().max() <= weights.sum() * ROUNDING
        assert ((reference_grad - exact_grad).abs() <= bound).all()

    @pytest.mark.parametrize("m,n", [(64, 128), (37, 70), (130, 200), (1, 5)])
    def test_transposes(self, m, n):
        """Exactly the transposed numbers, of every kind that is copied; the sum, in fp32, is rounded once."""
        src = torch.randn(m, n)
        for dtype in (FP32, BF16, E5M2):
            x, dst = src.to(dtype), torch.full((n, m), float("nan")).to(dtype)
            t.transpose_into(x, dst, add=False)
            assert torch.equal(dst.float(), x.float().T)
        added = torch.randn(n, m)
        expected = added + src.T
        t.transpose_into(src, added, add=True)
        assert torch.equal(added, expected)

    @pytest.mark.parametrize("m,n", [(64, 128), (37, 300), (1, 1)])
    def test_transposed(self, m, n):
        """Every byte of an e5m2 matrix, NaN and infinities too."""
        src = torch.randint(0, 256, (m, n), dtype=torch.uint8).view(E5M2)
        ours = t.transposed(src)
        assert ours.dtype == E5M2 and ours.is_contiguous()
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
        self.within(out, exact, size, T)

    @pytest.mark.parametrize("K,n,k", [(1, 16, 16), (2, 32, 48), (3, 20, 37), (2, 7, 5), (1, 140, 24), (2, 300, 70),
                                       (1, 256, 64)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_symmetric_products(self, K, n, k, turned):
        """c x x^T and b s + c s s^T over one and several tiles, of x and of views of tall x."""
        x = torch.randn(K, k, n).mT if turned else torch.randn(K, n, k)
        s = t.symmetric_product(x, 0.0, 1.5)
        self.within(s, 1.5 * x.double() @ x.double().mT, 1.5 * x.double().abs() @ x.double().abs().mT, k + 1)
        s = (s + s.mT) / 2
        reference = t.symmetric_product_reference
        self.within(t.symmetric_product(s, -2.5, 0.75), reference(s.double(), -2.5, 0.75),
                    reference(s.double().abs(), 2.5, 0.75), n + 4)

    def test_tile_numbers(self):
        """The closed form by which symmetric_kernel finds its tile, in fp32 with a root off by two roundings."""
        for i in range(300):
            for tile in (i * (i + 1) // 2, i * (i + 1) // 2 + i):
                for wrong in (1 - 2 * EPS, 1 + 2 * EPS):
                    assert int((torch.tensor(8.0 * tile + 2.0).sqrt() * wrong - 1) * 0.5) == i

    @pytest.mark.parametrize("shape", [(2, 40, 100), (2, 100, 40), (1, 140, 140)])
    def test_polar_express(self, shape):
        """With the kernels no less exact than with the references."""
        x = torch.randn(shape)
        exact = t.polar_express(x.double(), False)
        ours, plain = ((t.polar_express(x, fast).double() - exact).norm() for fast in (True, False))
        assert ours <= 2 * plain + EPS * exact.norm()

    @pytest.mark.parametrize("kernels", ["triton", "quack"])
    def test_model(self, kernels, n=40):
        """The loss of the whole model, as one compiled graph, and all gradients are those with the references."""
        hp, _ = t.parse_args(["--preset=demo", "--vocab_size=300"])
        model = t.GPT(hp)
        model.initialize(0)
        model.cos, model.sin = model.cos.float(), model.sin.float()
        model.set_stage(0)
        for p in model.parameters():
            p.data.add_(0.03 * torch.randn(p.shape))
        tokens = torch.randint(0, 300, (n + 1,), dtype=torch.int32)
        ids = torch.from_numpy(t.bigram_ids(tokens[:-1].numpy(), hp.bigram_rows))
        ends = torch.tensor([0, 13, 30, n, n], dtype=torch.int32)
        order, geometry = tokens[:-1].argsort().int(), t.Geometry(4, 12, 17, 0.2, segment=n // 2)
        batch = t.Batch(tokens[:-1], tokens[1:].long(), ids, ends, order)

        def results(kernels, compiler=lambda f, **_: f):
            model.use("reference", kernels)
            forward = compiler(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
            loss = forward(batch, model.lookup(batch), geometry, torch.tensor([1.0, 0.5]), 1.0)
            return loss.item(), *torch.autograd.grad(loss, tuple(model.parameters()))
        (loss, *ours), (exact, *plain) = results(kernels, torch.compile), results("reference")
        assert abs(loss - exact) <= 1e-6 * exact
        for row, a, b in zip(model.named_parameters(), ours, plain, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), (row[0], (a - b).norm() / b.norm())

    def test_operations(self):
        """Schemas and shapes that torch.compile relies on, and a graph without breaks; test_model has the others."""
        check = torch.library.opcheck
        check(t.symmetric_product, (torch.randn(1, 16, 8), 0.0, 0.5))
        a, b, c, r, scale = torch.randn(8, 4), torch.randn(4, 12), torch.rand(8, 12), torch.rand(8), torch.tensor(0.5)
        for more in ((), (r,)):
            check(t.product, (a, b, *more))
        check(t.product_root, (a, b, c, r))
        check(t.product_norm_grad, (a, b, c, c + 1, scale, r))
        check(t.product_sum, (a, b, [c, c + 1], [scale, scale]))
        check(t.add_columns, (c.clone(), c[:, :5]))
        check(t.embedding_sums_backward, (c, c + 1, torch.rand(3), torch.rand(3), [c, c - 1, c - 2]))
        check(t.softcapped_mtp_loss, (torch.randn(3, 16), torch.tensor([[1, 2, 3]]), torch.ones(2), FP32, 0.5))
        for mix in (False, True):
            qkv, *inputs, grads = qkv_inputs(5, 2, 16, mix)
            inputs = [qkv, row_factors(5, mix), *inputs, *rotation(5, 16, False)]
            check(t.attention_inputs_forward, (*inputs, False, True))
            check(t.attention_inputs_backward, (*inputs, *grads, False, True))
        check(t.transposed, (torch.ones(4, 8, dtype=torch.int8),))  # opcheck itself cannot do fp8
        tables = rotation(16, 16, True)

        def everything(x, up, down, ve, gate, scale):
            y, _ = t.ReluSquareMLP.apply(x, t.inverse_rms(x.detach().square(), 96), up, down, scale)
            q, k, v = t.AttentionInputs.apply(y.view(16, 3, 2, 16), None, ve, gate, *tables, True, True)
            s = t.symmetric_product(t.symmetric_product(up[None].detach(), 0.0, 1.0), 0.5, 0.25)
            loss, grad = t.softcapped_mtp_loss(y.detach(), torch.arange(16)[None], torch.ones(2), FP32, 1.0)
            return (q * v).sum() + (k * v).sum() + s.sum() + loss.sum() + grad.sum()

        inputs = [0.3 * torch.randn(shape) for shape in ((16, 96), (32, 96), (32, 96), (16, 32), (16, 2), (16,))]
        graph = torch.compile(everything, fullgraph=True, backend="aot_eager")
        for eager, ours in zip(*(gradients(f, inputs, None) for f in (everything, graph))):
            torch.testing.assert_close(ours, eager)


def error(x, exact):
    """Relative, in the Frobenius norm."""
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def as_good(ours, plain, exact, slack=1e-6):
    """Our errors are at most twice those of the plain bf16 version; false for NaN."""
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype
        assert error(a, c) <= 2 * error(b, c) + slack, (i, error(a, c), error(b, c))


def randn(*shape):
    return torch.randn(shape, device="cuda").to(BF16)


def installed(name):
    return importlib.util.find_spec(name) is not None


needs_fa4 = pytest.mark.skipif(not installed("flash_attn"), reason="flash_attn is not installed")
needs_quack = pytest.mark.skipif(not installed("quack"), reason="needs the package quack-kernels")


def document_ends(T, lengths):
    """cu_seqlens of documents of these lengths, repeated as long as T has room, and padding with T."""
    ends = list(itertools.takewhile(lambda e: e < T, itertools.accumulate(itertools.cycle(lengths))))
    return torch.tensor([0, *ends] + 3 * [T], dtype=torch.int32, device="cuda")


def test_flash3_is_called_right(monkeypatch):
    """With a stand-in for its module that checks the call, inside one compiled graph."""
    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size):
        assert cu_q is cu_k and max_q == max_k and causal and window_size == (9, 0)
        return t.attention_reference(q, k, v, cu_q, max_q, window_size[0], softmax_scale), None

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=varlen))
    q, k, v = torch.randn(3, 40, 2, 16)
    options = torch.tensor([0, 17, 40], dtype=torch.int32), 23, 9, 0.1
    attend = torch.compile(t.ATTENTION_BACKENDS["fa3"](), fullgraph=True, backend="aot_eager")
    for gate in (None, torch.rand(40, 2)):
        torch.testing.assert_close(attend(q, k, v, *options, gate), t.attention_reference(q, k, v, *options, gate))


@pytest.mark.parametrize("capability,chosen", [((9, 0), "fa4"), ((10, 0), "torch")])
def test_fa4_is_for_hopper(monkeypatch, capability, chosen):
    """On newer GPUs the package would take a kernel that knows no gates."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(t, "triton", object())
    monkeypatch.setattr(t, "gated_flash4", lambda: None)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "fa3", lambda: 1 // 0)
    hp, device = t.parse_args([])[0], torch.device("cuda")
    assert t.choose_attention(hp, device) == chosen
    if chosen != "fa4":
        with pytest.raises(t.UserError, match="fa4 and fa3 a Hopper GPU"):
            t.choose_attention(replace(hp, attention="fa4"), device)


@pytest.mark.parametrize("heads,head_dim,attention,kernels", [
    (6, 128, "fa4", "triton"), (4, 256, "torch", "triton"), (8, 96, "torch", "reference")])
def test_choice_by_head_dim(monkeypatch, heads, head_dim, attention, kernels):
    """What is chosen on a Hopper GPU without quack and fa3 can take that width, and what cannot says why."""
    monkeypatch.setattr(t, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "fa4", lambda: None)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "fa3", lambda: 1 // 0)
    hp, _ = t.parse_args([f"--num_heads={heads}", f"--head_dim={head_dim}", f"--model_dim={heads * head_dim}"])
    device = torch.device("cuda")
    assert (t.choose_attention(hp, device), t.choose_kernels(hp, device)) == (attention, kernels)
    if attention != "fa4":
        with pytest.raises(t.UserError, match="head_dim of 32, 64 or 128"):
            t.choose_attention(replace(hp, attention="fa4"), device)
    if kernels != "triton":
        with pytest.raises(t.UserError, match="head_dim that is a power of 2"):
            t.choose_kernels(replace(hp, kernels="triton"), device)


@pytest.mark.skipif(not HOPPER, reason="needs Triton and a Hopper or newer GPU")
class TestGPU:
    """bf16 against float64 on the same numbers: errors at most twice those of the plain version in bf16."""

    @pytest.fixture(autouse=True)
    def unwritten_is_nan(self):
        """The memory that a test gets was NaN."""
        torch.full((2**30,), float("nan"), dtype=BF16, device="cuda")
        yield
        torch.cuda.empty_cache()

    @needs_quack
    @pytest.mark.parametrize("T,D,width", [(1000, 768, 3072), (77, 136, 328)])
    def test_products(self, T, D, width):
        """The MLP, the linear layers around attention and their gradients."""
        scale, s0, s1 = (torch.tensor(s, device="cuda") for s in ([0.7] * T, [0.3, -0.4, 0.5], [0.2, 0.0, 0.6]))
        x, up, down, w = randn(T, D), randn(width, D) * D**-0.5, randn(width, D) * D**-0.5, randn(D, D) * D**-0.5
        r, streams = t.inverse_rms(x.float().square(), D), [randn(T, D), scale, randn(T, D), randn(T, D)]

        n = t.GATE_INPUTS
        gate_inputs = randn(T, n // 2), randn(2, n), randn(2, n)

        def linear(x, *y):
            u, *gates = t.NormedLinear.apply(t.FoldedNorm.apply(x, r), r, *y)
            return (u * r[:, None]).to(BF16), *(y.to(BF16) for y in gates)

        for ours, plain, inputs in [
            (lambda x, *y: t.ReluSquareMLP.apply(x, r, *y)[0], lambda x, *y: t.mlp_reference(x, None, *y)[0],
             [x, up, down, scale]),
            (linear, normed_linear_reference, [x, up, *gate_inputs]),
            (layers(t.LinearSum.apply, t.EmbeddingSums.apply),
             layers(t.linear_sum_reference, t.embedding_sums_reference), [x, w, *streams, s0, s1]),
        ]:
            dy = [randn(T, width), randn(T, 2), randn(T, 2)] if len(inputs) == 5 else [randn(T, D)]
            exact = gradients(plain, to(FP64, *inputs), to(FP64, *dy))
            as_good(gradients(ours, inputs, dy), gradients(plain, inputs, dy), exact, slack=2.0**-8)
        c = streams[0]
        y, sums_r = t.LinearSum.apply(x, w, c, scale, c, c, c, s0[0], s1[0])
        assert error(sums_r, t.inverse_rms(y.double().square(), D)) <= 2.0**-8

    @pytest.mark.parametrize("T,S,paired,offset,mix", [(1001, 1001, *kind) for kind in KINDS] + [
        (4096, 1024, True, True, True), (3003, 1001, False, True, True)])
    def test_attention_inputs(self, T, S, paired, offset, mix):
        (*inputs, grads), tables = qkv_inputs(T, 6, 128, mix, device="cuda"), rotation(S, 128, paired, device="cuda")
        inputs, grads, tables = to(BF16, *inputs), to(BF16, *grads), to(BF16, *tables)
        r = row_factors(T, offset == mix, device="cuda")

        def results(f, dtype=BF16):
            c, s = to(dtype, *tables)
            return gradients(lambda qkv, *x: f(qkv, r, *x, c, s, paired, offset), to(dtype, *inputs), to(dtype, *grads))

        as_good(results(t.AttentionInputs.apply), results(t.attention_inputs_reference),
                results(t.attention_inputs_reference, FP64))

    @pytest.mark.parametrize("T,kind", [(1001, kind) for kind in GATE_KINDS] + [(49152, (True, "mixed"))])
    def test_gates(self, T, kind):
        inputs, r, directions = gates_inputs(T, 6, 12, kind, device="cuda")
        inputs = to(BF16, *inputs)

        def results(f, dtype=BF16, exact=FP32):
            factor = r if r is None else r.to(exact)
            return gradients(gates_of(f, factor), to(dtype, *inputs), to(exact, *directions))

        as_good(results(t.Gates.apply), results(t.gates_reference), results(t.gates_reference, FP64, FP64))

    @pytest.mark.parametrize("n,S,V,count,spread,dtype", [
        (1, 512, 50304, 3, 4, E5M2), (1, 37, 1002, 2, 8, E5M2), (1, 5, 50258, 1, 4, BF16), (1, 300, 1003, 3, 4, FP32),
        (4, 128, 50304, 3, 4, E5M2), (3, 100, 1003, 3, 4, FP32)])
    def test_loss(self, n, S, V, count, spread, dtype):
        """fp32 and bf16 gradients to the bound of the arithmetic; e5m2 ones, with a short tanh, to e5m2's own error."""
        logits, targets = spread * randn(n * S, V), torch.randint(0, V, (n, S), device="cuda")
        logits = logits.to(FP32) if dtype == FP32 else logits
        targets[:, 2:5] = targets[:, 2:3]
        weights, scale = torch.tensor([1.0, 0.5, 0.25][:count], device="cuda") / 8, t.GRAD_SCALE / 8
        loss, grad = t.softcapped_mtp_loss(logits, targets, weights, dtype, scale)
        exact, exact_grad, bound = exact_loss(logits, targets, weights, scale)
        relative = ROUNDING + (1.01 * t.CAP / 2 * TANH_ERROR if dtype == E5M2 else 0)
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
    def test_transposes(self, m, n):
        """Exact: copies of bf16, e5m2 and fp32, and the sum rounded once."""
        for x in (randn(m, n), randn(m, n).to(E5M2), randn(m, n).float()):
            dst = torch.full((n, m), float("nan"), device="cuda").to(x.dtype)
            t.transpose_into(x, dst, add=False)
            assert torch.equal(dst.float(), x.float().T)
            if x.dtype == E5M2:
                assert torch.equal(t.transposed(x).view(torch.uint8), x.view(torch.uint8).T)
            else:
                added = randn(n, m).to(x.dtype)
                expected = added.clone()
                t.transpose_into(x, added, add=True)
                t.transpose_into_reference(x, expected, add=True)
                assert torch.equal(added, expected)

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

    @pytest.mark.parametrize("K,n,k,turned", [
        (6, 256, 768, False), (2, 768, 768, False), (2, 768, 3072, True), (3, 77, 100, False), (3, 77, 100, True)])
    def test_symmetric_products(self, K, n, k, turned):
        x = randn(K, k, n).mT if turned else randn(K, n, k)
        ours, reference = t.symmetric_product, t.symmetric_product_reference
        s = reference(x, 0.0, 1.0)
        as_good([ours(x, 0.0, 1.0)], [s], [reference(x.double(), 0.0, 1.0)])
        s = s / s.float().norm(dim=(-2, -1), keepdim=True).to(BF16)
        as_good(*([f(y, -2.77, 0.51)] for f, y in ((ours, s), (reference, s), (reference, s.double()))))

    @pytest.mark.parametrize("shape", [(6, 256, 768), (2, 3072, 768), (3, 100, 77)])
    def test_polar_express(self, shape):
        x = randn(*shape)
        as_good(*([t.polar_express(y, fast)] for y, fast in ((x, True), (x, False), (x.double(), False))))

    @pytest.mark.parametrize("fp8,kernels", [
        (True, pytest.param("quack", marks=needs_quack)), (True, "triton"), (False, "triton")])
    def test_head(self, fp8, kernels):
        """Loss as with the reference to the loss kernel's bound; gradients no less exact than the reference's."""
        T, D, V = 512, 768, 50304
        x, w, targets = randn(T, D), randn(D, V) * 0.03, torch.randint(0, V, (2, T // 2), device="cuda")
        weights = torch.tensor([1.0, 0.5, 0.25], device="cuda") / 8
        one = torch.ones((), device="cuda")
        (loss, *ours), (reference, *plain) = (
            gradients(lambda a, b, kernels=kernels: t.HeadLoss.apply(a, b, targets, weights, fp8, 1 / 8, kernels),
                      (x, w), one)
            for kernels in (kernels, "reference"))
        relative = ROUNDING + (1.01 * t.CAP / 2 * TANH_ERROR if fp8 else 0)
        assert (loss - reference).abs() <= T * weights.sum() * relative
        logits = x.double() @ w.double()
        _, grad, _ = exact_loss(logits, targets, weights, 1.0)
        as_good(ours, plain, [grad @ w.double().T, x.double().T @ grad], slack=1e-4)

    @pytest.mark.parametrize("has_gate", [False, True])
    @pytest.mark.parametrize("backend", ["torch", pytest.param("fa4", marks=needs_fa4)])
    @pytest.mark.parametrize("T,H,window,lengths", [
        (2048, 6, 384, (700, 300, 1)), (1537, 3, 128, (513, 90, 1, 2, 333)), (1001, 6, 2000, (1001,))])
    def test_attention(self, backend, T, H, window, lengths, has_gate):
        """Output and gradients: windows inside and beyond the documents, which are many, of one token, or one."""
        inputs, dy, ends = [randn(T, H, 128) for _ in range(3)], randn(T, H, 128), document_ends(T, lengths)
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
        T, D = 1024, 768
        *inputs, grads = qkv_inputs(T, 6, 128, True, device="cuda")
        inputs, tables = to(BF16, *inputs), to(BF16, *rotation(T, 128, False, device="cuda"))

        def both(x, up, down, scale, qkv, ve, gate):
            return (t.ReluSquareMLP.apply(x, t.inverse_rms(x.detach().float().square(), D), up, down, scale)[0],
                    *t.AttentionInputs.apply(qkv, None, ve, gate, *tables, False, True))

        scale = torch.full((T,), 0.7, device="cuda")
        inputs = [randn(T, D), randn(4 * D, D) * D**-0.5, randn(4 * D, D) * D**-0.5, scale, *inputs]
        direction = to(BF16, randn(T, D), *grads)
        graph = torch.compile(both, fullgraph=True, dynamic=False)
        for eager, ours in zip(*(gradients(f, inputs, direction) for f in (both, graph))):
            assert error(ours, eager) <= 2.0**-8  # a rounding in bf16: the graph may choose other matrix products
