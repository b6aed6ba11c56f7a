"""Whole runs as a user starts them: log, rank counts, agents, seeds, and one clear line for each bad input."""

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

import train_gpt as t

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
SAMPLE = ROOT / "data" / "sample"
TORCHRUN = ["-m", "torch.distributed.run"]
SHORT = ["--preset=demo", "--model_dim=48", "--head_dim=8", "--batch_unit=64", "--val_tokens=512", "--val_chunk=256",
         "--num_scheduled_iterations=6", "--num_extension_iterations=2", "--val_every=3"]
VAL_LINE = re.compile(r"^step:\d+/\d+ val_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$")
TRAIN_LINE = re.compile(r"^step:(\d+)/8 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$")


def environment(**more):
    launched = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    clean = {k: v for k, v in os.environ.items() if k not in launched}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def run(*args, launcher=(), timeout=120, cwd=ROOT, **env):
    """A run to its end, with its ranks in forks."""
    return forks.run(*launcher, SCRIPT, *args, env=environment(**env), cwd=cwd, timeout=timeout)


def run_command(*command):
    """A run as a user starts it."""
    return subprocess.run(command, env=environment(), cwd=ROOT, timeout=120, capture_output=True, text=True)


def losses(text, kind="val"):
    """(step, loss) of each line of a kind."""
    return [(int(a), float(b)) for a, b in re.findall(rf"^step:(\d+)/\d+ {kind}_loss:(\d+\.\d+) ", text, re.M)]


def write(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """One run of one rank on the bundled data, by ./run.sh where that trains the demo: its process and log folder."""
    logs = tmp_path_factory.mktemp("logs") / "new" / "folder"
    command = [sys.executable, SCRIPT, SHORT[0]] if torch.cuda.is_available() else [ROOT / "run.sh"]
    done = run_command(*command, *SHORT[1:], f"--log_dir={logs}", "--run_id=one")
    assert done.returncode == 0, done.stderr
    return done, logs


@pytest.fixture(scope="module")
def letters(byte_files):
    return [*SHORT, "--vocab_size=256", *(f"--{key}={value}" for key, value in byte_files.items())]


def test_log_file(bundled):
    """The log is the script, versions, configuration, then a line a step and a line a validation."""
    done, logs = bundled
    assert sorted(os.listdir(logs)) == ["one.csv", "one.txt"]
    raw = (logs / "one.txt").read_bytes()
    source = SCRIPT.read_bytes()
    assert raw.startswith(source)
    text = raw[len(source) :].decode()
    assert f"Python {sys.version.split()[0]}" in text and f"PyTorch {torch.__version__}" in text
    for line in ("model_dim = 48", "seed = 0", "val_every = 3", "muon_lr = 0.023", "batch_unit = 64",
                 "dtype = 'float32'", "cooldown_floor = 0.15", "run_id = 'one'"):
        assert f"\n{line}\n" in text, line
    assert "nvidia-smi" in text.lower()
    lines = [line for line in text.splitlines() if line.startswith("step:")]
    trained = [TRAIN_LINE.match(line) for line in lines if "train_loss" in line]
    assert [int(m[1]) for m in trained] == list(range(1, 9))
    validated = [line for line in lines if "val_loss" in line]
    assert len(trained) + len(validated) == len(lines)
    assert all(VAL_LINE.match(line) for line in validated)
    assert [step for step, _ in losses(text)] == [0, 3, 6, 8]
    # the terminal shows the same lines; without a terminal no progress bar is mixed in
    assert [line for line in done.stdout.splitlines() if line.startswith("step:")] == lines
    assert "\r" not in done.stdout + done.stderr


def test_table_beside_the_log(bundled):
    """The .csv has the log's numbers: a line a step and a line a validation, in the same order."""
    done, logs = bundled
    rows = list(csv.DictReader((logs / "one.csv").read_text().splitlines()))
    assert list(rows[0]) == ["step", "train_loss", "val_loss", "train_time_ms", "tokens_per_s"]
    lines = re.findall(r"^step:(\d+)/8 (\w+_loss):(\S+) train_time:(\d+)ms", done.stdout, re.M)
    assert len(rows) == len(lines) == 8 + 4
    before = 0.0  # the time of the step before
    for row, (step, kind, loss, ms) in zip(rows, lines):
        assert row["step"] == step and [x for x in ("train_loss", "val_loss") if row[x]] == [kind]
        assert float(row[kind]) == pytest.approx(float(loss), abs=5e-5)
        now = float(row["train_time_ms"])
        assert now == pytest.approx(int(ms), abs=0.51)
        if kind == "val_loss":
            assert row["tokens_per_s"] == ""
        else:
            tokens = t.plan(int(step) - 1, t.parse_args(SHORT)[0]).batch_tokens
            assert float(row["tokens_per_s"]) == pytest.approx(1000 * tokens / (now - before), rel=1e-3)
            before = now


def test_tables_in_the_log(bundled):
    """LAYERS, STAGES and PARAMS in aligned columns: every cell of the recipe, and the steps of each stage."""
    hp, _ = t.parse_args(SHORT)
    text = (bundled[1] / "one.txt").read_text().split("=" * 100)[-2]
    tables = {}
    for table in ("LAYERS", "STAGES", "PARAMS"):
        head, *lines = re.search(rf"^{table}\n(.*?)\n\n", text, re.S | re.M)[1].splitlines()
        starts = [found.start() for found in re.finditer(r"\S+", head)]
        assert all(line[a - 2 : a] in ("", "  ") and line[a] != " " for line in lines for a in starts)
        cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])] for line in lines]
        tables[table] = [dict(zip(head.split(), row)) for row in cells]
        rows = getattr(hp, table.lower())
        assert [row["row"] for row in tables[table]] == [str(i) for i in range(len(rows))]
        for row, expected in zip(tables[table], rows):
            for column, value in expected._asdict().items():
                assert row[column].replace(" ", "") == (str(value).replace(" ", "") or "-")
    assert str(hp.readout) in text
    for row, first, end in zip(tables["STAGES"], t.stage_bounds(hp), t.stage_bounds(hp)[1:]):
        assert row["steps"] == f"{first}-{end - 1}"
        assert int(row["tokens"]) == sum(t.plan(step, hp).batch_tokens for step in range(first, end))
    with torch.device("meta"):
        shapes = {name: "x".join(map(str, p.shape)) for name, p in t.GPT(hp).named_parameters()}
    assert {row["name"]: row["sizes"] for row in tables["PARAMS"]} == shapes


