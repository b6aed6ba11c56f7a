"""Checkpoints: a resumed run goes on as if it had never stopped, on any number of ranks; bad files cost one line."""

import dataclasses
import os
import re
from pathlib import Path

import forks
import pytest
import torch

import train_gpt as t

ROOT = Path(t.__file__).parent
SCRIPT = ROOT / "train_gpt.py"
CPU = torch.device("cpu")
ONE = t.Ranks(0, 1, CPU)
# Adam in the steps 1, 3, 5, 7 of 0..7; embed split off in step 5: between the checkpoints 5 and 6
SIZES = dict(model_dim=48, head_dim=8, vocab_size=256, batch_unit=64, val_tokens=256, val_chunk=128, val_every=3,
             num_scheduled_iterations=6, num_extension_iterations=2, muon_momentum_warmup=3, muon_momentum_cooldown=2)
N = 8


@pytest.fixture(scope="module")
def base(byte_files, tmp_path_factory):
    return dataclasses.replace(t.PRESETS["demo"], **SIZES, **byte_files, log_dir=str(tmp_path_factory.mktemp("logs")))


def train(hp, **more):
    """Train in this process as one rank; returns the log's folder."""
    hp = dataclasses.replace(hp, **more)
    saved = t.read_checkpoint(hp.resume, hp)
    log = t.Log(hp, ONE)
    t.train(t.Run(hp, ONE), log, t.Watch(ONE, log), saved)
    log.close()
    return Path(hp.log_dir)


def launch(hp, world, check=False, **more):
    """The same by torchrun on `world` ranks; or only the check of arguments and data, in one process."""
    hp = dataclasses.replace(hp, **more)
    args = [f"--{name}={getattr(hp, name)}" for name in t.KEYS]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", SCRIPT]
    return forks.run(*[SCRIPT, "--check"] if check else torchrun, *args)


def losses(folder, after=0):
    """(kind, step, loss) of the lines that follow step `after` in the log "run" of a folder."""
    lines = re.findall(r"^step:(\d+)/8 (\w+)_loss:(\S+) ", (folder / "run.txt").read_text(), re.M)
    return [(kind, int(step), float(loss)) for step, kind, loss in lines if int(step) > after]


def contents(folder, step):
    return torch.load(folder / f"run_step{step}.pt", weights_only=True)


def assert_same(ours, reference):
    """All that is saved is the same to the last bit, except the clock and what may change."""
    assert ours["tensors"].keys() == reference["tensors"].keys() and len(ours["tensors"]) > 3 * len(t.PARAMS) - 3
    for name, x in reference["tensors"].items():
        assert ours["tensors"][name].dtype == x.dtype and torch.equal(ours["tensors"][name], x), name
    assert ours["step"] == reference["step"]


def straight_run(base, folder, dtype):
    hp = dataclasses.replace(base, dtype=dtype, run_id="run", log_dir=str(folder))
    return hp, train(hp, save_every=1)


@pytest.fixture(scope="module")
def bfloat16(base, tmp_path_factory):
    return straight_run(base, tmp_path_factory.mktemp("bfloat16"), "bfloat16")


