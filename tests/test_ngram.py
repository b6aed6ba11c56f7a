"""The n-gram table of record #92: golden rows, signs and updates; ranks, checkpoints; and what a token may change."""

import dataclasses
import itertools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import token_classes
import torch
from causality import check_later_tokens, disturbed_model
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
    """The sum of a token's rows times their signs is rounded once; a row's gradient is the sum's times its signs."""
    toy = {name.removeprefix("toy/"): NGRAM[name] for name in NGRAM if name.startswith("toy/")}
    rows, signs = (ids(toy["tokens"].astype(np.int64), FULL) for ids in (t.table_ids, t.sign_ids))
    places = torch.from_numpy(np.searchsorted(toy["row_ids"], rows))
    sign_places = torch.from_numpy(np.searchsorted(toy["sign_row_ids"], signs))
    assert (toy["row_ids"][places] == rows).all() and (toy["sign_row_ids"][sign_places] == signs).all()
    table, pool = (torch.from_numpy(toy[name]).bfloat16() for name in ("rows", "signs"))
    assert (t.sum_ngrams(table, places, pool, sign_places).float().numpy() == toy["g"]).all()
    sums = torch.zeros(24, 8)
    t.add_ngrams(sums, torch.arange(24).view(2, 12), pool, sign_places, torch.from_numpy(toy["dg"]).bfloat16())
    assert (sums.numpy() == toy["row_gradients"]).all()


def error(ours, reference):
    return np.abs(ours - reference).max() / np.abs(reference).max()


def test_golden_schedule():
    """Update steps and the scalars of each, for #92's number of steps and rates."""
    hp = SimpleNamespace(num_steps=N, adam_lr=0.008, adam_wd=0.005, adam_eps=1e-10)
    due = [step for step in range(N) if t.due(ROW, step, hp)]
    assert due == [*range(1, 336, 2), *range(339, N, 4)] and len(due) == 382
    assert [t.cycle(ROW, step, hp)[1] for step in due] == [*range(1, 383)]
    for at, step in enumerate(ADAM["event_step"]):
        h = t.adam_hypers(ROW, SimpleNamespace(step=int(step), lr_factor=ADAM["lr"][at] / 0.56), hp)
        expected = [ADAM[name][at] for name in ("lr", "decay", "beta2")]
        assert [h.lr, h.decay, h.beta2] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", range(1, 40))
def test_rarer_updates_follow_an_update(steps):
    """Whatever the number of steps, cycles are of 2 steps and then of 4; without rarer, always of 2."""
    hp = SimpleNamespace(num_steps=steps)
    for row in (ROW, ROW._replace(rarer=0), ROW._replace(rarer=1)):
        due = [-1, *(step for step in range(steps) if t.due(row, step, hp))]
        lengths = np.diff(due).tolist()
        assert lengths == sorted(lengths) and {*lengths} <= {1: {2}, 0: {4}}.get(row.rarer, {2, 4})
        assert [t.cycle(row, step, hp) for step in due[1:]] == [*zip(lengths, range(1, steps + 1))]


