"""The tables at the top of the script and the command line: schedule, parameters, layers, keys, import."""

import ast
import csv
import dataclasses
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

import train_gpt as t

SCRIPT = Path(t.__file__).resolve()
HEADER = ("step,batch_tokens,max_doc_len,window_short,window_long,lr_factor,muon_momentum,mtp_0,mtp_1,mtp_2,"
          "prefix,update_adam,untie_embed")
ONE = t.Ranks(0, 1, torch.device("cpu"))
# four steps, one of each stage, Adam in the odd ones, embed and lm_head apart from step 3 on
SIZES = dict(model_dim=48, head_dim=8, vocab_size=120, batch_unit=64, val_chunk=64, val_tokens=64,
             num_scheduled_iterations=3, num_extension_iterations=1)
SMALL = dataclasses.replace(t.PRESETS["demo"], **SIZES)


def plan_lines(cwd, *args):
    """Lines that --plan prints in a folder without data or torchrun."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = forks.run(SCRIPT, "--plan", *args, cwd=cwd, env=env)
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
    values = [step, units * 131072, doc * 128, short * 128, long * 128, lr, momentum, *mtp, 0, step % 2,
              step == untie]
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
    hp = t.Recipe()
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    assert sum(p.batch_tokens for p in plans) == 393_216_000
    changes = [i for i in range(1, 1480) if plans[i].windows.long != plans[i - 1].windows.long]
    assert changes == [480, 960, 1440]
    assert [p.step for p in plans if p.unties] == [961]
    assert [p.lr_factor for p in (plans[0], plans[479], plans[480], plans[576])] == [1.0, 1.0, 1.52, 1.52]
    assert plans[577].lr_factor == pytest.approx(1.52 - 1.37 / 864)
    assert plans[1008].lr_factor == pytest.approx(0.94)  # half way from 1.73 to 0.15
    assert {p.lr_factor for p in plans[1440:]} == {0.15}
    assert [plans[i].muon_momentum for i in (0, 150, 300, 1430)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert plans[1479].muon_momentum == pytest.approx(0.852)
    assert [len(plans[i].mtp_weights) for i in (0, 479, 480, 959, 960, 1479)] == [3, 3, 2, 2, 1, 1]
    assert [p.index for p in (plans[0], plans[480], plans[960], plans[1440])] == [0, 1, 2, 3]


def test_quarter_schedule_landmarks():
    hp = t.Recipe(num_scheduled_iterations=360, num_extension_iterations=10)
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    assert t.stage_bounds(hp) == [0, 120, 240, 360, 370]
    assert [i for i in range(1, 370) if plans[i].index != plans[i - 1].index] == [120, 240, 360]
    assert plans[144].lr_factor == 1.52 and plans[145].lr_factor < 1.52
    assert [p.step for p in plans if p.unties] == [241]


@pytest.mark.parametrize("scheduled", [3, 4, 5, 7, 10, 11, 90])
def test_untying_happens_once_on_an_adam_step(scheduled):
    """For any length: one split, at the first odd step that is not before stage 3."""
    hp = t.Recipe(num_scheduled_iterations=scheduled, num_extension_iterations=4)
    plans = [t.plan(step, hp) for step in range(hp.num_steps)]
    first = next(p.step for p in plans if p.index >= 2 and p.step % 2)
    assert [p.step for p in plans if p.unties] == [first]
    assert {p.index for p in plans} == {0, 1, 2, 3}


def test_rates_ramp_to_the_next_stage():
    """In equal steps from one factor to the other, with the first step of a stage; as they fall, too. 0: at once. A
    ramp longer than a stage goes on from where it is."""
    at_once, ramp = t.Recipe(), t.Recipe(lr_ramp=3)
    for first, before, after in ((480, 1.0, 1.52), (960, 1.52, 1.73)):
        factors = [t.plan(step, at_once).lr_factor for step in range(first - 1, first + 5)]
        fallen = [min(max((step - 576) / (1440 - 576), 0.0), 1.0) for step in range(first - 1, first + 5)]
        expected = [before, *(before + (after - before) * k / 4 for k in (1, 2, 3)), after, after]
        for step, factor, lr, t_ in zip(range(first - 1, first + 5), factors, expected, fallen):
            assert t.plan(step, ramp).lr_factor == pytest.approx(lr * (1 - t_) + 0.15 * t_, rel=1e-12)
            assert factor == (before if step < first else after) * (1 - t_) + 0.15 * t_
    assert t.plan(0, ramp).lr_factor == 1.0 and t.plan(1439, ramp).lr_factor == t.plan(1439, at_once).lr_factor
    stages = [row._replace(length=x) for row, x in zip(t.STAGES, (0.4, 0.1, 0.5, None))]  # from steps 0, 576, 720
    long = t.Recipe(stages=tuple(stages), lr_ramp=200, cooldown_start=0.9)
    rises = np.diff([t.plan(step, long).lr_factor for step in range(575, 922)])
    assert rises == pytest.approx([0.52 / 201] * 144 + [0.73 / 201] * 57 + [0.21 / 201] * 144 + [0], abs=1e-9)


def test_update_order():
    """Small parameters are updated together and first, then the others in UPDATE_ORDER."""
    optimizer, groups = t.NorMuonAdam(t.GPT(SMALL), SMALL, ONE), []
    optimizer.update = lambda group, grads, hypers: groups.append([row.name for row in group])
    optimizer.step(t.plan(3, SMALL))
    sized = [row.name for row in t.PARAMS if math.prod(t.param_shape(row, SMALL))]
    assert groups[0] == [row.name for row in t.PARAMS if row.reduce == "replicate" and row.name in sized]
    assert groups[1:] == [[name] for name in t.UPDATE_ORDER if name in sized]  # the n-gram table has no rows here


@pytest.mark.parametrize("world, heads, matrices, mlp", [(1, 60, 20, 22), (4, 60, 20, 24), (8, 64, 24, 24)])
def test_banks_are_padded(world, heads, matrices, mlp):
    """PARAMS covers the model; banks are padded so that the ranks share them evenly."""
    model = t.GPT(SMALL, world)
    assert [row.name for row in t.PARAMS] == [name for name, _ in model.named_parameters()]
    assert (model.qk_bank.shape[0], model.vo_bank.shape[0], model.mlp_bank.shape[0]) == (heads, matrices, mlp)
    for row in t.PARAMS:
        if row.reduce != "replicate":
            assert getattr(model, row.name).shape[0] % world == 0


def test_initial_weights():
    """Ranges, means and zeros of the initial weights; embed is lm_head transposed; padding stays zero."""
    model = t.GPT(SMALL, 8)
    model.initialize(SMALL)
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
    assert model.attn_lambdas.tolist() == [[0.5] * 11, [1.0] * 11]
    assert (model.smear_lambda.item(), model.backout_lambda.item(), model.skip_lambda.item()) == (0.0, 0.5, -1.5)


def test_initial_values_depend_on_seed_and_name_alone():
    """A parameter's values are the same with other parameters, not with another seed."""
    fewer = dataclasses.replace(SMALL, params=SMALL.params[1:])
    for row in fewer.params:
        if row.init != "lm_head":
            values = t.initial_values(row, fewer)
            assert torch.equal(values, t.initial_values(row, SMALL))
            drawn = "uniform" in row.init or "normal" in row.init
            other = t.initial_values(row, dataclasses.replace(SMALL, seed=1))
            assert torch.equal(values, other) != (drawn and values.numel() > 0)


