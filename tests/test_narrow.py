"""Layers whose heads are narrower, a cell of LAYERS, against attention by its formulas in float64, which slices."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map, tree_map_only

import train_gpt as t

RANKS = t.Ranks(0, 1, torch.device("cpu"))
NARROW = [f"LAYERS.{i}.narrower={n}" for i, n in {0: 2, 1: 4, 2: 4, 3: 2, 8: 1, 9: 4, 10: 4}.items()]
DENSE = ["LAYERS.10.dense=early", "LAYERS.*.value_gate_mixed=true", "LAYERS.8.gate=false", "LAYERS.1.value_gate=false"]
FP8 = [f"LAYERS.{i}.fp8_qkv=true" for i in (0, 1, 2, 4, 10)]


@pytest.fixture
def base(byte_files):
    return dataclasses.replace(t.PRESETS["demo"], **byte_files, vocab_size=256, model_dim=64, num_heads=2, head_dim=32,
                               batch_unit=256)


def cells(hp, *texts):
    for text in texts:
        hp = t.set_cells(hp, text)
    t.check_recipe(hp)
    return hp


class Sliced(t.GPT):
    """The same of layers with whole heads, by formulas: Q, K and V use `widths` rows of each head, and what attention
    gives is zeros in O's other columns."""

    def attend(self, layer, j, h, qkv, ve, batch, windows):
        H, d, n, x, T = self.hp.num_heads, self.hp.head_dim, self.widths[j], h.x, len(h.x)
        q, k, v = (torch.stack([x @ w[d * i : d * i + n].mT for i in range(H)]) for w in qkv.chunk(3))  # [H, T, n]
        if ve is not None:
            mixed = layer.value_gate_mixed or not layer.paired
            seen = torch.cat([x[:, :6], ve[:, :6]], dim=1) if mixed else x[:, :12]
            gate = 2 * (seen @ self.ve_gate_bank[layer.value_table].mT).sigmoid()
            gate = gate if layer.value_gate and not layer.dense else torch.ones_like(gate)
            v = v + torch.stack([gate[:, i, None] * ve[:, d * i : d * i + n] for i in range(H)])

        q, k = (y / (y.square().mean(-1, keepdim=True) + t.FP32_EPS).sqrt() for y in (q, k))
        position = torch.arange(T) % windows.segment
        if layer.key_offset:
            back = k[..., n // 2 :]
            k = torch.cat([k[..., : n // 2], torch.where(position[:, None] > 0, back.roll(1, 1), back)], dim=-1)
        position = torch.stack([2 * position + i % 2 if layer.paired else position for i in range(H)])  # [H, T]
        angle = -position[..., None] * t.rotation(self.hp, 0)[0][:: d // n].to(x.dtype)
        turn = torch.polar(torch.ones_like(angle), angle)

        def turned(y):
            pairs = torch.view_as_complex(y[..., : n // 2].unflatten(-1, (-1, 2)))
            return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), y[..., n // 2 :]], dim=-1)
        q, k, m = turned(q), turned(k), 1 + layer.paired
        # paired: the first half of a token's heads, then the second, then the next token's first
        q, k, v = (y.view(m, H // m, T, n).permute(1, 2, 0, 3).reshape(H // m, m * T, n) for y in (q, k, v))
        ends, i = m * batch.cu_seqlens, torch.arange(m * T)
        document, back = torch.searchsorted(ends, i.int(), right=True), i[:, None] - i
        hidden = (back < 0) | (back > getattr(windows, layer.window)) | (document[:, None] != document)
        scores = windows.scale * (d / n) ** 0.5 * q @ k.mT
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        y = y.view(H // m, T, m, n).permute(1, 2, 0, 3).reshape(T, H, n)
        if layer.gate:
            y = (x[:, :12] @ self.attn_gate_bank[j].mT).sigmoid()[..., None] * y
        return F.pad(y, (0, d - n)).flatten(1)


def model_of(kind, hp):
    model = kind(hp).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    angle = torch.outer(torch.arange(len(model.cos)), t.rotation(hp, 0)[0].double())
    model.cos, model.sin = angle.cos(), angle.sin()
    return model


def loss_and_gradients(model):
    """Of a first step, also those of rows of value tables."""
    (batch, *_), _ = next(t.train_batches(model.hp, RANKS, [0]))
    now = t.plan(0, model.hp)
    rows = tree_map(lambda x: x.detach().requires_grad_(), model.lookup(batch))
    loss = model.train_loss(batch, rows, now.windows, torch.tensor(now.mtp_weights))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads | {f"rows of table {i}": x.grad for i, x in enumerate(rows.value)}


def used(hp, name):
    """Which of a bank's numbers its layers' heads use."""
    A, H, D, d = (hp.sizes[letter] for letter in "AHDd")
    place = torch.arange(d)
    rows = torch.stack([(place < n).repeat(H) for n in hp.head_dims])[:, :, None].expand(A, D, D)  # of Q, K or V
    return torch.stack([rows, rows if name == "qk_bank" else rows.mT], dim=1)  # K; or O, by columns


@pytest.mark.parametrize("more", [[], DENSE], ids=["record80", "dense"])
def test_against_slices(base, more):
    """Loss and gradients, in float64 but for the head; what no layer uses gets none."""
    hp = cells(base, *more, *NARROW)
    assert {*hp.head_dims} == {8, 16, 32}
    loss, grads = loss_and_gradients(model_of(t.GPT, hp))
    whole = model_of(Sliced, cells(hp, "LAYERS.*.narrower=1"))
    whole.widths = hp.head_dims
    exact, expected = loss_and_gradients(whole)
    bound = 16 * torch.finfo(torch.float32).eps  # the head's type
    assert abs(loss - exact) <= bound * exact and grads.keys() == expected.keys() > {"rows of table 4"}
    for name, grad in grads.items():
        assert grad.any() and (grad - expected[name]).norm() <= bound * expected[name].norm(), name
    for name in ("qk_bank", "vo_bank"):
        assert torch.equal(grads[name].view(used(hp, name).shape) != 0, used(hp, name))


@pytest.mark.parametrize("more", [[], DENSE], ids=["record80", "dense"])
def test_fp8_copies(base, more):
    """Loss and gradients with copies made once a step are those with copies made at use."""
    def at_use(h, w, ve, cos, sin, layer, fp8):
        made = fp8 and t.fp8_weight(w.qkv.detach(), t.NORMED_SCALE, fp8.unit)
        if fp8:
            assert fp8.bits.is_contiguous() and fp8.turned.is_contiguous()  # as the products need them
            assert len(fp8.bits) == 3 * 2 * 32 // layer.narrower
        return t.plain_attention_inputs(h, w, ve, cos, sin, layer, made)

    hp, results = cells(base, *more, *NARROW, *FP8), []
    for ops in t.PLAIN, t.PLAIN._replace(attention_inputs=at_use):
        model = model_of(t.GPT, hp).float()
        model.ops, model.fp8 = ops, tree_map_only(torch.Tensor, torch.zeros_like, model.fp8_weights())
        model.copy_weights()
        results.append(loss_and_gradients(model))
    (loss, grads), (again, others) = results
    assert loss == again and grads.keys() == others.keys()
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name
    for name in ("qk_bank", "vo_bank"):
        where = used(hp, name)
        assert grads[name].view(where.shape)[where].any() and not grads[name].view(where.shape)[~where].any()


@pytest.mark.parametrize("i", [0, 1, 2, 10])
def test_fp8_attention(base, i):
    """One layer's result and gradients against the formulas, to the error of the coarser format."""
    hp = cells(base, *NARROW, *FP8)
    layer, j = hp.layers[i], hp.attn_layers.index(i)
    model, whole = model_of(t.GPT, hp).float(), model_of(Sliced, cells(hp, "LAYERS.*.narrower=1"))
    model.fp8, whole.widths = model.fp8_weights(), hp.head_dims
    (batch, *_), _ = next(t.train_batches(hp, RANKS, [0]))
    windows, generator = t.plan(0, hp).windows, torch.Generator().manual_seed(2)
    x, ve, dy = torch.randn(3, windows.segment, 64, generator=generator)
    batch, results = t.pack(hp, [(np.append(batch.tokens[: len(x)], 0), np.array([20, len(x)]))]), []
    for m in (model, whole):
        qkv = m.matrices()[0][j].detach().requires_grad_()
        inputs = [y.to(qkv.dtype, copy=True).requires_grad_() for y in (x, *[ve] * (layer.value_table is not None))]
        y = m.attend(layer, j, t.Stream(t.norm(inputs[0])), qkv, *(inputs[1:] or [None]), batch, windows)
        y = F.pad(y.unflatten(1, (2, -1)), (0, 32 - y.size(1) // 2))  # [T, 2, 32]
        results.append([y, *torch.autograd.grad(y, [qkv, *inputs], dy.to(y.dtype).view(y.shape) / 50)])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 2.0**-3 * exact.norm()  # e5m2


def test_a_run(base):
    """Two steps in which rows without use decay at most; fewer products; bad cells are named."""
    hp = cells(base, *NARROW, *DENSE, *FP8)
    run = t.Run(hp, RANKS)
    banks = {name: used(hp, name) for name in ("qk_bank", "vo_bank")}
    before = {name: getattr(run.model, name).detach().clone() for name in banks}
    loader = t.load_batches(hp, RANKS, range(2))
    for step in range(2):
        assert run.train_step(*next(loader), t.plan(step, hp)).mean < 7
    loader.close()
    for name, where in banks.items():
        old, new = (x.view(where.shape) for x in (before[name], getattr(run.model, name)))
        kept = new[~where] / old[~where]
        assert 0.998 < kept.min() and kept.max() <= 1 and (new != old)[where].float().mean() > 0.99
    tokens = sum(t.plan(step, hp).batch_tokens for step in range(hp.num_steps))
    narrower = sum(32 - d for d in hp.head_dims)
    assert t.run_flops(cells(hp, "LAYERS.*.narrower=1")) - t.run_flops(hp) == 6 * narrower * 4 * 2 * 64 * tokens
    for preset, values in (base, (0, -2, 3, 16, 1.5)), (t.PRESETS["record80"], (3, 64)):
        for value in values:
            with pytest.raises(t.UserError, match=rf"^LAYERS\.2\.narrower={value}: use "):
                cells(preset, f"LAYERS.2.narrower={value}")
    with pytest.raises(t.UserError, match=r"LAYERS\.6\.narrower=2: use 1, or with attention"):
        cells(base, "LAYERS.6.narrower=2")
