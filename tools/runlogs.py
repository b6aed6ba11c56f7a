"""Reads the logs of train_gpt.py and of the public speedrun's scripts, and compares two samples of numbers.

A log holds the source of the script, a line of 100 `=`, versions and nvidia-smi, another such line, with us the
configuration and the run's tables and a third one, then a line a validation and mostly a line a step. Only what follows
the last of these lines is searched for results: the source may hold text that looks like them.
"""

import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RULE = re.compile(r"^={100}\n", re.M)
# A source may hold such a rule too, or end without newline; the rule that ends it is followed by the versions
END_OF_SOURCE = re.compile(r"={100}\n(?=(?:Running )?Py(?:thon|torch)\b)", re.M | re.I)
# Other fields, name:value, may stand around the loss; public scripts of some tracks give seconds
STEP_LINE = re.compile(r"^step:(\d+)/(\d+)((?: +\w+:\S+)*?) +train_time:(\d+\.?\d*)(ms|s)(?!\S)", re.M)
LOSS = re.compile(r"(?<!\S)(val|train)_loss:(\d+\.?\d*|-?inf|nan)(?!\S)")
MS = {"ms": 1, "s": 1000}
SETTING = re.compile(r"^(\w[\w ]*) = (.*)$", re.M)
VERSION = re.compile(r"^(?:Running )?((?:Python|PyTorch|Triton)\b.*?) *$", re.M | re.I)
DRIVER = re.compile(r"Driver Version: *\S+ +CUDA Version: *\S+")
GPU = re.compile(r"^\| +\d+ +(\S.*?) +(?:On|Off|N/A) +\|", re.M)
RANKS = re.compile(r", (\d+) ranks$", re.M)
# The table of stages: a heading, the names of its columns, a row a stage; its steps are written as first-last
STAGES = re.compile(r"^STAGES\b.*\n(.*(?<!\S)steps(?!\S).*)\n((?:.*\S.*\n)+)", re.M)
STEPS = re.compile(r"(?<!\S)(\d+)-(\d+)(?!\S)")
OLD_STAGES = 3  # equal parts of the scheduled steps


class LogError(Exception):
    """Logs that cannot be used, told in one line that names the cause and the remedy."""


def told(work: Callable[[], int], out: Path) -> int:
    """The exit status of work that writes below a folder; an error of the logs or of writing is one line and 2."""
    try:
        return work()
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: cannot write below {out}: {error}; choose another --out", file=sys.stderr)
    return 2


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
    bounds: list[int]  # first step of each stage and the number of steps, from the table; empty if there is none
    results: str  # the text after the last rule
    steps: int  # of the whole run; 0 if no line says it
    changed: tuple[str, ...]  # settings, "source" and "versions", as far as a resumption of the run changed them
    val: list[Line]
    train: list[Line]

    @property
    def first(self) -> int:
        """The first step that it tells; -1 if none."""
        return min((line.step for line in self.val + self.train), default=-1)

    @property
    def end(self) -> int:
        """The last step: that of the whole run, or where a public script stopped on seeing a validation loss."""
        last = max((line.step for line in self.val + self.train), default=0)
        early = not self.config and last and self.val and self.val[-1].step == last
        return last if early else self.steps

    @property
    def failure(self) -> str:
        """Why this is not one finished run; empty if it is."""
        final = [line for line in self.val if line.step == self.end]
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
        if self.bounds:
            return self.bounds
        # Logs from before the table, ours and the public ones: thirds of the scheduled steps, then the extension
        try:
            scheduled, extension = (int(self.config[f"num_{k}_iterations"]) for k in ("scheduled", "extension"))
        except (KeyError, ValueError):
            scheduled, extension = self.steps, 0
        bounds = [round(i * scheduled / OLD_STAGES) for i in range(OLD_STAGES + 1)]
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


class Part(NamedTuple):
    """What follows a source, up to the source of a resumption or of another run."""

    environment: str
    config: dict[str, str]
    bounds: list[int]
    results: str
    end: int  # of the results


def read_bounds(text: str) -> list[int]:
    """RunLog.bounds from a text with the table of stages; empty without one, or if its stages leave steps out."""
    table = STAGES.search(text)
    if not table:
        return []
    place, rows = re.search(r"(?<!\S)steps(?!\S)", table[1]), []
    for line in table[2].splitlines():
        # Other columns may hold such pairs too; a name and its values begin or end at the same place
        pairs = [(min(abs(x.start() - place.start()), abs(x.end() - place.end())), int(x[1]), int(x[2]))
                 for x in STEPS.finditer(line)]
        if not pairs:
            break
        _, first, last = min(pairs)
        rows.append((first, last + 1))
    bounds = [0, *(end for _, end in rows)]
    whole = [first for first, _ in rows] == bounds[:-1] and bounds == sorted(set(bounds))
    return bounds if rows and whole else []


