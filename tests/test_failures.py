"""A run that fails ends soon, on all ranks, with one line that says why; what was saved is kept."""

import ast
import contextlib
import dataclasses
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verify

import train_gpt as t

ROOT = Path(t.__file__).parent
CPU = torch.device("cpu")
ONE = t.Ranks(0, 1, CPU)
LAUNCH = [sys.executable, str(ROOT / "tools" / "launch.py"), "--standalone", "--nproc_per_node=2"]
N = 100  # steps; no run here gets as far
SIZES = dict(model_dim=48, head_dim=8, vocab_size=256, batch_unit=128, val_tokens=512, val_chunk=256, val_every=4,
             num_scheduled_iterations=N - 2, num_extension_iterations=2)
FASTER = 0.4  # of the time between looks
# The script, with a fault when the named rank begins its sixth step
FAULTY = f"""
import math, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt as t

t.LOOK_EVERY *= {FASTER}
fault, victim = os.environ["FAULT"].split()

def faulty(micro_step, batches, touched, p, train_step=t.train_step):
    if p.step == 5 and int(os.environ.get("RANK", 0)) == int(victim):
        if fault == "hang":
            time.sleep(1000)
        elif fault == "raise":
            raise ValueError("a test's error")
        elif fault == "inf":
            micro_step.model.resid_lambdas.data[3, 1] = 3e38
        else:
            os.kill(os.getpid(), getattr(signal, fault))
            if fault == "SIGTERM":  # the launcher tells the other rank later
                os.kill(os.getppid(), signal.SIGTERM)
    return train_step(micro_step, batches, touched, p)

t.train_step = faulty
t.main()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Hyperparameters of a run on the bundled text, as a vocabulary of 256."""
    folder, files = tmp_path_factory.mktemp("data"), {}
    for key, name in (("train_files", "fineweb_train_000001.bin"), ("val_files", "fineweb_val_000000.bin")):
        raw = np.fromfile(ROOT / "data" / "sample" / name, "<u2")
        raw[512:] = np.where(raw[512:] == 50256, 255, raw[512:] % 255)
        raw.tofile(folder / name)
        files[key] = str(folder / name)
    return t.Hyperparameters(**t.PRESETS["demo"] | SIZES | files)


def processes(marker):
    """Processes, zombies apart, whose command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


class Faulty:
    """A run with a fault, to its end."""

    def __init__(self, hp, folder, fault, world, **more):
        script, hp = folder / "faulty.py", dataclasses.replace(hp, log_dir=str(folder), run_id="run", **more)
        script.write_text(FAULTY)
        args = [f"--{f.name}={getattr(hp, f.name)}" for f in dataclasses.fields(hp)]
        launcher = LAUNCH if world > 1 else [sys.executable]
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            process = subprocess.Popen([*launcher, script, *args], stdout=out, stderr=err,
                                       env=os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault})
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while "SIGSTOP" in fault and process.poll() is None:  # torchrun takes 30 s more to end a stopped rank
                left = children.read_text().split()
                if len(left) == 1 and (folder / "err").read_text():
                    os.kill(int(left[0]), signal.SIGKILL)
                time.sleep(0.1)
            self.status = process.wait(timeout=60)
        self.left = processes(str(script))
        self.out, self.err = (folder / "out").read_text(), (folder / "err").read_text()
        self.log = (folder / "run.txt").read_text()
        self.results, self.path, self.folder = self.log.split("=" * 100)[-1], folder / "run.txt", folder
        self.files = sorted(path.name for path in folder.glob("run*"))


RUNS = {"kill": ("SIGKILL 1", 2), "stop": ("SIGSTOP 0", 2), "hang": ("hang 1", 2), "raise": ("raise 1", 2),
        "inf": ("inf 1", 2), "term": ("SIGTERM 1", 2), "interrupt": ("SIGINT 0", 1)}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """All faulty runs, a few at a time, as they mostly wait."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    with ThreadPoolExecutor(4) as pool:
        done = {name: pool.submit(Faulty, base, folders[name], *RUNS[name], save_final=name == "term")
                for name in RUNS}
    return {name: future.result() for name, future in done.items()}


LOST = (r"rank {} gave no sign of life for \d+ s, last in step \d at \w+ \(.*:\d+\): "
        "killed, out of memory, stopped or cut off")