def parse(*args):
    return t.parse_args(list(args))[0]


def test_typed_keys():
    """Each key has its type; a preset only changes what is not given."""
    hp = parse("--num_scheduled_iterations=360", "--muon_lr=0.5", "--compile=false", "--run_id=a b", "--fp8_head=1")
    given = (hp.num_scheduled_iterations, hp.muon_lr, hp.compile, hp.run_id, hp.fp8_head)
    assert given == (360, 0.5, False, "a b", True)
    assert parse() == t.Recipe()
    demo = parse("--val_every=7", "--preset=demo")
    assert demo.val_every == 7 and demo.model_dim == 96 and demo.dtype == "float32" and not demo.compile
    for key, kind in (("seed", int), ("muon_lr", float), ("compile", bool), ("dtype", str)):
        assert type(getattr(hp, key)) is kind


@pytest.mark.parametrize("args, parts", [
    (["--num_scheduled_iteration=3"], ["--num_scheduled_iteration", "--num_scheduled_iterations"]),
    (["--muon_lrr", "3"], ["unknown key --muon_lrr", "--muon_lr"]),
    (["--val=3"], ["unknown key --val"]),  # no guessing of shortened keys
    (["--zzzzzzzz=1"], ["--zzzzzzzz", "--help"]),
    (["--seed=x"], ["--seed=x", "whole number"]),
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
])
def test_bad_keys(args, parts):
    """One line that names the key and what is allowed."""
    with pytest.raises(t.UserError) as caught:
        parse(*args)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SMALL with shards for it."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shards")
    tokens, header = rng.integers(0, 119, 4000), np.zeros(256, "<i4")
    tokens[::23] = 119
    header[:3] = 20240520, 1, len(tokens)
    (folder / "a.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return dataclasses.replace(SMALL, train_files=str(folder / "a.bin"), val_files=str(folder / "a.bin"))


def cells(hp, *texts):
    for text in texts:
        hp = t.set_cells(hp, text)
    t.check_recipe(hp)
    return hp


def one_line(monkeypatch, capsys, hp, *args, kinds=((), ("--plan",), ("--check",))):
    """The one line with which these kinds of a run of these arguments, and of hp as the demo, end at the start."""
    monkeypatch.setitem(t.PRESETS, "demo", hp)
    monkeypatch.setattr(t.dist, "is_initialized", lambda: False)
    lines = set()
    for flags in kinds:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--preset=demo", *flags, *args])
        with pytest.raises(SystemExit) as ended:
            t.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        lines.add(err)
    line, = lines
    return line


@pytest.mark.parametrize("edits, place, allowed", [
    ({"PARAMS.lm_head.rule": "adamw"}, None, "normuon, twin_normuon, muon, adam or row_adam"),
    ({"PARAMS.vo_bank.reduce": "replicated"}, None, "replicate, shard, sparse or rows"),
    ({"PARAMS.x0_lambdas.dtype": "fp32"}, None, "model or float32"),
    ({"PARAMS.x0_lambdas.betas": None}, None, "two numbers"),
    ({"STAGES.0.mtp_end": (1.0, 0.5)}, None, "3 weights, as in mtp_start"),
    ({"STAGES.0.mtp_start": (1.0,) * 4, "STAGES.0.mtp_end": (1.0,) * 4}, "STAGES.0.mtp_start", "1 to 3 weights"),
    ({"STAGES.2.batch": 1.5}, None, "a whole number"),
    ({"STAGES.1.batch": 0}, None, "1 or more"),
    ({"STAGES.0.length": 0.5}, "STAGES.*.length", "add up to 1"),
    ({"LAYERS.1.window": "shrt"}, None, "short, long or none"),
    ({"LAYERS.9.value_table": 7}, "LAYERS.*.value_table", "0, 1, 2 .., each once"),
    ({"LAYERS.9.value_table": 2}, "LAYERS.*.value_table", "each once"),
    ({"LAYERS.1.reads": "middle"}, None, "none, a name of an earlier layer"),
    ({"LAYERS.8.reads": "end"}, None, "none or early or middle, a name of an earlier layer"),
    ({"LAYERS.6.skip_from": "middle"}, None, "none or early, a name of an earlier layer"),
    ({"LAYERS.6.skip_from": "end"}, None, "none or early, a name of an earlier layer"),
    ({"LAYERS.6.reads": "early"}, None, "a layer without attention (window=none) takes none"),
    ({"LAYERS.1.value_table": None, "LAYERS.6.value_table": 0}, "LAYERS.6.value_table", "without attention"),
    ({"PARAMS.x0_lambdas.betas": (0.5, 0.9, 0.9)}, None, "two numbers"),
    ({"PARAMS.x0_lambdas.shape": "2* L"}, None, "numbers and L, A, E"),
    ({"PARAMS.x0_lambdas.shape": "Q"}, None, "numbers and L, A, E"),
    ({"PARAMS.x0_lambdas.shape": "1"}, None, "use 'L', as GPT reads it so"),
    ({"PARAMS.smear_gate.shape": "1 D"}, None, "use '1 G', as GPT reads it so"),
    ({"PARAMS.vo_bank.shape": "A D D"}, None, "use '2*A D D', as GPT reads it so"),
    ({"PARAMS.embed.init": "normal 0.1"}, None, "use lm_head"),
    ({"READOUT.minus": "midle"}, None, "early, middle"),
], ids=str)
def test_bad_cell(monkeypatch, capsys, edits, place, allowed):
    """Set by --set or edited in the script, it ends a run with its name and what is allowed."""
    hp, args = SMALL, []
    for name, value in edits.items():
        table, row, column = name.split(".") if name.count(".") == 2 else (*name.split(".")[:1], 0, name.split(".")[1])
        rows = getattr(hp, table.lower())
        if table == "READOUT":
            hp = dataclasses.replace(hp, readout=rows._replace(**{column: value}))
        else:
            rows = tuple(x._replace(**{column: value}) if row in (str(i), getattr(x, "name", "")) else x
                         for i, x in enumerate(rows))
            hp = dataclasses.replace(hp, **{table.lower(): rows})
        text = ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else value
        args.append(f"--set={name}={text}")
    for line in (one_line(monkeypatch, capsys, hp, kinds=[()]),
                 one_line(monkeypatch, capsys, SMALL, *args, kinds=[("--plan",)])):
        assert (place or name) in line and allowed in line, line


def test_set_is_typed():
    """Cells get their column's type; a row is a number or a name, * any; what comes later counts."""
    hp = cells(SMALL, "LAYERS.6.skip_from=none", "LAYERS.middle.window=long", "LAYERS.8.reads=None", "STAGES.*.tied=0",
               "LAYERS.10.value_table=none", "STAGES.0.mtp_end=1, 0.5,0", "PARAMS.*_gate.lr=1e-3", "READOUT.cap=20",
               "STAGES.1.batch=4", "PARAMS.smear_gate.lr=2", "PARAMS.vo_bank.betas=0.5,0.75")
    row = {row.name: row for row in hp.params}
    assert (hp.layers[6].skip_from, hp.layers[8].reads, hp.layers[10].value_table) == (None, None, None)
    assert hp.layers[7].window == "long" and hp.layers[9] == SMALL.layers[9] and hp.stages[0].mtp_end == (1, 0.5, 0)
    assert [stage.tied for stage in hp.stages] == [False] * 4 and type(hp.stages[1].batch) is int
    assert (row["smear_gate"].lr, row["skip_gate"].lr, row["vo_bank"].betas) == (2.0, 0.001, (0.5, 0.75))
    assert type(hp.readout.cap) is float and hp.stages[1].batch == 4


@pytest.mark.parametrize("edits, parts", [
    (["PARAM.lm_head.rule=adam"], ["LAYERS, READOUT, STAGES, PARAMS"]),
    (["PARAMS.lm_haed.lr=1"], ["PARAMS has the rows", "lm_head"]),
    (["LAYERS.11.paired=true"], ["LAYERS has the rows 0, ", ", 10"]),
    (["STAGES.0.bacth=1"], ["STAGES has the columns", "batch"]),
    (["STAGES.batch=1"], ["TABLE.row.column"]),
    (["READOUT.cap=high"], ["READOUT.cap='high'", "a finite number"]),
    (["PARAMS.lm_head.lr"], ["TABLE.row.column=value"]),
    (["STAGES.0.tied=maybe"], ["STAGES.0.tied='maybe'", "true or false"]),
    (["PARAMS.lm_head.lr=nan"], ["PARAMS.lm_head.lr", "a finite number"]),
    (["PARAMS.lm_head.every=3"], ["PARAMS.embed.every", "use 3"]),
    (["PARAMS.smear_gate.rule=normuon"], ["PARAMS.smear_gate.rule", "use adam"]),
], ids=str)
def test_bad_set(monkeypatch, capsys, edits, parts):
    """So does a --set that names no cell, or gives what no cell takes: every kind of run."""
    line = one_line(monkeypatch, capsys, SMALL, *(f"--set={edit}" for edit in edits))
    assert edits[0].split("=")[0].split(".")[0] in line and all(part in line for part in parts), line


@pytest.mark.parametrize("row", t.PARAMS, ids=lambda row: row.name)
def test_missing_parameter(row):
    with pytest.raises(t.UserError, match=f"^PARAMS: add a row for {row.name}, which GPT reads$"):
        t.check_recipe(dataclasses.replace(SMALL, params=tuple(x for x in t.PARAMS if x != row)))


@pytest.mark.parametrize("table, change, parts", [
    ("params", lambda rows: rows[:3] + rows[4:], ["PARAMS: add a row for attn_lambdas, which GPT reads"]),
    ("params", lambda rows: rows + rows[:1], ["PARAMS.qk_bank has two rows"]),
    ("params", lambda rows: (*rows, rows[4]._replace(name="spare")), ["PARAMS.spare: GPT never reads self.spare"]),
    ("params", lambda rows: (), ["PARAMS"]),
    ("stages", lambda rows: (), ["STAGES"]),
    ("layers", lambda rows: (), ["LAYERS.*.window"]),
    ("stages", lambda rows: rows[:2] + rows[3:], ["STAGES.*.length", "add up to 1"]),
    ("stages", lambda rows: rows[:3], ["STAGES.2.length", "use none for the --num_extension_iterations=1"]),
    ("stages", lambda rows: rows[:1] + rows[3:] + rows[1:3], ["STAGES.*.length", "none only for the last row"]),
])
def test_bad_rows(monkeypatch, capsys, table, change, parts):
    """Rows that are missing or too many: the line says which, and on which side."""
    hp = dataclasses.replace(SMALL, **{table: change(getattr(SMALL, table))})
    line = one_line(monkeypatch, capsys, hp, kinds=[("--check",)])
    assert all(part in line for part in parts), line


def edited(folder, *edits):
    """A copy of the script in which each old text, which stands there once, is a new one."""
    text = SCRIPT.read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "edited.py").write_text(text)
    return str(folder / "edited.py")


