"""The sets of operations as a whole: the model with HOPPER's is the model with PLAIN's, and the check at the start of a
run finds an edit of one of them. FlashAttention-4, with stand-ins for its package, and how backends are chosen."""

import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kernel_tools as k
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_tools import FP32, FP64, gradients, to

import train_gpt as t

CPU = torch.device("cpu")


@k.needs_interpreter
def test_interpreted():
    k.run_interpreted(__file__)


def flash4_preprocess_reference(out, dout, lse, gate, cu_seqlens, block, sums, lse2, zero):
    dots = (out.float() * dout.float()).sum(-1) / gate.float().clamp_min(t.GATE_MIN)
    lse = lse - gate.float().mT.log()
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        at = (start // block + i) * block
        used = at + t.round_up(end - start, block)
        zero[:, at * out.size(2) : used * out.size(2)] = 0
        sums[:, at:used], lse2[:, at:used] = 0, math.inf
        sums[:, at : at + end - start] = dots[start:end].mT
        lse2[:, at : at + end - start] = math.log2(math.e) * lse[:, start:end]
    return dots


# Each way of a layer once, to save time
MODEL_LAYERS = (
    t.Layer("short", "early", paired=True, value_table=0),
    t.Layer(None, "middle", skip_from="early"),
    t.Layer("long", key_offset=True, gate=False, value_table=1, value_gate=False, reads="early"),
)
# And those of dense connections and narrower heads, with prefixes
DENSE_LAYERS = (
    MODEL_LAYERS[0]._replace(value_gate_mixed=True, narrower=2),
    t.Layer("short", "middle", skip_from="early", narrower=2),
    MODEL_LAYERS[2]._replace(gate=True, dense="middle"),
)
# Compared as one vector, as they were one parameter: the sum over tokens that is one number's gradient may cancel
SCALARS = ("attn_lambdas", "smear_lambda", "backout_lambda", "skip_lambda")


class TestInterpreted(k.Interpreted):
    @pytest.mark.parametrize("layers", [MODEL_LAYERS, DENSE_LAYERS], ids=["record80", "dense"])
    def test_model(self, layers, n=14):
        """The loss of the whole model, as one compiled graph, and all gradients are those with PLAIN's operations."""
        prefix = layers is DENSE_LAYERS
        sizes = dict(vocab_size=300, model_dim=64, num_heads=4)
        hp = replace(t.PRESETS["demo"], layers=layers, **sizes)
        t.check_recipe(hp)
        model = t.GPT(hp)
        model.initialize(hp)
        model.cos, model.sin = model.cos.float(), model.sin.float()
        model.set_stage(0)
        for p in model.parameters():
            p.data.add_(0.03 * torch.randn(p.shape))
        tokens = torch.randint(0, 300, (n + 1,), dtype=torch.int32)
        ids = torch.from_numpy(t.bigram_ids(tokens[:-1].numpy(), hp.sizes["B"]))
        ends = torch.tensor([0, 5, 10, n, n], dtype=torch.int32)
        order, windows = tokens[:-1].argsort().int(), t.Windows(4, 12, 17, 0.2, segment=n // 2)
        batch = t.Batch(tokens[:-1], tokens[1:].long(), ids, ends, order, torch.empty(2, 0, dtype=torch.int64),
                        *[torch.empty(0)] * 2, (tokens[1:, None].long() - 100).clamp_min(-1)[:, :prefix])

        def results(ops, compiler=lambda f, **_: f):
            model.ops = ops
            forward = compiler(model.train_loss, fullgraph=True, dynamic=False, backend="aot_eager")
            loss = forward(batch, model.lookup(batch), windows, torch.tensor([1.0, 0.5, 0.25][: 2 + prefix]))
            return loss.item(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.numel()],
                                                     allow_unused=True, materialize_grads=True)
        (loss, *ours), (exact, *plain) = results(t.HOPPER, torch.compile), results(t.PLAIN)
        assert abs(loss - exact) <= 1e-6 * exact
        names = [name for name, p in model.named_parameters() if p.numel()]
        ours, plain = (dict(zip(names, grads, strict=True)) for grads in (ours, plain))
        for grads in (ours, plain):
            grads["scalars"] = torch.cat([grads.pop(name).flatten() for name in SCALARS])
        for name, b in plain.items():
            assert b.norm() > 0 and (ours[name] - b).norm() <= 1e-5 * b.norm(), name

    def test_check_ops(self, monkeypatch):
        """HOPPER's kernels pass the check of a run's start, here in fp32 and but for FP8."""
        real = t.case_inputs
        monkeypatch.setattr(t, "case_inputs", lambda case, sizes, dtype, device: real(case, sizes, FP32, device))
        monkeypatch.setattr(t, "CASE_SIZES", dict(T=48, D=32, H=2, d=16, F=64, V=64, G=t.GATE_INPUTS, L=2))
        monkeypatch.setattr(t, "CASES", {name: case for name, case in t.CASES.items() if "FP8" not in name})
        monkeypatch.setattr(t, "CASE_TOLERANCE", 1e-5)
        t.check_ops(t.HOPPER, CPU)
        t.check_ops(t.HOPPER, CPU, [8])

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
        ours, plain = results(t.flash4_preprocess), results(flash4_preprocess_reference)
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


class Fp8Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, r, w, fp8):
        y, kept = t.fp8_linear(x, r, fp8, False)
        ctx.save_for_backward(r, *kept)
        ctx.unit = fp8.unit
        return y

    @staticmethod
    def backward(ctx, dy):
        r, *kept = ctx.saved_tensors
        dy8 = t.quantized_reference(dy, None, ctx.unit, t.E5M2)
        dx, dw = t.fp8_linear_gradients(*dy8, r, kept, ctx.unit, dy.dtype, False)
        return dx, None, dw, None


