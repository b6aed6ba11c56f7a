"""The tables at the top of the script and the command line: schedule, parameters, layers, keys, import."""

import ast
import csv
import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as t

SCRIPT = Path(t.__file__).resolve()
HEADER = ("step,batch_tokens,max_doc_len,window_short,window_long,lr_factor,muon_momentum,mtp_0,mtp_1,mtp_2,"
          "update_adam,untie_embed")
SMALL = t.Hyperparameters(**t.PRESETS["demo"] | dict(
    model_dim=48, head_dim=8, vocab_size=120, batch_unit=64, val_chunk=64, val_tokens=64))


def plan_lines(cwd, *args):
    """Lines that --plan prints in a folder without data or torchrun."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, str(SCRIPT), "--plan", *args], cwd=cwd, env=env, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert os.listdir(cwd) == []  # and nothing is written
    return done.stdout.splitlines()


def rows_of(lines):
    assert lines[0] == HEADER
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO("\n".join(lines)))]


def expected(step, scheduled, extension):
    """One row, from the formulas: thirds of the scheduled steps, then the extension."""
    total, third = scheduled + extension, scheduled // 3
    if step < third:
        units, doc, short, long, lr, mtp = 1, 7, 1, 3, 1.0, [1, 0.5, 0.25 * (1 - step / third)]
    elif step < 2 * third:
        units, doc, short, long, lr, mtp = 2, 16, 3, 7, 1.52, [1, 0.5 * (1 - (step - third) / third), 0]
    elif step < scheduled:
        units, doc, short, long, lr, mtp = 3, 16, 5, 11, 1.73, [1, 0, 0]
    else:
        units, doc, short, long, lr, mtp = 3, 16, 6, 13, 0.15, [1, 0, 0]
    start = int(scheduled * 0.4)
    if start < step < scheduled:
        done = (step - start) / (scheduled - start)
        lr = lr * (1 - done) + 0.15 * done
    if step < 300:
        momentum = 0.85 + 0.1 * step / 300
    else:
        momentum = 0.95
    if step > total - 50:
        momentum = 0.95 - 0.1 * (step - (total - 50)) / 50
    untie = 2 * third if (2 * third) % 2 else 2 * third + 1
    values = [step, units * 131072, doc * 128, short * 128, long * 128, lr, momentum, *mtp, step % 2, step == untie]
    return dict(zip(HEADER.split(","), map(float, values)))


@pytest.mark.parametrize("scheduled, extension", [(1440, 40), (360, 10)])
def test_plan_every_column(tmp_path, scheduled, extension):
    """--plan prints the schedule that the formulas give, for the record and for a quarter of it."""
    keys = [f"--num_scheduled_iterations={scheduled}", f"--num_extension_iterations={extension}"]
    rows = rows_of(plan_lines(tmp_path, *keys if scheduled != 1440 else []))
    assert len(rows) == scheduled + extension
    for step, row in enumerate(rows):
        assert row == pytest.approx(expected(step, scheduled, extension), rel=1e-8, abs=1e-9), step


def test_plan_landmarks():
    """Hand-computed points of the record's schedule."""
    hp = t.Hyperparameters()
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    assert sum(p.batch_tokens for p in plans) == 393_216_000
    changes = [i for i in range(1, 1480) if plans[i].window_long != plans[i - 1].window_long]
    assert changes == [480, 960, 1440]
    assert [p.step for p in plans if p.untie_embed] == [961]
    assert [p.lr_factor for p in (plans[0], plans[479], plans[480], plans[576])] == [1.0, 1.0, 1.52, 1.52]
    assert plans[577].lr_factor == pytest.approx(1.52 - 1.37 / 864)
    assert plans[1008].lr_factor == pytest.approx(0.94)  # half way from 1.73 to 0.15
    assert {p.lr_factor for p in plans[1440:]} == {0.15}
    assert [plans[i].muon_momentum for i in (0, 150, 300, 1430)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert plans[1479].muon_momentum == pytest.approx(0.852)
    assert [len(plans[i].mtp_weights) for i in (0, 479, 480, 959, 960, 1479)] == [3, 3, 2, 2, 1, 1]
    assert [p.stage for p in (plans[0], plans[480], plans[960], plans[1440])] == [0, 1, 2, 3]


def test_quarter_schedule_landmarks():
    hp = t.Hyperparameters(num_scheduled_iterations=360, num_extension_iterations=10)
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    assert t.stage_bounds(hp) == [0, 120, 240, 360, 370]
    assert [i for i in range(1, 370) if plans[i].stage != plans[i - 1].stage] == [120, 240, 360]
    assert plans[144].lr_factor == 1.52 and plans[145].lr_factor < 1.52
    assert [p.step for p in plans if p.untie_embed] == [241]


@pytest.mark.parametrize("scheduled", [3, 4, 5, 7, 10, 11, 90])
def test_untying_happens_once_on_an_adam_step(scheduled):
    """For any length: one split, at the first odd step that is not before stage 3."""
    hp = t.Hyperparameters(num_scheduled_iterations=scheduled, num_extension_iterations=4)
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    first = next(p.step for p in plans if p.stage >= 2 and p.step % 2)
    assert [p.step for p in plans if p.untie_embed] == [first]
    assert {p.stage for p in plans} == {0, 1, 2, 3}


def test_reduction_and_update_order():
    """The two orders of communication, and which parameters share an update."""
    assert [row.name for row in t.PARAMS] == [
        "qk_bank", "vo_bank", "mlp_bank", "scalars", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank",
        "lm_head", "bigram_embed", "post_lambdas", "x0_lambdas", "bigram_lambdas", "resid_lambdas", "value_embeds",
        "embed"]
    hp = dataclasses.replace(t.Hyperparameters(), **t.PRESETS["demo"] | dict(vocab_size=64, model_dim=48, head_dim=8))
    optimizer, groups = t.NorMuonAdam(t.GPT(hp), hp, t.Ranks(0, 1, torch.device("cpu"))), []
    optimizer.tied = False
    optimizer.update = lambda group, grads, knobs: groups.append([row.name for row in group])
    optimizer.step(t.plan(1, hp))
    assert set(groups[0]) == {"scalars", "smear_gate", "skip_gate", "attn_gate_bank", "ve_gate_bank", "post_lambdas",
                              "x0_lambdas", "bigram_lambdas", "resid_lambdas"}
    assert groups[1:] == [["value_embeds"], ["bigram_embed"], ["lm_head"], ["embed"], ["qk_bank"], ["vo_bank"],
                          ["mlp_bank"]]
    by_turn = [row.name for row in sorted(t.PARAMS, key=lambda row: row.turn)]
    assert [name for group in groups[1:] for name in group] == by_turn[9:]


ADAM = {  # betas, lr multiplier, decay multiplier, reduction
    "scalars": (0.9, 0.99, 5, 0, "replicate"), "smear_gate": (0.9, 0.99, 0.01, 0, "replicate"),
    "skip_gate": (0.9, 0.99, 0.05, 0, "replicate"), "attn_gate_bank": (0.9, 0.99, 1, 1, "replicate"),
    "ve_gate_bank": (0.9, 0.99, 1, 1, "replicate"), "lm_head": (0.5, 0.95, 1, 150, "shard"),
    "embed": (0.5, 0.95, 1, 150, "shard"), "bigram_embed": (0.75, 0.95, 75, 5, "sparse"),
    "value_embeds": (0.75, 0.95, 75, 5, "shard"), "post_lambdas": (0.9, 0.95, 1, 0, "replicate"),
    "x0_lambdas": (0.9, 0.95, 1, 0, "replicate"), "bigram_lambdas": (0.9, 0.95, 1, 0, "replicate"),
    "resid_lambdas": (0.9, 0.95, 5, 0, "replicate"),
}


def test_optimizer_table():
    ours = {r.name: (*r.betas, r.lr_mul, r.wd_mul, r.reduce) for r in t.PARAMS if r.optimizer == "adam"}
    assert ours == ADAM
    banks = [r for r in t.PARAMS if r.optimizer == "normuon"]
    assert [(r.name, r.lr_mul, r.wd_mul, r.reduce) for r in banks] == [
        (n, 1, 1, "shard") for n in ("qk_bank", "vo_bank", "mlp_bank")]
    exact = {r.name for r in t.PARAMS if r.dtype == "float32"}
    assert exact == {"scalars", "post_lambdas", "x0_lambdas", "bigram_lambdas", "resid_lambdas"}


def test_record_constants():
    """The optimizers' and head's tuned numbers."""
    hp = t.Hyperparameters()
    assert (hp.muon_lr, hp.muon_wd, hp.muon_beta2, hp.adam_lr, hp.adam_wd, hp.adam_eps) == (
        0.023, 1.2, 0.9, 0.008, 0.005, 1e-10)
    assert (hp.model_dim, hp.num_heads, hp.head_dim, hp.padded_vocab, hp.bigram_rows, hp.mlp_dim, hp.bos) == (
        768, 6, 128, 50304, 251520, 3072, 50256)
    assert (hp.val_tokens, hp.val_chunk, hp.val_every, hp.final_val_window) == (10_485_760, 262_144, 250, 20)
    assert (hp.rope_base, hp.attn_scale, t.CAP, t.CAP_SHIFT, t.CAP_WIDTH) == (1024, 0.1, 23, 5, 7.5)
    assert (t.X_SCALE, t.W_SCALE, t.GRAD_SCALE) == (100 / 448, 1.6 / 448, 0.75 / 448)


@pytest.mark.parametrize("world, heads, matrices", [(1, 60, 20), (4, 60, 20), (8, 64, 24)])
def test_check_tables_accepts_the_model(world, heads, matrices):
    """PARAMS covers the model; banks are padded so that the ranks share them evenly."""
    model = t.GPT(SMALL, world)
    t.check_tables(dict(model.named_parameters()))
    assert {row.name for row in t.PARAMS} == {name for name, _ in model.named_parameters()}
    assert (model.qk_bank.shape[0], model.vo_bank.shape[0], model.mlp_bank.shape[0]) == (heads, matrices, 24)
    for row in t.PARAMS:
        if row.reduce != "replicate":
            assert getattr(model, row.name).shape[0] % world == 0


@pytest.mark.parametrize("index", [0, 5, len(t.PARAMS) - 1])
def test_check_tables_rejects_a_broken_table(monkeypatch, index):
    """A missing row, a doubled row or a shared turn is found before training."""
    model, rows = t.GPT(SMALL), t.PARAMS
    shared = rows[index]._replace(turn=rows[index - 1].turn)
    broken = [rows[:index] + rows[index + 1 :], rows + (rows[index],), rows[:index] + (shared,) + rows[index + 1 :]]
    for table in broken:
        monkeypatch.setattr(t, "PARAMS", table)
        with pytest.raises(AssertionError):
            t.check_tables(dict(model.named_parameters()))


@pytest.mark.parametrize("index, change", [(1, dict(window="shrt")), (7, dict(reads=9)), (6, dict(skip_from=6))])
def test_check_tables_rejects_a_broken_layer(monkeypatch, index, change):
    layers = list(t.LAYERS)
    layers[index] = layers[index]._replace(**change)
    monkeypatch.setattr(t, "LAYERS", tuple(layers))
    with pytest.raises(AssertionError, match="LAYERS: "):
        t.GPT(SMALL)


def test_parameter_without_a_row(monkeypatch):
    monkeypatch.setattr(t, "PARAMS", t.PARAMS[1:])
    with pytest.raises(AssertionError, match="PARAMS does not match the model"):
        t.GPT(SMALL)


def test_layers():
    """Which layers are paired, long, fed by value tables, without attention, or read the saved stream."""
    layers = dict(enumerate(t.LAYERS))
    assert len(layers) == 11
    assert {i for i, x in layers.items() if x.paired} == {0, 2, 5, 9}
    assert {i for i, x in layers.items() if x.window == "long"} == {3, 10}
    assert {i for i, x in layers.items() if x.key_offset} == {3, 10}
    assert {i: x.value_table for i, x in layers.items() if x.value_table is not None} == {1: 0, 2: 1, 8: 2, 9: 3, 10: 4}
    assert {i: x.skip_from for i, x in layers.items() if x.window is None} == {6: 3}
    assert {i: x.reads for i, x in layers.items() if x.reads is not None} == {8: 7, 9: 7, 10: 7}
    assert t.BACKOUT_LAYER == 7 and t.NUM_VALUE_TABLES == 5 and t.SCALARS == 25
    assert t.ATTN_INDEX == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 7: 6, 8: 7, 9: 8, 10: 9}