@pytest.mark.parametrize("edit, parts", [
    (('"lm_head", "D V", "normal 0.005", **HEAD', '"lm_head", "D V", "normal 0.005", **(HEAD | dict(rule="adamw"))'),
     ["PARAMS.lm_head.rule='adamw'", "normuon, twin_normuon, muon, adam or row_adam"]),
    (('    Param("x0_lambdas", "L", "0", **LAMBDA),\n', ""), ["PARAMS: add a row for x0_lambdas, which GPT reads"]),
    (('Layer("short", value_table=2, reads="middle")', 'Layer("short", value_table=2, reads="midle")'),
     ["LAYERS.8.reads='midle'", "none or early or middle"]),
    (("    Stage(1 / 3, 3, 16, 5, 11, 1.73, (1.0,), (1.0,)),\n", ""), ["STAGES.*.length", "add up to 1"]),
])
def test_bad_edit_without_assertions(tmp_path, edit, parts):
    """So do edits of the script itself, in a process that skips assertions."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = forks.run(edited(tmp_path, edit), "--plan", env=env, cwd=tmp_path, optimized=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in ["error: ", *parts]), done.stderr


def test_shape_in_other_letters():
    """It is the numbers that count, in both presets."""
    for preset in t.PRESETS.values():
        t.check_recipe(cells(preset, "PARAMS.vo_bank.shape=A*2 H*d D", "PARAMS.mlp_bank.shape=2*L 4*D D"))


def test_help_without_docstrings(monkeypatch):
    """As PYTHONOPTIMIZE=2 leaves the script."""
    monkeypatch.setattr(t, "__doc__", None)
    assert all(f"\n  --{name}=" in t.help_text("record80") for name in t.KEYS)


def trained(hp, steps=4):
    """A run after some steps, whose losses are finite; and these."""
    run = t.Run(hp, ONE)
    items = t.train_batches(hp, ONE, range(steps))
    losses = [run.train_step(*item, t.plan(step, hp)).mean.item() for step, item in enumerate(items)]
    assert len(losses) == steps and np.isfinite(losses).all()
    assert all(p.isfinite().all() for p in run.model.parameters())
    return run, losses


@pytest.fixture(scope="module")
def base(small):
    return trained(small)


def ignores(*names):
    """The loss depends on none of these parameters."""
    def check(run, losses, base):
        (batch, *_), _ = next(t.train_batches(run.hp, ONE, range(1)))

        @torch.no_grad()
        def loss():
            return run.model.val_losses(batch, run.model.lookup(batch), t.plan(0, run.hp).windows)

        before = loss()
        with torch.no_grad():
            for name in names:
                getattr(run.model, name).normal_()
        return torch.equal(loss(), before)
    return check


def stays(name, value):
    return lambda run, losses, base: (getattr(run.model, name) == value).all()


def differs(run, losses, base):
    """From the first or second step on: from the run with the technique."""
    return losses[:3] != base[1][:3]


def weights_differ(run, losses, base):
    return not torch.equal(run.model.lm_head, base[0].model.lm_head)


def plans(check):
    return lambda run, losses, base: all(check(t.plan(step, run.hp), run.hp) for step in range(4))


def apart_after_step_1(run, losses, base):
    model, tied = (trained(hp, 2)[0].model for hp in (run.hp, base[0].hp))
    return not torch.allclose(model.embed, model.lm_head.T, atol=1e-3) and torch.equal(tied.embed, tied.lm_head.T)


def moved_at_once(run, losses, base):
    """Adam's parameters move in the first step, which is not their turn otherwise."""
    early, start = trained(run.hp, 1)[0].model, t.initial_values(run.optimizer.row["lm_head"], run.hp)
    return not torch.equal(early.lm_head, start) and torch.equal(trained(base[0].hp, 1)[0].model.lm_head, start)


