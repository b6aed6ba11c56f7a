"""Products in FP8 on the CPU: numbers and gradients against float64, with bounds from the formats."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import train_gpt as t

# Half a step: relative to a number, and the smallest one, in units of the scale
ROUNDING = {t.E4M3: (2.0**-4, 2.0**-10), t.E5M2: (2.0**-3, 2.0**-17)}
T, D, N = 48, 32, 64


def within(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("scaled", [False, True])
def test_quantized(dtype, scaled, scale=2.0**-5):
    """Rounded to the nearest number, saturated, the same transposed; a nan stays one."""
    x, r = torch.randn(T, D) * torch.logspace(-4, 1, T)[:, None], torch.rand(T) if scaled else None
    x[3, 5], x[4, 6], x[5, 7] = 1e9, -1e9, torch.nan
    y, turned = t.quantized(x, r, scale, dtype)
    assert y.dtype == dtype and torch.equal(y.mT.float().nan_to_num(-1), turned.float().nan_to_num(-1))
    exact = (x if r is None else r[:, None] * x).double()
    largest = scale * torch.finfo(dtype).max
    assert (y[3, 5].float() * scale, y[4, 6].float() * scale) == (largest, -largest) and y[5, 7].float().isnan()
    exact = exact.clamp(-largest, largest).nan_to_num(0)
    relative, least = ROUNDING[dtype]
    within(y.double().nan_to_num(0) * scale, exact, (relative * exact.abs()).clamp_min(scale * least))


def test_weight():
    """The largest number of a matrix is the format's largest, whatever it is; zeros stay zeros."""
    for w in (torch.randn(N, D) * 1e-3, torch.zeros(N, D)):
        w8, turned, scale, backward, unit = t.fp8_weight(w, 1.0, 0.125)
        assert torch.equal(w8.mT.float(), turned.float()) and (backward, unit) == (0.125 * scale, 0.125)
        assert w8.float().abs().max() == (t.FP8_MAX if w.any() else 0)
        within(w8.double() * scale, w.double(), (2.0**-4 * w.double().abs()).clamp_min(scale.item() * 2.0**-10))


def test_bank():
    """Each matrix of a bank is copied as alone, those of one layer as if they were one; a scale may be given."""
    bank = torch.randn(4, N, D) * torch.tensor([1.0, 3.0, 2.0, 0.5])[:, None, None]
    alone = t.fp8_weight(bank, 0.5, 0.25)
    joined = t.fp8_weight(bank, 0.5, 0.25, layers=torch.tensor([0, 2, 2, 3]))
    fixed = t.fp8_weight(bank[0], 0.5, 0.25, 2.0**-7)
    assert fixed[2:] == (2.0**-8, 2.0**-9, 0.25) and torch.equal(fixed.bits, t.to_fp8(2.0**7 * bank[0], t.E4M3))
    for copies, first, count in [*((alone, i, 1) for i in range(4)), (joined, 0, 1), (joined, 1, 2), (joined, 3, 1)]:
        for x, y in zip(copies.part(first, count), t.fp8_weight(bank[first : first + count].flatten(0, 1), 0.5, 0.25)):
            assert x == y if isinstance(y, float) else torch.equal(x.float(), y.float()) and x.shape == y.shape


@pytest.mark.parametrize("loss_scale", [1.0, 0.125])
def test_linear(loss_scale):
    x, w, dy = t.norm(torch.randn(T, D)), torch.randn(N, D) / 8, loss_scale * torch.randn(T, N) / 50
    x.requires_grad_(), w.requires_grad_()
    y = t.Fp8Linear.apply(x, w, t.fp8_weight(w.detach(), t.NORMED_SCALE, t.GRADIENT_SCALE * loss_scale))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    x, w, dy = (z.detach().double() for z in (x, w, dy))
    one, two = 2.0**-4 + 2.0**-4 + 2.0**-8, 2.0**-3 + 2.0**-4 + 2.0**-7  # of the factors, and of their product
    tiny = 1e-4 * loss_scale  # numbers below the formats' smallest
    within(y, x @ w.mT, one * (x.abs() @ w.abs().mT) + 1e-3)
    within(dx, dy @ w, two * (dy.abs() @ w.abs()) + tiny)
    within(dw, dy.mT @ x, two * (dy.abs().mT @ x.abs()) + tiny)


def plain_mlp(x, up, down, resid, loss_scale):
    """The MLP in FP8, with copies of its weights."""
    scales = t.NORMED_SCALE, t.HIDDEN_SCALE
    copies = [t.fp8_weight(w.detach(), s, t.GRADIENT_SCALE * loss_scale) for w, s in zip((up, down), scales)]
    return t.plain_mlp(t.Stream(x), up, down, resid, copies).x


def mlp_results(f, x, up, down, scale, dy):
    inputs = [z.detach().clone().requires_grad_() for z in (x, up, down, scale)]
    y = f(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy)


def test_mlp():
    """Also its share in the gradient of the norm before it, and the residual's."""
    x, up, down = torch.randn(T, D), torch.randn(N, D) / 6, torch.randn(N, D) / 8
    scale, dy = torch.rand(T), torch.randn(T, D) / 50

    def exact(x, up, down, scale):
        return F.relu(F.linear(t.norm(x), up)).square() @ down + scale[0] * x

    def ours(x, up, down, scale):
        return plain_mlp(x, up, down, scale[0].expand(T), 1.0)

    found = mlp_results(ours, x, up, down, scale, dy)
    for a, b in zip(found, mlp_results(exact, *(z.double() for z in (x, up, down, scale, dy))), strict=True):
        assert (a - b).norm() / b.norm() < 2.0**-3  # the coarsest format's error
    again = mlp_results(ours, 2 * x, up, down, scale / 2, dy)  # the norm takes the factor out again
    torch.testing.assert_close(again[0], found[0])