@pytest.fixture(scope="module")
def float32(base, tmp_path_factory):
    return straight_run(base, tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture(params=["bfloat16", "float32"])
def straight(request):
    """A run without interruption that saves after every step: its recipe and folder."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def two_ranks(base, tmp_path_factory):
    """The same by two ranks, in fp32."""
    hp = dataclasses.replace(base, run_id="run", log_dir=str(tmp_path_factory.mktemp("two")))
    done = launch(hp, 2, save_every=1)
    assert done.returncode == 0, done.stderr
    return hp, Path(hp.log_dir)


def test_contents(straight):
    """Gradients are saved where Adam rests, low bits of bf16 weights always; nothing temporary stays."""
    hp, folder = straight
    assert sorted(os.listdir(folder)) == ["run.csv", "run.txt", *(f"run_step{i}.pt" for i in range(1, N + 1))]
    for step in range(1, N + 1):
        saved = contents(folder, step)
        waiting = {name.removesuffix(".grad") for name in saved["tensors"] if name.endswith(".grad")}
        due = {"bigram_embed", "value_embeds", "embed", "lm_head", "attn_lambdas", "smear_lambda", "backout_lambda"}
        assert waiting == set() if step % 2 == 0 else waiting >= due
        assert saved["step"] == step
        assert torch.equal(saved["tensors"]["embed"], saved["tensors"]["lm_head"].mT) == (step < 6)
        assert ("mlp_bank.low" in saved["tensors"]) == (hp.dtype == "bfloat16")


def test_saving_changes_nothing(float32, tmp_path):
    """In bfloat16 test_resume_is_exact shows it from a checkpoint on."""
    hp, folder = float32
    train(hp, log_dir=str(tmp_path), save_final=True)
    assert sorted(os.listdir(tmp_path)) == ["run.csv", "run.txt", "run_step8.pt"]
    assert losses(tmp_path) == losses(folder)
    assert_same(contents(tmp_path, N), contents(folder, N))


# after odd and even numbers of steps, before and after the split
@pytest.mark.parametrize("dtype, step", [("bfloat16", 3), ("float32", 4), ("float32", 5), ("bfloat16", 6)])
def test_resume_is_exact(request, tmp_path, dtype, step):
    hp, folder = request.getfixturevalue(dtype)
    train(hp, log_dir=str(tmp_path), resume=str(folder / f"run_step{step}.pt"), save_final=True, val_every=2)
    ours, reference = losses(tmp_path), losses(folder, step)
    assert [x for x in ours if x[0] == "train"] == [x for x in reference if x[0] == "train"]
    assert (tmp_path / "run.csv").read_text().startswith("step,train_loss,val_loss,train_time_ms,tokens_per_s\n")
    assert ours[-1] == reference[-1] and ours[-1][:2] == ("val", N)
    assert_same(contents(tmp_path, N), contents(folder, N))


def test_clock_goes_on(float32, tmp_path, monkeypatch):
    """A resumed run counts from the saved time on, saving is not counted, and the log's two files are continued."""
    hp, folder = float32
    clocks, saves, save = [], [], torch.save
    monkeypatch.setattr(t, "Clock", lambda device, make=t.Clock: clocks.append(make(device)) or clocks[-1])
    monkeypatch.setattr(torch, "save", lambda *args: saves.append(clocks[-1].started) or save(*args))
    for name in ("run.txt", "run.csv"):
        (tmp_path / name).write_text("of before\n")
    train(hp, log_dir=str(tmp_path), resume=str(folder / "run_step5.pt"), save_every=1)
    assert saves == [None, None, None]
    text = (tmp_path / "run.txt").read_text()
    times = [int(ms) for ms in re.findall(r"^step:\d/8 .*train_time:(\d+)ms", text, re.M)]
    first, *rows = (tmp_path / "run.csv").read_text().splitlines()
    assert first == "of before" and [row.split(",")[0] for row in rows] == re.findall(r"^step:(\d)/8 ", text, re.M)
    assert text.startswith("of before\n") and len(times) == 5 and times == sorted(times)
    assert times[0] >= round(contents(folder, 5)["ms"]) and contents(tmp_path, 6)["ms"] > contents(folder, 5)["ms"]


def assert_close(ours, reference):
    """The validation losses after step 5 of two logs are equal to the rounding of sums over ranks."""
    ours, reference = ([x for x in losses(folder, 5) if x[0] == "val"] for folder in (ours, reference))
    assert [x[:2] for x in ours] == [x[:2] for x in reference] == [("val", 6), ("val", 8)]
    assert [x[2] for x in ours] == pytest.approx([x[2] for x in reference], abs=2e-4)


def test_one_rank_to_two(base, tmp_path):
    """With gradients that wait, and the split still to come."""
    folder = train(base, run_id="run", log_dir=str(tmp_path / "one"), save_every=5)
    done = launch(base, 2, run_id="run", log_dir=str(tmp_path), resume=str(folder / "run_step5.pt"))
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path, folder)


@pytest.mark.parametrize("step", [5, 6])
def test_two_ranks_to_one(two_ranks, tmp_path, step):
    hp, folder = two_ranks
    assert_close(train(hp, log_dir=str(tmp_path), resume=str(folder / f"run_step{step}.pt")), folder)


def test_two_ranks_to_two(two_ranks, tmp_path):
    """Exact also with gradients that differ by rank."""
    hp, folder = two_ranks
    done = launch(hp, 2, log_dir=str(tmp_path), resume=str(folder / "run_step3.pt"), save_final=True)
    assert done.returncode == 0, done.stderr
    assert not torch.equal(*contents(folder, 3)["tensors"]["lm_head.grad"])
    assert_same(contents(tmp_path, N), contents(folder, N))


