"""Averages of the last weights: ticks, rates, blends and norms against record #92's golden numbers; ranks; off."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_golden import GOLDEN

import train_gpt as t

R92 = np.load(GOLDEN / "r92_tail_average.npz")
N = t.AVERAGE_STEPS
PLACES = {"embed": 0, "lm_head": 1, "qk_bank": 2, "vo_bank": 3, "mlp_bank": 4, "value_embeds": 5}
# of #92: its tables' rarer updates, which decide when the average of value_embeds is fed
PARAMS = tuple(row._replace(rarer=0.2814 if row.name == "value_embeds" else 1) for row in t.PARAMS)
LETTERS = "ABCEE"


def recipe(**more):
    return dataclasses.replace(t.PRESETS["demo"], num_scheduled_iterations=N - 20, num_extension_iterations=20,
                               params=PARAMS, tail_average=1.0, **more)


def weights(step, name, dtype):
    """What the golden numbers take for a parameter's weights after a step [8]; A's copy, here one step earlier, is of
    the same weights there, as nothing is updated in step 896."""
    step += step == 895
    k = 8 * PLACES[name] + np.arange(8)
    w = ((7919 * step + 104729 * (k + 1)) % 2003) / 2003 - 0.5 + 0.002 * (step - 894) * ((k % 5) - 2)
    return torch.from_numpy(w).to(dtype)


@pytest.mark.parametrize("letter", "ABCE")
def test_golden_ticks(letter):
    average = t.AVERAGES[LETTERS.index(letter)]
    rates = t.ticks(average, recipe())
    expected = R92[f"ticks_{letter}"].tolist()
    assert [step + (letter == "A" and step == 895) for step in rates] == expected
    first, *rest = rates.values()
    assert first == 1 and set(rest) == {average.rate, average.last_rate or average.rate}
    half = t.ticks(average, dataclasses.replace(recipe(), num_scheduled_iterations=N // 2 - 20))
    assert list(half.values())[1] == pytest.approx(2 * average.rate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_golden_weights(dtype):
    """Accumulators and the last weights, of rounded weights and of exact ones."""
    rows = {name: t.Param(name, "8", "0", "adam", reduce="shard") for name in PLACES}
    held = {name: torch.zeros(8, dtype=dtype) for name in PLACES}
    hp = recipe()
    averages = {(average, name): torch.zeros(8) for average in t.AVERAGES for name in average.params.split()}
    optimizer = SimpleNamespace(hp=hp, averages=averages, row=rows, shard=lambda row: held[row.name],
                                launch_gather=lambda row: None)
    for step in range(890, N):
        for name in PLACES:
            held[name].copy_(weights(step, name, dtype))
        if step in (894, N - 1):
            assert np.abs(np.stack([x.double() for x in held.values()]) - R92[f"weights_at_{step}"]).max() < 4e-3
        t.NorMuonAdam.average(optimizer, SimpleNamespace(step=step))
    kind, tolerance = ("_bf16", 1e-6) if dtype == torch.bfloat16 else ("", 2e-6)
    for (average, name), x in averages.items():
        letter = LETTERS[t.AVERAGES.index(average)]
        order = {"A": ("lm_head", "embed"), "B": ("vo_bank", "mlp_bank"), "C": ("value_embeds",),
                 "E": ("qk_bank", "vo_bank", "mlp_bank")}[letter]
        assert np.abs(x.double().numpy() - R92[f"{letter}{kind}"][order.index(name)]).max() < tolerance
    for name, i in PLACES.items():
        difference = np.abs(held[name].double().numpy() - R92[f"final{kind}"][i]).max()
        assert difference <= (0 if dtype == torch.bfloat16 else 4e-6), name


def test_off_by_a_zero():
    """No state and no change, by the key or by the cells; a blend alone takes its own average away."""
    small = dict(vocab_size=256, model_dim=48, head_dim=8, batch_unit=64, num_scheduled_iterations=6)
    hp = dataclasses.replace(t.PRESETS["frontier_demo"], **small)
    ranks, counts = t.Ranks(0, 1, torch.device("cpu")), []
    for cell in ("", "AVERAGES.1.blend=0", "AVERAGES.*.blend=0"):
        found = t.set_cells(hp, cell) if cell else hp
        optimizer = t.NorMuonAdam(t.GPT(found), found, ranks)
        counts.append(len(optimizer.averages))
    assert counts == [8, 6, 0]
    assert not t.NorMuonAdam(t.GPT(t.small(t.Recipe())), t.small(t.Recipe()), ranks).averages


@pytest.mark.parametrize("cell,said", [
    ("AVERAGES.0.params=lm_haed", "use names of PARAMS"), ("AVERAGES.0.params=ngram_embed", "but not ngram_embed"),
    ("AVERAGES.0.params=", "use names of PARAMS"), ("AVERAGES.2.blend=-1", "0 or more")])
def test_bad_cells(cell, said):
    with pytest.raises(t.UserError, match=f"{cell[:10]}.*{said}"):
        t.parse_args(["--preset=frontier", f"--set={cell}"])
