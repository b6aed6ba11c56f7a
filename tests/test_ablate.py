"""Tests of tools/ablate.py: its edits on train_gpt.py, its order and its table with a small script that writes logs."""

import ast
import csv
import os
import re
import signal
import statistics
import time
from pathlib import Path

import ab
import ablate
import forks
import pytest
import torch
from runlogs import LogError

import train_gpt as t

TESTS = Path(__file__).resolve().parent
TOOL, PLOT = TESTS.parent / "tools" / "ablate.py", ablate.plot
# The loss depends on the seed, on three edits and on one line, which one of them replaces; the time on the GPU
SCRIPT = f'''
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from fake_logs import fake_log
text, folder = " ".join(sys.argv[1:]), Path.cwd().parents[2]
seed, gpu = int(text.partition("--seed=")[2].split()[0]), int(os.environ["CUDA_VISIBLE_DEVICES"])
loss = 3.2 + seed ** 2 / 1000 + 0.02 * ("smear" in text) + (0.001 + seed / 1000) * ("yarn" in text)
POLAR_COEFFICIENTS = ((0, 0, 0),)
for a, b, c in () if text is None else POLAR_COEFFICIENTS:
    loss += a / 100
with (folder / "history").open("a") as file:
    file.write(f"{{[Path.cwd().parent.name, seed, gpu]}}\\n")
if "yarn" in text and (folder / "broken").exists():
    sys.exit("broken")
if "rope_base" in text:
    print(os.getpid(), flush=True)
    time.sleep(60)
if (folder / "side_by_side").exists():
    while len((folder / "history").read_text().splitlines()) < 2:
        time.sleep(0.01)
Path("logs").mkdir()
Path("logs", "x.txt").write_text(fake_log(loss, 1000 + 500 * gpu + 100 * ("smear" in text), seed,
                                          source=Path(__file__).read_text()))
'''


