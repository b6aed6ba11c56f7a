"""Tests of data/cached_fineweb10B.py against a local server that speaks the hub's download protocol."""

import collections
import hashlib
import http.server
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import forks
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import cached_fineweb10B as downloader

DATA = Path(__file__).resolve().parent.parent / "data"
SCRIPT = DATA / "cached_fineweb10B.py"
REPO = "kjj0/fineweb10B-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = 20_000
VAL, TRAIN_1, TRAIN_2 = NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def shard(seed, magic=20240520, tokens=TOKENS):
    """Return the bytes of a small shard."""
    return struct.pack("<256i", magic, 1, tokens, *[0] * 253) + struct.pack("<H", 50256 - seed) * tokens


class Hub(http.server.ThreadingHTTPServer):
    """A hub with a few files, which can be told to misbehave. `bodies` counts the bodies asked for, by file name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"{REPO}/{name}": shard(seed) for seed, name in enumerate(NAMES)}
        self.bodies = collections.Counter()
        self.ranges = []
        self.bad_first = {}  # file name: body of its first download
        self.cut_first = set()  # names of files whose first download breaks off halfway
        self.bad_always = {}  # file name: body of all its downloads
        self.busy = []  # statuses of the next answers
        self.retry_after = "0"
        self.valid_token = None  # any other one is refused
        self.tokens = []  # that requests came with
        self.stall_first = set()  # names of files whose first download stops halfway and holds the line
        self.stalled, self.release = threading.Event(), threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_file(self, with_body):
        hub = self.server
        match = re.fullmatch(rf"/datasets/(.+)/resolve/(?:main|{COMMIT})/(.+)", self.path)
        body = match and hub.files.get("/".join(match.groups()))
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.tokens.append(token := self.headers.get("Authorization"))
        refused = token not in (None, f"Bearer {hub.valid_token}")
        if refused or hub.busy:
            self.send_response(401 if refused else hub.busy.pop(0))
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Retry-After", hub.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        name = match[2]
        etag, start, first = hashlib.sha256(body).hexdigest(), 0, False
        if with_body:
            hub.bodies[name] += 1
            first = hub.bodies[name] == 1
            body = hub.bad_first.get(name, body) if first else hub.bad_always.get(name, body)
            if range_header := self.headers.get("Range"):
                hub.ranges.append(range_header)
                start = int(re.fullmatch(r"bytes=(\d+)-", range_header)[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Linked-ETag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            broken = first and name in hub.cut_first | hub.stall_first
            self.wfile.write(body[start : len(body) // 2 if broken else None])
            if first and name in hub.stall_first:
                hub.stalled.set()
                hub.release.wait(20)
            self.close_connection = broken

    def do_HEAD(self):
        self.handle_file(with_body=False)

    def do_GET(self):
        self.handle_file(with_body=True)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def environment(tmp_path):
    """An environment for the script that holds none of the user's hub and proxy settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return kept | {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def command(environment, tmp_path):
    """Return keyword arguments that start the script, for subprocess."""
    def make(port, *arguments, script=SCRIPT, **options):
        return {
            "args": [sys.executable, str(script), *map(str, arguments)], "cwd": tmp_path, "text": True,
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
            "env": environment | {"HF_ENDPOINT": f"http://127.0.0.1:{port}"}, **options,
        }
    return make


@pytest.fixture
def run(command, tmp_path):
    """Run the script with target folder tmp_path/out."""
    def start(port, *arguments):
        about = command(port, *arguments, "--out", tmp_path / "out")
        return forks.run(*about["args"][1:], env=about["env"], cwd=tmp_path)
    return start


def shards_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def expected(hub, *names):
    return {name: hub.files[f"{REPO}/{name}"] for name in names}


def assert_one_error_line(result, *parts):
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]


