"""Compares two sets of logs: losses by step, milliseconds a step by stage, total time, and a plot of the losses.

    python tools/compare.py records/old records/new --out=compare.png
    python tools/compare.py logs/a.txt logs/b.txt
    python tools/compare.py logs/a.txt                                  # one set alone: its losses, times and plot

A set is a log file, or a directory whose logs, at any depth, are taken together. Differences are B minus A, with 95 %
intervals of Welch's t-test. Runs that did not finish are named and left out. A training loss is the mean of the steps
since the row above. The plot shows the losses by step and by time and, below, the difference by step. Exit status: 0,
or 2 if there is nothing to compare.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Sized
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from runlogs import Line, LogError, RunLog, difference, read_set

LOSS_ROW = "{:>6}  {:>8} {:>8} {:<30} {:>9} {:>8} {:<30}"
TIME_ROW = "{:<18} {:>10} {:>10} {:>9}  {:<30}"
PLOT_WINDOWS = 50  # points of a curve of the training loss
PLOT_FROM = 0.1  # part of the run from which on the plot shows all losses; before, they would flatten the rest


def window_means(lines: list[Line], edges: Iterable[int]) -> list[Line]:
    """Mean step, loss and time of the lines in each window (edge, next edge]; nan where there are none."""
    windows = [[x for x in lines if a < x.step <= b] or [Line(b, math.nan, math.nan)]
               for a, b in itertools.pairwise(edges)]
    return [Line(*np.mean(w, axis=0).tolist()) for w in windows]


def validated_steps(logs: list[RunLog]) -> list[int]:
    """Steps with a validation in every log."""
    return sorted(set.intersection(*({line.step for line in log.val} for log in logs)))


def val_losses(logs: list[RunLog], step: int) -> list[float]:
    """The validation loss of each log at a step."""
    return [line.loss for log in logs for line in log.val if line.step == step]


def text(x: float, digits: int) -> str:
    """x with so many digits, or a dash for nan."""
    return "-" if math.isnan(x) else f"{x:.{digits}f}"


def columns(a: list[float], b: list[float], digits: int) -> tuple[str, str, str]:
    """Mean of A, mean of B, and their difference; the latter two are dashes if B is empty."""
    if not b:
        return text(np.mean(a), digits), "-", "-"
    return text(np.mean(a), digits), text(np.mean(b), digits), difference(a, b).text(digits)


def loss_rows(a: list[RunLog], b: list[RunLog]) -> list[str]:
    """The table of losses: a row for each validation that all logs have, and the last one."""
    steps = validated_steps(a + b)
    trained = [[window_means(log.train, [0, *steps]) for log in logs] for logs in (a, b)]
    rows = [LOSS_ROW.format("step", "val A", "val B", "B - A", "train A", "train B", "B - A")]
    for i, step in enumerate(steps):
        train = columns(*([run[i].loss for run in runs] for runs in trained), 4)
        rows.append(LOSS_ROW.format(step, *columns(val_losses(a, step), val_losses(b, step), 4), *train))
    final = columns([log.loss for log in a], [log.loss for log in b], 4)
    return [row.rstrip() for row in (*rows, LOSS_ROW.format("final", *final, "", "", ""))]


def stage_differences(a: list[RunLog], b: list[RunLog]) -> list[str]:
    """A line if not all logs have the same stages, as a row then compares those of one number only."""
    kinds = [sorted({tuple(log.stage_bounds()) for log in logs}) for logs in (a, b)]
    if len(set(itertools.chain(*kinds))) < 2:
        return []
    texts = (" / ".join(", ".join(f"{x}-{y - 1}" for x, y in itertools.pairwise(bounds)) for bounds in kind)
             for kind in kinds if kind)
    return ["The stages differ. " + "; ".join(f"{name}: {steps}" for name, steps in zip("AB", texts))]


def time_rows(a: list[RunLog], b: list[RunLog]) -> list[str]:
    """The table of times: milliseconds a step by stage, and seconds of the run."""
    def row(name: str, x: list[float], y: list[float], digits: int) -> str:
        mean_a, mean_b, change = columns(x, y, digits)
        ratio = text(np.mean(y) / np.mean(x), 4) if y else "-"
        return TIME_ROW.format(name, mean_a, mean_b, ratio, change).rstrip()

    rows = [TIME_ROW.format("", "A", "B", "B / A", "B - A").rstrip()]
    stages = [[log.stage_ms() for log in logs] for logs in (a, b)]
    for i in range(max(len(run) for runs in stages for run in runs)):
        values = ([run[i] if i < len(run) else math.nan for run in runs] for runs in stages)
        rows.append(row(f"stage {i + 1}, ms a step", *values, 2))
    return [*rows, row("total, s", [log.seconds for log in a], [log.seconds for log in b], 3)]


def table(a: list[RunLog], b: list[RunLog]) -> str:
    """What is compared, then the losses, then the times. B may be empty."""
    sets = [f"{name}: {len(logs)} run{'s' * (len(logs) > 1)} of {' / '.join(sorted({str(log.end) for log in logs}))} "
            f"steps on {', '.join(sorted({log.gpus for log in logs}))}" for name, logs in (("A", a), ("B", b)) if logs]
    few = ["Intervals need two finished runs in each set."] if b and min(len(a), len(b)) < 2 else []
    return "\n".join([*sets, *few, "", *loss_rows(a, b), "", *stage_differences(a, b), *time_rows(a, b)])


def curves(logs: list[RunLog], kind: str, edges: list[int]) -> np.ndarray:
    """Array [run, point, (step, loss, ms)] of the points at which all runs have a loss of that kind."""
    if kind == "validation":
        by_step = [{line.step: line for line in log.val} for log in logs]
        points = np.array([[lines[step] for step in validated_steps(logs)] for lines in by_step])
    else:
        points = np.array([window_means(log.train, edges) for log in logs])
    return points[:, ~np.isnan(points[..., 1]).any(axis=0)]


def visible(style: str, points: Sized) -> str:
    """The style, or a dot where there is one point, of which a line would show nothing."""
    return style if len(points) > 1 else "o"


def plot(a: list[RunLog], b: list[RunLog], names: tuple[str, str], path: Path) -> None:
    """Write the PNG: losses by step and by time, runs thin and means thick, validation in full lines, training in
    dashed ones; below, if there is a B, its mean differences from A, which tell curves apart that look the same."""
    figure = Figure(figsize=(13, 8 if b else 5), layout="constrained")
    panels = [["step", "time"], ["difference", "time"]] if b else [["step", "time"]]
    axes = figure.subplot_mosaic(panels, height_ratios=[2, 1][: len(panels)])
    axes["time"].sharey(axes["step"])
    # both sets at the same steps, so that their points can be subtracted
    edges = np.unique(np.linspace(0, max(log.end for log in a + b), PLOT_WINDOWS + 1).astype(int)).tolist()
    shown = []
    for kind, style in (("validation", "o-"), ("training", "--")):
        sets = [curves(logs, kind, edges) for logs in (a, b) if logs]
        # B, drawn over A, is thinner: where both are equal, A is seen on both sides of it
        for points, name, colour, width in zip(sets, names, ("C0", "C1"), (4, 1.5) if b else (2,)):
            if not points.shape[1]:
                continue
            mean = points.mean(axis=0)
            shown.append(mean[mean[:, 0] >= PLOT_FROM * mean[-1, 0], 1])
            for axis, column, unit in ((axes["step"], 0, 1), (axes["time"], 2, 1000)):
                for run in points:
                    axis.plot(run[:, column] / unit, run[:, 1], style.strip("o"), color=colour, lw=0.5)
                axis.plot(mean[:, column] / unit, mean[:, 1], visible(style, mean), color=colour, lw=width,
                          ms=width + 2, label=f"{name} {kind}")
        if b:
            of_a, of_b = ({step: loss for step, loss, _ in points.mean(axis=0)} for points in sets)
            steps = [step for step in of_a if step in of_b]
            if steps:
                axes["difference"].plot(steps, [of_b[step] - of_a[step] for step in steps], visible(style, steps),
                                        color="C2", ms=4, label=kind)
    low, high = np.nanmin(np.concatenate(shown)), np.nanmax(np.concatenate(shown))
    margin = 0.05 * (high - low) + 0.01
    axes["step"].set(xlabel="step", ylabel="loss", ylim=(low - margin, high + margin))
    axes["time"].set(xlabel="training time, s")
    if b:
        axes["difference"].set(xlabel="step", ylabel="B - A", xlim=axes["step"].get_xlim())
        axes["difference"].axhline(0, color="black", lw=0.5)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="log, or directory of logs")
    parser.add_argument("b", type=Path, nargs="?", metavar="B", help="the logs to compare with them, if any")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="PNG",
                        help="file of the plot (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        (a, failed_a), (b, failed_b) = read_set(args.a), read_set(args.b) if args.b else ([], [])
        for log in failed_a + failed_b:
            print(f"left out: {log.path}: {log.failure}")
        print(table(a, b))
        plot(a, b, (f"A: {args.a}", f"B: {args.b}"), args.out)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
