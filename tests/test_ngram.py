"""The n-gram table of record #92: golden rows, signs and updates; ranks, checkpoints; and what a token may change."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_golden import GOLDEN

import train_gpt as t

NGRAM, ADAM = (np.load(GOLDEN / f"r92_{name}.npz") for name in ("ngram", "sparse_adam"))
CPU = torch.device("cpu")
ONE = t.Ranks(0, 1, CPU)
FULL = SimpleNamespace(ngram_rows=84_602_880, vocab_size=50_304)  # of #92; not GPT-2's 50,257: a token is its own class
ROW = next(row for row in t.PARAMS if row.name == "ngram_embed")
N = 1194


@pytest.mark.parametrize("classes", ["", "_classes"])
def test_golden_rows_and_signs(classes):
    """To the integer, of the tokens and of their classes."""
    tokens, hp = NGRAM["tokens"], SimpleNamespace(**vars(FULL))
    hp.vocab_size = 50_257 if classes else 50_304
    for ids, name in ((t.table_ids(tokens, hp), "rows"), (t.sign_ids(tokens, hp), "sign_rows")):
        assert ids.dtype == np.int32
        assert (ids == [NGRAM[f"bigram_{name}{classes}"], NGRAM[f"trigram_{name}{classes}"]]).all()


def test_golden_classes():
    assert (t.token_classes(50_257) == NGRAM["token_class"][:50_257]).all()
    assert (t.token_classes(300) == np.arange(300)).all() and (NGRAM["token_class"][50_257:] >= 50_257).all()


def test_golden_sum_and_gradients():
    """The sum of a token's two rows times their signs is rounded once; a row's gradient is the sum's times its signs."""
    toy = {name.removeprefix("toy/"): NGRAM[name] for name in NGRAM if name.startswith("toy/")}
    rows, signs = (ids(toy["tokens"].astype(np.int64), FULL) for ids in (t.table_ids, t.sign_ids))
    places = torch.from_numpy(np.searchsorted(toy["row_ids"], rows))
    sign_places = torch.from_numpy(np.searchsorted(toy["sign_row_ids"], signs))
    assert (toy["row_ids"][places] == rows).all() and (toy["sign_row_ids"][sign_places] == signs).all()
    table, pool = (torch.from_numpy(toy[name]).bfloat16() for name in ("rows", "signs"))
    batch = SimpleNamespace(bigram_ids=places, sign_ids=sign_places, slots=torch.arange(24).view(2, 12))
    assert (t.GPT.ngrams(SimpleNamespace(signs=pool), batch, table).float().numpy() == toy["g"]).all()
    sums = torch.zeros(24, 8)
    cycle = SimpleNamespace(signs=pool, sums=sums, add_rows=t.PLAIN.add_rows)
    t.Cycle.add(cycle, batch, torch.from_numpy(toy["dg"]).bfloat16())
    assert (sums.numpy() == toy["row_gradients"]).all()


def error(ours, reference):
    return np.abs(ours - reference).max() / np.abs(reference).max()


def test_golden_schedule():
    """Update steps and the scalars of each, for #92's number of steps and rates."""
    assert (0, 0) == (0, 0)
    hp = SimpleNamespace(num_steps=N, adam_lr=0.008, adam_wd=0.005, adam_eps=1e-10)
    due = [step for step in range(N) if t.due(ROW, step, hp)]
    assert due == [*range(1, 336, 2), *range(339, N, 4)] and len(due) == 382
    assert [t.cycle(ROW, step, hp)[1] for step in due] == [*range(1, 383)]
    for at, step in enumerate(ADAM["event_step"]):
        h = t.adam_hypers(ROW, SimpleNamespace(step=int(step), lr_factor=ADAM["lr"][at] / 0.56), hp)
        assert [h.lr, h.decay, h.beta2] == pytest.approx([ADAM[name][at] for name in ("lr", "decay", "beta2")], rel=1e-12)


FRONTIER = t.PRESETS["frontier"]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 3e-7)])
def test_golden_updates(dtype, tolerance):
    """Eight events at both rates, of the touched rows only: the table that updates of all rows give."""
    p = torch.from_numpy(ADAM["table_start"]).to(dtype)
    state = {key: x.to(dtype) if key == "second" else x for key, x in t.row_adam_state(p).items()}
    for at, step in enumerate(ADAM["event_step"].tolist()):
        rows = torch.from_numpy(np.unique(ADAM["token_rows"][at])).long()
        g = torch.from_numpy(ADAM["row_sums_exact"][at]).to(dtype)[rows] / 8
        beta2, decay = (ADAM[name][at] for name in ("beta2", "decay"))
        hyper = t.AdamHypers(ADAM["lr"][at], decay, 0, beta2, 1, 1 - beta2 ** (at + 1), 1e-10, 0.95, (step + 1) // 2)
        new, part = p[rows], {key: x[rows] for key, x in state.items()}
        t.row_adam_update([new], [g], [part], [torch.tensor(hyper, dtype=dtype)], [True])
        p[rows] = new
        for key in state:
            state[key][rows] = part[key]
        assert error(p.numpy(), ADAM["table_exact"][at]) < tolerance
        gap = (step + 1) // 2 - state["last"]
        assert error((state["second"] * 0.95**gap).numpy(), ADAM["second_moment_exact"][at]) < tolerance