def test_initial_weights():
    """Ranges, means and zeros of the initial weights; embed is lm_head transposed; padding stays zero."""
    model = t.GPT(SMALL, 8)
    model.initialize(3)
    bound = math.sqrt(3) * 0.5 * 48**-0.5
    for weight in (model.qk_bank[:60], model.vo_bank[:20], model.mlp_bank[0:22:2]):
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert weight.flatten(1).std(dim=1).min() > 0
    for zero in (model.qk_bank[60:], model.vo_bank[20:], model.mlp_bank[1::2], model.mlp_bank[22:], model.bigram_embed,
                 model.smear_gate, model.skip_gate, model.attn_gate_bank, model.ve_gate_bank, model.x0_lambdas):
        assert not zero.any()
    assert model.lm_head.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.value_embeds.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(model.embed, model.lm_head.T)
    assert (model.post_lambdas == 1).all() and (model.bigram_lambdas == 0.05).all()
    assert torch.allclose(model.resid_lambdas, torch.tensor(1.1).sqrt())
    assert model.scalars.tolist() == [0.5, 1.0] * 11 + [0.0, 0.5, -1.5]


def parse(*args):
    return t.parse_args(list(args))[0]


def test_typed_keys():
    """Each key has its type; a preset only changes what is not given."""
    hp = parse("--num_scheduled_iterations=360", "--muon_lr=0.5", "--compile=false", "--run_id=a b", "--fp8_head=1")
    given = (hp.num_scheduled_iterations, hp.muon_lr, hp.compile, hp.run_id, hp.fp8_head)
    assert given == (360, 0.5, False, "a b", True)
    assert parse() == t.Hyperparameters()
    demo = parse("--val_every=7", "--preset=demo")
    assert demo.val_every == 7 and demo.model_dim == 96 and demo.dtype == "float32" and not demo.compile
    for key, kind in (("seed", int), ("muon_lr", float), ("compile", bool), ("dtype", str)):
        assert type(getattr(hp, key)) is kind


