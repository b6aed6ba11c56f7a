"""Makes the folder of a record, or of what is none, from its logs: records/DATE_NAME, where the why is left to write.

    python tools/record.py NAME logs/seed*.txt --baseline logs_old/*.txt

The folder gets the logs, verify.json, compare.png and compare.txt, the differences of script and settings from the
baseline as script.diff and settings.diff, and README.md: records/TEMPLATE with every number filled in. A baseline in a
folder beside the new one stays there; of two logs with the same name the baseline's gets the prefix baseline_. Logs of
different sources are refused, and fewer finished runs than verify.py needs; what else verify.py finds makes the text
say that it is no record. Exit status: 0 written, 2 bad input.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from compare import plot
from compare import table as compare_table
from runlogs import RULE, LogError, RunLog, read_logs, told
from verify import CLOCK, MIN_RUNS, OWN_KEYS, TARGET, check, interval, number, runs, statistics

RECORDS = Path(__file__).resolve().parents[1] / "records"
PEAK = re.compile(r"^peak memory allocated: (\d+) MiB", re.M)
TRACK_GPUS = re.compile(r"8 x .*\bH100\b")
TO_WRITE = "the title, what changed, why it is faster, and the credits"


def read_all(paths: Sequence[Path], what: str) -> list[RunLog]:
    """The runs of log files, named as the copies will be; raises LogError, also if they are of different sources."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise LogError(f"two logs of {what} have the same name; rename one of {', '.join(map(str, paths))}")
    logs = [log for path in paths for log in read_logs(path)]
    if (sources := len({log.source for log in logs})) > 1:
        raise LogError(f"the logs of {what} hold {sources} sources; verify.py shows how they differ, and a record has "
                       "one")
    return logs


def file_of(log: RunLog) -> Path:
    """The file of a run, which may hold several."""
    return Path(re.sub(r" run \d+$", "", str(log.path)))


def renamed(logs: list[RunLog], names: dict[str, str]) -> list[RunLog]:
    """The logs under the names that their files have in the new folder."""
    files = [str(file_of(log)) for log in logs]
    return [replace(log, path=Path(names[file] + str(log.path)[len(file):])) for log, file in zip(logs, files)]


def settings(log: RunLog) -> list[str]:
    """The lines of a log's keys and tables, but for what is each run's own; none of logs without them."""
    text = file_of(log).read_text(encoding="utf-8", errors="replace").removeprefix(log.source)
    lines = RULE.split(text)[2].splitlines() if log.config else []
    return [line for line in lines if line.partition(" = ")[0] not in OWN_KEYS]


def difference(before: list[str], after: list[str], name: str) -> str:
    """A unified diff, empty if both are the same."""
    return "".join(f"{line}\n" for line in difflib.unified_diff(before, after, f"before/{name}", f"after/{name}",
                                                                lineterm=""))


def changed_lines(diff: str) -> str:
    """How many lines a unified diff adds and takes away."""
    lines = diff.splitlines()[2:]
    return "lines added: {}, removed: {}".format(*(sum(line.startswith(sign) for line in lines) for sign in "+-"))


def machine(log: RunLog) -> str:
    """GPUs and versions of a run."""
    return "; ".join([log.gpus, *(" ".join(version.split()) for version in log.versions)])


def backends(log: RunLog) -> str:
    """Attention and kernels of a run, as far as its log tells."""
    keys = "attention", "kernels"
    used = [log.config.get(f"{key} used", log.config.get(key, "unknown")).strip("'") for key in keys]
    return "attention {}, kernels {}".format(*used)


def peak_memory(logs: list[RunLog]) -> str:
    """The most memory that a run allocated, as its log says."""
    peaks = [int(peak) for log in logs for peak in PEAK.findall(log.results)]
    return f"{max(peaks):,} MiB" if peaks else "-"


def seeds(logs: list[RunLog]) -> str:
    """The runs' seeds, as far as the logs tell."""
    return ", ".join(log.config.get("seed", "unknown") for log in logs)


def column(logs: list[RunLog], target: float) -> dict[str, str]:
    """The cells of the template's table for a set of runs, by the first words of their row."""
    facts = statistics(logs, target)
    done = [log for log in logs if not log.failure]
    steps = {log.end for log in done}
    time = facts["time_mean_s"]
    return {
        "validation loss, mean": number(facts["loss_mean"], ".5f"),
        "standard deviation": number(facts["loss_std"], ".5f"),
        "runs": f"{facts['finished']} of {facts['runs']}, seeds {seeds(logs)}",
        "p-value": number(facts["p"], ".3g"),
        "training time": f"{number(time, '.3f')} s, 95 % interval {interval(facts['time_95_s'], '.3f')}",
        "steps": " / ".join(map(str, sorted(steps))) or "-",
        "ms a step": f"{1000 * time / np.mean([log.end for log in done]):.2f}" if time is not None else "-",
        "peak memory": peak_memory(done),
    }


