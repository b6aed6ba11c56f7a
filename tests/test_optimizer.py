"""Optimizers, loss, head and attention against slow float64 versions written from the formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as t

CPU = torch.device("cpu")
ONE = t.Ranks(0, 1, CPU)
# six steps: 0 and 1 in stage 1, 2 and 3 in stage 2, 4 and 5 in stage 3 with the split at 5, 6 and 7 in the extension
HP = dataclasses.replace(t.PRESETS["demo"], model_dim=48, head_dim=8, vocab_size=120, batch_unit=64, val_chunk=64,
                         val_tokens=64, num_scheduled_iterations=6, num_extension_iterations=2, muon_momentum_warmup=3,
                         muon_momentum_cooldown=2)
POLAR = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
         (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
         (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
BANKS = ("qk_bank", "vo_bank", "mlp_bank")
ADAM = {row.name: row for row in t.PARAMS if row.rule == "adam" and math.prod(t.param_shape(row, HP))}  # not off
CAP = (23.0, 5.0, 7.5)
ALL = torch.empty(1, 0, dtype=torch.int64)  # no candidates: the softmax is over all classes


def polar(u):
    """Polar Express of one matrix."""
    x = u / (1.02 * np.sqrt((u**2).sum()) + 1e-6)
    for a, b, c in POLAR:
        gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
        m = b * gram + c * gram @ gram
        x = a * x + (x @ m if x.shape[0] > x.shape[1] else m @ x)
    return x


class Muon:
    """NorMuon of one matrix in float64."""

    def __init__(self, p, extra_lr):
        rows, columns = p.shape
        self.p, self.m, self.s = p, np.zeros_like(p), 0.0
        self.axis = 1 if rows >= columns else 0
        self.lr = 0.023 * math.sqrt(max(1, rows / columns)) * extra_lr
        self.unclear = np.zeros(p.shape, bool)

    def step(self, g, schedule, mu):
        self.m = mu * self.m + (1 - mu) * g
        x = polar((1 - mu) * g + mu * self.m)
        v = (x**2).mean(axis=self.axis, keepdims=True)
        self.s = 0.9 * self.s + 0.1 * v
        scaled = x / np.sqrt(np.maximum(self.s, 1e-10))
        size = np.sqrt((scaled**2).sum())
        x = scaled * np.sqrt((x**2).sum()) / size if size else scaled
        lr = self.lr * schedule
        self.unclear |= np.abs(x) < 1e-5
        decay = np.where(x * self.p >= 0, 1.2 * 0.023 * schedule * self.p, 0)
        self.p = self.p - lr * decay - lr * x


class Adam:
    """Adam with cautious decay in float64; counts nothing itself, so that a late starter shares the count."""

    def __init__(self, name, p, m=None, v=None):
        (self.beta1, self.beta2), self.lr, self.wd = ADAM[name].betas, ADAM[name].lr, ADAM[name].wd
        self.p, self.m, self.v = p, np.zeros_like(p) if m is None else m, np.zeros_like(p) if v is None else v
        self.unclear = np.zeros(p.shape, bool)

    def step(self, g, schedule, count):
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        lr = 0.008 * schedule * self.lr
        ratio = (self.m / (1 - self.beta1**count)) / (np.sqrt(self.v / (1 - self.beta2**count)) + 1e-10)
        self.unclear |= np.abs(ratio) < 1e-5
        decay = np.where(lr * ratio * self.p > 0, lr**2 * 0.005 * self.wd * self.p, 0)
        self.p = self.p - lr * ratio - decay


def random_model(hp):
    """A model whose weights are all random, so that decay and signs matter everywhere."""
    model, generator = t.GPT(hp), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "embed":
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        model.embed.copy_(model.lm_head.T)
    return model


def random_gradients(model, optimizer, generator):
    """Add random gradients as a micro-step would; returns them in float64."""
    out = {}
    for name, p in ((name, p) for name, p in model.named_parameters() if p.numel()):
        size = 10 ** (2 * torch.rand((), generator=generator) - 3)
        g = (size * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.grads[name] += g
        out[name] = g.double().numpy()
    return out


def any_state(optimizer):
    """Whether anything that steps change, but weights, is not zero."""
    return any(state.tensor.any() for state in optimizer.states() if state.name not in optimizer.params)


def same(ours, reference, unclear, tolerance=1e-5):
    """Equal to rounding, apart from the few elements whose decay hangs on the sign of almost nothing."""
    ours = ours.detach().double().numpy()
    clear = ~unclear
    assert clear.mean() > 0.98
    return np.abs(ours - reference)[clear].max() <= tolerance * max(np.abs(reference).max(), 1e-3)


def test_eight_steps_of_both_optimizers():
    """Every parameter over tied steps, the split and after it, each step compared with the float64 formulas."""
    model = random_model(HP)
    optimizer = t.NorMuonAdam(model, HP, ONE)
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    banks = {name: [Muon(p, 2.0 if name == "mlp_bank" and i % 2 else 1.0) for i, p in enumerate(start[name])]
             for name in BANKS}
    assert banks["mlp_bank"][0].lr == pytest.approx(0.046) and banks["mlp_bank"][1].lr == pytest.approx(0.092)
    adams = {name: Adam(name, start[name]) for name in ADAM if name != "embed"}
    sums, generator, updates = {name: 0.0 for name in ADAM}, torch.Generator().manual_seed(7), 0
    for step in range(8):
        p = t.plan(step, HP)
        assert p.unties == (step == 5) and p.tied == (step < 5)
        gradients = random_gradients(model, optimizer, generator)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        optimizer.step(p)
        for name, matrices in banks.items():
            for matrix, g in zip(matrices, gradients[name]):
                matrix.step(g, p.lr_factor, p.muon_momentum)
            reference, unclear = (np.stack([getattr(m, k) for m in matrices]) for k in ("p", "unclear"))
            assert same(getattr(model, name), reference, unclear), (step, name)
            assert not optimizer.grads[name].any()
        for name in ADAM:
            sums[name] = sums[name] + gradients[name]
        if step % 2 == 0:
            for name in ADAM:
                assert torch.equal(getattr(model, name), before[name]), (step, name)
            continue
        updates += 1
        if step < 5:
            sums["lm_head"] = sums["lm_head"] + sums["embed"].T
        if step == 5:
            head = adams["lm_head"]
            adams["embed"] = Adam("embed", head.p.T.copy(), head.m.T.copy(), head.v.T.copy())
        for name, adam in adams.items():
            adam.step(sums[name], p.lr_factor, updates)
            assert same(getattr(model, name), adam.p, adam.unclear), (step, name)
        for name in ADAM:
            sums[name] = 0.0
            assert not optimizer.grads[name].any(), (step, name)
        if step < 5:
            assert torch.equal(model.embed, model.lm_head.T)
        else:
            assert not torch.allclose(model.embed, model.lm_head.T, atol=1e-3)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_learning_rates_of_a_shard(world):
    """Down projections keep their doubled rate whichever rank owns them; a rank's state is that of its shard."""
    model = t.GPT(HP, world)
    found = []
    for rank in range(world):
        optimizer = t.NorMuonAdam(model, HP, t.Ranks(rank, world, CPU))
        found += optimizer.rates["mlp_bank"]["rate"].flatten().tolist()
        assert all((optimizer.rates[name]["rate"] == 1).all() for name in ("qk_bank", "vo_bank"))
        for row in t.PARAMS:
            whole, part = getattr(model, row.name), optimizer.shard(row)
            if not whole.numel():  # off here
                continue
            size = len(whole) if row.reduce == "replicate" else len(whole) // world
            begin = 0 if row.reduce == "replicate" else rank * size
            assert torch.equal(part, whole[begin : begin + size]) and part.data_ptr() == whole[begin].data_ptr()
            for tensor in optimizer.moments[row.name].values():
                assert len(tensor) == size
    assert found == pytest.approx([2.0, 4.0] * (len(model.mlp_bank) // 2)) and len(found) == (22 if world == 2 else 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_reduction_takes_all_replicated_gradients(dtype):
    """Also of a table, should its row say so."""
    hp = dataclasses.replace(HP, dtype=dtype)
    for name in ("bigram_embed", "value_embeds", "vo_bank"):
        hp = t.set_cells(hp, f"PARAMS.{name}.reduce=replicate")
    optimizer = t.NorMuonAdam(t.GPT(hp), hp, ONE)
    for flat in optimizer.flat.values():
        flat.fill_(1)
    assert {name for name, grad in optimizer.grads.items() if grad.numel() and grad.all()} == {
        row.name for row in hp.params if row.reduce == "replicate" and math.prod(t.param_shape(row, hp))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reset_brings_back_the_start(dtype, monkeypatch):
    """After steps past the split, reset gives the same state and the same further steps as a new optimizer."""
    monkeypatch.setattr(t, "polar_express", lambda x, six: x / (x.float().norm() + 1e-6).to(x.dtype))  # for speed
    hp, ends = dataclasses.replace(HP, dtype=dtype), []
    for used in (False, True):
        model = random_model(hp)
        optimizer = t.NorMuonAdam(model, hp, ONE)
        if used:
            kept = {name: p.detach().clone() for name, p in model.named_parameters()}
            generator = torch.Generator().manual_seed(1)
            for step in (0, 1, 4, 5, 6):
                random_gradients(model, optimizer, generator)
                optimizer.step(t.plan(step, hp))
            assert all(x.any() for moments in optimizer.moments.values() for x in moments.values() if x.numel())
            assert ("low" in optimizer.moments["vo_bank"]) == (dtype == "bfloat16")
            optimizer.reset()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(kept[name])
        assert not any_state(optimizer)
        generator = torch.Generator().manual_seed(2)
        for step in range(4):
            random_gradients(model, optimizer, generator)
            optimizer.step(t.plan(step, hp))
        ends.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_warmup_leaves_no_trace(make_shard):
    """The warm-up trains and splits embed from lm_head, then weights and optimizer are bitwise as at the start."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 119, 20_000)
    tokens[::37] = 119
    hp = dataclasses.replace(HP, train_files=make_shard("train_1.bin", tokens), val_tokens=128, dtype="bfloat16",
                             val_files=make_shard("val_0.bin", tokens[:200]), seed=5, num_scheduled_iterations=9,
                             num_extension_iterations=1)
    run = t.Run(hp, ONE)
    model, optimizer = run.model, run.optimizer
    kept = [p.detach().clone() for p in model.parameters()]
    lines, changed = [], []

    def log(text):
        lines.append(text)
        changed.append(not torch.equal(model.qk_bank, kept[0]) and optimizer.moments["qk_bank"]["low"].any().item())

    run.warm_up(t.Validation(hp, ONE), log)
    # two steps of each stage, as far as it has them, so that every shape meets a step with Adam and one without
    assert [int(line.split()[2]) for line in lines] == [0, 3, 6, 9, 1, 4, 7] and all(changed)
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters()))
    assert not any_state(optimizer)
    fresh = t.GPT(hp)
    for stage in (0, 1):  # the rotary tables follow the stage, whatever came before
        for m in (model, fresh):
            m.set_stage(stage)
        assert torch.equal(model.cos, fresh.cos) and torch.equal(model.sin, fresh.sin)


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38, 1 + 2**-23,
           1 - 2**-24, -1 - 2**-23, 65535.0, 2**-126 - 2**-149]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_split_bits_roundtrip(patterns):
    """Any 32 bits come back; the high half is the truncated number, the low half its last 16 bits."""
    bits = torch.cat([torch.tensor(patterns, dtype=torch.int32), torch.tensor(SPECIAL).view(torch.int32)])
    high, low = t.split_bits(bits.view(torch.float32))
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(t.join_bits(high, low).view(torch.int32), bits)
    unsigned = [int(b) & 0xFFFFFFFF for b in bits]
    assert [int(b) & 0xFFFF for b in high.view(torch.int16)] == [b >> 16 for b in unsigned]
    assert [int(b) & 0xFFFF for b in low] == [b & 0xFFFF for b in unsigned]


def test_bf16_weights_follow_the_fp32_update():
    """Over many tiny updates weight and low bits together are an fp32 number; the weight is its truncation."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 20, 12)
    p = (0.2 * torch.randn(shape, generator=generator)).bfloat16()
    state = t.normuon_state(p) | {"rate": torch.tensor([1.0, 2.0, 0.5])[:, None, None]}
    low, momentum, second = (state[key] for key in ("low", "momentum", "second"))
    exact = p.double()
    hypers, first = torch.tensor([1e-4, 0.02, 0.9, 0.9]), p.clone()
    for _ in range(20):
        g = torch.randn(shape, generator=generator).bfloat16()
        x = t.normuon_direction(g, momentum.clone(), second.clone(), hypers[2], hypers[3], torch.bfloat16).double()
        reference = np.stack([polar((0.1 * a + 0.9 * (0.1 * a + 0.9 * m)).numpy())
                              for a, m in zip(g.double(), momentum.double())])
        lr, decay = hypers[0].double() * state["rate"], hypers[1].double()
        step = lr * decay * torch.where(x * exact >= 0, exact, 0.0) + lr * x
        before = t.join_bits(p, low).double()
        t.normuon_update([(p, g, state, hypers, True)])
        exact = exact - step
        after = t.join_bits(p, low)
        assert ((after.double() - before + step).abs() <= 2**-23 * before.abs() + 2**-22 * step.abs()).all()
        assert torch.equal(p.view(torch.int16), (after.view(torch.int32) >> 16).to(torch.int16))
        assert (after.double() - exact).abs().max() < 1e-6
        # the direction is that of the float64 orthogonalisation to what bf16 products allow
        x = x.numpy()
        cosine = (x * reference).sum((1, 2)) / np.sqrt((x**2).sum((1, 2)) * (reference**2).sum((1, 2)))
        assert cosine.min() > 0.97
    assert (exact - first.double()).abs().max() > 1e-4  # which updates of 1e-4 in bf16 alone would lose
    assert low.any()


def test_normuon_zero_gradient():
    """Padding matrices never get a gradient: they stay exactly zero, and nothing becomes NaN."""
    p = torch.zeros(2, 8, 6, dtype=torch.bfloat16)
    state = t.normuon_state(p) | {"rate": torch.ones(2, 1, 1)}
    g = torch.zeros(2, 8, 6).bfloat16()
    g[1] = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    t.normuon_update([(p, g, state, torch.tensor([0.02, 0.03, 0.9, 0.9]), True)])
    assert not p[0].any() and not state["low"][0].any() and p[1].all() and p.isfinite().all()


def direct_loss(logits, targets, weights):
    """Per position the weighted sum of cross entropies of capped logits, in the precision of the logits."""
    z = 23 * torch.sigmoid((logits + 5) / 7.5)
    logp = z.log_softmax(dim=1)
    n = len(targets)
    return torch.stack([sum(-weights[k] * logp[i, targets[i + k]] for k in range(len(weights)) if i + k < n)
                        for i in range(n)])


def close(ours, reference, tolerance):
    return (ours.double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("weights", [[1.0], [0.6, 0.3], [1.0, 0.5, 0.25], [0.125, 0.0625, 0.0]])
@pytest.mark.parametrize("T, V", [(2, 5), (3, 31), (37, 129)])
def test_mtp_loss(weights, T, V):
    """Loss of each position and gradient against float64 autograd, also where later targets are missing."""
    generator = torch.Generator().manual_seed(T)
    logits = 12 * torch.randn(T, V, generator=generator)
    targets = torch.randint(V, (T,), generator=generator)
    exact = logits.double().requires_grad_()
    reference = direct_loss(exact, targets, weights)
    reference.sum().backward()
    for scale in (1.0, 0.037):
        loss, grad = t.softcapped_mtp_loss_reference(
            logits, t.next_targets(targets[None], len(weights)), torch.tensor(weights), torch.float32, scale, *CAP)
        assert loss.shape == (T,) and loss.dtype == torch.float32
        assert close(loss, reference.detach(), 1e-6) and close(grad * scale, exact.grad, 2e-6)
    coarse = t.softcapped_mtp_loss_reference(
        logits.bfloat16(), t.next_targets(targets[None], len(weights)), torch.tensor(weights), torch.bfloat16, 1.0,
        *CAP)[1]
    assert coarse.dtype == torch.bfloat16


@pytest.mark.parametrize("weights", [[0.25], [0.5, 0.2], [1.0, 0.5, 0.25]])
@pytest.mark.parametrize("T, D, V", [(2, 3, 7), (33, 17, 65)])
def test_head_loss_gradients(weights, T, D, V, monkeypatch):
    """x and w get the float64 gradients of the summed loss, times the incoming gradient; also in chunks of rows."""
    monkeypatch.setattr(t, "PLAIN_HEAD_ROWS", 8)
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(T, D, generator=generator), torch.randn(D, V, generator=generator)
    targets = torch.randint(V, (T,), generator=generator)
    grads = []
    for make, factor in ((torch.Tensor.float, -2.5), (torch.Tensor.double, 1.0)):
        a, b = make(x).clone().requires_grad_(), make(w).clone().requires_grad_()
        if a.dtype == torch.float32:
            found = t.next_targets(targets[None], len(weights))
            loss = t.PLAIN.head_loss(a, b, ALL, found, torch.tensor(weights), CAP, None)
        else:
            loss = direct_loss(a @ b, targets, weights).sum()
        assert loss.shape == ()
        (factor * loss).backward()
        grads.append((loss.detach() * factor, a.grad, b.grad))
    for ours, reference in zip(*grads):
        assert close(ours, -2.5 * reference, 3e-6)


def head_copies(w, loss_scale):
    return t.fp8_weight(w.detach(), t.X_SCALE, t.GRAD_SCALE * loss_scale, t.W_SCALE)


@pytest.mark.parametrize("unit", [1.0, 0.125])
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_fp8(unit, factor, dtype):
    """The FP8 products stay within what 3 and 2 mantissa bits allow of the float64 loss and gradients."""
    generator = torch.Generator().manual_seed(2)
    T, D, V = 48, 64, 80
    x = torch.nn.functional.rms_norm(torch.randn(T, D, generator=generator), (D,)).to(dtype).requires_grad_()
    w = (0.2 * torch.randn(D, V, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    weights = torch.tensor([1.0, 0.5, 0.25]) * unit
    try:
        found = t.next_targets(targets[None], 3)
        loss = t.PLAIN.head_loss(x, w, ALL, found, weights, CAP, head_copies(w, unit))
        (factor * loss).backward()
    except (RuntimeError, NotImplementedError) as e:
        pytest.skip(f"this torch has no FP8 product on the CPU: {e}")
    assert x.grad.dtype == w.grad.dtype == dtype

    x64, w64 = (a.detach().double().requires_grad_() for a in (x, w))
    logits = x64 @ w64
    logits.retain_grad()
    reference = direct_loss(logits, targets, weights.tolist()).sum()
    (factor * reference).backward()
    # e4m3 rounds to 2^-4 of a number, or 2^-10 steps near zero; the logits are rounded to bf16, 2^-9 of a number
    dx = 2**-4 * x64.detach().abs() + 2**-10 * 100 / 448
    dw = 2**-4 * w64.detach().abs() + 2**-10 * 1.6 / 448
    spread = dx @ w64.detach().abs() + x64.detach().abs() @ dw + dx @ dw + 2**-8 * logits.detach().abs()
    slope = logits.grad.abs() / factor
    assert (loss.double() - reference).abs() <= 1.1 * (slope * spread).sum()

    # gradients: the same numbers rounded to the formats, then exact products
    def rounded(a, scale, kind):
        return (a.detach().float() / scale).to(kind).double() * scale

    x8, w8 = (rounded(x, 100 / 448, torch.float8_e4m3fn), rounded(w, 1.6 / 448, torch.float8_e4m3fn))
    z = (x8 @ w8).bfloat16().double().requires_grad_()
    total = direct_loss(z, targets, weights.tolist()).sum()
    total.backward()
    assert (loss.double() - total).abs() <= 1e-3 * total
    g8 = rounded(z.grad, 0.75 / 448 * unit, torch.float8_e5m2)
    assert ((g8 - z.grad).abs() <= 2**-3 * z.grad.abs() + 2**-17 * 0.75 / 448 * unit).all()
    for ours, exact, full in ((x.grad, g8 @ w8.T, x64.grad), (w.grad, x8.T @ g8, w64.grad)):
        assert (ours.double() - factor * exact).norm() <= 0.02 * factor * exact.norm()
        assert (ours.double() - full).norm() <= 0.2 * full.norm()


def test_head_loss_fp8_clamps_large_weights():
    """A weight beyond the largest e4m3 number counts as that number instead of becoming NaN."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(16, 16, generator=generator), 0.1 * torch.randn(16, 32, generator=generator)
    w[3, 5], w[4, 6] = 5.0, -9.0
    clamped = w.clamp(-1.6, 1.6)
    targets, weights = torch.arange(16)[:, None], torch.ones(1)
    a, b = (t.PLAIN.head_loss(x, v, ALL, targets, weights, CAP, head_copies(v, 1.0)) for v in (w, clamped))
    assert a.isfinite() and a == b


def slow_attention(q, k, v, documents, window, scale):
    """All pairs of query and key, in float64."""
    T = len(q)
    first = np.array([max(i - window, max(s for s in documents if s <= i)) for i in range(T)])
    seen = (np.arange(T) >= first[:, None]) & (np.arange(T) <= np.arange(T)[:, None])
    e = np.where(seen, np.exp(scale * np.einsum("ihd,jhd->hij", q, k)), 0)
    return np.einsum("hij,jhd->ihd", e / e.sum(2, keepdims=True), v)


@pytest.mark.parametrize("window", [0, 1, 17, 255, 256, 257, 5000])
@pytest.mark.parametrize("T, starts", [(1, [0]), (7, [0, 1, 2, 6]), (301, [0, 1, 2, 130, 255, 256, 257, 300]),
                                       (515, [0, 100]), (519, [0, 513])])
def test_attention_reference(T, starts, window):
    """Causal, inside documents, with a left window, across the blocks of queries that share a mask."""
    assert t.REFERENCE_BLOCK == 256  # the sizes above lie around its multiples
    rng = np.random.default_rng(T)
    q, k, v = (rng.standard_normal((T, 2, 3)) for _ in range(3))
    cu = torch.full((16,), T, dtype=torch.int32)
    cu[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    ours = t.attention_reference(*(torch.from_numpy(x) for x in (q, k, v)), cu, T, window, 0.7)
    assert ours.shape == (T, 2, 3)
    assert np.abs(ours.numpy() - slow_attention(q, k, v, starts, window, 0.7)).max() < 1e-12


def test_attention_reference_gradients():
    """Gradients by finite differences, over a block boundary."""
    T = t.REFERENCE_BLOCK + 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(T, 2, 2, generator=generator, dtype=torch.double).requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 250, T, T], dtype=torch.int32)
    direction = torch.randn(T, 2, 2, generator=generator, dtype=torch.double)

    def value(*args):
        return (t.attention_reference(*args, cu, T, 6, 0.5) * direction).sum()

    grads = torch.autograd.grad(value(q, k, v), (q, k, v))
    for number, grad in enumerate(grads):
        for i in (0, 249, 250, 255, 256, T - 1):
            args = [x.detach().clone() for x in (q, k, v)]
            args[number][i, 1, 0] += 1e-5
            up = value(*args)
            args[number][i, 1, 0] -= 2e-5
            assert ((up - value(*args)) / 2e-5).item() == pytest.approx(grad[i, 1, 0].item(), abs=1e-8)
