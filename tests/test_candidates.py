"""The classes that a segment's training softmax is over: the golden choice, loss and gradients; off is as before."""

import dataclasses
from types import SimpleNamespace

import ablate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import GOLDEN

import train_gpt as t

R92 = np.load(GOLDEN / "r92_candidates.npz")
CAP = 23.0, 5.0, 7.5


def off(preset):
    """The preset without the parts of frontier, each by its edit in tools/ablate.py."""
    edits = [edit for edit in ablate.EDITS if edit.preset == "frontier" and edit.name != "24,576 classes"]
    edits += [edit for edit in ablate.EDITS if not edit.preset and not edit.patch
              and ablate.recipe(edit, []) == t.PRESETS["record80"]]  # of what record80 has none of
    return t.parse_args([f"--preset={preset}", *(text for edit in edits for text in edit.arguments)])[0]


def sweep(V):
    return t.Sweep(SimpleNamespace(sizes={"V": V}))


def bits(classes, V=50_304):
    marks = np.zeros(V, dtype=bool)
    marks[classes] = True
    return np.packbits(marks)


@pytest.mark.parametrize("at,segment", [(0, 0), (1, 3), (2, 7)])
def test_golden_candidates(at, segment):
    """To the integer, with the places that a segment's walk is at before and after."""
    ours = sweep(50_304)
    for k in range(6):
        u = np.random.default_rng([92005, k, segment]).random(R92["tokens"][k])
        u4 = (u * u) * (u * u)
        targets = np.floor(50_257 * ((u4 * u4) * u4)).astype(np.int64)
        assert (targets[:16] == R92["targets_first_16"][k, at]).all()
        count, _, before, after, _ = R92["count_window_offset_before_after_fallback"][k, at]
        ours.places[segment] = int(before)
        chosen = ours.choose(segment, targets, int(R92["P"][k]))
        assert (bits(chosen) == R92["candidate_bits"][k, at]).all() and ours.places[segment] == after
        assert count == len(np.unique(targets))
        assert (np.searchsorted(chosen, targets[:256]) == R92["target_positions_256"][k, at]).all()


def test_golden_fallback():
    """Where the window holds no free class, every so many-th free one of all is taken."""
    ours, segment = sweep(50_304), 5
    _, _, before, after, fallback = R92["fallback_count_window_offset_before_after_fallback"]
    assert ours.places[segment] == before and fallback == 1
    targets = ours.walk[(before + np.arange(9900)) % ours.V]
    assert (bits(ours.choose(segment, targets, 10_240)) == R92["fallback_bits"]).all()
    assert ours.places[segment] == after


@pytest.mark.parametrize("more", [256, 4])
@pytest.mark.parametrize("at,segment", [(0, 0), (1, 3), (2, 7)])
def test_golden_small(at, segment, more):
    """Twelve steps on 64 classes: the whole walk as a window, or a short one that wraps and often fails."""
    ours, name = sweep(64), f"small{more}"
    for k, targets in enumerate(R92[f"{name}_targets"][at]):
        _, _, before, after, _ = R92[f"{name}_count_window_offset_before_after_fallback"][at, k]
        assert ours.places[segment] == before
        assert (ours.choose(segment, targets, 16, more) == R92[f"{name}_candidates"][at, k]).all()
        assert ours.places[segment] == after


def test_too_few_classes():
    with pytest.raises(t.UserError, match="segment 2 has 17 different targets, above STAGES.*classes=16"):
        sweep(64).choose(2, np.arange(17), 16)


def test_places():
    """Of a token among the classes, before, between and after them; of no token."""
    assert t.places(np.array([7, 9, 5, 2, 3, 60, -1]), np.array([2, 3, 7, 9, 50])).tolist() == [2, 3, -1, 0, 1, -1, -1]