def test_golden_updates(dtype=torch.float32, tolerance=3e-7):
    """Eight events at both rates, of the touched rows only: the table that updates of all rows give."""
    p = torch.from_numpy(ADAM["table_start"]).to(dtype)
    state = {key: x.to(dtype) if key == "second" else x for key, x in t.row_adam_state(p).items()}
    for at, step in enumerate(ADAM["event_step"].tolist()):
        rows = torch.from_numpy(np.unique(ADAM["token_rows"][at])).long()
        g = torch.from_numpy(ADAM["row_sums_exact"][at]).to(dtype)[rows] / 8
        beta2, decay = (ADAM[name][at] for name in ("beta2", "decay"))
        hyper = t.AdamHypers(ADAM["lr"][at], decay, 0, beta2, 1, 1 - beta2 ** (at + 1), 1e-10, 0.95, (step + 1) // 2)
        new, part = p[rows], {key: x[rows] for key, x in state.items()}
        t.row_adam_update([(new, g, part, torch.tensor(hyper, dtype=dtype), True)])
        p[rows] = new
        for key in state:
            state[key][rows] = part[key]
        assert error(p.numpy(), ADAM["table_exact"][at]) < tolerance
        gap = (step + 1) // 2 - state["last"]
        assert error((state["second"] * 0.95**gap).numpy(), ADAM["second_moment_exact"][at]) < tolerance


# rows are updated after steps 1, 3, then 7, 11, 15 of 17; embed split off in step 9 or later
SIZES = dict(model_dim=48, head_dim=8, vocab_size=256, batch_unit=64, val_tokens=1024, val_chunk=128, val_every=3,
             num_scheduled_iterations=14, num_extension_iterations=3, muon_momentum_warmup=3, muon_momentum_cooldown=2,
             ngram_rows=512, run_id="run")


@pytest.fixture(scope="module")
def base(byte_files):
    return t.set_cells(dataclasses.replace(t.PRESETS["frontier_demo"], **SIZES, **byte_files), "STAGES.*.classes=0")


def test_rows_in_slots_equal_a_dense_table(base):
    """Random gradients of batches' rows, summed in slots and applied to the rows of a cycle, against all rows in
    float64, over gaps and both rates; after the last update nothing is applied."""
    hp = dataclasses.replace(base, seed=3)
    run, generator = t.Run(hp, ONE), torch.Generator().manual_seed(0)
    cycle = run.optimizer.cycle
    run.model.ngram_embed.data.normal_(generator=generator)
    exact = run.model.ngram_embed.detach().double()
    signs, second, summed, seen, events = run.model.signs.double(), torch.zeros(512).double(), 0.0, set(), 0
    for step, (batches, touched) in enumerate(t.train_batches(hp, ONE, range(hp.num_steps))):
        cycle.read(touched)
        for batch in batches:
            grad = torch.randn(len(batch.tokens), 48, generator=generator)
            rows = batch.bigram_ids.flatten()
            summed = summed + torch.zeros(512, 48).double().index_add_(
                0, rows, (grad.double() * signs[batch.sign_ids]).flatten(0, 1))
            t.add_ngrams(cycle.sums, batch.slots, cycle.signs, batch.sign_ids, grad)
            seen |= set(rows.tolist())
        assert len(seen) == cycle.filled and seen == set(cycle.ids[: len(seen)].tolist())
        now = t.plan(step, hp)
        run.optimizer.step(now, touched)
        if t.due(ROW, step, hp):
            events += 1
            n = 2 if step > 3 else 1
            lr, beta2 = 70 * 0.008 * now.lr_factor, 0.95**n
            second = beta2 * second + (1 - beta2) * summed.square().mean(1)
            update = lr * (1 - beta2**events) ** 0.5 * summed / (second.sqrt() + 1e-10)[:, None]
            exact -= update + torch.where(update * exact > 0, 5 * n * 0.005 * lr**2 * exact, 0.0)
            summed, seen = 0.0, set()
            assert not cycle.sums.any() and cycle.filled == 0
        assert (run.model.ngram_embed.double() - exact).abs().max() < 2e-5
    assert events == 5 and seen


def losses(text, after=0):
    """(kind, step, loss) of a log's lines after a step."""
    lines = re.findall(r"^step:(\d+)/17 (\w+)_loss:(\S+) ", text, re.M)
    return [(kind, int(step), float(loss)) for step, kind, loss in lines if int(step) > after]


def train(hp, world, folder, **more):
    """Train by torchrun on `world` ranks; the losses."""
    hp = dataclasses.replace(hp, log_dir=str(folder), **more)
    args = [f"--{name}={getattr(hp, name)}" for name in t.KEYS]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    script = Path(t.__file__).resolve()
    done = forks.run(*launcher, script, "--set", "STAGES.*.classes=0", "--preset=frontier_demo", *args)
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def close(ours, reference):
    assert [x[:2] for x in ours] == [x[:2] for x in reference] and len(ours) > 4
    assert [x[2] for x in ours] == pytest.approx([x[2] for x in reference], abs=2e-4)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """By number of ranks the losses, and the folder of a checkpoint in the middle of a cycle."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (1, 2, 8)}
    return {world: (train(base, world, folder, save_every=14), folder) for world, folder in folders.items()}


@pytest.mark.parametrize("world", [2, 8])
def test_ranks_follow_the_same_trajectory(runs, world):
    close(runs[world][0], runs[1][0])


@pytest.mark.parametrize("world,to", [(1, 1), (2, 2), (2, 1), (1, 8), (8, 2)])
def test_resumption_in_a_cycle(base, runs, tmp_path, world, to):
    """After step 14, when a cycle and averages have begun; exactly on as many ranks, to rounding on others."""
    expected, folder = runs[world]
    assert sorted(x.name for x in folder.glob("*.pt*")) == ["run_step14.pt", *(
        f"run_step14.pt.{rank}of{world}" for rank in range(world))]
    ours = train(base, to, tmp_path, resume=str(folder / "run_step14.pt"))
    expected = [x for x in expected if x[1] > 14]
    close(ours, expected)
    assert ours == expected or world != to


def test_pieces(base, runs, tmp_path):
    """No file has more than a rank's rows; a checkpoint without all pieces of the same moment is refused."""
    folder = runs[2][1]
    main, *pieces = (torch.load(folder / f"run_step14.pt{end}", weights_only=True) for end in ("", ".0of2", ".1of2"))
    assert not any(name.startswith("ngram") for name in main["tensors"])
    for piece in pieces:
        x = piece["tensors"]
        assert len(x["ngram_embed"]) == len(x["ngram_embed.second"]) == len(x["ngram_embed.last"]) == 256
        assert 0 < len(x["ngram_embed.ids"]) == len(x["ngram_embed.grad"]) < 512
    whole = t.read_checkpoint(str(folder / "run_step14.pt"), base)["tensors"]["ngram_embed"]
    assert torch.equal(t.slice_of(whole, 192, 128), torch.cat([x["tensors"]["ngram_embed"] for x in pieces])[192:320])
    for path in folder.glob("*.pt*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(pieces[1] | {"ms": 1.0}, tmp_path / "run_step14.pt.1of2")
    with pytest.raises(t.UserError, match="pieces of several checkpoints"):
        t.read_checkpoint(str(tmp_path / "run_step14.pt"))
    (tmp_path / "run_step14.pt.1of2").unlink()
    with pytest.raises(t.UserError, match="1of2"):
        t.read_checkpoint(str(tmp_path / "run_step14.pt"))


@pytest.fixture(scope="module")
def model(base):
    return disturbed_model(base)


@pytest.mark.parametrize("position", [1, 28, 29, 30, 59, 70, 95])
def test_later_tokens_change_no_earlier_loss(model, position):
    check_later_tokens(model, position)


def test_a_trigram_looks_two_back(base):
    """Whatever documents these tokens are of; classes join what differs in case, accents or space alone."""
    tokens = np.arange(100, 110, dtype=np.uint16)
    ids, signs = t.table_ids(tokens, base), t.sign_ids(tokens, base)
    for at in range(10):
        changed = tokens.copy()
        changed[at] += 50
        for old, new in ((ids, t.table_ids(changed, base)), (signs, t.sign_ids(changed, base))):
            assert not (old != new)[0, [i for i in range(10) if i not in (at, at + 1)]].any()
            assert not (old != new)[1, [i for i in range(10) if i not in (at, at + 1, at + 2)]].any()
    assert ids[0, 0] == 255 and (ids[1, :2] == 511).all() and (ids[0] < 256).all() and (ids[1] >= 256).all()


def test_classes_of_a_vocabulary():
    words = ["the", " The", "THE ", "th\u00e9", "\uff54he", " ", "\n\n", "\t", "", "\u0301"]
    words += [b"\xff", None, b"\xff", "then"]
    raw = [word.encode() if isinstance(word, str) else word for word in words]
    assert token_classes.token_classes(raw).tolist() == [0, 0, 0, 0, 0, 5, 5, 5, 8, 9, 10, 11, 12, 13]


def test_bundled_classes(tmp_path, monkeypatch, capsys):
    """The tool makes the bundled file from GPT-2's vocabulary."""
    monkeypatch.setattr(sys, "argv", ["token_classes.py", "--out", str(tmp_path / "a.npy")])
    token_classes.main()
    assert (tmp_path / "a.npy").read_bytes() == t.TOKEN_CLASSES.read_bytes()
    assert "32980 classes of 50257 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("args,said", [
    (["--ngram_rows=1000"], "--ngram_rows=1000 must be a multiple of 16"),
    (["--set=PARAMS.ngram_embed.rule=adam"], "PARAMS.ngram_embed.rule='adam': ngram_embed uses row_adam"),
    (["--set=PARAMS.bigram_embed.reduce=rows"], "PARAMS.bigram_embed.reduce='rows': ngram_embed uses rows"),
    (["--set=PARAMS.lm_head.rarer=0.5"], "PARAMS.lm_head.rarer=0.5: use 1"),
    (["--set=PARAMS.ngram_embed.init=uniform"], "PARAMS.ngram_embed.init='uniform': use 0"),
])
def test_bad_arguments(args, said):
    with pytest.raises(t.UserError, match=re.escape(said)):
        t.parse_args(["--preset=frontier", *args])