def test_fresh_download_and_second_run(hub, run, tmp_path):
    result = run(hub.server_port, 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert shards_in(tmp_path / "out") == expected(hub, *NAMES)
    assert hub.bodies == dict.fromkeys(NAMES, 1)

    # Nothing answers at this port any more, so the second run proves that it needs no network.
    result = run(closed_port(), 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert "0 of them downloaded" in result.stdout
    assert hub.bodies == dict.fromkeys(NAMES, 1)


def test_only_what_is_asked_for_into_the_folder_beside_the_script(hub, command, tmp_path):
    names = ["finewebedu_val_000000.bin", "finewebedu_train_000001.bin"]
    hub.files = {f"kjj0/finewebedu10B-gpt2/{name}": shard(seed) for seed, name in enumerate(names)}
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (SCRIPT.name, "shards.py"):
        shutil.copy(DATA / name, folder)
    subprocess.run(**command(hub.server_port, 1, "--dataset", "finewebedu10B", script=folder / SCRIPT.name), check=True)
    assert sorted(shards_in(folder / "finewebedu10B")) == sorted(names)


@pytest.mark.parametrize("bad", [shard(1)[:-2], shard(1, magic=1), b"", b"x" * 100], ids=[
    "truncated", "magic", "empty", "short header"])
def test_bad_local_shard_is_fetched_again(hub, run, tmp_path, bad):
    out = tmp_path / "out"
    out.mkdir()
    (out / VAL).write_bytes(shard(0))
    (out / TRAIN_1).write_bytes(bad)
    assert run(hub.server_port, 1).returncode == 0
    assert shards_in(out) == expected(hub, VAL, TRAIN_1)
    assert hub.bodies == {TRAIN_1: 1}


def test_bad_copy_from_the_server_is_fetched_once_more(hub, run, tmp_path):
    hub.bad_first[TRAIN_1] = shard(1, magic=1)
    assert run(hub.server_port, 1).returncode == 0
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)
    assert hub.bodies == {VAL: 1, TRAIN_1: 2}


@pytest.mark.parametrize("bad, words", [
    (shard(1)[:-100], "20,000 tokens take 41,024"), (shard(1) + b"\0\0", "41,026 bytes"),
    (shard(1, magic=20240521), "magic 20240521"), (shard(1)[:4] + b"\2" + shard(1)[5:], "version 2")],
    ids=["short", "long", "magic", "version"])
def test_server_with_a_corrupt_shard(hub, run, tmp_path, bad, words):
    """Neither a wrong size nor a wrong header is kept."""
    hub.files[f"{REPO}/{TRAIN_1}"] = bad
    assert_one_error_line(run(hub.server_port, 2), REPO, TRAIN_1, words)
    assert shards_in(tmp_path / "out") == expected(hub, VAL)
    assert hub.bodies == {VAL: 1, TRAIN_1: 2}


def test_copy_with_other_content(hub, run, tmp_path):
    """The right length and header are not enough: the hub tells the content's sha256."""
    hub.bad_first[TRAIN_1] = shard(7)
    assert run(hub.server_port, 1).returncode == 0
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)
    assert hub.bodies == {VAL: 1, TRAIN_1: 2}
    hub.bad_first[TRAIN_2] = hub.bad_always[TRAIN_2] = shard(7)
    sums = [hashlib.sha256(shard(seed)).hexdigest() for seed in (7, 2)]
    assert_one_error_line(run(hub.server_port, 2), TRAIN_2, f"its sha256 is {sums[0]}, but should be {sums[1]}")
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)


def test_shard_that_changed_on_the_disk(hub, run, tmp_path):
    """It is fetched again; one that was only touched is not, and needs no network."""
    assert run(hub.server_port, 2).returncode == 0
    out = tmp_path / "out"
    os.utime(out / VAL, (1, 1))
    assert run(closed_port(), 2).returncode == 0
    notes = json.loads((out / ".cache" / "sha256.json").read_text())
    assert notes[VAL] == {"sha256": hashlib.sha256(shard(0)).hexdigest(), "stamp": [len(shard(0)), 10**9]}
    (out / TRAIN_1).write_bytes(shard(1)[:-9] + bytes(9))
    result = run(closed_port(), 2)
    assert result.returncode == 1
    assert "not what was downloaded" in result.stderr and "Connection refused" in result.stderr
    assert len(shards_in(out)) == 3  # it stays until there is a better one
    result = run(hub.server_port, 2)
    assert result.returncode == 0 and result.stderr == (f"{out / TRAIN_1}: not what was downloaded any more, so it is "
                                                        "fetched again\n")
    assert shards_in(out) == expected(hub, *NAMES) and hub.bodies == {VAL: 1, TRAIN_1: 2, TRAIN_2: 1}