def test_eight_ranks_pad_and_shard(straight, tmp_path, monkeypatch):
    """One rank's checkpoint, loaded by eight, whose banks are padded, and saved by them, is what it was."""
    hp, folder = straight
    path = folder / "run_step5.pt"
    saved, optimizers = t.read_checkpoint(str(path), hp), []
    for rank in range(8):
        with torch.device(CPU):
            model = t.GPT(hp, 8)
        model.initialize(hp)
        optimizers.append(t.NorMuonAdam(model, hp, t.Ranks(rank, 8, CPU)))
        assert t.load_checkpoint(saved, optimizers[-1], t.Clock(CPU)) == 5
    padded = [p.size(0) != saved["settings"]["shapes"][name][0] for name, p in model.named_parameters()]
    assert sum(padded) == 3 and not model.qk_bank[60:].any() and not model.mlp_bank[22:].any()
    parts = zip(*([x for _, x, kind in optimizer.states() if kind != "same"] for optimizer in optimizers))
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda out, part: out.copy_(
        torch.cat([x.view(torch.uint8).view(len(part), *part.shape[1:]) for x in next(parts)])))
    log = t.Log(dataclasses.replace(hp, log_dir=str(tmp_path)), ONE)
    t.save_checkpoint(log, optimizers[0], 5, 0.0)
    log.close()
    again = contents(tmp_path, 5)
    for name in [name for name in again["tensors"] if name.endswith(".grad")]:
        assert len(again["tensors"][name]) == 8
        x = again["tensors"][name]  # of the sparse table each rank has its shard's, so that it sends them to itself
        again["tensors"][name] = x.mean(0, keepdim=True) if name == "bigram_embed.grad" else x[3:4]
    assert_same(again, contents(folder, 5))