def attention_inputs(x, r, w, w_gate, w_value, ve, cos, sin, paired, key_offset, gated_by_ve, fp8):
    """AttentionInputs by references: its kernels' backward does not run on a CPU."""
    first = ve[:, : t.GATE_INPUTS // 2] if gated_by_ve else None
    gate, value_gate = t.gates_reference(x[:, : t.GATE_INPUTS], r, first, w_gate, w_value)
    qkv = Fp8Rows.apply(x, r, w, fp8) if fp8 else F.linear(x, w)
    qkv, r = qkv.view(len(x), 3, -1, 4 * cos.size(1)), None if fp8 else r
    value_gate = None if w_value is None else value_gate
    return *t.attention_inputs_reference(qkv, r, ve, value_gate, cos, sin, paired, key_offset), gate


class TestCheckOps:
    """The check at the start in bf16, on a CPU: HOPPER with the references of its kernels."""

    @pytest.fixture
    def hopper(self, monkeypatch):
        attention, rows = t.attention_reference, t.scatter_add_rows_reference
        monkeypatch.setattr(t, "AttentionInputs", SimpleNamespace(apply=attention_inputs))
        return t.HOPPER._replace(attention=lambda *x: attention(*x), add_rows=lambda *x: rows(*x))

    @pytest.mark.parametrize("d", [128, 64])
    def test_passes(self, hopper, d):
        """And leaves the random state as it was."""
        state = torch.get_rng_state()
        t.check_ops(hopper, CPU, [d])
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("op,edit", [
        ("mlp", lambda f: lambda x, up, down, resid, fp8: t.Stream(
            F.gelu(F.linear(t.norm(x.x), up)) @ down + (resid[:, None] * x.x).to(x.x.dtype))),
        ("mlp", lambda f: lambda x, up, down, resid, fp8: f(x, up, down, 0.9 * resid, fp8)),
        ("mlp", lambda f: lambda x, up, down, resid, fp8: f(x, up, down, torch.ones(len(x.x)), fp8)),
        ("head_loss", lambda f: lambda x, w, a, b, c, cap, *more: f(x, w, a, b, c, (23.0, 5.0, 8.0), *more)),
        ("attention_inputs", lambda f: lambda *x: (*f(*x)[:3], 1.2 * f(*x)[3])),
        ("attention_inputs", lambda f: lambda *x: f(*x[:-2], x[-2]._replace(key_offset=False), x[-1])),
        ("attention_inputs", lambda f: lambda h, w, *x: (*f(h, w, *x)[:3], None)),
        ("linear_sum", lambda f: lambda y, o, x, *more: f(y.relu(), o, x, *more)),
        ("linear_sum", lambda f: lambda y, o, x, resid, inject: f(
            y, o, x, resid, inject._replace(total=inject.total.detach()))),
        ("first_columns", lambda f: lambda x, k: (x, 1.1 * x[:, :k])),
        ("add_rows", lambda f: lambda rows, *x: f(rows * 1.1, *x)),
        ("attention", lambda f: lambda q, k, v, *x: f(1.5 * q, k, v, *x))])
    def test_an_edit_of_one_set(self, monkeypatch, hopper, op, edit):
        """Other results or gradients of PLAIN end the run with a line that names the operation and the remedy."""
        monkeypatch.setattr(t, "CASE_SIZES", dict(T=96, D=64, H=2, d=32, F=128, V=128, G=t.GATE_INPUTS, L=2))
        monkeypatch.setattr(t, "PLAIN", t.PLAIN._replace(**{op: edit(getattr(t.PLAIN, op))}))
        remedy = "attention=reference" if op == "attention" else "kernels=plain"
        with pytest.raises(t.UserError, match=f"the operation {op} .*; --{remedy} "):
            t.check_ops(hopper, CPU)


@pytest.mark.parametrize("capability,chosen", [((9, 0), "fa4"), ((10, 0), "torch")])
def test_fa4_is_for_hopper(monkeypatch, capability, chosen):
    """On newer GPUs the package would take a kernel that knows no gates."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(t, "triton", object())
    monkeypatch.setattr(t, "gated_flash4", lambda: None)
    hp, device = t.parse_args(["--micro_tokens=1"])[0], torch.device("cuda")
    assert t.choose_backends(hp, device).attention == chosen
    if chosen != "fa4":
        with pytest.raises(t.UserError, match="fa4 a Hopper one"):
            t.choose_backends(replace(hp, attention="fa4"), device)


@pytest.mark.parametrize("heads,head_dim,narrow,quack,attention,kernels", [
    (6, 128, 1, True, "fa4", "hopper"), (6, 128, 1, False, "fa4", "plain"),
    (6, 128, 2, True, "fa4", "hopper"), (6, 128, 8, True, "torch", "hopper"),
    (4, 256, 1, True, "torch", "hopper"), (8, 96, 1, True, "torch", "plain")])
def test_choice_by_head_dim(monkeypatch, heads, head_dim, narrow, quack, attention, kernels):
    """What is chosen on a Hopper GPU can take that width, and what cannot says why."""
    monkeypatch.setattr(t, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if quack else None)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "fa4", lambda: None)
    hp, _ = t.parse_args([f"--num_heads={heads}", f"--head_dim={head_dim}", f"--model_dim={heads * head_dim}",
                          "--micro_tokens=1", "--set", f"LAYERS.1.narrower={narrow}"])
    device = torch.device("cuda")
    chosen = t.choose_backends(hp, device)
    assert (chosen.attention, chosen.kernels) == (attention, kernels)
    if attention != "fa4":
        with pytest.raises(t.UserError, match="heads of 32, 64 or 128"):
            t.choose_backends(replace(hp, attention="fa4"), device)
    if kernels != "hopper":
        with pytest.raises(t.UserError, match="quack-kernels, bfloat16 and a --head_dim that is a power of 2"):
            t.choose_backends(replace(hp, kernels="hopper"), device)


@pytest.mark.parametrize("there, args, generation, said", [
    ("", [], 9, "without flash-attn-4 and quack-kernels, PyTorch's attention takes 1.08 of the time and plain "),
    ("quack", [], 9, "without flash-attn-4, PyTorch's attention takes 1.08 of the time; python -m pip install -r "),
    ("flash_attn quack", [], 9, ""), ("", [], 8, ""), ("", ["--head_dim=96", "--num_heads=8"], 9, ""),
    ("", ["--kernels=plain"], 9, "PyTorch's attention takes 1.08 of the time; "),
    ("", ["--attention=torch"], 9, "quack-kernels, plain operations take"),
    ("", ["--attention=torch", "--kernels=plain"], 9, "")])
def test_missing_packages(monkeypatch, there, args, generation, said):
    """Told where the run is slower for it, unless the user asked for that."""
    monkeypatch.setattr(t, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in there else None)
    monkeypatch.setitem(t.ATTENTION_BACKENDS, "fa4", (lambda: None) if there == "flash_attn quack" else lambda: 1 // 0)
    hp, device = t.parse_args([*args, "--micro_tokens=1"])[0], torch.device("cuda")
    line = t.missing_packages(hp, t.choose_backends(hp, device), device)
    assert said in line if said else not line


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 is not installed")
def test_flash4_is_the_pinned_one():
    """gated_flash4 and flash4_backward replace private parts of the package, so each new version must be read first."""
    requirements = (Path(t.__file__).parent / "requirements-hopper.txt").read_text()
    assert f"flash-attn-4=={importlib.metadata.version('flash-attn-4')}\n" in requirements
    from flash_attn.cute import flash_fwd_sm90, interface

    kernel = interface.FlashAttentionForwardSm90
    assert kernel is flash_fwd_sm90.FlashAttentionForwardSm90 and hasattr(interface._flash_attn_fwd, "compile_cache")
    kernel_takes = ("self acc_O lse mO mLSE sO seqlen gmem_tiled_copy_O tma_atom_O tiled_mma tidx m_block head_idx "
                    "batch_idx").split()
    assert [*inspect.signature(kernel.epilogue).parameters] == kernel_takes
    preprocess_takes = ("out dout dpsum lse lse_log2 dq_accum cu_seqlens_q seqused_q dlse dtype head_dim head_dim_v "
                        "m_block_size").split()
    assert [*inspect.signature(interface._bwd_preprocess).parameters][:13] == preprocess_takes


def test_compile_ahead(monkeypatch):
    """Processes beside a run on Hopper run all cases, end by themselves, and at once when it ends; none elsewhere."""
    ranks = t.Ranks(0, 1, CPU)
    assert t.compile_ahead(replace(t.PRESETS["demo"], kernels="plain"), ranks.device) == []
    hp = replace(t.PRESETS["demo"], kernels="hopper", attention="reference")
    started = t.compile_ahead(hp, ranks.device)
    assert len(started) == t.COMPILERS
    first, *others = started
    for process in others:
        process.stdin.close()
    assert [process.wait(60) for process in others] == [0] * len(others)
    assert first.wait(120) == 0
    seen = []
    monkeypatch.setattr(t, "case_inputs", lambda case, *_: seen.append(case))
    monkeypatch.setattr(t.os, "_exit", lambda status: None)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for part in range(t.COMPILERS):
        t.compile_cases("reference", "cpu", part)
    assert sorted(map(id, seen)) == sorted(map(id, t.CASES.values()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert t.compile_ahead(hp, ranks.device) == []
