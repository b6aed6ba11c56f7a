"""A run that fails ends soon, on all ranks, with one line that says why; what was saved is kept."""

import contextlib
import dataclasses
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import runlogs
import torch

import train_gpt as t

ROOT = Path(t.__file__).parent
CPU = torch.device("cpu")
ONE = t.Ranks(0, 1, CPU)
LAUNCH = [ROOT / "tools" / "launch.py", "--standalone", "--nproc_per_node=2"]
N = 100  # steps; no run here gets as far
SIZES = dict(model_dim=48, head_dim=8, vocab_size=256, batch_unit=64, val_tokens=256, val_chunk=128, val_every=4,
             num_scheduled_iterations=N - 2, num_extension_iterations=2)
FASTER = 0.4  # of the time between looks
# The script, with a fault when the named rank begins its sixth step
FAULTY = f"""
import math, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as t

t.LOOK_EVERY *= {FASTER}
fault, victim = os.environ["FAULT"].split()

def faulty(run, batches, touched, now, train_step=t.Run.train_step):
    if now.step == 5 and int(os.environ.get("RANK", 0)) == int(victim):
        if fault == "hang":
            time.sleep(1000)
        elif fault == "raise":
            raise ValueError("a test's error")
        elif fault == "table":  # in the update of the n-gram table, when the other rank has its rows
            t.NorMuonAdam.update_rows = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "inf":
            run.model.resid_lambdas.data[3, 1] = 3e38
        else:
            os.kill(os.getpid(), getattr(signal, fault))
            if fault == "SIGTERM":  # the launcher tells the other rank later
                os.kill(os.getppid(), signal.SIGTERM)
    return train_step(run, batches, touched, now)

t.Run.train_step = faulty
t.main()
"""


@pytest.fixture(scope="module")
def base(byte_files):
    return dataclasses.replace(t.PRESETS["demo"], **SIZES, **byte_files)


def processes(folder):
    """Processes, zombies apart, that run in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if path.readlink() == folder:
                found.append(int(path.parent.name))
    return found


class Faulty:
    """A run with a fault, to its end."""

    def __init__(self, hp, folder, fault, world, **more):
        script, hp = folder / "faulty.py", dataclasses.replace(hp, log_dir=str(folder), run_id="run", **more)
        script.write_text(FAULTY)
        args = [f"--{name}={getattr(hp, name)}" for name in t.KEYS]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            process = forks.Program(*LAUNCH if world > 1 else [], script, *args, stdout=out, stderr=err, cwd=folder,
                                    env=os.environ | {"FAULT": fault})
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while "SIGSTOP" in fault and process.poll() is None:  # torchrun takes 30 s more to end a stopped rank
                left = children.read_text().split()
                if len(left) == 1 and (folder / "err").read_text():
                    os.kill(int(left[0]), signal.SIGKILL)
                time.sleep(0.1)
            self.status = process.wait(timeout=60)
        self.left = processes(folder)
        self.out, self.err = (folder / "out").read_text(), (folder / "err").read_text()
        self.log = (folder / "run.txt").read_text()
        self.results, self.path, self.folder = self.log.split("=" * 100)[-1], folder / "run.txt", folder
        self.files = sorted(path.name for path in folder.glob("run*"))


RUNS = {"kill": ("SIGKILL 1", 2), "stop": ("SIGSTOP 0", 2), "hang": ("hang 1", 2), "raise": ("raise 1", 2),
        "inf": ("inf 1", 2), "table": ("table 1", 2), "term": ("SIGTERM 1", 2), "interrupt": ("SIGINT 0", 1)}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """All faulty runs, a few at a time, as they mostly wait."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    with ThreadPoolExecutor(4) as pool:
        done = {name: pool.submit(Faulty, base, folders[name], *RUNS[name], save_final=name == "term",
                                  ngram_rows=512 * (name == "table")) for name in RUNS}
    return {name: future.result() for name, future in done.items()}


LOST = (r"rank {} gave no sign of life for \d+ s, last in step \d at \S+ \(.*:\d+\): "
        "killed, out of memory, stopped or cut off")
