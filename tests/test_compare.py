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
    texts |= {"b/crash.txt": fake_log(9.0, seed=7, steps=STEPS, stop=30), "b/notes.txt": "no log",
              "b/crash.csv": "step,train_loss\n1,9\n"}
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
    assert "crash.txt: no final validation line, last step 29 of 38" in out and "stages differ" not in out
    assert "A: 3 runs of 38 steps" in out
    assert len(err.splitlines()) == 1 and "skipped" in err and "notes.txt" in err  # and not the table beside a log
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) > 10_000


def test_single_files(tmp_path, capsys):
    """One public log against one of ours: no interval, no training loss, and a missing stage 4."""
    for name, public in (("a", True), ("b", False)):
        (tmp_path / f"{name}.txt").write_text(fake_log(3.3, COST, steps=STEPS, public=public))
    assert compare.main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), f"--out={tmp_path}/c.png"]) == 0
    out = capsys.readouterr().out
    assert "Intervals need two" in out and "[" not in out and "nan" not in out and "A: 1 run of 38 steps" in out
    assert "The stages differ. A: 0-12, 13-24, 25-37; B: 0-11, 12-23, 24-35, 36-37" in out.splitlines()
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


@pytest.mark.parametrize("bounds", [[0, 10, 38], [0, 4, 12, 24, 36, 38], [0, 38]])
def test_stages_of_the_table(tmp_path, capsys, bounds):
    """As many stages as the log's table has, each with its own steps, and as many rows; others are told."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(fake_log(ms=COST, steps=STEPS, bounds=bounds if i else [0, 12, 38]))
    log = runlogs.read_log(tmp_path / "1.txt")
    assert log.stage_bounds() == bounds and log.config["attention used"] == "torch" and len(log.train) == STEPS
    cost = [1 + min(3 * step // (STEPS - 2), 3) for step in range(STEPS)]  # of the step that a log's line ends
    for first, end, ms in zip(bounds, bounds[1:], log.stage_ms()):
        lines = [step for step in range(max(first, 1), end) if step not in (0, STEPS // 2)]  # without validation
        # a line shows the time a step late
        expected = sum(cost[lines[0] + 1 : lines[-1] + 1]) / (len(lines) - 1) if len(lines) > 1 else math.nan
        assert ms == pytest.approx(UNIT * expected, rel=0.1, nan_ok=True)
    assert compare.main([str(tmp_path / "0.txt"), str(tmp_path / "1.txt"), f"--out={tmp_path}/c.png"]) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("stage ") for line in out.splitlines()) == max(2, len(bounds) - 1)
    ranges = ", ".join(f"{a}-{b - 1}" for a, b in zip(bounds, bounds[1:]))
    assert f"The stages differ. A: 0-11, 12-37; B: {ranges}" in out.splitlines()


@pytest.mark.parametrize("table, bounds", [
    ("STAGES\nsteps  lr\n0-3    1.0\n4-7    2.0\n", [0, 4, 8]),  # left-aligned, and the last of its block
    ("STAGES\nwindow  steps  cut\n   1-3    0-3  1-2\n   3-7    4-7  4-7\n\n", [0, 4, 8]),  # other pairs beside them
    ("STAGES\nlr  steps\n1   0-3\n2   5-7\n", []),  # a step is missing
    ("STAGES\nlr  steps\n1   2-3\n", []), ("STAGES\nlr  steps\n1   none\n", []), ("STAGES = 3\nseed = 0\n", []),
    ("STEPS\nsteps\n0-3\n", [])])
def test_read_bounds(table, bounds):
    assert runlogs.read_bounds(f"seed = 0\n{table}{'=' * 100}\n") == bounds


def drawn(a, b, tmp_path, monkeypatch):
    """The panels of a plot: by name, the label and the points of each labelled line."""
    figures, subplots = [], compare.Figure.subplot_mosaic

    def keep(self, *args, **kwargs):
        figures.append(subplots(self, *args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(compare.Figure, "subplot_mosaic", keep)
    compare.plot(a, b, ("A", "B"), tmp_path / "c.png")
    return {name: {line.get_label(): line.get_xydata() for line in axis.get_lines() if line.get_label()[0] != "_"}
            for name, axis in figures[0].items()}


def test_plot_tells_equal_curves_apart(folders, tmp_path, monkeypatch):
    """A panel of its own for the difference: the means' at each validation, and 0 for equal sets."""
    (a, _), (b, _) = (runlogs.read_set(runlogs.Path(folder)) for folder in folders)
    panels = drawn(a, b, tmp_path, monkeypatch)
    assert panels["difference"]["validation"] == pytest.approx(np.array([[0, -0.025], [19, -0.025], [38, -0.025]]))
    assert panels["difference"]["training"][:, 1] == pytest.approx(-0.025)
    assert panels["step"]["B validation"][:, 1] == pytest.approx(panels["step"]["A validation"][:, 1] - 0.025)
    panels = drawn(a, a, tmp_path, monkeypatch)
    assert (panels["difference"]["validation"][:, 1] == 0).all() and len(panels["step"]) == len(panels["time"]) == 4


@pytest.mark.parametrize("public", [False, True])
def test_plot_shows_what_it_names(tmp_path, monkeypatch, public):
    """Runs shorter than the plot's windows are whole curves; without training losses there is no such curve."""
    (tmp_path / "x.txt").write_text(fake_log(steps=8, public=public))
    log = runlogs.read_log(tmp_path / "x.txt")
    panels = drawn([log], [log], tmp_path, monkeypatch)
    if public:
        assert set(panels["step"]) == {"A validation", "B validation"} and set(panels["difference"]) == {"validation"}
    else:
        assert panels["step"]["A training"][:, 0].tolist() == list(range(1, 9))
    assert not any(np.isnan(points).any() for panel in panels.values() for points in panel.values())


def test_one_set(folders, tmp_path, monkeypatch, capsys):
    """A single set gets its own columns and a plot without difference."""
    png = tmp_path / "one.png"
    assert compare.main([folders[0], f"--out={png}"]) == 0
    out = capsys.readouterr().out
    final = next(line.split() for line in out.splitlines() if line.strip().startswith("final"))
    assert final == ["final", "3.3100", "-", "-"] and "nan" not in out and "B:" not in out and "Intervals" not in out
    stage = next(line.split() for line in out.splitlines() if line.startswith("stage 2"))
    assert stage[5:] == ["2000.00", "-", "-", "-"]
    assert png.read_bytes().startswith(b"\x89PNG")
    (logs, _) = runlogs.read_set(runlogs.Path(folders[0]))
    panels = drawn(logs, [], tmp_path, monkeypatch)
    assert set(panels) == {"step", "time"} and set(panels["time"]) == {"A validation", "A training"}


def test_window_means():
    lines = [runlogs.Line(step, step / 10, 100.0 * step) for step in range(1, 7)]
    first, second, empty = compare.window_means(lines, [0, 2, 6, 9])
    assert first == pytest.approx((1.5, 0.15, 150)) and second == pytest.approx((4.5, 0.45, 450))
    assert empty.step == 9 and np.isnan(empty.loss)


@pytest.mark.parametrize("name, words", [("missing", "cannot read"), ("empty", "no log here"),
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