@pytest.mark.parametrize("edits, check", [
    (["LAYERS.*.key_offset=false"], differs),
    (["LAYERS.*.value_table=none"], lambda run, *_: len(run.model.value_embeds) == 0),
    (["LAYERS.*.gate=false"], ignores("attn_gate_bank")),
    (["LAYERS.*.value_gate=false"], ignores("ve_gate_bank")),
    (["PARAMS.smear_lambda.lr=0"], ignores("smear_gate")),
    (["PARAMS.backout_lambda.init=0", "PARAMS.backout_lambda.lr=0"], stays("backout_lambda", 0)),
    (["LAYERS.6.skip_from=none"], ignores("skip_gate", "skip_lambda")),
    (["PARAMS.x0_lambdas.lr=0"], stays("x0_lambdas", 0)),
    (["PARAMS.bigram_lambdas.init=0", "PARAMS.bigram_lambdas.lr=0"], ignores("bigram_embed")),
    (["LAYERS.*.paired=false"], differs),
    (["STAGES.*.yarn=false"], plans(lambda now, hp: now.windows.scale == hp.attn_scale and torch.equal(
        t.rotation(hp, now.index)[0], t.rotation(hp, 0)[0]))),
    (["PARAMS.*.cautious=false"], weights_differ),
    ([f"PARAMS.{name}.rule=muon" for name in ("qk_bank", "vo_bank", "mlp_bank")],
     lambda run, *_: all("second" not in run.optimizer.moments[name] for name in ("qk_bank", "vo_bank", "mlp_bank"))),
    (["READOUT.cap=80", "READOUT.cap_shift=0", "READOUT.cap_width=20"], differs),
    (["STAGES.*.mtp_start=1", "STAGES.*.mtp_end=1"], plans(lambda now, hp: now.mtp_weights == (1.0,))),
    (["STAGES.*.tied=true"], lambda run, *_: torch.equal(run.model.embed, run.model.lm_head.T)),
    (["STAGES.*.tied=false"], apart_after_step_1),
    (["PARAMS.*.every=1"], moved_at_once),
    (["PARAMS.vo_bank.init=uniform,0"],
     lambda run, *_: [*map(torch.any, t.initial_values(run.optimizer.row["vo_bank"], run.hp)[:2])] == [True, False]),
], ids=lambda x: x[0] if isinstance(x, list) else "")
def test_switched_off(small, base, edits, check):
    """Each technique can be switched off by cells, and the run trains on; the check sees that it is off."""
    run, losses = trained(cells(small, *edits))
    assert check(run, losses, base)