def test_shards_from_elsewhere(hub, run, tmp_path):
    """They are compared with the hub's, once; one's own are never overwritten; without network all are taken."""
    out = tmp_path / "out"
    out.mkdir()
    for seed, name in enumerate(NAMES[:2]):
        (out / name).write_bytes(shard(seed))
    result = run(closed_port(), 1)
    assert (result.returncode, result.stderr) == (0, "") and not (out / ".cache").exists()
    assert run(hub.server_port, 1).returncode == 0
    assert sorted(json.loads((out / ".cache" / "sha256.json").read_text())) == sorted(NAMES[:2])
    asked = len(hub.tokens)
    assert run(hub.server_port, 1).returncode == 0 and len(hub.tokens) == asked
    (out / TRAIN_2).write_bytes(shard(7))
    assert_one_error_line(run(hub.server_port, 2), TRAIN_2, "delete it", "--train_files")
    assert (out / TRAIN_2).read_bytes() == shard(7) and not hub.bodies


@pytest.mark.parametrize("notes", ["", "[]", '{"a": 1}', f'{{"{VAL}": {{"sha256": "*", "stamp": 0}}}}', None])
def test_damaged_notes(hub, run, tmp_path, notes):
    """They are made anew from what the hub says; where they cannot be written it goes on without."""
    assert run(hub.server_port, 1).returncode == 0
    path = tmp_path / "out" / ".cache" / "sha256.json"
    if notes is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(notes)
    result = run(hub.server_port, 1)
    assert (result.returncode, result.stderr) == (0, "") and hub.bodies == {VAL: 1, TRAIN_1: 1}
    assert notes is None or sorted(json.loads(path.read_text())) == sorted(NAMES[:2])


@pytest.mark.parametrize("valid", [False, True])
def test_token(hub, run, environment, tmp_path, valid):
    """A valid token is used, as more is granted to it; what is public is had without one that the hub refuses."""
    environment["HF_TOKEN"] = "hf_mine"
    hub.valid_token = "hf_mine" if valid else None
    result = run(hub.server_port, 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)
    assert hub.tokens[0] == "Bearer hf_mine" and set(hub.tokens[1:]) == {"Bearer hf_mine" if valid else None}


def test_refusal(hub, run):
    """Of a repository that is not public, the line names the token."""
    hub.busy = [401] * 9
    assert_one_error_line(run(hub.server_port, 1), VAL, "401", "HF_TOKEN")


@pytest.mark.parametrize("status", [429, 503, 500])
def test_busy_hub(hub, run, tmp_path, status):
    """It is asked again after as long as it says; if it stays busy, the line says so."""
    hub.busy, hub.retry_after, started = [status] * 2, "1", time.monotonic()
    result = run(hub.server_port, 1)
    assert (result.returncode, result.stderr) == (0, "") and time.monotonic() - started > 2
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)
    hub.busy, hub.retry_after = [status] * 99, "0"
    assert_one_error_line(run(hub.server_port, 2), TRAIN_2, str(status), "busy", "again later")
    assert len(hub.busy) == 99 - 1 - 4


def test_waits():
    """As long as the hub asks for, if that is a number and no hour; otherwise as long as planned."""
    error = RuntimeError("busy")
    for asked, seconds in (("7", 7), ("0", 0), ("3600", downloader.LONGEST_WAIT), ("Wed, 21 Oct 2026", 2), ("", 2)):
        error.response = types.SimpleNamespace(status_code=429, headers={"Retry-After": asked})
        outer = KeyError("x")
        outer.__cause__ = error
        assert downloader.wait_for(error, 2) == downloader.wait_for(outer, 2) == seconds
    assert downloader.wait_for(KeyError("x"), 2) == 2