@pytest.mark.parametrize("fp8,bound", [(False, 1e-5), (True, 0.2)])
def test_loss_and_gradients(fp8, bound, n=2, S=32, D=64, V=256, P=128):
    """A softmax over each segment's candidates, against float64; other columns' gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    x = F.rms_norm(torch.randn(n * S, D, generator=generator), (D,))
    w = 0.2 * torch.randn(D, V, generator=generator)
    candidates = torch.stack([torch.randperm(V - 40, generator=generator)[:P].sort().values for _ in range(n)])
    targets = t.next_targets(torch.randint(P, (n, S), generator=generator), 2)
    weights, results = torch.tensor([1.0, 0.5]), []
    for dtype in (torch.float32, torch.float64):
        a, b = (y.to(dtype, copy=True).requires_grad_() for y in (x, w))
        if dtype == torch.float32:
            copies = t.fp8_weight(w, t.X_SCALE, t.GRAD_SCALE, t.W_SCALE) if fp8 else None
            loss = t.PLAIN.head_loss(a, b, candidates, targets, weights, CAP, copies)
        else:
            loss = 0.0
            for part, columns, ahead in zip(a.chunk(n), candidates, targets.chunk(n)):
                z = CAP[0] * torch.sigmoid((part @ b[:, columns] + CAP[1]) / CAP[2])
                for weight, target in zip(weights, ahead.unbind(1)):
                    loss += weight * F.cross_entropy(z, target, ignore_index=-1, reduction="sum")
        loss.backward()
        results.append((loss.detach().double(), a.grad.double(), b.grad.double()))
    for ours, exact in zip(*results):
        assert (ours - exact).norm() <= bound * exact.norm()
    unused = torch.ones(V, dtype=torch.bool).index_fill_(0, candidates.unique(), False)
    assert unused.any() and not results[0][2][:, unused].any()


def test_ranks_choose_the_same():
    """Segment s has the same candidates and places on 1, 2 and 8 ranks, and after a resumption."""
    hp = dataclasses.replace(t.PRESETS["frontier_demo"], micro_tokens=1)
    hp = dataclasses.replace(hp, stages=tuple(stage._replace(classes=stage.classes and 384) for stage in hp.stages))
    seen = {}
    for world, done in ((1, 0), (2, 0), (8, 0), (2, 1)):
        for rank in range(world):
            ranks = t.Ranks(rank, world, torch.device("cpu"))
            for step, (batches, _) in enumerate(t.train_batches(hp, ranks, range(2), done), start=done):
                for i, batch in enumerate(batches):
                    key = step, rank + i * world
                    assert batch.candidates.shape == (1, 384)
                    kept = seen.setdefault(key, (batch.candidates, batch.targets))
                    assert all(map(torch.equal, kept, (batch.candidates, batch.targets)))
    assert len(seen) == 16


def test_targets_are_places():
    """A batch's targets point at the classes that follow each token; validation is over all classes."""
    hp, ranks = t.PRESETS["frontier_demo"], t.Ranks(0, 1, torch.device("cpu"))
    plain = dataclasses.replace(hp, stages=tuple(stage._replace(classes=0) for stage in hp.stages))
    (batch,), _ = next(t.train_batches(hp, ranks, range(1)))
    (all_classes,), _ = next(t.train_batches(plain, ranks, range(1)))
    n = len(batch.candidates)
    found = batch.candidates.gather(1, batch.targets.view(n, -1)).flatten()
    assert n == 8 and torch.equal(found, all_classes.targets) and all_classes.candidates.shape == (8, 0)
    assert next(t.Validation(hp, ranks).batches()).candidates.shape == (1, 0)


def test_off_is_record80(byte_files):
    """Without its parts, frontier's schedule, batches and losses are record80's, bit for bit."""
    losses = []
    for hp in (t.PRESETS["demo"], off("frontier_demo")):
        hp = dataclasses.replace(hp, **byte_files, model_dim=48, head_dim=8, batch_unit=hp.batch_unit // 4,
                                 vocab_size=256, num_scheduled_iterations=30, muon_momentum_warmup=30)
        ranks = t.Ranks(0, 1, torch.device("cpu"))
        run = t.Run(hp, ranks)
        steps = [0, 1, 19, 24, 25, 26, 27, 28, 29, 30, 31]
        for step, (batches, touched) in zip(steps, t.train_batches(hp, ranks, steps)):
            losses.append((step, run.train_step(batches, touched, t.plan(step, hp)).mean.item()))
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]
    full = t.PRESETS["record80"]
    frontier = dataclasses.replace(off("frontier"), num_scheduled_iterations=full.num_scheduled_iterations)
    assert frontier.layers == full.layers
    for step in range(full.num_steps):
        a, b = (t.plan(step, hp)._replace(index=0, stage=None) for hp in (full, frontier))
        assert a == b


@pytest.mark.parametrize("value,said", [("100", "a multiple of 128 up to 50304"), ("-128", "use 0 or more"),
                                        ("50432", "a multiple of 128 up to 50304"), ("1.5", "a whole number")])
def test_bad_cells(value, said):
    with pytest.raises(t.UserError, match=rf"STAGES.0.classes=.*{said}"):
        t.parse_args([f"--set=STAGES.0.classes={value}"])


def test_too_few_classes_is_found_before_the_start():
    """The check of the data counts the targets of every segment of the schedule."""
    hp, _ = t.parse_args(["--preset=demo", "--set=STAGES.2.classes=128"])
    with pytest.raises(t.UserError, match=r"STAGES.2.classes=128: segment \d of step 40 has .*; use (256|384)"):
        t.check_data(hp)