def read_part(text: str, another: bool) -> Part:
    """Split the text behind a source at its rules. If another source follows, which may hold rules and anything else,
    the results end with a rule or their last line of a step."""
    rules, step = list(RULE.finditer(text)), STEP_LINE.search(text)
    before = [rule.end() for rule in rules if not step or rule.start() < step.start()] or [len(text)]
    between, end = text[before[0] : before[-1]], len(text)
    if another:
        limit = next((rule.start() for rule in rules if rule.start() > before[-1]), end)
        end = max((line.end() for line in STEP_LINE.finditer(text, before[-1], limit)), default=before[-1])
        end = text.find("\n", end) + 1 or end
    return Part(text[: rules[0].start()] if rules else text, dict(SETTING.findall(between)), read_bounds(between),
                text[before[-1] : end], end)


def read_versions(environment: str) -> tuple[str, ...]:
    """Python, PyTorch, Triton, driver and CUDA."""
    return tuple(VERSION.findall(environment) + DRIVER.findall(environment))


def read_lines(results: str) -> list[tuple[str, Line, int]]:
    """Kind (val or train), line, and number of steps of the whole run, of each line that tells a step."""
    lines = []
    for step, total, fields, time, unit in STEP_LINE.findall(results):
        loss = LOSS.search(fields)
        if loss or "_loss:" not in fields:  # a loss that is no number is no result
            kind, value = (loss[1], float(loss[2])) if loss else ("train", math.nan)
            lines.append((kind, Line(int(step), value, float(time) * MS[unit]), int(total)))
    return lines


def apart(results: str) -> list[str]:
    """The results of each run, where a script made several and wrote them one after the other."""
    starts, before = [0], -1
    for line in STEP_LINE.finditer(results):
        step = int(line[1])
        if step < before and step <= 1:  # counted anew
            starts.append(line.start())
        before = step
    return [results[a:b] for a, b in itertools.pairwise([*starts, len(results)])]


def make_log(path: Path, source: str, part: Part, results: str) -> RunLog:
    """The run that a part of a log tells of."""
    names, ranks = GPU.findall(part.environment), RANKS.search(part.environment)
    name = "CPU" if part.config.get("device") == "'cpu'" else " / ".join(sorted(set(names))) or "unknown device"
    lines = read_lines(results)
    return RunLog(path, source, read_versions(part.environment), f"{ranks[1] if ranks else len(names) or '?'} x {name}",
                  part.config, part.bounds, results, lines[-1][2] if lines else 0, (),
                  *([line for kind, line, _ in lines if kind == k] for k in ("val", "train")))


def resumed(first: RunLog, later: RunLog) -> RunLog | None:
    """The whole run, if `later` goes on with `first`; its results are the later ones. None if it is another run."""
    if later.first in (0, 1) and (not first.failure or not first.config):
        return None
    differs = {key: first.config.get(key) != later.config.get(key) for key in first.config.keys() | later.config.keys()}
    differs |= {"source": first.source != later.source, "versions": first.versions != later.versions}
    changed = {*first.changed, *(key for key, value in differs.items() if value)}
    return replace(first, bounds=later.bounds, results=later.results, steps=later.steps,
                   changed=tuple(sorted(changed)), val=later.val, train=later.train)


def read_logs(path: Path) -> list[RunLog]:
    """Parse a log with one run, finished or not, or with several; raises LogError if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}; name existing log files") from None
    ends = list(END_OF_SOURCE.finditer(text))  # a resumed run has several
    if not ends:
        raise LogError(f"{path} is not a log: no line of 100 '=' with versions below it; name files that a training "
                       "script wrote")
    first, last, runs = text[: ends[0].start()], 0, []
    for end, after in itertools.zip_longest(ends, ends[1:]):
        source = first if text.endswith(first, last, end.start()) else text[last : end.start()]
        stop = after.start() if after else len(text)
        again = bool(after) and text.endswith(first, end.end(), stop)
        part = read_part(text[end.end() : stop - len(first) * again], bool(after) and not again)
        last = end.end() + part.end
        for i, results in enumerate(apart(part.results)):
            log = make_log(path, source, part, results)
            whole = resumed(runs[-1], log) if runs and i == 0 else None
            runs[-1:] = [whole] if whole else [*runs[-1:], log]
    if len(runs) > 1:
        runs = [replace(log, path=Path(f"{path} run {i}")) for i, log in enumerate(runs, 1)]
    return runs


def read_log(path: Path) -> RunLog:
    """Parse a log of one run, finished or not; raises LogError if there is none."""
    log, *others = read_logs(path)
    if others:
        raise LogError(f"{path} holds {len(others) + 1} runs; choose a log of one")
    return log


def read_path(path: Path) -> list[RunLog]:
    """The runs of a log file or of all logs below a directory; raises LogError if there are none.

    Text files of a directory that are no logs are named on stderr.
    """
    if not path.is_dir():
        return read_logs(path)
    logs = []
    for file in sorted(path.rglob("*.txt")):
        try:
            logs += read_logs(file)
        except LogError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if not logs:
        raise LogError(f"{path}: no log here; name a log file or a directory with some")
    return logs


def read_set(path: Path) -> tuple[list[RunLog], list[RunLog]]:
    """Finished and failed runs of read_path; raises LogError if none finished."""
    logs = read_path(path)
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
