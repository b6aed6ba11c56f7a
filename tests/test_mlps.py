"""Layers with no MLP and with several side by side, a cell of LAYERS."""

import dataclasses

import pytest
import torch

import train_gpt as t

RANKS = t.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def loss(byte_files):
    """The loss of a model's first step, whose MLPs are the given pairs of matrices, and their gradients."""
    base = dataclasses.replace(t.PRESETS["demo"], **byte_files, vocab_size=256, model_dim=16, num_heads=2, head_dim=8,
                               batch_unit=256)

    def loss_of(mlps, *cells):
        hp = base
        for cell in cells:
            hp = t.set_cells(hp, cell)
        t.check_recipe(hp)
        model = t.GPT(hp).double()
        model.initialize(hp)
        (batch, *_), _ = next(t.train_batches(hp, RANKS, [0]))
        model.mlp_bank.data.copy_(torch.stack(sum(map(list, mlps), [])))
        now = t.plan(0, hp)
        model.set_stage(0)
        rows = t.Embeddings(*(x.detach() if isinstance(x, torch.Tensor) else tuple(y.detach() for y in x)
                              for x in model.lookup(batch)))
        value = model.train_loss(batch, rows, now.windows, torch.tensor(now.mtp_weights).double())
        value.backward()
        return value.item(), [*model.mlp_bank.grad.view(-1, 2, *model.mlp_bank.shape[1:])]

    return loss_of


def pairs(n):
    generator = torch.Generator().manual_seed(0)
    return [(0.3 * torch.randn(2, 64, 16, generator=generator)).double().unbind() for _ in range(n)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_side_by_side(loss):
    """Two MLPs of a layer are one whose hidden layer is cut in two, and so are their gradients; others keep theirs."""
    mlps = pairs(11)
    up, down = mlps[3]
    first, second = torch.zeros_like(up), torch.zeros_like(down)
    first[:32], second[:32] = up[32:], down[32:]  # its second half, the rest without effect
    cut = [x.clone() for x in (up, down)]
    for x in cut:
        x[32:] = 0
    whole, grads = loss(mlps)
    value, parts = loss([*mlps[:3], tuple(cut), (first, second), *mlps[4:]], "LAYERS.3.mlps=2")
    close(value, whole)
    close(parts[3][:, :32], grads[3][:, :32])
    close(parts[4][:, :32], grads[3][:, 32:])
    for a, b in zip([*parts[:3], *parts[5:]], [*grads[:3], *grads[4:]], strict=True):
        close(a, b)


def test_none(loss):
    """Without an MLP a layer does what one of zeros does."""
    mlps = pairs(11)
    value, _ = loss([*mlps[:7], tuple(map(torch.zeros_like, mlps[7])), *mlps[8:]])
    close(loss([*mlps[:7], *mlps[8:]], "LAYERS.7.mlps=0")[0], value)
    assert abs(value - loss(mlps)[0]) > 1e-4


def test_a_run(byte_files):
    """Two steps on a bank of another size, also padded; bad cells are named."""
    base = dataclasses.replace(t.PRESETS["demo"], **byte_files, vocab_size=256, model_dim=16, num_heads=2, head_dim=8,
                               batch_unit=256)
    hp = t.set_cells(t.set_cells(base, "LAYERS.7.mlps=0"), "LAYERS.8.mlps=3")
    run = t.Run(hp, RANKS)
    loader = t.load_batches(hp, RANKS, range(2))
    before = run.model.mlp_bank.detach().clone()
    for step in range(2):
        assert run.train_step(*next(loader), t.plan(step, hp)).mean < 7
    loader.close()
    assert len(before) == 24 and ((run.model.mlp_bank - before).flatten(1).norm(dim=1) > 1e-3).all()
    tokens = sum(t.plan(step, hp).batch_tokens for step in range(hp.num_steps))
    assert t.run_flops(hp) - t.run_flops(base) == 6 * 2 * 16 * 64 * tokens  # one MLP more
    for text in ("LAYERS.2.mlps=-1", "LAYERS.2.mlps=1.5"):
        with pytest.raises(t.UserError, match=r"LAYERS\.2\.mlps="):
            t.check_recipe(t.set_cells(hp, text))