def test_training_lowers_the_losses(bundled):
    """From the uniform guess, ln 50304, both losses fall."""
    text = bundled[0].stdout
    val = [loss for _, loss in losses(text)]
    assert val[0] == pytest.approx(np.log(50304), abs=0.02)
    assert all(b < a for a, b in zip(val, val[1:])) and val[-1] < val[0] - 0.4
    assert np.isfinite([loss for _, loss in losses(text, "train")]).all()


def test_times_rise(bundled):
    """train_time grows and step_avg is train_time per step."""
    lines = re.findall(r"step:(\d+)/8 (\w+)_loss:\S+ train_time:(\d+)ms step_avg:(\S+)ms", bundled[0].stdout)
    times = [int(ms) for _, kind, ms, _ in lines if kind == "val"]
    assert times == sorted(times) and times[0] < times[-1]
    for step, kind, ms, average in lines:
        if kind == "val":
            assert float(average) == pytest.approx(int(ms) / max(int(step), 1), abs=0.51)


@pytest.fixture(scope="module")
def small_runs(letters, tmp_path_factory):
    """One-rank runs with a small vocabulary, seed 0 twice and seed 1: the losses, and what the checkpoint holds."""
    folder = tmp_path_factory.mktemp("small")

    def start(name, seed):
        return run(*letters, f"--seed={seed}", f"--log_dir={folder}", f"--run_id={name}", "--save_final=true")

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, ("a", "b", "c"), (0, 0, 1)))
    assert [d.returncode for d in done] == [0, 0, 0], done[0].stderr
    return [(losses(d.stdout, "val") + losses(d.stdout, "train"),
             torch.load(folder / f"{name}_step8.pt", weights_only=True)["tensors"]) for name, d in zip("abc", done)]


