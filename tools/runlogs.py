"""Reads the logs of train_gpt.py and of the public speedrun's scripts, and compares two samples of numbers.

A log holds the source of the script, a line of 100 `=`, versions and nvidia-smi, another such line, with us the
configuration and a third one, then a line a validation and mostly a line a step. Only what follows the last of these
lines is searched for results: the source may hold text that looks like them.
"""

import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RULE = re.compile(r"^={100}\n", re.M)
# A source may hold such a rule too, or end without newline; the rule that ends it is followed by the versions
END_OF_SOURCE = re.compile(r"={100}\n(?=(?:Running )?Py(?:thon|torch)\b)", re.M | re.I)
STEP_LINE = re.compile(
    r"^step:(\d+)/(\d+) (?:(val|train)_loss:(\d+\.?\d*|-?inf|nan) )?train_time:(\d+\.?\d*)ms", re.M)
SETTING = re.compile(r"^(\w[\w ]*) = (.*)$", re.M)
VERSION = re.compile(r"^(?:Running )?((?:Python|PyTorch|Triton)\b.*?) *$", re.M | re.I)
DRIVER = re.compile(r"Driver Version: *\S+ +CUDA Version: *\S+")
GPU = re.compile(r"^\| +\d+ +(\S.*?) +(?:On|Off|N/A) +\|", re.M)
RANKS = re.compile(r", (\d+) ranks$", re.M)
STAGES = 3  # equal parts of the scheduled steps


class LogError(Exception):
    """Logs that cannot be used, told in one line that names the cause and the remedy."""


class Line(NamedTuple):
    """A line of a log that tells a step; times in ms."""

    step: int
    loss: float  # nan where the line has none
    ms: float  # train_time


@dataclass(frozen=True)
class RunLog:
    """What a log says; see read_log."""

    path: Path
    source: str
    versions: tuple[str, ...]  # see read_versions
    gpus: str  # number and name of the devices
    config: dict[str, str]  # values as they are written; empty for logs without configuration
    results: str  # the text after the last rule
    steps: int  # of the whole run; 0 if no line says it
    changed: tuple[str, ...]  # settings, "source" and "versions", as far as a resumption of the run changed them
    val: list[Line]
    train: list[Line]

    @property
    def failure(self) -> str:
        """Why this is not one finished run; empty if it is."""
        final = [line for line in self.val if line.step == self.steps]
        if len(final) > 1:
            return f"{len(final)} final validation lines"
        if not final:
            last = max((line.step for line in self.val + self.train), default=None)
            return "no step" if last is None else f"no final validation line, last step {last} of {self.steps}"
        return "" if math.isfinite(final[0].loss) else f"final loss {final[0].loss}"

    @property
    def loss(self) -> float:
        """Final validation loss of a finished run."""
        return self.val[-1].loss

    @property
    def seconds(self) -> float:
        """Training time of a finished run: train_time of its final line."""
        return self.val[-1].ms / 1000

    def stage_bounds(self) -> list[int]:
        """First step of each stage, and the number of steps as the last entry."""
        try:
            scheduled, extension = (int(self.config[f"num_{k}_iterations"]) for k in ("scheduled", "extension"))
        except (KeyError, ValueError):
            scheduled, extension = self.steps, 0
        bounds = [round(i * scheduled / STAGES) for i in range(STAGES + 1)]
        return bounds + [scheduled + extension] * (extension > 0)

    def stage_ms(self) -> list[float]:
        """Milliseconds a step of each stage: the slope between its first and its last line, nan without two lines.

        A step's line is written up to a step late, except before a validation. So it is lines of steps without
        validation that are compared, and of these the last step's is left out; validation lines serve if there are
        no others.
        """
        bounds, validated, slopes = self.stage_bounds(), {line.step for line in self.val}, []
        for first, end in zip(bounds, bounds[1:]):
            lines = [x for x in self.train if first <= x.step < end and x.step not in validated]
            if len(lines) < 2:
                lines = [x for x in self.val if first <= x.step <= end]
            a, b = (lines[0], lines[-1]) if len(lines) > 1 else (Line(0, 0, math.nan), Line(1, 0, math.nan))
            slopes.append((b.ms - a.ms) / (b.step - a.step))
        return slopes