@pytest.fixture
def args(tmp_path, monkeypatch):
    """A working directory with the script and data/; returns the arguments of three edits. No picture is drawn."""
    monkeypatch.setattr(ablate, "plot", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Path("train.py").write_text(SCRIPT)
    Path("data").mkdir()
    return ["--out=out", "--script=train.py", "--only", "no smear", "no YaRN", "Newton-Schulz"]


def history():
    return [ast.literal_eval(line) for line in Path("history").read_text().splitlines()]


def table():
    with open("out/ablations.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("edit", ablate.EDITS, ids=lambda edit: edit.name)
def test_each_edit_is_another_recipe(edit):
    """train_gpt.py takes its arguments and finds another recipe, of record80 or frontier; its patch is found once."""
    if edit.preset or (ablate.recipe(edit, []) == t.PRESETS["record80"] and not edit.patch):
        assert ablate.recipe(edit, ["--preset=frontier"]) != t.PRESETS["frontier"]
    source = Path(t.__file__).read_text()
    changed = ablate.patched(source, edit)
    assert (changed != source) == bool(edit.patch)
    assert changed == source or ast.parse(changed)
    with open(TESTS.parent / "records" / "history.csv", newline="") as file:
        records = {row["number"] for row in csv.DictReader(file)}
    assert {*filter(None, edit.since.split(", "))} <= records


def test_no_two_edits_share_a_name_or_a_folder():
    names = [ablate.CONTROL.name, *(edit.name for edit in ablate.EDITS)]
    assert len({re.sub(r"\W+", "_", name) for name in names}) == len(names)


def test_newton_schulz(monkeypatch):
    """Five equal steps: singular values near 1, and further from it than Polar Express's."""
    (edit,) = (edit for edit in ablate.EDITS if edit.name == "Newton-Schulz")
    repeated = re.fullmatch(r"else 5 \* (.*):", edit.patch[0][1])[1]
    x, off = torch.randn(2, 40, 60, generator=torch.Generator().manual_seed(0)), []
    for coefficients in (t.POLAR_COEFFICIENTS, 5 * ast.literal_eval(repeated)):
        monkeypatch.setattr(t, "POLAR_COEFFICIENTS", coefficients)
        off.append((torch.linalg.svdvals(t.polar_express(x)) - 1).abs().max())
    assert len(t.POLAR_COEFFICIENTS) == 5 and off[0] < 0.2 < off[1] < 0.4


def test_order_and_table(args, capsys, monkeypatch):
    """Controls at both ends and between, differences of the same seed, sorted by what leaving out costs."""
    monkeypatch.setattr(ablate, "plot", PLOT)
    assert ablate.main(["--controls=3", *args]) == 0
    names = [(name, seed) for name, seed, _ in history()]
    assert names == [("control", 0), ("no_smear", 0), ("control", 1), ("no_YaRN", 0), ("Newton_Schulz", 0),
                     ("control", 2)]
    assert Path("out/no_smear/0/data").resolve() == Path("data").resolve()
    rows = table()
    assert list(rows) == ["control", "Newton-Schulz", "no smear", "no YaRN"]
    smear, polar = rows["no smear"], rows["Newton-Schulz"]
    assert (smear["since_record"], smear["loss"], smear["loss_change"], smear["seeds"]) == (
        "34", "3.2200", "0.0200", "1")
    assert (smear["time_s"], smear["time_ratio"]) == ("1.100", "1.1000")
    assert polar["loss_change"] == f"{5 * 3.4445 / 100:.4f}" and polar["time_ratio"] == "1.0000"
    assert rows["control"]["seeds"] == "3" and rows["control"]["loss_change"] == "0.0000"
    out = capsys.readouterr().out
    own = statistics.stdev([3.2, 3.201, 3.204])
    assert "+20.0" in out and f"losses: {1000 * own:.1f}" in out
    assert Path("out/ablations.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_is_told_and_repeated(args, capsys):
    """The others go on; the same command runs what is missing alone, and more seeds can follow."""
    Path("broken").touch()
    assert ablate.main(["--controls=2", *args]) == 1
    assert "run no YaRN/0 ended with status 1" in capsys.readouterr().err
    assert len(history()) == 5 and list(table()) == ["control", "Newton-Schulz", "no smear"]
    Path("broken").unlink()
    assert ablate.main(["--controls=2", *args]) == 0
    assert history()[5:] == [["no_YaRN", 0, 0]] and capsys.readouterr().out.count("(kept)") == 4
    (aside,) = Path("out/unfinished").iterdir()
    assert aside.name.startswith("no_YaRN0_") and "broken" in (aside / "output").read_text()
    assert ablate.main(["--controls=2", "--seeds=2", *args]) == 0
    assert sorted(history()[6:]) == [["Newton_Schulz", 1, 0], ["no_YaRN", 1, 0], ["no_smear", 1, 0]]
    assert table()["no YaRN"]["loss_change"] == "0.0015" and table()["no YaRN"]["seeds"] == "2"


def test_further_seeds_of_close_ones_only(args):
    """Of two thousandths of a deviation of 2.1 another seed is made, of twenty none."""
    assert ablate.main(["--controls=3", "--seeds=2", "--close", *args]) == 0
    assert {name for name, seed, _ in history() if seed == 1} == {"control", "no_YaRN"}


def test_the_table_has_what_ran_before(args):
    """Also of edits that this command leaves out, and controls beyond its number."""
    assert ablate.main(["--controls=3", *args]) == 0
    assert ablate.main(["--controls=1", *args, "--only", "no smear"]) == 0
    assert list(table()) == ["control", "Newton-Schulz", "no smear", "no YaRN"] and len(history()) == 6
    assert table()["control"]["seeds"] == "3"


def test_side_by_side(args):
    """Two runs at a time, each on its GPU, each GPU begins with a control, times are compared on one GPU."""
    Path("side_by_side").touch()  # the first two wait for each other
    assert ablate.main(["--gpus=2", *args]) == 0
    runs = history()
    assert sorted(runs[:2]) == [["control", 0, 0], ["control", 1, 1]] and len(runs) == 7
    gpu = {name: gpu for name, _, gpu in runs}["no_smear"]
    assert float(table()["no smear"]["time_ratio"]) == pytest.approx(1 + 100 / (1000 + 500 * gpu), abs=1e-4)
    assert float(table()["control"]["time_ratio"]) == 1


def test_given_gpus(args, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert ablate.main(["--controls=1", *args]) == 0 and {gpu for *_, gpu in history()} == {7}
    assert ablate.main(["--gpus=2", *args]) == 2 and "fewer than --gpus=2" in capsys.readouterr().err


def test_budget(args, capsys):
    """None begins when the time is over; the same command, with more, continues."""
    assert ablate.main(["--budget=0", "--controls=1", *args]) == 1
    assert "4 runs not begun within 0.0 s" in capsys.readouterr().out and not Path("history").exists()
    assert ablate.main(["--budget=60", "--controls=1", *args]) == 0 and len(history()) == 4


def test_ends_with_its_runs(args):
    """SIGTERM ends the runs too, and says how to continue."""
    said, deadline, outputs = Path("said"), time.monotonic() + 60, []
    with open(said, "w") as file:
        process = forks.Program(str(TOOL), *args, "--gpus=2", "--", "--rope_base=100", stdout=file, stderr=file)
    while len(outputs) < 2 or not all(path.read_text().endswith("\n") for path in outputs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
        outputs = [*Path("out").glob("*/*/output")]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1 and "the same command continues" in said.read_text()
    for path in outputs:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_changes_are_refused(args, capsys, monkeypatch):
    """Neither another recipe, nor another edit, nor an edited script may continue the runs."""
    assert ablate.main(["--controls=1", *args]) == 0
    assert ablate.main(["--controls=1", *args, "--", "--muon_lr=0.1"]) == 2
    assert "control holds runs of another command (arguments changed)" in capsys.readouterr().err
    other = [edit._replace(change="--muon_lr=0.1") if edit.name == "no smear" else edit for edit in ablate.EDITS]
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "EDITS", other)
        assert ablate.main(["--controls=1", *args]) == 2
    assert "no_smear holds runs of another command" in capsys.readouterr().err
    Path("train.py").write_text(SCRIPT + "pass\n")
    assert ablate.main(["--controls=1", *args]) == 2
    assert "another state of its script" in capsys.readouterr().err and len(history()) == 4


@pytest.mark.parametrize("more, words", [
    (["--", "--seed=7"], "a --seed of its own"), (["--script=none.py"], "no script none.py"),
    (["--", "--muonlr=1"], "unknown key --muonlr"), (["--out=train.py"], "choose another --out"),
    (["--", "--set", "STAGES.*.mtp_start=9"], "error: STAGES.0.mtp_end")])
def test_bad_input(args, capsys, more, words):
    assert ablate.main([*args, *more]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and not Path("history").exists()


def test_an_edit_that_does_not_fit():
    with pytest.raises(LogError, match=r"^faster: PARAMS.smear_lambda.lr=-1.0: use 0 or more$"):
        ablate.recipe(ablate.Edit("faster", "", "PARAMS.smear_lambda.lr=-1"), [])


def test_a_patch_that_does_not_fit(args, capsys):
    """A text that is not there, or twice, is told before any run."""
    for source, number in ((SCRIPT.replace("else POLAR", "else  POLAR"), 0), (SCRIPT + SCRIPT, 2)):
        Path("train.py").write_text(source)
        assert ablate.main(args) == 2
        err = capsys.readouterr().err
        assert f"POLAR_COEFFICIENTS:' {number} times, not once" in err and not Path("history").exists()


def test_what_changes_nothing_is_left_out(args, capsys):
    assert ablate.main(["--controls=1", *args, "--", "--set", "STAGES.*.yarn=false"]) == 0
    assert "left out, as this recipe is the same with them: no YaRN\n" in capsys.readouterr().out


def test_list(capsys):
    """A line an edit, with its record and what it changes."""
    assert ablate.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [edit.name for edit in ablate.EDITS]
    assert any(re.fullmatch("no key offset +#49 +LAYERS.*.key_offset=false", line) for line in lines)
    with pytest.raises(SystemExit):
        ablate.main([])
    assert "--out is needed" in capsys.readouterr().err


def test_demo(tmp_path, byte_files, monkeypatch):
    """A few steps of the demo, with cells and with a patch: the losses are other ones, the sources tell why."""
    def start(command, folder, out, env):
        folder.mkdir(parents=True)
        with open(folder / "output", "w") as output:
            return forks.Program(*command[1:], stdout=output, stderr=output, env=env, cwd=folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "start", start)
    monkeypatch.setattr(ab.subprocess, "run", lambda command, **_: forks.run(*command[1:]))
    both = ["--preset=demo", "--model_dim=48", "--head_dim=8", "--batch_unit=64", "--vocab_size=256", "--val_every=0",
            "--val_tokens=256", "--val_chunk=256", "--num_scheduled_iterations=6", "--num_extension_iterations=1",
            *(f"--{key}={path}" for key, path in byte_files.items())]
    names = ["no value embeddings", "Newton-Schulz"]
    assert ablate.main(["--out=out", "--controls=1", "--only", *names, "--", *both]) == 0
    rows = table()
    assert len({row["loss"] for row in rows.values()}) == 3
    source = Path(t.__file__).read_text()
    logs = {name: ab.finished_log(Path("out") / name / "0") for name in ("control", "Newton_Schulz")}
    assert logs["control"].source.startswith(source) and not logs["Newton_Schulz"].source.startswith(source)


def test_edit_of_one_recipe(capsys, tmp_path):
    """What only frontier has cannot be left out of another recipe; asked for, it is one line."""
    asked = [f"--out={tmp_path}", "--controls=1", "--only", "attention in 4", "--", "--preset=demo"]
    assert ablate.main(asked) == 2
    assert capsys.readouterr().err == (
        "error: attention in 4: an edit of one recipe; add --preset=frontier behind --\n")