def verdict(facts: dict, logs: list[RunLog]) -> str:
    """The first paragraph: whether it is a record, and if not, why."""
    found = [*facts["problems"], *sorted({f"it ran on {log.gpus}, not on 8 H100s" for log in logs
                                          if not TRACK_GPUS.match(log.gpus)})]
    measured = (f"The mean validation loss of {runs(facts['finished'])} is {number(facts['loss_mean'], '.5f')}, the "
                f"mean training time {number(facts['time_mean_s'], '.3f')} s.")
    if found:
        return f"Not a record: {'; '.join(found)}. {measured}"
    return f"**A record by `tools/verify.py`**, if the data are FineWeb's, which logs cannot prove. {measured}"


def gains(facts: dict) -> str:
    """The differences from the baseline, with their intervals."""
    base = facts.get("baseline", {})
    if "loss_p" not in base:
        return "There is no baseline."
    return (f"Against the record before: loss {base['loss_difference']:+.5f}, 95 % interval "
            f"{interval(base['loss_difference_95'], '+.5f')}, Welch's t-test p = {number(base['loss_p'], '.3g')} "
            f"(two-sided); time {base['time_difference_s']:+.3f} s, 95 % interval "
            f"{interval(base['time_difference_95_s'], '+.3f')}.")


def same_machine(logs: list[RunLog], baseline: list[RunLog]) -> str:
    """Where the columns come from."""
    here, before = (dict.fromkeys(f"{machine(log)}; {backends(log)}" for log in x) for x in (logs, baseline))
    if here == before:
        return "Both columns come from the same kind of GPUs, driver and packages, as far as the logs say."
    return f"The record before ran on {' / '.join(before)}." if before else ""


def put(text: str, start: str, new: str) -> str:
    """The text with a new paragraph or row in place of the one that starts so; raises LogError unless it is there
    once."""
    block = re.compile(rf"^{re.escape(start)}.*(?:\n(?![-|#\n]).+)*$", re.M)
    if len(block.findall(text)) != 1:
        raise LogError(f"{RECORDS}/TEMPLATE/README.md needs one line that begins with {start!r}; put it back")
    if not start.startswith("|"):
        new = "\n".join(textwrap.fill(line, 120, subsequent_indent="  " * line.startswith("- "), break_long_words=False,
                                      break_on_hyphens=False) for line in new.splitlines())
    return block.sub(lambda _: new, text)


def readme(name: str, day: str, logs: list[RunLog], baseline: list[RunLog], facts: dict, diffs: dict[str, str],
           kept: list[str]) -> str:
    """records/TEMPLATE with all that the logs say; `kept` are links to the baseline's logs."""
    text = (RECORDS / "TEMPLATE" / "README.md").read_text()
    failed = [f"{log.path}: {log.failure}" for log in logs if log.failure]
    data = sorted({f"`{log.config['train_files']}`, `{log.config['val_files']}`".replace("'", "") for log in logs
                   if "val_files" in log.config}) or ["unknown"]
    text = put(text, "# NAME", f"# {name}: what changed, in a few words")
    text = put(text, "Say first", verdict(facts, logs))
    text = put(text, "- Hardware:", "- Hardware: " + " / ".join(dict.fromkeys(map(machine, logs)))
               + f"; {' / '.join(dict.fromkeys(map(backends, logs)))}.")
    text = put(text, "- Data:", f"- Data: {' / '.join(data)}. Losses on another corpus than FineWeb cannot be compared "
               f"with {facts['target']}.")
    text = put(text, "- Date:", f"- Date: {day}. {runs(len(logs)).capitalize()}, seeds {seeds(logs)}. Left out of the "
               f"means: {'; '.join(failed) or 'none'}.")
    old, new = ({} if not x else column(x, facts["target"]) for x in (baseline, logs))
    for start, value in new.items():
        (label,) = re.findall(rf"^\| ({re.escape(start)}[^|]*) \|", text, re.M) or [start]
        text = put(text, f"| {start}", f"| {label} | {old.get(start, '-')} | {value} |")
    text = put(text, "Both columns", f"{gains(facts)} {same_machine(logs, baseline)}\n\n{CLOCK}")
    changes = [f"[{file}]({file}): {changed_lines(diff)}." for file, diff in diffs.items()]
    if baseline and "script.diff" not in diffs:
        changes.insert(0, "The script is the one of the record before.")
    asked = re.search(r"^The difference from.*$|\Z", text, re.M)[0]  # stays
    text = put(text, "The difference from", " ".join([asked, *changes]))
    files = [f"[{file}]({file})" for file in dict.fromkeys(map(file_of, logs))]
    return put(text, "Every run's log", f"The runs: {', '.join(files)}. "
               + (f"The record before: {', '.join(kept)}. " if kept else "")
               + "The verdict of `tools/verify.py`: [verify.json](verify.json); `tools/compare.py`: "
               "[compare.txt](compare.txt) and this picture.\n\n![loss against step and against time](compare.png)")