def read_part(text: str) -> tuple[str, dict[str, str], str]:
    """Environment, configuration and results of what follows a source, up to the end of the log."""
    environment, *blocks = RULE.split(text)
    return environment, dict(SETTING.findall(blocks[0])) if len(blocks) > 1 else {}, blocks[-1] if blocks else ""


def read_versions(environment: str) -> tuple[str, ...]:
    """Python, PyTorch, Triton, driver and CUDA."""
    return tuple(VERSION.findall(environment) + DRIVER.findall(environment))


def read_log(path: Path) -> RunLog:
    """Parse a log, of a finished run or not; raises LogError if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}; name existing log files") from None
    ends = list(END_OF_SOURCE.finditer(text))  # a resumed run has several
    if not ends:
        raise LogError(f"{path} is not a log: no line of 100 '=' with versions below it; name files that a training "
                       "script wrote")
    source, environment, config, changed = text[: ends[0].start()], *read_part(text[ends[0].end() :])[:2], set()
    versions = read_versions(environment)
    for end in ends[1:]:
        later, settings, _ = read_part(text[end.end() :])
        differs = {key: config.get(key) != settings.get(key) for key in config.keys() | settings.keys()}
        differs |= {"source": not text.endswith(source, 0, end.start()), "versions": versions != read_versions(later)}
        changed |= {key for key, value in differs.items() if value}
    results = read_part(text[ends[-1].end() :])[2]
    names, ranks = GPU.findall(environment), RANKS.search(environment)
    name = "CPU" if config.get("device") == "'cpu'" else " / ".join(sorted(set(names))) or "unknown device"
    gpus = f"{ranks[1] if ranks else len(names) or '?'} x {name}"
    kinds, steps = {"val": [], "train": []}, 0
    for step, total, kind, loss, ms in STEP_LINE.findall(results):
        kinds[kind or "train"].append(Line(int(step), float(loss or "nan"), float(ms)))
        steps = int(total)
    return RunLog(path, source, versions, gpus, config, results, steps, tuple(sorted(changed)), **kinds)


def read_set(path: Path) -> tuple[list[RunLog], list[RunLog]]:
    """Finished and failed runs of a log file or of all logs below a directory; raises LogError if none finished.

    Text files of a directory that are no logs are named on stderr.
    """
    logs = []
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        try:
            logs.append(read_log(file))
        except LogError as error:
            if file == path:
                raise
            print(f"skipped: {error}", file=sys.stderr)
    finished, failed = [x for x in logs if not x.failure], [x for x in logs if x.failure]
    if not finished:
        raise LogError(f"{path}: no log of a finished run; name a log file or a directory with some")
    return finished, failed


class Interval(NamedTuple):
    """A mean or a difference of means with its 95 % interval; nan where there are too few numbers."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # two-sided, of the value being 0

    def text(self, digits: int) -> str:
        value = "-" if math.isnan(self.value) else f"{self.value:+.{digits}f}"
        return value if math.isnan(self.low) else f"{value} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def t_interval(test: Any, value: float) -> Interval:
    """A value with the interval and the p of what scipy.stats returned for it."""
    return Interval(value, *map(float, test.confidence_interval(CONFIDENCE)), float(test.pvalue))


def mean_interval(x: Sequence[float]) -> Interval:
    """Student's t interval of a mean. Given the differences of pairs, this is the paired test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, of equal numbers: their interval is a point
        return t_interval(stats.ttest_1samp(x, 0), np.mean(x).item()) if len(x) > 1 else Interval(*x)


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of b minus mean of a, with Welch's t interval and test."""
    value = np.mean(b).item() - np.mean(a).item()
    if min(len(a), len(b)) < 2:
        return Interval(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return t_interval(stats.ttest_ind(b, a, equal_var=False), value)
