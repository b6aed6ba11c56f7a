"""What GPUs of other sizes and generations train with: micro-batches, graphs, recompute, the head's type."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ablate
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
    """record80 with plain kernels: less memory gives no graphs, then smaller micro-batches, then recompute."""
    hp = t.choose_backends(replace(t.Recipe(), attention="reference"), gpu(gib, fraction=fraction))
    assert (hp.micro_tokens, hp.graphs, hp.recompute) == chosen


def test_more_memory_never_gives_less(gpu):
    hp = replace(t.PRESETS["mini"], attention="reference")
    recipes = [t.choose_backends(hp, gpu(gib)) for gib in range(10, 90, 4)]
    for less, more in itertools.pairwise(recipes):
        assert (more.micro_tokens, more.graphs) >= (less.micro_tokens, less.graphs) and more.recompute <= less.recompute
    assert not recipes[0].graphs and recipes[-1].graphs


def test_what_is_asked_for_stays(gpu):
    """Also on a GPU that is too small, which costs a line."""
    asked, device = replace(t.Recipe(), attention="reference", micro_tokens=32_768), gpu(8, (9, 0))
    hp = t.choose_backends(asked, device)
    assert hp == replace(asked, kernels="plain")
    (line,) = (line for line in t.notices(asked, hp, device) if "memory" in line)
    assert "too small: about 49 GiB" in line and "--micro_tokens" in line
    smaller = t.choose_backends(replace(asked, micro_tokens="auto"), device)
    assert (smaller.micro_tokens, smaller.graphs, smaller.recompute) == (16_384, False, True)
    assert any("too small: about 23 GiB" in line for line in t.notices(asked, smaller, device))
    (eager,) = (line for line in t.notices(asked, replace(hp, compile=False), device) if "memory" in line)
    assert "--graphs=false" in line and "about 30 GiB" in eager and "--graphs=false" not in eager
    device = gpu(79, (9, 0))
    assert not any("memory" in line for line in t.notices(asked, t.choose_backends(asked, device), device))


def test_without_graphs():
    """Eager PyTorch has no graphs, and takes what a compiled run takes without them."""
    hp = replace(t.Recipe(), kernels="plain", micro_tokens=16_384)
    graphs, compiled, eager = (t.memory_needed(replace(hp, graphs=g, compile=c))
                               for g, c in ((True, True), (False, True), (True, False)))
    assert eager == compiled < graphs


TABLE = dict(ngram_rows=10_575_360)


LATER = ("attention in 4", "attention in 9", "no narrow heads", "last steps as large", "no taper",
         "no dense connections", "no prefix term", "10.6M n-gram rows")  # by ablate.py's edits


@pytest.mark.parametrize("preset,more,edits,reserved", [
    ("record80", {}, (), 47.5), ("record80", TABLE, (), 65.9), ("frontier", {}, LATER, 60.5),
    ("frontier", {}, LATER[-1:], 60.4), ("frontier", {}, (), 68.5)])
def test_as_measured(preset, more, edits, reserved):
    """The most GiB reserved in runs of records/ with kernels and graphs; frontier had fewer parts in some."""
    arguments = [text for edit in ablate.EDITS if edit.name in edits for text in edit.arguments]
    hp = replace(t.parse_args([f"--preset={preset}", *arguments])[0], kernels="hopper", micro_tokens=65_536, **more)
    assert t.memory_needed(hp) / GIB == pytest.approx(reserved, rel=0.03)


def test_frontier_with_graphs(gpu):
    """On 80 GB its n-gram table fits beside graphs of the largest micro-batches."""
    found = t.fit_memory(replace(t.PRESETS["frontier"], kernels="hopper"), gpu(79.2, (9, 0)))
    assert found.graphs and found.micro_tokens == 65_536


def test_dense_connections_keep_more():
    """Of 65,536 tokens about 0.7 GiB more; parameters count little."""
    hp = replace(t.Recipe(), kernels="hopper", micro_tokens=65_536)
    more = t.set_cells(hp, "LAYERS.10.dense=early")
    assert (t.memory_needed(more) - t.memory_needed(hp)) / GIB == pytest.approx(0.75, rel=0.2)


def test_readme_says_how_much(gpu):
    """The least memory, and that for the fastest way, are what the script reckons with."""
    readme = Path(t.__file__).with_name("README.md").read_text()
    way = dict(kernels="plain", attention="reference")
    fast = replace(t.Recipe(), micro_tokens=65_536, **way)
    least = t.fit_memory(replace(t.Recipe(), **way), gpu(1))
    least, fast = (t.memory_needed(hp) / t.MEMORY_USED / GIB for hp in (least, fast))
    assert f"{least:.0f} GiB on each GPU at least, {math.ceil(fast)} GiB to be fast" in readme
    assert f"`record80` needs about {least:.0f} GiB at least" in readme


@pytest.mark.parametrize("capability,fp8", [((8, 0), False), ((8, 9), True), ((12, 0), True)])
def test_without_fp8(gpu, capability, fp8):
    """Before compute capability 8.9 products are in bf16, with one line that says so."""
    asked, device = replace(t.PRESETS["frontier"], attention="reference"), gpu(79, capability)
    hp = t.choose_backends(asked, device)
    assert (hp.fp8_head, hp.layers == asked.layers, any(x.fp8_mlp or x.fp8_qkv for x in hp.layers)) == (fp8,) * 3
    said = [line for line in t.notices(asked, hp, device) if "no FP8 products: they are in bfloat16" in line]
    assert len(said) == (not fp8)


@pytest.mark.parametrize("compiled", [False, True])
def test_recompute(compiled):
    """The MLP and its gradients are the same, also in one compiled graph; the operations are chosen by the recipe."""
    hp = replace(t.PRESETS["demo"], kernels="plain", attention="reference", recompute=True)
    ops, case = t.choose_ops(hp), t.CASES["MLP"]
    assert ops.mlp is t.recomputed_mlp and t.choose_ops(replace(hp, recompute=False)).mlp is t.PLAIN.mlp
    if compiled:
        mlp = torch.compile(lambda *x: t.recomputed_mlp(t.Stream(x[0]), *x[1:]).x, fullgraph=True, backend="aot_eager")
        ops = ops._replace(mlp=lambda x, *weights: t.Stream(mlp(x.x, *weights)))
    inputs = t.case_inputs(case, dict(T=40, D=24, F=72), torch.float32, "cpu")
    for ours, kept in zip(*(t.case_results(case, x, inputs) for x in (ops, t.PLAIN)), strict=True):
        assert kept.any()
        torch.testing.assert_close(ours, kept)