def test_file_that_the_hub_lacks(hub, run, tmp_path):
    del hub.files[f"{REPO}/{TRAIN_2}"]
    assert_one_error_line(run(hub.server_port, 2), f"cannot download {TRAIN_2}", "404")
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_hub_out_of_reach(run, tmp_path):
    started = time.monotonic()
    result = run(closed_port(), 1)
    assert time.monotonic() - started < 20
    assert_one_error_line(result, VAL, "Connection refused", "HF_ENDPOINT", "data/fineweb.py", "data/sample")
    assert shards_in(tmp_path / "out") == {}


def test_connection_that_breaks_halfway_is_resumed(hub, run, tmp_path):
    # The client resumes whole chunks of 10 MB only.
    hub.files[f"{REPO}/{TRAIN_1}"] = shard(1, tokens=12_000_000)
    hub.cut_first.add(TRAIN_1)
    result = run(hub.server_port, 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert shards_in(tmp_path / "out") == expected(hub, VAL, TRAIN_1)
    assert hub.bodies == {VAL: 1, TRAIN_1: 2}
    assert hub.ranges == [f"bytes={10 * 2**20}-"]


def partial(out):
    return list(out.rglob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_download_leaves_no_partial_shard(hub, command, run, tmp_path, number):
    hub.stall_first.add(TRAIN_1)
    out = tmp_path / "out"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children
    with subprocess.Popen(**command(hub.server_port, 1, "--out", out)) as process:
        assert hub.stalled.wait(30)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == ("interrupted; run this again for the rest (finished shards are kept, an unfinished one begins "
                      "anew)\n")
    assert shards_in(out) == expected(hub, VAL) and not partial(out)
    assert run(hub.server_port, 1).returncode == 0
    assert shards_in(out) == expected(hub, VAL, TRAIN_1)


def test_killed_download_is_cleared_away(hub, command, run, tmp_path):
    """What a killed process leaves is removed by the next complete run; other files of the folder are not touched."""
    hub.stall_first.add(TRAIN_1)
    out = tmp_path / "out"
    with subprocess.Popen(**command(hub.server_port, 1, "--out", out)) as process:
        assert hub.stalled.wait(30)
        process.kill()
    assert len(partial(out)) == 1
    other = out / ".cache" / "huggingface" / "download" / f"x.{'0' * 64}.incomplete"
    other.touch()
    result = run(hub.server_port, 1)
    assert (result.returncode, result.stderr) == (0, "") and partial(out) == [other]
    assert shards_in(out) == expected(hub, VAL, TRAIN_1)


def test_disk_that_takes_no_more(unmeasured, hub, command, tmp_path):
    limit = len(shard(0)) // 2
    result = subprocess.run(
        **command(hub.server_port, 1, "--out", tmp_path / "out"), timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_error_line(result, str(tmp_path / "out"), "File too large", "choose another --out")
    assert shards_in(tmp_path / "out") == {}


def test_target_that_is_no_folder(run, tmp_path):
    (tmp_path / "out").write_text("in the way")
    assert_one_error_line(run(closed_port(), 1), str(tmp_path / "out"), "choose another --out")


@pytest.mark.parametrize("arguments, part", [
    (["0"], "train shards 1 to 103"), (["104"], "train shards 1 to 103"), (["-1"], "1 to 103"), (["x"], "invalid int"),
    (["1031", "--dataset", "fineweb100B"], "1 to 1030"), (["--dataset", "other"], "invalid choice")])
def test_wrong_arguments(run, tmp_path, arguments, part):
    result = run(closed_port(), *arguments)
    assert result.returncode == 2
    assert part in result.stderr
    assert not (tmp_path / "out").exists()
