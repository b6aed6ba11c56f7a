"""--trials: several seeds after one set-up, each as if it had been started alone."""

import re
from pathlib import Path

import forks
import pytest

import train_gpt as t

ROOT = Path(t.__file__).resolve().parent


def start(files, folder, *args):
    return forks.run(
        ROOT / "train_gpt.py", "--preset=demo", "--model_dim=48", "--head_dim=8", "--batch_unit=128",
        "--vocab_size=256", "--val_tokens=1024", "--val_chunk=256", "--num_scheduled_iterations=3", "--val_every=2",
        "--num_extension_iterations=1", f"--log_dir={folder}", *(f"--{k}={v}" for k, v in files.items()), *args,
        timeout=120)


def lines(path):
    """The losses of a log's steps and validations, without times."""
    return re.findall(r"^(step:\d+/4 \w+_loss:\S+)", path.read_text(), re.M)


def test_trials(byte_files, tmp_path):
    """The second of two seeds trains what it trains alone, and verify.py has the last word."""
    both = start(byte_files, tmp_path, "--trials=2", "--seed=4", "--run_id=a")
    assert both.returncode == 0, both.stderr
    logs = [tmp_path / f"a_seed{seed}.txt" for seed in (4, 5)]
    assert sorted(tmp_path.glob("*.txt")) == logs
    alone = start(byte_files, tmp_path / "alone", "--seed=5", "--run_id=b")
    assert alone.returncode == 0, alone.stderr
    assert len(lines(logs[1])) == 4 + 3
    assert lines(logs[0]) != lines(logs[1]) == lines(tmp_path / "alone" / "b.txt")
    assert "\nseed = 5\n" in logs[1].read_text()
    assert all(str(log) in both.stdout for log in logs) and re.search("verdict|not verified|mean", both.stdout)


@pytest.mark.parametrize("args,text", [
    (["--trials=0"], "--trials=0 must be positive"), (["--trials=2", "--resume=x"], "use it without --trials")])
def test_refused(args, text):
    with pytest.raises(t.UserError, match=text):
        t.parse_args(args)
