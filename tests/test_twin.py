"""NorMuon with a fast and a slow momentum (rule twin_normuon) against record #92's golden numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from test_golden import GOLDEN, error

import train_gpt as t

R92 = np.load(GOLDEN / "r92_optimizer.npz")
HP = dataclasses.replace(t.PRESETS["frontier"], num_scheduled_iterations=1174, num_extension_iterations=20)  # #92's
ROW = HP.rows["qk_bank"]
STEPS = [120, 600, 1160]  # one before the slow momentum is mixed in, one after, one of the last ones
ROUNDING = {torch.float64: 2**-24, torch.float32: 2e-6}  # a norm is in fp32; the golden numbers differ by 9e-7 in fp32


def hypers(i):
    """Those of the i-th golden update, whose rates are #92's."""
    now = t.plan(STEPS[i], HP)._replace(lr_factor=R92["lr_factor"][i].item())
    return t.twin_hypers(ROW, now, HP)


def start(kind, dtype):
    """Weights and state before the first update; of bf16 weights the low bits, too."""
    p = torch.from_numpy(R92[f"{kind}/p0"]).to(dtype)
    rate = torch.from_numpy(R92[f"{kind}/eta"][0] / (HP.muon_lr * R92["lr_factor"][0]))[:, None, None]
    return p, t.twin_state(p) | {"rate": rate.float()}


def test_golden_hypers():
    assert R92["steps"].tolist() == STEPS
    for i in range(3):
        h = hypers(i)
        for value, name in ((h.momentum, "beta"), (h.fast, "beta_fast"), (h.share, "weight_fast"), (h.decay, "decay")):
            assert value == pytest.approx(R92[name][i], rel=1e-12), name
        assert h.beta2 == 0.9


def test_begins_with_the_step():
    """All of the fast momentum, which is the only one, up to 514 / 1194 of the run."""
    for steps in (1194, 555):
        hp = dataclasses.replace(HP, num_scheduled_iterations=steps - 20)
        first = round(514 * steps / 1194)
        before, after = (t.twin_hypers(ROW, t.plan(step, hp), hp) for step in (first - 1, first))
        assert before.share == 1 and before.fast == before.momentum
        assert (after.share, after.fast) == (0.4385, 0.85) != (1, after.momentum)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_golden_directions(kind, dtype):
    """Both momenta, what the six maps make of their mix, and the normalised direction."""
    fast, slow, bare_fast, bare_slow = (torch.zeros(R92[f"{kind}/p0"].shape, dtype=dtype) for _ in range(4))
    K, rows, columns = fast.shape
    second = torch.zeros((K, rows, 1) if kind == "tall" else (K, 1, columns), dtype=dtype)
    for i in range(3):
        g = torch.from_numpy(R92[f"{kind}/g"][i])
        h = t.MuonHypers(*torch.tensor(hypers(i), dtype=dtype).unbind())
        bare = t.normuon_direction(g, bare_fast, None, h.momentum, h.beta2, dtype, bare_slow, *h[4:])
        x = t.normuon_direction(g, fast, second, h.momentum, h.beta2, dtype, slow, *h[4:])
        found = {"cascade": bare, "x": x, "fast": fast, "slow": slow, "lane_energy": second.flatten(1)}
        for name, value in found.items():
            assert error(value, R92[f"{kind}/{name}"][i]) < ROUNDING[dtype], name
        singular = torch.linalg.svdvals(bare.double())
        assert (singular - 1).abs().max() < 5e-4


@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_golden_updates(kind):
    """Weights in fp32 and, with their low bits, in bf16; decay asks the slow momentum for its sign."""
    p, state = start(kind, torch.float32)
    high, low = start(kind, torch.bfloat16)
    for i in range(3):
        g, h = torch.from_numpy(R92[f"{kind}/g"][i]), torch.tensor(hypers(i))
        t.normuon_update([(p, g, state, h, True)])
        assert error(p, R92[f"{kind}/p"][i]) < 1e-6
        t.normuon_update([(high, g.bfloat16(), low, h, True)])
        assert error(t.join_bits(high, low["low"]), R92[f"{kind}/p_bf16path"][i]) < 5e-3
        assert error(state["slow"], R92[f"{kind}/slow"][i]) < 1e-6


def test_which_sign_matters():
    """Where the slow momentum and the direction disagree, decay follows the slow one: the golden weights tell them
    apart."""
    p, state = start("tall", torch.float32)
    exact, differ = torch.from_numpy(R92["tall/p"]), 0
    for i in range(3):
        g, h = torch.from_numpy(R92["tall/g"][i]), torch.tensor(hypers(i))
        old = p.clone()
        t.normuon_update([(p, g, state, h, True)])
        x = torch.from_numpy(R92["tall/x"][i])
        other = (x * old >= 0) != (state["slow"] * old >= 0)
        lr = h[0] * state["rate"]
        moved = (exact[i] - (old - lr * x)) / (-lr * h[1] * old)  # 1 where it decays, 0 where not
        assert torch.equal(moved[other].round() == 1, (state["slow"] * old >= 0)[other])
        differ += other.sum()
    assert differ > 20


def test_one_momentum_is_normuon():
    """While it is not mixed in, the slow momentum changes the maps and decay alone: with rule normuon's own hypers the
    direction before the maps is the same."""
    g = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    alone, fast, slow = (torch.zeros(2, 6, 4) for _ in range(3))
    h = t.MuonHypers(*torch.tensor(hypers(0)).unbind())
    for _ in range(3):
        t.normuon_direction(g, alone, None, h.momentum, h.beta2, torch.float32)
        t.normuon_direction(g, fast, None, h.momentum, h.beta2, torch.float32, slow, *h[4:])
    assert torch.equal(alone, fast) and not torch.equal(slow, fast)