ERRORS = {  # the end of the one error line
    "kill": LOST.format(1),
    "stop": LOST.format(0),
    "hang": r"no rank finished a step for \d+ s, a rank hangs: rank 0 in step 6 at \w+ \(train_gpt.py:\d+\), "
            r"rank 1 in step 6 at faulty \(faulty.py:\d+\)",
    "raise": r"rank 1, step 6: ValueError: a test's error",
    "inf": r"the (training loss of step [67]|validation loss) is (nan|inf); it began on rank 1 in step 6 with "
           r"aten\.mul\.Tensor in mlp_reference:\d+ of trunk:\d+ of forward:\d+, layer 3, and reached .*mlp_bank.*; "
           r"--resume=\S+run_step5\.pt repeats this step",
}


@pytest.mark.parametrize("name", ERRORS)
def test_one_error(runs, name):
    """On stderr and at the end of the log; no process is left, and no traceback of the launcher."""
    run = runs[name]
    lines = [line for line in run.err.splitlines() if "error" in line.lower()]
    expected = [line for line in lines if re.fullmatch("error: " + ERRORS[name], line)]
    assert len(expected) == 1, run.err
    assert run.log.splitlines()[-1] == expected[0]
    extra = ["rank 1 was ended by SIGKILL"] * (name == "kill")
    told = [line for line in run.err.splitlines() if line not in extra + expected]
    if name == "raise":  # the failed rank's own traceback
        assert told[0].startswith("Traceback") and told[-1].startswith("ValueError") and "launch.py" not in run.err
        assert "\n".join(told) in run.log
    else:
        assert told == []
    assert run.status == (137 if name == "kill" else 1)
    assert run.left == []
    if name != "stop":  # nothing that was printed before is lost
        assert "step:4/100 val_loss" in run.out


def test_limits():
    """A dead rank is found before torchrun kills all that are left, a hang within a minute."""
    assert t.SILENT * t.LOOK_EVERY + 5 < 30 and (t.STALLED + 5) * t.LOOK_EVERY < 60
    assert (t.SILENT_COMPILING + 5) * t.LOOK_EVERY < 60


def test_state_before_the_bad_step(runs, base):
    """It is what an undisturbed run saves there, and can be resumed."""
    run = runs["inf"]
    assert run.files == ["run.txt", "run_step5.pt"]
    saved = t.read_checkpoint(str(run.folder / "run_step5.pt"), base)
    assert saved["step"] == 5 and all(x.isfinite().all() for x in saved["tensors"].values())
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
        assert run.files == ["run.txt", f"run_step{step}.pt"] and found[2].endswith(f"run_step{step}.pt goes on")
        assert t.read_checkpoint(str(run.folder / f"run_step{step}.pt"), base)["step"] == step
    else:
        assert run.files == ["run.txt"] and found[2] == "nothing saved; --save_final=true would have"
    failure = verify.read_log(run.path).failure
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
    monkeypatch.setattr(watch, "end", lambda text, status=1: watch.ended.append((text, status)))
    watch.step = 7
    return watch


def test_slow_is_not_dead(watch):
    """Compiling, validating and a long step short of the limit end nothing; nor does the sleep of this process."""
    for beat in range(1000):
        watch.look(states({}, {}, beat=beat, timed=False))
    for beat in range(t.STALLED - 1):
        watch.look(states({}, {}, beat=beat))
    watch.look(states({"step": 8}, {}, beat=0))
    for beat in range(t.SILENT - 1):
        watch.look(states({"beat": beat}, {"beat": 0}, timed=False))
    assert watch.ended == []


def test_new_shape_compiles(base):
    """A step whose shapes are new has no deadline, as a compiler works: Triton's at least."""
    micro_step = t.MicroStep(t.GPT(base), SimpleNamespace(), base, ONE)
    micro_step.run = lambda *_: None
    seen = []
    for n in (5, 5, 7, 5):
        micro_step((torch.zeros(n),), None, torch.zeros(1), 1.0)
        seen.append(micro_step.compiling)
    assert seen == [True, False, True, False]


def test_compiler_may_keep_threads_waiting(watch):
    watch.step = -1
    for beat in range(t.SILENT + 3):
        watch.look(states({"beat": beat}, {"beat": 0}, timed=False))
    assert watch.ended == []
    for beat in range(t.SILENT_COMPILING):
        watch.look(states({"beat": -beat}, {"beat": 0}, timed=False))
    assert "rank 1 gave no sign of life" in watch.ended[0][0]


def test_death_is_told_rather_than_what_follows_from_it(watch):
    """A dead rank makes the others' collectives raise: their errors are not the cause."""
    for beat in range(t.SILENT + 1):
        assert not watch.ended
        watch.look(states({"beat": beat, "error": "error: connection closed"}, {"beat": 0}, timed=False))
    assert len(watch.ended) == 1 and "rank 1 gave no sign of life" in watch.ended[0][0]