def diffs_of(logs: list[RunLog], baseline: list[RunLog]) -> Iterator[tuple[str, str]]:
    """Name and text of each difference from the baseline that is not empty."""
    if baseline:
        before, after = baseline[0], logs[0]
        yield "script.diff", difference(before.source.splitlines(), after.source.splitlines(), "train_gpt.py")
        yield "settings.diff", difference(settings(before), settings(after), "settings")


def write(folder: Path, name: str, day: str, paths: list[Path], base_paths: list[Path], target: float,
          final: Path) -> None:
    """Fill a folder, which will be `final`; raises LogError."""
    logs, baseline = read_all(paths, "the record"), read_all(base_paths, "the baseline")
    if (finished := sum(not log.failure for log in logs)) < MIN_RUNS:
        raise LogError(f"{runs(finished, 'finished ')}, but verify.py's t-test needs {MIN_RUNS}; make more")
    if baseline and all(log.failure for log in baseline):
        raise LogError("no run of the baseline finished; choose other logs")
    diffs = {file: diff for file, diff in diffs_of(logs[:1], baseline[:1]) if diff}
    names, links = {str(path): path.name for path in paths}, {}
    copies = dict(names)
    for path in base_paths:
        if path.resolve().is_relative_to(final.parent):
            links[str(path)] = os.path.relpath(path.resolve(), final)
        else:
            links[str(path)] = copies[str(path)] = "baseline_" * (path.name in names.values()) + path.name
    if len(set(copies.values())) < len(copies):
        raise LogError("a log of the record has the name of a copy of the baseline's; rename it")
    for path, copy in copies.items():
        shutil.copyfile(path, folder / copy)
    logs, baseline = renamed(logs, names), renamed(baseline, links)
    facts = check(logs, baseline, target)
    (folder / "verify.json").write_text(json.dumps(facts, indent=1) + "\n")
    done, base = ([log for log in x if not log.failure] for x in (logs, baseline))
    a, b = (base, done) if base else (done, [])
    (folder / "compare.txt").write_text(compare_table(a, b) + "\n")
    plot(a, b, ("A: the record before", f"B: {name}") if b else (name, ""), folder / "compare.png")
    for file, diff in diffs.items():
        (folder / file).write_text(diff)
    kept = [f"[{Path(link).name}]({link})" for link in links.values()]
    (folder / "README.md").write_text(readme(name, day, logs, baseline, facts, diffs, kept))


def make(args: argparse.Namespace) -> int:
    """Write the folder and say what is left to do; returns the exit status."""
    final = args.out.resolve() / f"{args.date}_{args.name}"
    if not re.fullmatch(r"[\w-]+", args.name):
        raise LogError(f"{args.name!r} is no name of a folder; use letters, digits, - and _")
    if final.exists():
        raise LogError(f"{final} is there; choose another name, or remove it")
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:  # nothing half-written has the record's name
        folder = Path(scratch) / "record"
        folder.mkdir()
        write(folder, args.name, str(args.date), args.logs, args.baseline, args.target, final)
        folder.rename(final)
    facts = json.loads((final / "verify.json").read_text())
    print(f"{final}: {'valid' if facts['valid'] else 'not valid: ' + '; '.join(facts['problems'])}\n"
          f"Left to write in its README.md: {TO_WRITE}. A row for the table in records/README.md:\n"
          f"| [{final.name}]({final.name}/README.md) | {facts['logs'][0]['gpus']} | which data | what it shows |")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="of the record: letters, digits, - and _")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="logs of all its runs")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="LOG", help="of the record before")
    parser.add_argument("--date", type=date.fromisoformat, default=date.today(), help="of the runs (default: today)")
    parser.add_argument("--target", type=float, default=TARGET, help="loss to be below (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="where the folder is made (default: %(default)s)")
    args = parser.parse_args(argv)
    return told(lambda: make(args), args.out)


if __name__ == "__main__":
    sys.exit(main())