ERRORS = {  # the end of the one error line
    "kill": LOST.format(1),
    "table": LOST.format(1),
    "stop": LOST.format(0),
    "hang": r"no rank finished a step for \d+ s, a rank hangs: rank 0 in step 6 at \S+ \(train_gpt.py:\d+\), "
            r"rank 1 in step 6 at faulty \(faulty.py:\d+\)",
    "raise": r"rank 1, step 6: ValueError: a test's error",
    "inf": r"the training loss of step 6 is (nan|inf) on rank 1; to find its origin: python tools/find_nan\.py .*"
           r"--log_dir=\S+ --run_id=run .*",
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_error(runs, name):
    """On stderr and at the end of the log; no process is left, and no traceback of the launcher."""
    run = runs[name]
    lines = [line for line in run.err.splitlines() if "error" in line.lower()]
    expected = [line for line in lines if re.fullmatch("error: " + ERRORS[name], line)]
    assert len(expected) == 1, run.err
    assert run.log.splitlines()[-1] == expected[0]
    extra = ["rank 1 was ended by SIGKILL"] * (name in ("kill", "table"))
    told = [line for line in run.err.splitlines() if line not in extra + expected]
    if name == "raise":  # the failed rank's own traceback
        assert told[0].startswith("Traceback") and told[-1].startswith("ValueError") and "launch.py" not in run.err
        assert "\n".join(told) in run.log
    else:
        assert told == []
    assert run.status == (137 if name in ("kill", "table") else 1)
    assert run.left == []
    if name != "stop":  # nothing that was printed before is lost
        assert "step:4/100 val_loss" in run.out


def test_limits():
    """A dead rank is found before torchrun kills all that are left, a hang within a minute."""
    assert t.SILENT * t.LOOK_EVERY + 5 < 30 and (t.STALLED + 5) * t.LOOK_EVERY < 60
    assert (t.SILENT_COMPILING + 5) * t.LOOK_EVERY < 60


def test_nan_stops_soon(runs):
    """Within 10 steps, on all ranks, and no checkpoint of it is written."""
    run = runs["inf"]
    assert run.files == ["run.csv", "run.txt"]
    steps = [int(step) for step in re.findall(r"^step:(\d+)/", run.results, re.M)]
    assert max(steps) <= 6 + 10


@pytest.mark.parametrize("name, number", [("term", 15), ("interrupt", 2)])
def test_interrupted(runs, base, name, number):
    """All ranks stop after the same step with a line that says so, and verify.py counts the run as failed."""
    run = runs[name]
    assert run.status == 128 + number and run.err == "" and run.left == []
    found = re.fullmatch(r"interrupted by SIG(?:TERM|INT) after step (\d+) of 100: (.*)", run.log.splitlines()[-1])
    step = int(found[1])
    assert 5 < step < 100 and f"\nstep:{step}/100 train_loss" in run.results
    if name == "term":
        assert run.files == ["run.csv", "run.txt", f"run_step{step}.pt"]
        assert found[2].endswith(f"run_step{step}.pt goes on")
        assert t.read_checkpoint(str(run.folder / f"run_step{step}.pt"), base)["step"] == step
    else:
        assert run.files == ["run.csv", "run.txt"] and found[2] == "nothing saved; --save_final=true would have"
    failure = runlogs.read_log(run.path).failure
    assert failure == f"no final validation line, last step {step} of 100"


def states(*more, **common):
    """States of two ranks in training, as Watch publishes them; each of `more` changes one rank's."""
    state = {"beat": 0, "step": 7, "timed": True, "at": "here", "stop": None, "why": "", "error": "", "log": ""}
    return [state | common | x for x in more]


@pytest.fixture
def watch(monkeypatch):
    """Rank 0 of two, which notes the end instead of ending."""
    watch = t.Watch(t.Ranks(0, 2, CPU), SimpleNamespace(path=None))
    watch.ended = []
    monkeypatch.setattr(watch, "end_process", lambda text, status=1: watch.ended.append((text, status)))
    watch.step = 7
    return watch


def test_slow_is_not_dead(watch):
    """Compiling, validating and a long step short of the limit end nothing; nor does the sleep of this process."""
    for beat in range(1000):
        watch.judge(states({}, {}, beat=beat, timed=False))
    for beat in range(t.STALLED - 1):
        watch.judge(states({}, {}, beat=beat))
    watch.judge(states({"step": 8}, {}, beat=0))
    for beat in range(t.SILENT - 1):
        watch.judge(states({"beat": beat}, {"beat": 0}, timed=False))
    assert watch.ended == []


def test_new_shape_compiles():
    """A step whose shapes are new has no deadline, as a compiler works: Triton's at least."""
    micro_step = t.Replay(lambda *_: None, graphs=False)
    seen = []
    for n in (5, 5, 7, 5):
        micro_step((torch.zeros(n),), None, torch.zeros(1))
        seen.append(micro_step.compiling)
    assert seen == [True, False, True, False]


def test_compiler_may_keep_threads_waiting(watch):
    watch.step = -1
    for beat in range(t.SILENT + 3):
        watch.judge(states({"beat": beat}, {"beat": 0}, timed=False))
    assert watch.ended == []
    for beat in range(t.SILENT_COMPILING):
        watch.judge(states({"beat": -beat}, {"beat": 0}, timed=False))
    assert "rank 1 gave no sign of life" in watch.ended[0][0]


def test_death_is_told_rather_than_what_follows_from_it(watch):
    """A dead rank makes the others' collectives raise: their errors are not the cause."""
    for beat in range(t.SILENT + 1):
        assert not watch.ended
        watch.judge(states({"beat": beat, "error": "error: connection closed"}, {"beat": 0}, timed=False))
    assert len(watch.ended) == 1 and "rank 1 gave no sign of life" in watch.ended[0][0]


def test_ranks_agree_on_a_step(watch):
    """A rank that got no signal stops where the others do, after every step that any of them may have begun."""
    assert not watch.stops(7)
    watch.judge(states({}, {"step": 8}))
    assert watch.stop_from is None
    watch.judge(states({}, {"step": 8, "stop": 8, "why": "SIGTERM"}))
    assert (watch.stop_from, watch.why, watch.stop_before) == (7, "SIGTERM", None)
    watch.judge(states({"stop": 7}, {"step": 9, "stop": 8}, why="SIGTERM"))
    assert not watch.stops(8) and not watch.stops(9) and watch.stops(10) and watch.ended == []


def test_interrupt_while_compiling(watch):
    watch.step, watch.wish = -1, "SIGINT"
    watch.judge(states({}, {}, timed=False))
    assert watch.stop_from == -1 and not watch.ended
    watch.judge(states({"beat": 1}, {"beat": 1}, timed=False, why="SIGINT", stop=-1))
    assert watch.ended == [("interrupted by SIGINT before the first step", 130)]


def train(hp):
    log = t.Log(hp, ONE)
    t.log_environment(log, hp, ONE)
    t.train(t.Run(hp, ONE), log, t.Watch(ONE, log), None)
    log.close()


SHORT = dict(num_scheduled_iterations=6, num_extension_iterations=0, val_every=0, run_id="run")


@pytest.mark.parametrize("loss, files", [("full disk", ["txt"]), ("deleted folder", ["csv", "txt"]),
                                         ("deleted table", ["csv"])])
def test_log_lost_in_training(base, tmp_path, monkeypatch, capsys, loss, files):
    """One warning a file, the run goes on to the same end, and the end says that the file is incomplete."""
    straight = dataclasses.replace(base, log_dir=str(tmp_path / "straight"), **SHORT)
    train(straight)
    expected = re.findall("(.*loss:[0-9.]+) ", capsys.readouterr().out)

    def lose(*args, step=t.Run.train_step):
        if args[-1].step == 3 and loss == "deleted folder":
            shutil.rmtree(tmp_path / "logs")
        elif args[-1].step == 3 and loss == "deleted table":
            (tmp_path / "logs" / "run.csv").unlink()
        elif args[-1].step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "logs" / "run.txt").stat().st_size, limits[1]))
        return step(*args)

    monkeypatch.setattr(t.Run, "train_step", lose)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        train(dataclasses.replace(straight, log_dir=str(tmp_path / "logs")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = capsys.readouterr()
    cause = "File too large" if loss == "full disk" else "it was deleted"
    warnings = [f"warning: the log {tmp_path}/logs/run.{file} is incomplete ({cause})" for file in files]
    first, last = (sorted(part) for part in np.split(np.array(done.err.splitlines()), 2))
    assert [line.split(";")[0] for line in first] == last == warnings
    assert all("; training goes on" in line for line in first)
    assert re.findall("(.*loss:[0-9.]+) ", done.out) == expected and "final: val_loss" in done.out
    assert (tmp_path / "logs").exists() == (loss != "deleted folder")
    if "csv" not in files:  # the other file is complete
        assert len((tmp_path / "logs" / "run.csv").read_text().splitlines()) == 1 + 6 + 1
    if "txt" not in files:
        assert not runlogs.read_log(tmp_path / "logs" / "run.txt").failure
    if loss == "full disk":
        assert "no final validation line" in runlogs.read_log(tmp_path / "logs" / "run.txt").failure


def test_log_that_cannot_be_written_at_first(base, tmp_path):
    """A full disk and a folder that takes no files are told before training."""
    for name in ("a.txt", "b.csv"):
        (tmp_path / name).symlink_to("/dev/full")
    for folder, name, cause in ((tmp_path, "a.txt", "No space left"), (tmp_path, "b.csv", "No space left"),
                                (Path("/proc/self"), "a.txt", "No such file")):
        with pytest.raises(t.UserError, match=f"cannot write the log {folder}/{name}: {cause}.*--log_dir"):
            t.Log(dataclasses.replace(base, log_dir=str(folder), run_id=name[0], resume="x.pt"), ONE)


def test_log_of_another_run_is_kept(base, tmp_path):
    """Either file is refused; a resumed run adds to both, with the source but without a second line of columns."""
    hp = dataclasses.replace(base, log_dir=str(tmp_path), run_id="run")
    t.Log(hp, ONE).close()
    text, table = (tmp_path / "run.txt").read_text(), (tmp_path / "run.csv").read_text()
    with pytest.raises(t.UserError, match=f"{tmp_path}/run.txt is another run's log; choose another --run_id"):
        t.Log(hp, ONE)
    t.Log(dataclasses.replace(hp, resume="x.pt"), ONE).close()
    assert (tmp_path / "run.txt").read_text() == text + text and (tmp_path / "run.csv").read_text() == table
    (tmp_path / "run.txt").unlink()
    with pytest.raises(t.UserError, match=f"{tmp_path}/run.csv is another run's log; choose another --run_id"):
        t.Log(hp, ONE)
    assert os.listdir(tmp_path) == ["run.csv"] and (tmp_path / "run.csv").read_text() == table


def test_line_with_its_step():
    """On a CPU nothing is queued, so that a step's line, and with it its time, does not wait for the next one's."""
    rows, clock = [], SimpleNamespace(before=1000.0, ms=lambda: 1500.0)
    log = SimpleNamespace(loss=lambda *row: rows.append(row))
    reports = t.Reports(log, clock)
    reports.add(7, t.StepLoss(torch.tensor(2.5), torch.tensor([2.5])), 384)
    assert rows == [("train_loss", 2.5, 7, 1500.0, 768.0)]


def test_lost_terminal(base, tmp_path, monkeypatch):
    """A terminal that is closed costs its lines, not the log's."""
    log = t.Log(dataclasses.replace(base, log_dir=str(tmp_path), run_id="run"), ONE)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", buffering=1))
    log("one")
    log.loss("train_loss", 2.0, 1, 3.0, 4.0)
    log.close()
    line = "step:1/100 train_loss:2.0000 train_time:3ms step_avg:3.00ms"
    assert (tmp_path / "run.txt").read_text().endswith(f"one\n{line}\n")
    assert (tmp_path / "run.csv").read_text().endswith("\n1,2,,3,4\n")


def test_lost_log_and_terminal(base, tmp_path, monkeypatch):
    """Nor does a log that is lost end the run where stderr takes no warning, as with both on one full disk."""
    log = t.Log(dataclasses.replace(base, log_dir=str(tmp_path), run_id="run"), ONE)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))
    (tmp_path / "run.txt").unlink()
    log.loss("train_loss", 2.0, 1, 3.0, 4.0)
    log.close()
    assert (tmp_path / "run.csv").read_text().endswith("\n1,2,,3,4\n")