def test_ranks_agree_on_a_step(watch):
    """A rank that got no signal stops where the others do, after every step that any of them may have begun."""
    assert not watch.stops(7)
    watch.look(states({}, {"step": 8}))
    assert watch.stop_from is None
    watch.look(states({}, {"step": 8, "stop": 8, "why": "SIGTERM"}))
    assert (watch.stop_from, watch.why, watch.stop_before) == (7, "SIGTERM", None)
    watch.look(states({"stop": 7}, {"step": 9, "stop": 8}, why="SIGTERM"))
    assert not watch.stops(8) and not watch.stops(9) and watch.stops(10) and watch.ended == []


def test_interrupt_while_compiling(watch):
    watch.step, watch.wish = -1, "SIGINT"
    watch.look(states({}, {}, timed=False))
    assert watch.stop_from == -1 and not watch.ended
    watch.look(states({"beat": 1}, {"beat": 1}, timed=False, why="SIGINT", stop=-1))
    assert watch.ended == [("interrupted by SIGINT before the first step", 130)]


@pytest.mark.parametrize("where, expected", [
    ("forward", r"aten\.mul\.Tensor in mlp_reference:\d+ of trunk:\d+ of forward:\d+, layer 3, and reached qk_bank"),
    ("backward", r"aten\.mul\.Tensor in run:\d+ of __call__:\d+ of train_step:\d+, and reached attn_gate_bank;"),
    ("update", r"aten\.\w+\.default in knobs:\d+ of step:\d+ of train_step:\d+, and reached qk_bank"),
])
def test_place_of_the_first_nan(base, tmp_path, monkeypatch, where, expected):
    """find_bad repeats the steps from the last copy to the first bad one and names the operation."""
    hp = dataclasses.replace(base, log_dir=str(tmp_path), run_id="run")
    model = t.GPT(hp)
    model.initialize(0)
    micro_step = t.MicroStep(model, t.NorMuonAdam(model, hp, ONE), hp, ONE)
    rewind, log = t.Rewind(micro_step.optimizer, 0), t.Log(hp, ONE)

    def poison(micro_step, batches, touched, p, train_step=t.train_step):
        if p.step == 3 and where == "forward":
            model.resid_lambdas.data[3, 1] = 3e38
        hook = model.attn_gate_bank.register_hook(lambda g: g * math.nan if p.step == 3 and where == "backward" else g)
        if p.step == 3 and where == "update":
            p = p._replace(lr_factor=1e40)
        loss = train_step(micro_step, batches, touched, p)
        hook.remove()
        return loss

    monkeypatch.setattr(t, "train_step", poison)
    loader = t.TrainLoader(hp, ONE, range(6))
    for step in range(5):
        poison(micro_step, *next(loader), t.plan(step, hp))
    loader.close()
    with pytest.raises(t.UserError) as error:
        t.find_bad(rewind, micro_step, log, 5, 0.0, "the loss is nan")
    assert re.search(expected, str(error.value)) and "on rank 0 in step 4" in str(error.value), error.value
    saved = t.read_checkpoint(str(tmp_path / "run_step3.pt"), hp)
    assert saved["step"] == 3 and all(x.isfinite().all() for x in saved["tensors"].values())


def test_nan_in_autograds_own_thread():
    """On a GPU the backward pass runs in a thread that has no frames of the script."""
    with t.FirstBad() as found:
        call = torch.ops.aten.log.default, (), (-torch.ones(1),)
        thread = threading.Thread(target=found.__torch_dispatch__, args=call)
        thread.start()
        thread.join()
    assert found.place == "aten.log.default in the backward pass"


def test_nan_that_does_not_come_back(base, tmp_path):
    """It was the hardware's, perhaps; the message says so."""
    hp = dataclasses.replace(base, log_dir=str(tmp_path), run_id="run")
    model = t.GPT(hp)
    model.initialize(0)
    micro_step = t.MicroStep(model, t.NorMuonAdam(model, hp, ONE), hp, ONE)
    rewind = t.Rewind(micro_step.optimizer, 0)
    model.embed.data[:] = math.nan
    with pytest.raises(t.UserError, match="from step 1 on all is finite: suspect the hardware"):
        t.find_bad(rewind, micro_step, t.Log(hp, ONE), 2, 0.0, "the loss is nan")


def train(hp):
    log = t.Log(hp, ONE)
    t.train(hp, ONE, "reference", "reference", log, None, t.Watch(ONE, log))
    log.close()


SHORT = dict(num_scheduled_iterations=6, num_extension_iterations=0, val_every=0, run_id="run")


