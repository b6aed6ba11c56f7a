"""The validation loss is the cross entropy of a causal probability model, in which documents see each other only where
the README says so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import train_gpt as t

HP = replace(t.PRESETS["demo"], vocab_size=256)
# parameters whose gradients are rounded to bf16
ROUNDED = ("post_lambdas", "x0_lambdas", "bigram_lambdas", "resid_lambdas")
T, ENDS = 96, (0, 29, 60, 96)  # three documents in a pack
WINDOWS = t.Windows(16, 48, 64, HP.attn_scale)


@pytest.fixture(scope="module", params=["random", "trained"])
def model(request, byte_files):
    """A small model in float32, with random weights everywhere or after some steps of the demo."""
    hp = replace(HP, **byte_files)
    run = t.Run(hp, t.Ranks(0, 1, torch.device("cpu")))
    run.model.set_stage(0)
    if request.param == "random":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    else:
        for step, item in enumerate(t.train_batches(hp, run.ranks, range(6))):
            run.train_step(*item, t.plan(step, hp))
    return run.model


@pytest.fixture
def tokens():
    tokens = np.random.default_rng(0).integers(0, HP.bos, T + 1)
    tokens[list(ENDS[:-1])] = HP.bos
    return tokens


def batch_of(tokens):
    batch = t.pack(HP, [(tokens, np.array(ENDS[1:]))])
    return batch._replace(targets=torch.full_like(batch.targets, 7))  # so that a token counts as input only


@torch.no_grad()
def losses(model, batch):
    return model.val_losses(batch, model.lookup(batch), WINDOWS)


def other(tokens, position):
    changed = tokens.copy()
    changed[position] = (changed[position] + 1) % HP.bos
    return changed


def test_probabilities_sum_to_one(model, tokens):
    """exp(-loss), summed over every possible target, in float64."""
    batch = batch_of(tokens)
    with torch.no_grad():
        x = model.trunk(batch, model.lookup(batch), WINDOWS, model.val_layers)
        z = t.softcap(x @ model.lm_head, *model.cap).double()
    minus_log_p = z.logsumexp(1, keepdim=True) - z  # [T, V]
    torch.testing.assert_close((-minus_log_p).exp().sum(1), torch.ones(T, dtype=torch.float64), rtol=0, atol=1e-9)
    for target in (0, 7, HP.bos, HP.sizes["V"] - 1):
        found = losses(model, batch._replace(targets=torch.full_like(batch.targets, target)))
        torch.testing.assert_close(found.double(), minus_log_p[:, target], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [1, 28, 29, 30, 59, 70, 95])
def test_later_tokens_change_no_earlier_loss(model, tokens, position):
    """Bit for bit, through paired heads, key offset, smear, bigram ids, value embeddings and packing."""
    before, after = losses(model, batch_of(tokens)), losses(model, batch_of(other(tokens, position)))
    assert torch.equal(before[:position], after[:position])
    assert not torch.equal(before[position:], after[position:])


class Closed:
    """The three ways across a document's start, closed one by one."""

    def __init__(self, model, monkeypatch, bigram_ids):
        self.model, self.monkeypatch, self.bigram_ids = model, monkeypatch, bigram_ids

    def smear(self):
        self.monkeypatch.setattr(self.model, "smear", lambda e: e)

    def key_offset(self):
        self.monkeypatch.setattr(self.model, "val_layers", t.set_cells(HP, "LAYERS.*.key_offset=false").layers)

    def losses(self, tokens, bigram):
        batch = batch_of(tokens)
        return losses(self.model, batch if bigram else batch._replace(bigram_ids=self.bigram_ids))


@pytest.mark.parametrize("position", [40, 59], ids=["inside", "last token"])
@pytest.mark.parametrize("open_way", ["none", "smear", "bigram id", "key offset"])
def test_what_crosses_documents(model, tokens, monkeypatch, position, open_way):
    """A token of the second document, changed, changes the third only through the ways that are open; the first never.

    Smear and bigram id carry the last token of the document before, the key offset all of it.
    """
    closed = Closed(model, monkeypatch, batch_of(tokens).bigram_ids)
    if open_way != "smear":
        closed.smear()
    if open_way != "key offset":
        closed.key_offset()
    before, after = (closed.losses(x, open_way == "bigram id") for x in (tokens, other(tokens, position)))
    assert torch.equal(before[: ENDS[1]], after[: ENDS[1]])
    # with bigram ids held, a changed token shows only through its embedding; inside its document it always shows
    assert not torch.equal(before[position : ENDS[2]], after[position : ENDS[2]])
    crosses = open_way == "key offset" or (open_way != "none" and position == ENDS[2] - 1)
    if open_way == "smear" and not model.smear_lambda:
        crosses = False  # its weight begins at zero
    ids = [batch_of(x).bigram_ids[ENDS[2]] for x in (tokens, other(tokens, position))]
    if open_way == "bigram id" and torch.equal(*model.bigram_embed[torch.stack(ids)]):
        crosses = False  # rows that training did not reach are zero
    assert torch.equal(before[ENDS[2] :], after[ENDS[2] :]) != crosses


@pytest.mark.parametrize("n", [2, 4])
def test_joined_segments_train_as_each_alone(model, n, S=24):
    """Loss and all gradients of n segments in one micro-batch are the sums over the segments."""
    rng, weights, parts = np.random.default_rng(n), torch.tensor([1.0, 0.5, 0.25]), []
    for _ in range(n):
        tokens = rng.integers(0, HP.bos, S + 1)
        tokens[[0, 9]] = HP.bos
        parts.append((tokens, np.array([9, S + 1])))
    parameters = {name: p for name, p in model.named_parameters() if p.numel()}

    def results(segments, S):
        batch = t.pack(HP, segments)
        loss = model.train_loss(batch, model.lookup(batch), WINDOWS._replace(segment=S), weights)
        return loss, *torch.autograd.grad(loss, tuple(parameters.values()))

    alone = list(zip(*(results([part], S) for part in parts)))
    names = ["loss", *parameters]
    for name, a, b in zip(names, results(parts, S), alone, strict=True):
        rounding = 2.0**-8 if name in ROUNDED else 1e-5
        assert (a - sum(b)).norm() <= rounding * sum(x.norm() for x in b), name
    # and a boundary is felt: as one long segment, the losses are others
    assert abs(results(parts, n * S)[0] - sum(alone[0])) > 1e-4 * sum(alone[0])
