"""What GPUs of other sizes and generations train with: micro-batches, graphs, recompute, the head's type."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t

GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """A device of so many GiB and such a compute capability, for what choose_backends asks."""
    def make(gib, capability=(8, 0), fraction=1.0):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        return torch.device("cuda", 0)
    return make


@pytest.mark.parametrize("gib,fraction,chosen", [
    (79.2, 1, (65_536, True, False)), (39.4, 1, (65_536, False, False)), (23.6, 1, (16_384, False, True)),
    (79.2, 0.3, (16_384, False, True))])
def test_micro_batches_fit_the_memory(gpu, gib, fraction, chosen):
    """record80 with plain kernels: less memory gives smaller micro-batches, then no graphs, then recompute."""
    hp = t.choose_backends(replace(t.Recipe(), attention="reference"), gpu(gib, fraction=fraction))
    assert (hp.micro_tokens, hp.graphs, hp.recompute) == chosen


def test_more_memory_never_gives_less(gpu):
    hp = replace(t.PRESETS["mini"], attention="reference")
    recipes = [t.choose_backends(hp, gpu(gib)) for gib in range(10, 90, 4)]
    for less, more in itertools.pairwise(recipes):
        assert (more.graphs, more.micro_tokens) >= (less.graphs, less.micro_tokens) and more.recompute <= less.recompute
    assert not recipes[0].graphs and recipes[-1].graphs


def test_what_is_asked_for_stays(gpu):
    """Also on a GPU that is too small, which costs a line."""
    asked, device = replace(t.Recipe(), attention="reference", micro_tokens=32_768), gpu(8, (9, 0))
    hp = t.choose_backends(asked, device)
    assert hp == replace(asked, kernels="plain")
    (line,) = (line for line in t.notices(asked, hp, device) if "memory" in line)
    assert "too small: about 52 GiB" in line and "--micro_tokens" in line
    smaller = t.choose_backends(replace(asked, micro_tokens="auto"), device)
    assert (smaller.micro_tokens, smaller.graphs, smaller.recompute) == (16_384, False, True)
    assert any("too small: about 23 GiB" in line for line in t.notices(asked, smaller, device))
    device = gpu(79, (9, 0))
    assert not any("memory" in line for line in t.notices(asked, t.choose_backends(asked, device), device))


@pytest.mark.parametrize("capability,fp8", [((8, 0), False), ((8, 9), True), ((12, 0), True)])
def test_fp8_head(gpu, capability, fp8):
    """Before compute capability 8.9 the head is bf16, with one line that says so."""
    asked, device = replace(t.Recipe(), attention="reference"), gpu(79, capability)
    hp = t.choose_backends(asked, device)
    assert hp.fp8_head is fp8
    said = [line for line in t.notices(asked, hp, device) if "no FP8 products: the head computes in bfloat16" in line]
    assert len(said) == (not fp8)


def test_recompute():
    """Loss and gradients are the same, to the last bit, and so in one compiled graph."""
    found = []
    for recompute in (False, True):
        hp = replace(t.PRESETS["demo"], model_dim=48, head_dim=8, batch_unit=128, kernels="plain", recompute=recompute,
                     attention="reference")
        run = t.Run(hp, t.Ranks(0, 1, torch.device("cpu")), t.choose_ops(hp))
        with torch.no_grad():  # projections that begin with zeros would hide the MLPs
            for p in run.model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        batches, _ = next(t.train_batches(hp, run.ranks, range(1)))
        now = t.plan(0, hp)
        run.model.set_stage(0)
        run.loss_of = torch.compile(run.model.train_loss, fullgraph=True, backend="aot_eager") if recompute else (
            run.model.train_loss)
        loss = run.add_gradients(batches[0], now.windows, torch.tensor(now.mtp_weights))
        found.append([loss, *(p.grad.clone() for p in run.model.parameters() if p.grad is not None)])
    assert found[0][-1].any() or found[0][3].any()
    for ours, kept in zip(*found, strict=True):
        torch.testing.assert_close(ours, kept, rtol=1e-5, atol=1e-6)