def test_mlp_in_one_graph():
    """torch.compile takes the references of the products, too, without a break."""
    inputs = torch.randn(T, D), torch.randn(N, D) / 6, torch.randn(N, D) / 8, torch.rand(T), torch.randn(T, D) / 50

    def mlp(x, up, down, scale):
        return plain_mlp(x, up, down, scale[0].expand(T), 1.0)

    compiled = torch.compile(mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(mlp_results(compiled, *inputs), mlp_results(mlp, *inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_scale_with_the_loss():
    """By powers of 2 exactly, so that ranks, which change the loss scale, change no rounding."""
    x, up, down = torch.randn(T, D), torch.randn(N, D) / 6, torch.randn(N, D) / 8
    scale, dy = torch.rand(T), torch.randn(T, D) / 50
    results = []
    for s in (1.0, 0.125):
        def mlp(x, up, down, scale, s=s):
            return plain_mlp(x, up, down, scale, s)
        results.append(mlp_results(mlp, x, up, down, scale, s * dy))
    for a, b in zip(*(r[1:] for r in results), strict=True):
        torch.testing.assert_close(0.125 * a, b, rtol=1e-6, atol=1e-9)
    assert torch.equal(results[0][0], results[1][0])


RANKS = t.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def base(byte_files):
    return replace(t.PRESETS["demo"], **byte_files, vocab_size=256, model_dim=64, num_heads=2, head_dim=32,
                   batch_unit=256, val_tokens=1024)


def with_cells(hp, **cells):
    """Cells of all layers that have what they switch."""
    return replace(hp, layers=tuple(
        layer._replace(**{k: v and (k != "fp8_qkv" or layer.window is not None) for k, v in cells.items()})
        for layer in hp.layers))


def started(hp):
    """A run whose MLPs begin with random numbers throughout: half of them would be 0."""
    run = t.Run(hp, RANKS)
    torch.manual_seed(3)
    with torch.no_grad():
        run.model.mlp_bank.normal_(0, 0.05)
    return run


def test_cells(base):
    """Cells of LAYERS switch the products of training, each its own, and a stage leaves all out."""
    def loss(stages=base.stages, **cells):
        hp = replace(with_cells(base, **cells), stages=stages)
        loader = t.load_batches(hp, RANKS, [0])
        mean = started(hp).train_step(*next(loader), t.plan(0, hp)).mean.item()
        loader.close()
        return mean

    off = loss()
    found = [loss(fp8_mlp=True), loss(fp8_qkv=True), loss(fp8_mlp=True, fp8_qkv=True)]
    assert len({off, *found}) == 4 and max(abs(x - off) for x in found) < 0.05
    without = tuple(stage._replace(fp8=False) for stage in base.stages)
    assert off == loss(fp8_mlp=False) == loss(without, fp8_mlp=True, fp8_qkv=True)


def test_copies_that_are_asked_for(base):
    for hp, names in ((base, set()), (replace(base, fp8_head=True), {"head"}),
                      (with_cells(base, fp8_qkv=True), {"qkv"}), (with_cells(base, fp8_mlp=True), {"mlp"})):
        assert t.Run(hp, RANKS).model.fp8.keys() == names


@pytest.mark.parametrize("compiled", [False, True])
def test_copies(base, compiled, monkeypatch):
    """A step makes them of the weights as they are, always in the same places and by the same compiled code; they are
    no part of a checkpoint. Heads have two widths."""
    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    def addresses():
        return [x.data_ptr() for x in tree_leaves(run.model.fp8) if isinstance(x, torch.Tensor)]

    graphs, compilations = [], []
    monkeypatch.setattr(t, "maybe_compiled", lambda f, hp: torch.compile(
        f, dynamic=False, fullgraph=True, backend=counted) if compiled else f)
    hp = replace(t.set_cells(with_cells(base, fp8_mlp=True, fp8_qkv=True), "LAYERS.2.narrower=2"), fp8_head=True)
    run = started(hp)
    places = addresses()
    assert not {*places} & {state.tensor.data_ptr() for state in run.optimizer.states()}
    assert run.model.state_dict().keys() == {row.name for row in hp.params}
    with contextlib.closing(t.load_batches(hp, RANKS, range(4))) as loader:
        for step in range(4):
            expected = tree_leaves(run.model.fp8_weights())
            run.train_step(*next(loader), t.plan(step, hp))
            compilations.append(len(graphs))
            for x, y in zip(tree_leaves(run.model.fp8), expected, strict=True):
                assert x == y if isinstance(x, float) else torch.equal(x.float(), y.float())
            assert not torch.equal(run.model.fp8_weights()["mlp"][0].forward, run.model.fp8["mlp"][0].forward)
    assert addresses() == places and compilations[1] == compilations[3] and (compilations[0] > 0) == compiled


def test_validation_is_exact(base):
    """It computes the same with and without the cells."""
    values = []
    for hp in (base, with_cells(base, fp8_mlp=True, fp8_qkv=True)):
        run = started(hp)
        values.append(run.evaluate(t.Validation(hp, RANKS), t.plan(0, hp)))
    assert values[0] == values[1]


def test_layer_without_attention():
    with pytest.raises(t.UserError, match=r"LAYERS\.6\.fp8_qkv=True: a layer without attention"):
        t.parse_args(["--preset=demo", "--set", "LAYERS.6.fp8_qkv=true"])