@pytest.mark.parametrize("loss", ["full disk", "deleted folder"])
def test_log_lost_in_training(base, tmp_path, monkeypatch, capsys, loss):
    """One warning, the run goes on to the same end, and the end says that the log is incomplete."""
    straight = dataclasses.replace(base, log_dir=str(tmp_path / "straight"), **SHORT)
    train(straight)
    expected = re.findall("(.*loss:[0-9.]+) ", capsys.readouterr().out)

    def lose(*args, step=t.train_step):
        if args[-1].step == 3 and loss == "deleted folder":
            shutil.rmtree(tmp_path / "logs")
        elif args[-1].step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "logs" / "run.txt").stat().st_size, limits[1]))
        return step(*args)

    monkeypatch.setattr(t, "train_step", lose)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        train(dataclasses.replace(straight, log_dir=str(tmp_path / "logs")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = capsys.readouterr()
    first, last = done.err.splitlines()
    cause = "File too large" if loss == "full disk" else "it was deleted"
    assert first.startswith("warning: the log ") and cause in first and "training goes on" in first
    assert last == f"warning: the log {tmp_path}/logs/run.txt is incomplete ({cause})"
    assert re.findall("(.*loss:[0-9.]+) ", done.out) == expected and "final: val_loss" in done.out
    assert (tmp_path / "logs").exists() == (loss == "full disk")
    if loss == "full disk":
        assert "no final validation line" in verify.read_log(tmp_path / "logs" / "run.txt").failure


def test_log_that_cannot_be_written_at_first(base, tmp_path):
    """A full disk and a folder that takes no files are told before training."""
    (tmp_path / "run.txt").symlink_to("/dev/full")
    for folder, cause in ((tmp_path, "No space left"), (Path("/proc/self"), "No such file")):
        with pytest.raises(t.UserError, match=f"cannot write the log {folder}/run.txt: {cause}.*--log_dir"):
            t.Log(dataclasses.replace(base, log_dir=str(folder), run_id="run", resume="x.pt"), ONE)


def test_log_of_another_run_is_kept(base, tmp_path):
    hp = dataclasses.replace(base, log_dir=str(tmp_path), run_id="run")
    t.Log(hp, ONE).close()
    kept = (tmp_path / "run.txt").read_text()
    with pytest.raises(t.UserError, match=f"{tmp_path}/run.txt is another run's log; choose another --run_id"):
        t.Log(hp, ONE)
    assert (tmp_path / "run.txt").read_text() == kept
    t.Log(dataclasses.replace(hp, resume="x.pt"), ONE).close()
    assert (tmp_path / "run.txt").read_text() == kept + kept


def test_lost_terminal(base, tmp_path, monkeypatch):
    """A terminal that is closed costs its lines, not the log's."""
    log = t.Log(dataclasses.replace(base, log_dir=str(tmp_path), run_id="run"), ONE)
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w", buffering=1))
    log("one")
    log.step("two", 1)
    log.close()
    assert (tmp_path / "run.txt").read_text().endswith("one\ntwo\n")


def test_end_without_a_terminal(base, tmp_path, monkeypatch):
    """The reason is in the log, and the process ends."""
    watch = t.Watch(ONE, t.Log(dataclasses.replace(base, log_dir=str(tmp_path), run_id="run"), ONE))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w", buffering=1))
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    watch.end("error: why", 3)
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
    assert sorted(os.listdir(tmp_path)) == ["run.txt", "run_step2.pt"]
    assert t.read_checkpoint(str(tmp_path / "run_step2.pt"))["step"] == 2


HOSTILE = ["--run_id=$(touch x)`touch x`;touch x", "--log_dir=a b\"'*", "--seed=1 && touch x"]


@pytest.mark.parametrize("gpus", ["0", "2"])
def test_run_sh_passes_arguments_as_they_are(tmp_path, gpus):
    """No shell reads them, with or without GPUs: a stand-in for Python notes what it is called with."""
    for name in ("run.sh", "tools/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nimport sys\n"
                      f"if 'device_count' in sys.argv[2]:\n    print({gpus})\n"
                      f"else:\n    print(sys.argv[1:], file=open({str(tmp_path / 'calls')!r}, 'a'))\n")
    python.chmod(0o755)
    before = sorted(tmp_path.rglob("*"))
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run([tmp_path / "run.sh", *HOSTILE], env=environment, cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "calls"])
    calls = [ast.literal_eval(line) for line in (tmp_path / "calls").read_text().splitlines()]
    own = [call for call in calls if "train_gpt.py" in call]
    assert own and all(call[-3:] == HOSTILE for call in own)