def test_missing_classes(monkeypatch, tmp_path):
    monkeypatch.setattr(t, "TOKEN_CLASSES", tmp_path / "none.npy")
    with pytest.raises(t.UserError, match="none.npy is missing: .*tools/token_classes.py"):
        t.check_recipe(t.PRESETS["frontier"])
    t.check_recipe(t.PRESETS["record80"])


def test_too_few_slots(base):
    with pytest.raises(t.UserError, match="--ngram_slots=40: use more, .* read more than 40 n-gram rows"):
        next(t.train_batches(dataclasses.replace(base, ngram_slots=40), ONE, range(1)))


@pytest.mark.parametrize("gib,rows", [(79, None), (36, "5"), (12, "0")])
def test_table_that_does_not_fit(monkeypatch, gib, rows):
    """One error that says how many rows would; these do."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    hp, device = dataclasses.replace(t.PRESETS["frontier"], attention="reference"), torch.device("cuda", 0)
    if rows is None:
        assert t.choose_backends(hp, device).ngram_rows == hp.ngram_rows
        return
    with pytest.raises(t.UserError, match="--ngram_rows=15863040: beside the rest .*memory holds") as error:
        t.choose_backends(hp, device)
    found = int(re.search(r"holds (\d+)", str(error.value))[1])
    assert found < hp.ngram_rows and found % 16 == 0
    if found:
        t.choose_backends(dataclasses.replace(hp, ngram_rows=found), device)
        with pytest.raises(t.UserError):
            t.choose_backends(dataclasses.replace(hp, ngram_rows=found + 16), device)


def test_warm_up_steps_are_cycles_of_their_own(base):
    """Where steps are left out, slots begin anew, so that few do for all stages' first steps."""
    firsts = [touched.first for _, touched in t.train_batches(base, ONE, [4, 5, 8, 9, 10, 12])]
    assert [first == 0 for first in firsts] == [True, False, True, False, False, True]
    assert all(a < b for a, b in itertools.pairwise(firsts[2:5]))
