"""Compares two sets of logs: losses by step, milliseconds a step by stage, total time, and a plot of the losses.

    python tools/compare.py records/old records/new --out=compare.png
    python tools/compare.py logs/a.txt logs/b.txt

A set is a log file, or a directory whose logs, at any depth, are taken together. Differences are B minus A, with 95 %
intervals of Welch's t-test. Runs that did not finish are named and left out. A training loss is the mean of the steps
since the row above. Exit status: 0, or 2 if there is nothing to compare.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterable
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
    """Mean of A, mean of B, and their difference."""
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


def time_rows(a: list[RunLog], b: list[RunLog]) -> list[str]:
    """The table of times: milliseconds a step by stage, and seconds of the run."""
    def row(name: str, x: list[float], y: list[float], digits: int) -> str:
        mean_a, mean_b, change = columns(x, y, digits)
        return TIME_ROW.format(name, mean_a, mean_b, text(np.mean(y) / np.mean(x), 4), change).rstrip()

    rows = [TIME_ROW.format("", "A", "B", "B / A", "B - A").rstrip()]
    stages = [[log.stage_ms() for log in logs] for logs in (a, b)]
    for i in range(max(len(run) for runs in stages for run in runs)):
        values = ([run[i] if i < len(run) else math.nan for run in runs] for runs in stages)
        rows.append(row(f"stage {i + 1}, ms a step", *values, 2))
    return [*rows, row("total, s", [log.seconds for log in a], [log.seconds for log in b], 3)]


def table(a: list[RunLog], b: list[RunLog]) -> str:
    """What is compared, then the losses, then the times."""
    sets = [f"{name}: {len(logs)} runs of {' / '.join(sorted({str(log.steps) for log in logs}))} steps on "
            f"{', '.join(sorted({log.gpus for log in logs}))}" for name, logs in (("A", a), ("B", b))]
    few = ["Intervals need two finished runs in each set."] if min(len(a), len(b)) < 2 else []
    return "\n".join([*sets, *few, "", *loss_rows(a, b), "", *time_rows(a, b)])


def plot(a: list[RunLog], b: list[RunLog], names: tuple[str, str], path: Path) -> None:
    """Write the PNG: runs thin, means thick; validation in full lines, training in dashed ones."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shown = []
    for logs, name, colour in zip((a, b), names, ("C0", "C1")):
        steps = validated_steps(logs)
        edges = np.linspace(0, max(log.steps for log in logs), PLOT_WINDOWS + 1).astype(int).tolist()
        val = [[line for line in log.val if line.step in steps] for log in logs]
        train = [window_means(log.train, edges) for log in logs]
        for kind, style, runs in (("validation", "o-", val), ("training", "--", train)):
            points = np.array(runs)  # run, point, (step, loss, ms)
            if np.isnan(points[..., 1]).all():
                continue
            mean = points.mean(axis=0)
            shown.append(mean[mean[:, 0] >= PLOT_FROM * mean[-1, 0], 1])
            for axis, column, unit in zip(axes, (0, 2), (1, 1000)):
                for run in points:
                    axis.plot(run[:, column] / unit, run[:, 1], style.strip("o"), color=colour, lw=0.5)
                axis.plot(mean[:, column] / unit, mean[:, 1], style, color=colour, lw=2, ms=4, label=f"{name} {kind}")
    low, high = np.nanmin(np.concatenate(shown)), np.nanmax(np.concatenate(shown))
    margin = 0.05 * (high - low) + 0.01
    axes[0].set(xlabel="step", ylabel="loss", ylim=(low - margin, high + margin))
    axes[1].set(xlabel="training time, s")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="log, or directory of logs")
    parser.add_argument("b", type=Path, metavar="B", help="the logs to compare with them")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), metavar="PNG",
                        help="file of the plot (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        (a, failed_a), (b, failed_b) = read_set(args.a), read_set(args.b)
        for log in failed_a + failed_b:
            print(f"left out: {log.path}: {log.failure}")
        print(table(a, b))
        plot(a, b, (str(args.a), str(args.b)), args.out)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror}; choose another --out", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
