"""Checkpoints and logs from others are data: nothing in them is executed, and a bad one costs one line."""

import ast
import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import compare
import generate
import hellaswag
import pytest
import torch
import verify
from fake_logs import SOURCE, fake_log

import train_gpt as t

ROOT = Path(t.__file__).parent
FILES = sorted(path for folder in (".", "data", "tools", "tests") for path in (ROOT / folder).glob("*.py"))


class Payload:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(params=["plain pickle", "torch.save", "old torch.save"])
def evil(request, checkpoint, tmp_path):
    """A checkpoint that leaves the folder "harm" beside it if it is unpickled."""
    path, payload = tmp_path / "evil.pt", Payload(tmp_path / "harm")
    if request.param == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    elif request.param == "torch.save":
        saved = torch.load(checkpoint[4], weights_only=True)
        torch.save(saved | {"settings": saved["settings"] | {"seed": payload}}, path)
    else:
        torch.save({"settings": payload}, path, _use_new_zipfile_serialization=False)
    return path


def test_payload_would_work(evil, tmp_path):
    """Read carelessly, each kind does its harm; else the tests below would show nothing."""
    with contextlib.suppress(RuntimeError):  # afterwards it may turn out to be no checkpoint
        torch.load(evil, weights_only=False)
    assert (tmp_path / "harm").is_dir()


def refused(path, capsys, error, status):
    assert error.value.code == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {path} is no intact checkpoint"), err
    assert not (path.parent / "harm").exists()


@pytest.mark.parametrize("tool", [generate, hellaswag])
def test_tools_run_no_checkpoint(evil, tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", str(evil)])
    with pytest.raises(SystemExit) as error:
        tool.main()
    refused(evil, capsys, error, 2)


def test_resume_runs_no_checkpoint(evil, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--preset=demo", "--check", f"--resume={evil}"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(t.dist, "is_initialized", lambda: False)  # it would end the tests' own group
    with pytest.raises(SystemExit) as error:
        t.main()
    refused(evil, capsys, error, 1)


@pytest.mark.parametrize("change", [
    dict(tensors=None), dict(step=None), dict(step="4"), dict(settings=None), dict(settings=dict(model_dim="48")),
    dict(settings=dict(model_dim=-48)), dict(settings=dict(attention="/bin/sh")), dict(settings=dict(dtype="load"))],
    ids=str)
def test_false_contents(change, checkpoint, tmp_path):
    """Values of another type or meaning in an intact file are told, not used; None stands for what is missing."""
    saved, path = torch.load(checkpoint[4], weights_only=True), tmp_path / "false.pt"
    for key, value in change.items():
        saved[key] = saved[key] | value if isinstance(value, dict) else value
        if value is None:
            del saved[key]
    torch.save(saved, path)
    with pytest.raises(t.UserError, match="false.pt is no intact checkpoint"):
        t.read_checkpoint(str(path))


HARM = """import os, sys, pathlib
pathlib.Path({mark!r}).mkdir()
os._exit(3)
"""


def test_sources_in_logs_are_text(tmp_path, capsys):
    """verify and compare show or compare a log's source, and do not run or import it."""
    mark, paths = tmp_path / "harm", [tmp_path / f"{i}.txt" for i in range(3)]
    harm = HARM.format(mark=str(mark))
    done = subprocess.run([sys.executable, "-c", harm], timeout=60)
    assert done.returncode == 3 and mark.is_dir()  # it would be noticed
    mark.rmdir()
    for i, path in enumerate(paths):
        path.write_text(fake_log(3.27 + i / 1000, seed=i, source=harm + SOURCE * (i == 2), muon_lr="__import__('os')"))
    assert verify.main([*map(str, paths)]) == 1  # the sources differ
    assert compare.main([str(paths[0]), str(paths[2]), f"--out={tmp_path}/c.png"]) == 0
    assert "the sources differ" in capsys.readouterr().out and not mark.exists()


@pytest.mark.parametrize("old, new", [
    ("val_loss:3.27", "val_loss:3.2.7"), ("train_time:1000ms", "train_time:..ms"), ("step:4/8 v", "step:4/0 v"),
    ("num_scheduled_iterations = 6", "num_scheduled_iterations = many"),
    ("num_scheduled_iterations = 6", "num_scheduled_iterations = -6"), ("Driver", "\0\x1b[2J")])
def test_false_logs(tmp_path, old, new):
    """Results that are no numbers are a failed run or an error of one line, never a crash."""
    text, paths = fake_log(seed=1), [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert old in text
    paths[0].write_text(fake_log(3.26))
    paths[1].write_text(text.replace(old, new))
    assert verify.main([*map(str, paths)]) in (1, 2)
    assert compare.main([*map(str, paths), f"--out={tmp_path}/c.png"]) in (0, 2)


def dangers(tree):
    """(line, what) of the calls and imports that can run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            for name in {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib"}.intersection(names):
                yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec", "compile", "os.system", "os.popen", "runpy.run_path"):
            yield node.lineno, name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if keywords.get("shell", "False") != "False" or name in ("subprocess.getoutput", "subprocess.getstatusoutput"):
            yield node.lineno, f"{name} with a shell"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{name} with pickle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_executes_what_it_reads(path):
    found = [what for _, what in dangers(ast.parse(path.read_text()))]
    if path == Path(__file__):  # it makes malicious files and shows that they are
        assert sorted(found) == ["import pickle", "torch.load without weights_only=True"]
    else:
        assert not found


@pytest.mark.parametrize("code", [
    "eval(x)", "exec(x)", "exec(compile(x, 'f', 'exec'))", "os.system(x)", "os.popen(x)", "import pickle",
    "from pickle import loads", "import os, marshal", "torch.load(x)", "torch.load(x, weights_only=False)",
    "subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=flag)", "subprocess.getoutput(x)",
    "np.load(x, allow_pickle=True)"])
def test_dangers_are_seen(code):
    assert list(dangers(ast.parse(code)))


def test_safe_calls_are_not_dangers():
    code = "torch.load(x, weights_only=True); re.compile(x); torch.compile(f); subprocess.run([x]); model.eval()"
    assert not list(dangers(ast.parse(code)))
