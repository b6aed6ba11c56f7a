"""Tests of tools/compare.py on logs written here."""

import math
from dataclasses import replace

import compare
import numpy as np
import pytest
import runlogs
from fake_logs import fake_log
from scipy import stats

A, B = (3.30, 3.32, 3.31), (3.28, 3.29)
STEPS, UNIT = 38, 1000  # 12 steps of each third and 2 of the extension, which take 1, 2, 3 and 4 units each
COST = UNIT * (12 * (1 + 2 + 3) + 2 * 4)


@pytest.fixture
def folders(tmp_path):
    """Two sets: three runs below a, two that take half the time below b, with a failed one and what is no log."""
    texts = {f"a/{i}/logs/x.txt": fake_log(loss, COST, i, steps=STEPS) for i, loss in enumerate(A)}
    texts |= {f"b/{i}.txt": fake_log(loss, COST / 2, i, steps=STEPS) for i, loss in enumerate(B)}
    texts |= {"b/crash.txt": fake_log(9.0, seed=7, steps=STEPS, stop=30), "b/notes.txt": "no log"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return str(tmp_path / "a"), str(tmp_path / "b")


def test_table_and_plot(folders, tmp_path, capsys):
    """Differences with intervals by step, times by stage, and a PNG."""
    png = tmp_path / "out.png"
    assert compare.main([*folders, f"--out={png}"]) == 0
    out, err = capsys.readouterr()
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    welch = stats.ttest_ind(B, A, equal_var=False).confidence_interval(0.95)
    interval = f"-0.0250 [{welch.low:+.4f}, {welch.high:+.4f}]"
    assert {"0", "19", "38", "final"} <= set(rows)
    assert all(interval in rows[step] for step in ("0", "19", "38", "final"))
    assert rows["final"].split()[1:3] == ["3.3100", "3.2850"]
    # training losses of steps 20 .. 38: 0.05 below the validation losses, 0.1 lower each step
    assert rows["38"].split()[6:8] == [f"{loss + 0.1 * 9 - 0.05:.4f}" for loss in (3.31, 3.285)]
    for stage in (1, 2, 3):
        assert rows[f"stage {stage}, ms a step"].split()[5:8] == [f"{stage * UNIT}.00", f"{stage * UNIT / 2:.2f}",
                                                                  "0.5000"]
    assert rows["total, s"].split()[2:5] == [f"{COST / 1000:.3f}", f"{COST / 2000:.3f}", "0.5000"]
    assert "crash.txt: no final validation line, last step 29 of 38" in out
    assert "skipped" in err and "notes.txt" in err
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) > 10_000


def test_single_files(tmp_path, capsys):
    """One public log against one of ours: no interval, no training loss, and a missing stage 4."""
    for name, public in (("a", True), ("b", False)):
        (tmp_path / f"{name}.txt").write_text(fake_log(3.3, COST, steps=STEPS, public=public))
    assert compare.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), f"--out={tmp_path}/c.png"]) == 0
    out = capsys.readouterr().out
    assert "Intervals need two" in out and "[" not in out and "nan" not in out
    (stage,) = (line.split() for line in out.splitlines() if line.startswith("stage 4"))
    assert stage[5] == "-" and stage[7:] == ["-", "-"]


def test_stage_times(tmp_path):
    """Lines that are a step late do not blur the stages; without configuration, stages are thirds of all steps."""
    path = tmp_path / "x.txt"
    path.write_text(fake_log(ms=COST, steps=STEPS))
    log = runlogs.read_log(path)
    assert log.stage_bounds() == [0, 12, 24, 36, 38] and log.stage_ms()[:3] == [1000, 2000, 3000]
    on_time = runlogs.Line(12, 3.3, 12 * UNIT)  # a validation at a stage's first step
    log = replace(log, val=[*log.val, on_time], train=[on_time if x.step == 12 else x for x in log.train])
    assert log.stage_ms()[:3] == [1000, 2000, 3000]
    path.write_text(fake_log(ms=COST, steps=STEPS, public=True, train=False))
    log = runlogs.read_log(path)
    assert log.stage_bounds() == [0, 13, 25, 38]
    assert all(math.isnan(ms) for ms in log.stage_ms())  # a validation each is too few


def test_window_means():
    lines = [runlogs.Line(step, step / 10, 100.0 * step) for step in range(1, 7)]
    first, second, empty = compare.window_means(lines, [0, 2, 6, 9])
    assert first == pytest.approx((1.5, 0.15, 150)) and second == pytest.approx((4.5, 0.45, 450))
    assert empty.step == 9 and np.isnan(empty.loss)


@pytest.mark.parametrize("name, words", [("missing", "cannot read"), ("empty", "no log of a finished run"),
                                         ("crash.txt", "no log of a finished run")])
def test_nothing_to_compare(folders, tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "crash.txt").write_text(fake_log(stop=5))
    assert compare.main([folders[0], str(tmp_path / name), f"--out={tmp_path}/c.png"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and name in err
    assert not (tmp_path / "c.png").exists()


def test_plot_that_cannot_be_written(folders, tmp_path, capsys):
    assert compare.main([*folders, f"--out={tmp_path}/none/c.png"]) == 2
    assert "choose another --out" in capsys.readouterr().err
