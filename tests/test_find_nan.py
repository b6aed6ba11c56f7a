"""tools/find_nan.py: an injected nan is found by operation, layer, rank and step; what a run prints can be pasted."""

import math
import os
import re
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import find_nan
import forks
import pytest
import torch

import train_gpt as t

ROOT = Path(t.__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
ONE = t.Ranks(0, 1, torch.device("cpu"))
SIZES = dict(model_dim=48, head_dim=8, vocab_size=256, batch_unit=64, val_tokens=256, val_chunk=128, val_every=0,
             num_scheduled_iterations=6, num_extension_iterations=2, run_id="run")
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tools")!r}, {str(ROOT / "tests")!r}]
import test_find_nan as test
test.t.Run.train_step = test.poisoned("forward", victim=1)
test.find_nan.main()
"""
FOUND = {  # by where the nan is made; with the place's first names only, as functions may be cut otherwise
    "forward": r"aten\.mul\.Tensor in .*\bof trunk:\d+.*, layer 3, and reached .*mlp_bank.*, the loss",
    "backward": r"aten\.mul\.Tensor in .*\btrain_step:\d+, and reached attn_gate_bank",
    "update": r"aten\.\w+\.default in .*\bof step:\d+.*, and reached qk_bank.*",
}


@pytest.fixture(scope="module")
def hp(byte_files, tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs") / "it's a folder"
    return replace(t.PRESETS["demo"], **SIZES, **byte_files, log_dir=str(logs))


def arguments(hp, **more):
    hp = replace(hp, **more)
    return [f"--{name}={getattr(hp, name)}" for name in t.KEYS]


def run(*args):
    return forks.run(*args, env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
                     cwd=ROOT)


def poisoned(where, victim, at=2, train_step=t.Run.train_step):
    """train_step, with a nan in one step of one rank."""
    def step(run, batches, touched, now):
        bad = now.step == at - 1 and run.ranks.rank == victim
        if bad and where == "forward":
            run.model.resid_lambdas.data[3, 1] = 3e38
        if bad and where == "update":
            now = now._replace(lr_factor=1e40)
        hook = run.model.attn_gate_bank.register_hook(lambda g: g * math.nan if bad and where == "backward" else g)
        loss = train_step(run, batches, touched, now)
        hook.remove()
        return loss

    return step


@pytest.mark.parametrize("where", FOUND)
def test_place_of_the_first_nan(hp, monkeypatch, where):
    """Operation, layer, rank and step, in one line."""
    monkeypatch.setattr(t.Run, "train_step", poisoned(where, victim=0))
    found = find_nan.find(hp, ONE)
    assert re.fullmatch(rf"it began on rank 0 in step 2 with {FOUND[where]}", found), found


def test_nan_on_one_of_two_ranks(hp, tmp_path):
    """That rank is named, once; nothing is written."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(*TORCHRUN, "--nproc_per_node=2", tmp_path / "script.py", *arguments(hp, log_dir=tmp_path / "logs"))
    assert done.returncode == 0, done.stderr
    expected = rf"it began on rank 1 in step 2 with {FOUND['forward']}\n"
    assert re.fullmatch(expected, done.stdout), done.stdout
    assert os.listdir(tmp_path) == ["script.py"]


def test_all_finite(hp):
    """One line that suspects the hardware."""
    done = run("tools/find_nan.py", *arguments(hp))
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: all is finite in steps 1 to 8: suspect the hardware")


def test_from_a_checkpoint(hp, tmp_path, monkeypatch):
    """The steps after it are repeated; one that holds a nan itself is refused."""
    hp = replace(hp, log_dir=str(tmp_path), save_every=3)
    log = t.Log(hp, ONE)
    t.train(t.Run(hp, ONE), log, t.Watch(ONE, log), None)
    log.close()
    (tmp_path / "run_step6.pt").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    path = tmp_path / "run_step3.pt"
    hp = replace(hp, resume=str(path))
    steps, poison = [], poisoned("forward", victim=0, at=4)
    monkeypatch.setattr(t.Run, "train_step", lambda *args: steps.append(args[-1].step) or poison(*args))
    assert "step 4 with aten.mul.Tensor" in find_nan.find(hp, ONE)
    assert steps == [3, 3]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    saved = torch.load(path, weights_only=True)
    saved["tensors"]["vo_bank"][0] = float("nan")
    torch.save(saved, path)
    with pytest.raises(t.UserError, match="run_step3.pt holds nan or inf in vo_bank: begin earlier"):
        find_nan.find(hp, ONE)


def test_from_a_checkpoint_between_two_updates_of_the_ngram_table(hp, tmp_path):
    """Its sums of gradients are in the repeated step, too: one of 3e38 makes an infinite moment; an inf is refused."""
    hp = replace(hp, log_dir=str(tmp_path), save_every=3, ngram_rows=512)
    log = t.Log(hp, ONE)
    t.train(t.Run(hp, ONE), log, t.Watch(ONE, log), None)
    log.close()
    hp, piece = replace(hp, resume=str(tmp_path / "run_step3.pt")), tmp_path / "run_step3.pt.0of1"
    saved = torch.load(piece, weights_only=True)
    assert saved["tensors"]["ngram_embed.grad"].any()
    saved["tensors"]["ngram_embed.grad"][0] = 3e38
    torch.save(saved, piece)
    found = find_nan.find(hp, ONE)
    assert re.match(r"it began on rank 0 in step 4 with aten\.\w+\.\w+ in row_adam_update:", found), found
    saved["tensors"]["ngram_embed.grad"][0] = math.inf
    torch.save(saved, piece)
    with pytest.raises(t.UserError, match="run_step3.pt holds nan or inf in ngram_embed: begin earlier"):
        find_nan.find(hp, ONE)


def test_what_a_run_prints_can_be_pasted(hp):
    """A rate far too high stops a run within 10 steps; its last line holds the command that finds the operation."""
    args = arguments(hp, muon_lr=1e38, num_scheduled_iterations=60)
    done = run("train_gpt.py", *args)
    found = re.search(r"^error: the training loss of step 2 is (?:nan|inf) on rank 0; to find its origin: (.*)$",
                      done.stderr, re.M)
    assert done.returncode == 1 and found, done.stderr
    assert max(int(step) for step in re.findall(r"^step:(\d+)/62 ", done.stdout, re.M)) <= 12
    words = subprocess.check_output(["bash", "-c", f"printf '%s\\0' {found[1]}"], text=True)
    python, *command = words.removesuffix("\0").split("\0")
    assert python == "python"
    pasted = run(*command)
    assert pasted.returncode == 0, pasted.stderr
    assert re.fullmatch(r"it began on rank 0 in step [12] with aten\..* in .*, and reached .*\n", pasted.stdout)


def test_nan_of_compiled_code_only(hp, monkeypatch):
    """If the step is finite without torch.compile and graphs, that is said."""
    def poison(run, batches, touched, now, train_step=t.Run.train_step):
        loss = train_step(run, batches, touched, now)
        if now.step == 1 and run.hp.graphs:
            run.model.qk_bank.data[0] = torch.nan
        return loss

    monkeypatch.setattr(t.Run, "train_step", poison)
    with pytest.raises(t.UserError, match="step 2 reached qk_bank, but not without torch.compile and graphs"):
        find_nan.find(hp, ONE)


def test_operation_without_a_result():
    """What it changes is looked at."""
    with find_nan.FirstBad() as found:
        torch._foreach_log_([torch.ones(1), -torch.ones(1)])
    assert found.place.startswith("aten._foreach_log_.default")


def test_nan_in_autograds_own_thread():
    """On a GPU the backward pass runs in a thread that has no frames of the script."""
    with find_nan.FirstBad() as found:
        call = torch.ops.aten.log.default, (), (-torch.ones(1),)
        thread = threading.Thread(target=found.__torch_dispatch__, args=call)
        thread.start()
        thread.join()
    assert found.place == "aten.log.default in the backward pass"
