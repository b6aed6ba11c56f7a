"""Tests of tools/ab.py with a small script that writes logs and can end early."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import ab
import pytest
from scipy import stats

TESTS = Path(__file__).resolve().parent
AB = TESTS.parent / "tools" / "ab.py"
SCRIPT = f'''
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from fake_logs import fake_log
values = dict(arg.lstrip("-").split("=") for arg in sys.argv[1:])
seed, lr = int(values.get("seed", 0)), float(values.get("lr", 1))
history = Path(values["history"])
with history.open("a") as file:
    file.write(f"{{values}}\\n")
text = fake_log(3 + lr / 10 + seed ** 2 * lr / 100, 1000 + 10 * seed * lr + lr, seed, source=Path(__file__).read_text())
Path("logs").mkdir()
log = Path("logs", "x.txt")
if "once" in values and seed == 1 and not Path(values["once"]).exists():
    Path(values["once"]).touch()
    log.write_text(text[:-300])
    os.kill(os.getpid(), signal.SIGKILL)
if "hang" in values:
    import time
    print(os.getpid(), flush=True)
    time.sleep(60)
log.write_text(text)
'''


@pytest.fixture
def variants(tmp_path, monkeypatch):
    """A working directory with the script and data/; returns the arguments of A (lr 1) and B (lr 2)."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    Path("data").mkdir()
    return ["--out=out", "--a=train.py", "--b=train.py --lr=2", "--", f"--history={tmp_path}/history"]


def history(key="lr"):
    return [ast.literal_eval(line).get(key) for line in Path("history").read_text().splitlines()]


def test_order_seeds_and_paired_difference(variants, capsys):
    """A B B A A B; pairs share their seed; the last lines are the paired test."""
    assert ab.main(["--pairs=3", *variants]) == 0
    assert ["b" if lr else "a" for lr in history()] == list("abbaab")
    assert history("seed") == ["0", "0", "1", "1", "2", "2"]
    assert sorted(os.listdir("out/a")) == ["0", "1", "2"] and Path("out/a/0/data").resolve() == Path("data").resolve()
    out = capsys.readouterr().out
    losses, times = [0.1, 0.11, 0.14], [0.001, 0.011, 0.021]  # what B adds to A in each pair
    for name, x, digits in (("final val loss", losses, 4), ("training time, s", times, 3)):
        test = stats.ttest_1samp(x, 0)
        low, high = test.confidence_interval(0.95)
        (line,) = (line for line in out.splitlines()[-2:] if line.strip().startswith(name))
        assert f"{sum(x) / 3:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]" in line
        assert f"p = {test.pvalue:.3g}" in line
    assert "final    3.1167   3.2333" in out and Path("out/compare.png").read_bytes().startswith(b"\x89PNG")


def test_resumes_after_a_run_that_was_killed(variants, tmp_path, capsys):
    """The killed run is named with its status and moved aside; finished ones are kept, and more pairs can follow."""
    variants = [*variants, f"--once={tmp_path}/once"]
    assert ab.main(["--pairs=2", *variants]) == 1
    assert "run b/1 ended with status -9" in capsys.readouterr().err
    assert history() == [None, "2", "2"]
    assert ab.main(["--pairs=2", *variants]) == 0
    assert history() == [None, "2", "2", "2", None]
    out = capsys.readouterr().out
    assert out.count("(kept)") == 2 and "2 pairs" in out
    (aside,) = Path("out/unfinished").iterdir()
    assert (aside / "logs" / "x.txt").exists() and aside.name.startswith("b1_")
    assert ab.main(["--pairs=3", *variants]) == 0
    assert history() == [None, "2", "2", "2", None, None, "2"]


def test_ends_with_its_run(variants):
    """SIGTERM ends the run too, and says how to continue."""
    command = [sys.executable, str(AB), "--pairs=1", *variants, "--hang=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    output, deadline = Path("out/a/0/output"), time.monotonic() + 60
    while not (output.exists() and output.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in process.communicate(timeout=60)[1] and process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(output.read_text()), 0)


def test_no_seed(variants, capsys):
    assert ab.main(["--pairs=1", "--no_seed", *variants]) == 0
    assert ", 1 pair (" in capsys.readouterr().out
    assert history("seed") == [None, None]


def test_torchrun(variants):
    """Under torchrun the script is started in as many processes as asked for."""
    Path("train.py").write_text(SCRIPT.replace("Path(\"logs\").mkdir()", """
if os.environ["RANK"] != "0" or os.environ["WORLD_SIZE"] != "2":
    sys.exit()
Path("logs").mkdir()"""))
    assert ab.main(["--pairs=1", "--nproc_per_node=2", *variants]) == 0
    assert len(history()) == 4


def test_changes_are_refused(variants, capsys):
    """Neither another command nor an edited script may continue the runs."""
    assert ab.main(["--pairs=1", *variants]) == 0
    assert ab.main(["--pairs=1", *variants, "--lr=3"]) == 2
    assert "(both changed)" in capsys.readouterr().err
    Path("train.py").write_text(SCRIPT + "pass\n")
    assert ab.main(["--pairs=1", *variants]) == 2
    err = capsys.readouterr().err
    assert "another state of its script" in err and err.count("\n") == 1
    assert json.loads(Path("out/command.json").read_text())["b"] == "train.py --lr=2" and len(history()) == 2


def test_arguments_are_checked_first(variants, capsys):
    """What the other variant's script refuses is told before any run."""
    Path("train.py").write_text(SCRIPT.replace("import os,", "import sys\nif '--check' in sys.argv:\n"
                                               "    sys.exit('lr' in str(sys.argv) and 'error: unknown key --lr')\n"
                                               "import os,"))
    assert ab.main(["--pairs=1", *variants]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch("error: train.py --lr=2 .*: error: unknown key --lr\n", err), err
    assert not Path("history").exists() and not Path("out/command.json").exists()


@pytest.mark.parametrize("change, words", [("--a=none.py", "no script 'none.py'"), ("--a=", "no script ''"),
                                           ("--a=train.py --seed=7", "--no_seed"),
                                           ("--out=train.py", "choose another --out")])
def test_bad_input(variants, capsys, change, words):
    mark = variants.index("--")
    assert ab.main([*variants[:mark], change, *variants[mark:]]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not Path("history").exists()