@pytest.mark.parametrize("done", [2, 3])
def test_loader_skips(base, done):
    """It goes on with the same batches; Adam's next step of eight ranks sends all rows with waiting gradients."""
    loaders = [t.load_batches(base, t.Ranks(rank, 8, CPU), range(6)) for rank in range(8)]
    whole = [[next(loader) for _ in range(6)] for loader in loaders]
    read = [[set(batches[0].bigram_ids.tolist()) for batches, _ in items] for items in whole]  # [rank][step]
    loaders.append(t.load_batches(base, t.Ranks(5, 8, CPU), range(6), done))
    for step in range(done, 6):
        ((batch,), touched), ((same,), expected) = next(loaders[-1]), whole[5][step]
        assert all(map(torch.equal, batch, same))
        assert (touched is None) == (step % 2 == 0)
        if step == 3:  # of step 2 its own rows or, if it was before the checkpoint, also those of its shard
            size = base.sizes["B"] // 8
            shard = {row for rows in read for row in rows[2] if row // size == 5} if done == 3 else set()
            assert touched.gradients.sent.tolist() == sorted(read[5][2] | shard | read[5][3])
        elif step == 5:
            assert torch.equal(touched.gradients.sent, expected.gradients.sent)
            assert torch.equal(touched.gradients.received, expected.gradients.received)
    for loader in loaders:
        loader.close()


def damaged(path, how):
    """Write a bad copy of a checkpoint beside it."""
    raw, bad = bytearray(path.read_bytes()), path.with_name(f"bad_{how}.pt")
    if how == "flipped bit":
        raw[len(raw) // 2] ^= 1
    elif how == "truncated":
        raw = raw[:-1000]
    elif how == "empty":
        raw = b""
    elif how == "text":
        raw = b"loss 3.28\n" * 1000
    if how == "other dictionary":
        torch.save({"model": torch.zeros(3)}, bad)
    elif how == "pickled code":
        torch.save({"settings": os.getcwd}, bad)
    elif how != "missing":
        bad.write_bytes(raw)
    return str(bad)


BAD = ["flipped bit", "truncated", "empty", "text", "other dictionary", "pickled code", "missing"]


@pytest.mark.parametrize("how", BAD)
def test_bad_files(float32, how):
    hp, folder = float32
    path = damaged(folder / "run_step4.pt", how)
    for given in (hp, None):
        with pytest.raises(t.UserError) as error:
            t.read_checkpoint(path, given)
        text = "no such checkpoint" if how == "missing" else "intact checkpoint"
        assert path in str(error.value) and text in str(error.value) and "\n" not in str(error.value)


def test_other_settings(float32, tmp_path):
    """What changes the weights is refused by name; the rest is not, nor are the same shards elsewhere."""
    hp, folder = float32
    path, other = str(folder / "run_step4.pt"), dict(seed=1, muon_lr=0.5, model_dim=96, head_dim=16)
    with pytest.raises(t.UserError) as error:
        t.read_checkpoint(path, dataclasses.replace(hp, **other))
    for part in (path, "seed=0", "muon_lr=0.023", "model_dim=48", "head_dim=8", "shapes"):
        assert part in str(error.value)
    assert "val_every" not in str(error.value) and "num_heads" not in str(error.value)
    free = dict(val_every=1, log_dir="x", save_every=9, kernels="auto", attention="reference", final_val_window=7)
    assert t.read_checkpoint(path, dataclasses.replace(hp, **free))["hp"].log_dir == "x"
    moved = tmp_path / "moved" / "fineweb_train_000001.bin"
    moved.parent.mkdir()
    moved.write_bytes(Path(hp.train_files).read_bytes())
    assert t.read_checkpoint(path, dataclasses.replace(hp, train_files=str(moved)))["step"] == 4
    moved.write_bytes(Path(hp.train_files).read_bytes()[:-99_000] + 99_000 * b"\1")
    with pytest.raises(t.UserError, match="same: the contents of --train_files$"):
        t.read_checkpoint(path, dataclasses.replace(hp, train_files=str(moved)))
    for cell in ("LAYERS.0.paired=false", "READOUT.cap=22", "STAGES.1.lr=1", "PARAMS.embed.wd=1"):
        with pytest.raises(t.UserError, match=f"same: {cell.split('.')[0]}$"):
            t.read_checkpoint(path, t.set_cells(hp, cell))


def test_tables_are_saved(base, tmp_path):
    """A checkpoint alone tells the recipe, cells that were set included, and a run of that recipe goes on with it."""
    hp = dataclasses.replace(base, run_id="run", log_dir=str(tmp_path), save_every=6)
    for cell in ("LAYERS.0.paired=false", "READOUT.minus=early", "STAGES.1.mtp_end=1,0.5", "PARAMS.*o_bank.rule=muon"):
        hp = t.set_cells(hp, cell)
    saved = contents(train(hp, save_final=True), N)
    path = str(tmp_path / "run_step6.pt")
    assert t.read_checkpoint(path)["hp"] == dataclasses.replace(hp, save_final=True)
    assert "vo_bank.second" not in saved["tensors"] and "qk_bank.second" in saved["tensors"]
    assert_same(contents(train(hp, log_dir=str(tmp_path / "more"), resume=path, save_final=True), N), saved)


def test_refused_before_anything_is_written(two_ranks):
    """One line of a launch of two ranks and of --check; log and checkpoints stay as they are."""
    hp, folder = two_ranks
    path = str(folder / "run_step4.pt")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = launch(hp, 2, resume=path, seed=1)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert done.returncode != 0 and len(lines) == 1 and path in lines[0] and "seed=0" in lines[0], done.stderr
    check = launch(hp, 1, check=True, resume=path, seed=1)
    assert check.returncode == 1 and check.stderr == lines[0] + "\n" and check.stdout == ""
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_log_of_a_finished_run(float32):
    """A resumed run does not go on in a log that has ended."""
    hp, folder = float32
    with pytest.raises(t.UserError, match="run.txt is another run's log; choose another --run_id"):
        t.Log(dataclasses.replace(hp, run_id="run", log_dir=str(folder), resume="x.pt"), ONE)


def test_disk_that_takes_no_more(base, tmp_path, monkeypatch):
    """One error that names the file; nothing half-written stays, and an older checkpoint of that name does."""
    def fail(_, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    (tmp_path / "run_step1.pt").write_bytes(b"older")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(t.UserError, match=r"run_step1\.pt: Pytorch.*--log_dir"):
        train(base, run_id="run", log_dir=str(tmp_path), save_every=1)
    assert sorted(os.listdir(tmp_path)) == ["run.csv", "run.txt", "run_step1.pt"]
    assert (tmp_path / "run_step1.pt").read_bytes() == b"older"