@pytest.mark.parametrize("edits, check", [
    ([('    Layer("short"),\n', '    Layer("short"),\n' * 2)], lambda x: len(x["qk_bank"]) == 66),
    ([("    Stage(1 / 3, 2, 16, 3, 7,", "    Stage(1 / 6, 2, 12, 2, 5, 1.2, (1.0, 0.5), (1.0, 0.5), tied=True),\n"
       "    Stage(1 / 6, 2, 16, 3, 7,")], lambda x: True),
    ([('"vo_bank", "2*A D D", "uniform", "normuon",', '"vo_bank", "2*A D D", "uniform", "adam", betas=(0.9, 0.95),')],
     lambda x: x["vo_bank.first"].any() and "vo_bank.momentum" not in x),
    ([('    Param("smear_gate",', '    Param("x0_scale", "1", "1", **SCALAR),\n    Param("smear_gate",'),
      ("        x0, gate_in = ops.first_columns(x0, GATE_INPUTS)\n",
       "        x0, gate_in = ops.first_columns(x0 * self.x0_scale[0], GATE_INPUTS)\n")], lambda x: x["x0_scale"] != 1),
], ids=["one more layer is a row", "one more stage is a row and a length", "Adam for a bank is its row",
        "one more parameter is a row and its use"])
def test_places_of_an_edit(tmp_path, small, edits, check):
    """What a change of the algorithm takes; the edited script trains, and its checkpoint has what is new."""
    keys = SIZES | dict(num_scheduled_iterations=6, train_files=small.train_files, val_files=small.val_files,
                        save_final=True, run_id="new", log_dir=tmp_path)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = forks.run(edited(tmp_path, *edits), "--preset=demo", *(f"--{key}={value}" for key, value in keys.items()),
                     env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert check(torch.load(tmp_path / "new_step7.pt", weights_only=True)["tensors"])


def test_first_edit_of_the_readme(tmp_path, small):
    """Its line differs from one of the script by the activation, and the script with it trains to other losses."""
    readme = (SCRIPT.parent / "README.md").read_text()
    (new,) = re.findall(r"^    return Stream\(F\.leaky_relu.*\n", readme, re.M)
    old = re.sub(r"F\.leaky_relu\((.*), 0\.1\)\.square", r"F.relu(\1).square", new)
    keys = SIZES | dict(num_scheduled_iterations=6, train_files=small.train_files, val_files=small.val_files)
    losses = []
    for run, edits in (("old", []), ("new", [(old, new)])):
        done = forks.run(edited(tmp_path, *edits), "--preset=demo", f"--run_id={run}", f"--log_dir={tmp_path}",
                         *(f"--{key}={value}" for key, value in keys.items()), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(re.search(r"^final: val_loss (\S+)", done.stdout, re.M)[1])
    assert old != new and losses[0] != losses[1]


def test_where_the_algorithm_ends():
    """README says how many lines a reader of it reads."""
    readme, text = (SCRIPT.parent / "README.md").read_text(), SCRIPT.read_text()
    lines = int(re.search(r"algorithm is its first (\S+) lines", readme)[1].replace(",", ""))
    assert lines == len(text.partition("# ==== 8. ")[0].rstrip().splitlines()) < 1750


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