def test_seed(small_runs):
    """The same seed gives the same losses, weights and optimizer state to the last bit, another seed gives others."""
    (first, state), (again, same), (other, different) = small_runs
    assert len(first) == 4 + 8 and first == again
    assert sum(a != b for a, b in zip(first, other)) >= 9  # all but, by chance, a few
    assert state.keys() == same.keys() == different.keys() and {"lm_head", "qk_bank.momentum"} < state.keys()
    assert all(torch.equal(x.view(torch.uint8), same[name].view(torch.uint8)) for name, x in state.items())
    assert not any(torch.equal(x, different[name]) for name, x in state.items() if x.any())


def test_two_ranks_follow_the_same_trajectory(letters, small_runs, tmp_path):
    """Two gloo ranks give the losses of one, over tied steps, the split and the extension."""
    done = run_command(sys.executable, *TORCHRUN, "--standalone", "--nproc_per_node=2", SCRIPT, *letters,
                       f"--log_dir={tmp_path}", "--run_id=two")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["two.csv", "two.txt"]  # one log, by rank 0
    assert len((tmp_path / "two.csv").read_text().splitlines()) == 1 + 8 + 4
    ours, reference = losses((tmp_path / "two.txt").read_text().split("=" * 100)[-1]), small_runs[0][0]
    assert [step for step, _ in ours] == [step for step, _ in reference[:4]] == [0, 3, 6, 8]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in reference[:4]], abs=2e-4)
    ours = losses(done.stdout, "train")  # means over the ranks
    assert len(ours) == 8  # other ranks print nothing
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in reference[4:]], abs=2e-4)
    assert len(losses(done.stdout, "val")) == 4