@pytest.mark.parametrize("args, parts", [
    (["--num_scheduled_iteration=3"], ["--num_scheduled_iteration", "--num_scheduled_iterations"]),
    (["--muon_lrr", "3"], ["unknown key --muon_lrr", "--muon_lr"]),
    (["--val=3"], ["unknown key --val"]),  # no guessing of shortened keys
    (["--zzzzzzzz=1"], ["--zzzzzzzz", "--help"]),
    (["--seed=x"], ["--seed", "x", "--help"]),
    (["--seed=1.5"], ["--seed", "1.5"]),
    (["--muon_lr=fast"], ["--muon_lr", "fast"]),
    (["--compile=maybe"], ["--compile", "maybe"]),
    (["--preset=demoo"], ["--preset", "record80", "demo"]),
    (["--dtype=float16"], ["--dtype=float16", "bfloat16", "float32"]),
    (["--device=tpu"], ["--device=tpu", "cuda", "cpu"]),
    (["--attention=flash"], ["--attention=flash", "reference"]),
    (["--batch_unit=12"], ["--batch_unit=12", "8"]),
    (["--val_tokens=10485761"], ["--val_tokens=10485761", "--val_chunk"]),
    (["--block=0"], ["--block=0", "positive"]),
    (["--val_every=-1"], ["--val_every=-1", "negative"]),
    (["--cooldown_start=nan"], ["--cooldown_start=nan"]),
    (["--model_dim=770"], ["--model_dim", "head_dim"]),
    (["--chek"], ["unknown key --chek", "--check"]),
    (["--muon_lr=nan"], ["--muon_lr=nan", "finite"]),
    (["--rope_base=0"], ["--rope_base=0", "positive"]),
    (["--seed=99999999999999999999"], ["--seed=9999", "64 bits"]),
])
def test_bad_keys(args, parts):
    """One line that names the key and what is allowed."""
    with pytest.raises(t.UserError) as caught:
        parse(*args)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_import_has_no_side_effects(tmp_path):
    """Importing makes no process group, does not touch CUDA, writes nothing and prints nothing."""
    code = (f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); sys.dont_write_bytecode = True; "
            "sys.argv = ['x', '--plan', '--nonsense']\n"
            "import os, threading, torch, torch.distributed as dist\n"
            "files, env, seed = os.listdir(), dict(os.environ), torch.initial_seed()\n"
            "state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()\n"
            "import train_gpt\n"
            "assert train_gpt.plan and not dist.is_initialized() and not torch.cuda.is_initialized()\n"
            "assert os.listdir() == files == [] and dict(os.environ) == env\n"
            "assert threading.active_count() == 1 and torch.equal(state, torch.get_rng_state())\n"
            "assert torch.get_float32_matmul_precision() == precision and torch.get_default_dtype() == torch.float32\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == []


def test_main_is_guarded():
    """The last statement runs main only as a script, and no other top-level statement calls something at import."""
    body = ast.parse(SCRIPT.read_text()).body
    assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    main()"
    calls = [ast.unparse(node) for node in body[1:] if isinstance(node, ast.Expr)]
    definitions = ("register_fake", "register_autograd", "register_kernel")  # they complete an operation's definition
    assert [call for call in calls if call.split("(")[0].split(".")[-1] not in definitions] == []