@pytest.mark.parametrize("before", [0, 60])
def test_time_left(base, tmp_path, monkeypatch, before):
    """The bar's first estimate counts neither set-up nor the steps before a resumption."""
    now, terminal = [0.0], io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    log = t.Log(dataclasses.replace(base, log_dir=str(tmp_path)), ONE)
    for done, now[0] in ((1, 1000.0), (2, 1002.0)):
        log.loss("train_loss", 9.0, before + done, 0.0, 1000.0)
    assert f"{before + 2}/100 [00:02<" in terminal.getvalue()  # the time taken, then the time left
    minutes, seconds = divmod(2 * (98 - before), 60)
    assert terminal.getvalue().endswith(f"[00:02<{minutes:02}:{seconds:02},  2.00s/step, loss=9.000, tok_s=1,000]")
    assert "?step/s" in terminal.getvalue()  # no estimate before
    log.close()


def test_end_without_a_terminal(base, tmp_path, monkeypatch):
    """The reason is in the log, and the process ends."""
    watch = t.Watch(ONE, t.Log(dataclasses.replace(base, log_dir=str(tmp_path), run_id="run"), ONE))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    watch.end_process("error: why", 3)
    assert ended == [3] and (tmp_path / "run.txt").read_text().endswith("error: why\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_is_a_signal(base, tmp_path, ignored):
    """It stops a run as Ctrl-C does, except under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with t.Watch(ONE, t.Log(dataclasses.replace(base, log_dir=str(tmp_path)), ONE)) as watch:
            signal.raise_signal(signal.SIGHUP)
            assert watch.wish == ("" if ignored else "SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_checkpoint_on_a_full_disk(base, tmp_path, monkeypatch):
    """The error names file and remedy; earlier checkpoints stay, and nothing half-written."""
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), torch.save

    def limited(content, path):
        if content["step"] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(content, path)

    monkeypatch.setattr(torch, "save", limited)
    try:
        with pytest.raises(t.UserError, match=r"cannot write .*run_step4\.pt.*free some space"):
            train(dataclasses.replace(base, log_dir=str(tmp_path), save_every=2, **SHORT))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["run.csv", "run.txt", "run_step2.pt"]
    assert t.read_checkpoint(str(tmp_path / "run_step2.pt"))["step"] == 2