def test_two_agents(letters, small_runs, tmp_path):
    """Two torchrun agents of one process each, as on two machines, end where one process ends."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def agent(number):
        launcher = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}", "--rdzv_backend=c10d",
                    "--rdzv_id=test", f"--rdzv_endpoint=localhost:{port}", "--local_addr=127.0.0.1"]
        return run(*letters, f"--log_dir={tmp_path}", "--run_id=agents", launcher=launcher)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(agent, (0, 1)))
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    ours = losses(done[0].stdout + done[1].stdout)
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in small_runs[0][0][:4]], abs=2e-4)
    assert sorted(os.listdir(tmp_path)) == ["agents.csv", "agents.txt"]


BAD = {  # name: words that the error must contain (the cause, the file or key, the remedy)
    "missing train data": ["--train_files=", "/nothing_*.bin", "data/cached_fineweb10B.py"],
    "missing val data": ["--val_files=", "/nothing_*.bin", "data/cached_fineweb10B.py"],
    "truncated shard": ["fineweb_train_000001.bin", "608837 tokens", "1218698", "1218498", "again"],
    "no header": ["fineweb_train_000001.bin", "100 bytes", "again"],
    "wrong magic": ["fineweb_train_000001.bin", "magic", "20240521", "again"],
    "wrong version": ["fineweb_val_000000.bin", "version 2", "again"],
    "token above 50256": ["fineweb_train_000001.bin", "50257", "position 7", "again"],
    "unknown key": ["--model_dimm", "did you mean", "--model_dim"],
    "wrong type": ["--val_every=often", "whole number"],
    "not enough train tokens": ["--train_files=", "6 of 8 steps", "about 1 more", "--num_scheduled_iterations"],
    "many shards missing": ["--train_files=", "0 of 8 steps", "more of this size", "--num_scheduled_iterations"],
    "no documents": ["--train_files=", "no document begins", "50256", "--vocab_size"],
    "not enough val tokens": ["fineweb_val_000000.bin", "500 tokens", "513", "--val_tokens"],
    "three ranks": ["3 ranks", "1, 2, 4 or 8"],
    "half a launch": ["RANK=0", "WORLD_SIZE", "MASTER_PORT", "torchrun"],
    "two ranks, said by WORLD_SIZE alone": ["WORLD_SIZE=2", "MASTER_PORT", "torchrun"],
    "one long document": ["documents are cut to", "(1 of 1)", "0 of 8 steps", "--max_chars"],
    "attention that cannot run": ["--attention=torch", "bfloat16", "--attention=auto"],
    "kernels that cannot run": ["--kernels=hopper", "bfloat16", "--kernels=auto"],
    "log_dir is a file": ["occupied", "File exists", "--log_dir"],
    "no GPU": ["no NVIDIA GPU", "--preset=demo"],
    "no GPU, though asked for": ["no NVIDIA GPU", "--preset=demo"],
    "no such checkpoint": ["nothing.pt", "no such checkpoint"],
}
FULL_LENGTH = 2 * (64 + 128 + 192) + 2 * 192  # tokens of the schedule's 8 steps


def bad_arguments(name, folder):
    """Prepare a bad input in a folder; returns the arguments and the environment of the run."""
    train, val = folder / "fineweb_train_000001.bin", folder / "fineweb_val_000000.bin"
    shutil.copy(SAMPLE / train.name, train)
    shutil.copy(SAMPLE / val.name, val)
    files = {"train_files": f"{folder}/fineweb_train_*.bin", "val_files": f"{folder}/fineweb_val_*.bin"}
    more, env, logs = [], {}, folder / "logs"
    tokens = np.fromfile(train, "<u2", offset=1024)
    short = np.full(FULL_LENGTH + 8 * 8, 5)  # one document a segment suffices
    short[::4] = 50256
    if name == "missing train data":
        files["train_files"] = f"{folder}/nothing_*.bin"
    elif name == "attention that cannot run":
        more = ["--attention=torch"]
    elif name == "kernels that cannot run":
        more = ["--kernels=hopper"]
    elif name == "missing val data":
        files["val_files"] = f"{folder}/nothing_*.bin"
    elif name == "truncated shard":
        train.write_bytes(train.read_bytes()[:-200])
    elif name == "no header":
        train.write_bytes(train.read_bytes()[:100])
    elif name == "wrong magic":
        write(train, tokens, magic=20240521)
    elif name == "wrong version":
        write(val, tokens[:4000], version=2)
    elif name == "token above 50256":
        tokens[7] = 50257
        write(train, tokens)
    elif name == "unknown key":
        more = ["--model_dimm=48"]
    elif name == "wrong type":
        more = ["--val_every=often"]
    elif name == "not enough train tokens":
        write(train, short[: FULL_LENGTH - 2 * 192 + 8 * 8 * 4])
    elif name == "many shards missing":
        write(train, short[:80])
    elif name == "no documents":
        write(train, np.full(FULL_LENGTH + 100, 5))
    elif name == "not enough val tokens":
        write(val, tokens[:500])
    elif name == "three ranks":
        env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    elif name == "no GPU":
        more = ["--device=auto"]
    elif name == "no GPU, though asked for":
        more = ["--device=cuda"]
    elif name == "no such checkpoint":
        more = ["--resume=nothing.pt"]
    elif name == "half a launch":
        env = {"RANK": "0"}
    elif name == "two ranks, said by WORLD_SIZE alone":
        env = {"WORLD_SIZE": "2"}
    elif name == "one long document":
        write(train, [50256, *[5] * 9999])
    elif name == "log_dir is a file":
        logs = folder / "occupied"
        logs.write_text("kept")
    return [*SHORT, *(f"--{k}={v}" for k, v in files.items()), f"--log_dir={logs}", *more], env


# Told by what starts the ranks, and one each of: data, keys, files that are written
AS_A_PROCESS = ("three ranks", "half a launch", "two ranks, said by WORLD_SIZE alone", "no GPU",
                "no GPU, though asked for", "wrong magic", "wrong type", "log_dir is a file")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path, monkeypatch, capsys, name):
    """One line on stderr that names the cause and the remedy; status 1; nothing written."""
    args, env = bad_arguments(name, tmp_path)
    before = sorted(tmp_path.iterdir())
    if name in AS_A_PROCESS:
        done = run(*args, cwd=tmp_path, **env)
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *args])
        monkeypatch.setattr(t, "setup_ranks", lambda hp: t.Ranks(0, 1, torch.device("cpu")))
        monkeypatch.setattr(t.dist, "is_initialized", lambda: False)  # it would end the tests' own group
        with pytest.raises(SystemExit) as ended:
            t.main()
        status, (out, err) = ended.value.code, capsys.readouterr()
    assert status == 1
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(word in lines[0] for word in BAD[name]), lines[0]
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before
    if name == "log_dir is a file":
        assert (tmp_path / "occupied").read_text() == "kept"


def test_source_and_locale(letters, tmp_path):
    """A letter outside ASCII in the script, in an ASCII locale: the run starts, and the log holds the source."""
    script = tmp_path / "train_gpt.py"
    source = SCRIPT.read_text(encoding="utf-8") + "# größer\n"
    script.write_text(source, encoding="utf-8")
    ascii_only = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    steps = ["--num_scheduled_iterations=3", "--num_extension_iterations=0", "--val_every=0"]
    args = [sys.executable, str(script), *letters, *steps, "--run_id=a"]
    done = subprocess.run(args, env=ascii_only, cwd=tmp_path,
                          timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs" / "a.txt").read_text(encoding="utf-8").startswith(source)


def test_data_error_under_torchrun(tmp_path):
    """With two ranks the error is told once and the whole launch ends."""
    args, _ = bad_arguments("wrong magic", tmp_path)
    done = run(*args, timeout=60, cwd=tmp_path, launcher=[*TORCHRUN, "--standalone", "--nproc_per_node=2"])
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "magic number 20240521" in lines[0]
    assert not (tmp_path / "logs").exists()


def test_check_reads_everything_and_writes_nothing(tmp_path):
    """--check accepts the bundled data in a line, from any folder, and finds a bad shard."""
    good = run("--check", *SHORT, f"--log_dir={tmp_path}/logs", timeout=60, cwd=tmp_path)
    found = "the train shards (1) last all 8 steps; validation has its tokens\n"
    assert (good.returncode, good.stdout, good.stderr) == (0, found, "")
    args, _ = bad_arguments("token above 50256", tmp_path)
    bad = run("--check", *args, timeout=60)
    assert bad.returncode != 0 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """Let the script import a torch that is this code."""
    def write(code):
        (tmp_path / "torch.py").write_text(f"import os, signal, sys, time\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def test_interrupt_while_torch_is_imported(standin):
    """A line and the status of Ctrl-C, not a traceback; also where a library would catch the exception."""
    standin("try:\n    signal.raise_signal(signal.SIGINT)\n    time.sleep(9)\nexcept BaseException:\n    pass")
    done = run_command(sys.executable, SCRIPT, "--preset=demo")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted by SIGINT\n")


@pytest.mark.parametrize("given, spins", [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                          ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_that_wait_sleep_soon(standin, monkeypatch, given, spins):
    """OpenMP's threads are told before torch loads them; a user's own setting stays."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    standin("print(os.environ.get('GOMP_SPINCOUNT')); sys.exit()")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_command(sys.executable, SCRIPT, "--preset=demo").stdout == f"{spins}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="run.sh trains the record where there is a GPU")
def test_one_command_runs_the_demo(bundled):
    """./run.sh without a GPU says so, trains the demo, here fewer and smaller steps, and ends with loss and time."""
    lines = bundled[0].stdout.splitlines()
    assert lines[0] == "No NVIDIA GPU here: running the CPU demo on the bundled sample."
    end = rf"final: val_loss {losses(bundled[0].stdout)[-1][1]:.4f} after 8 steps, (\d+\.\d) s of training on 1 x CPU"
    seconds = float(re.fullmatch(end, lines[-2])[1])
    speed = re.fullmatch(r"speed: (\S+) TFLOP/s on each, counting products with weights", lines[-1])
    hp = t.parse_args(SHORT)[0]
    weights = 10 * 4 * 48**2 + 11 * 2 * 48 * 192 + 48 * 50304  # QKV and O, up and down, head
    tokens = sum(t.plan(step, hp).batch_tokens for step in range(8))
    assert float(speed[1]) == pytest.approx(6e-12 * weights * tokens / seconds, rel=0.06 / seconds + 0.01)
