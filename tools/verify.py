"""Checks whether logs together make a valid record: a mean validation loss below the target, shown by a t-test.

    python tools/verify.py logs/*.txt
    python tools/verify.py records/new --baseline records/old --json

A folder stands for all logs in it, at any depth; a file may hold several runs. A record is valid if there are at least
two runs, all of them finished and of the same length, with the same source, configuration and environment (also after a
resumption), none of them a copy or of the same seed as another, all validated on the track's number of targets as far
as the logs say it, and if p < 0.01 in a one-sided one-sample t-test of the mean final validation loss against the
target. Exit status: 0 valid, 1 not valid, 2 unreadable input.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from runlogs import LogError, RunLog, difference, mean_interval, read_path
from scipy import stats

TARGET, P_LIMIT, MIN_RUNS = 3.28, 0.01, 2
VAL_TOKENS = 10_485_760
# settings in which the runs of one record may differ; checkpoints are written while the clock rests
OWN_KEYS = ("seed", "run_id", "log_dir", "save_every", "save_final")
DIFF_LINES = 40  # of a difference between sources that are shown
CLOCK = "Time is train_time of the final line: training steps only, without compilation, warm-up and validation."
NOTE = (f"The verdict holds only if the data are FineWeb and the loss is over the track's first {VAL_TOKENS:,} "
        "validation targets,\nwhich logs cannot prove. Times compare only on the same hardware; the track's is 8 "
        "H100s.")
ROW = "{:<{width}} {:>8} {:>10} {:>7} {:>7}  {:<20} {:<10} {}"


def digest(text: str) -> str:
    """The first 8 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_facts(log: RunLog) -> dict:
    """A log's row of the table, for JSON; None where the log does not say it."""
    done = not log.failure
    train, val = (log.config[key].strip("'") if key in log.config else None for key in ("train_files", "val_files"))
    return {
        "log": str(log.path), "val_loss": log.loss if done else None, "train_time_s": log.seconds if done else None,
        "steps": log.steps, "stopped_at": log.end if done and log.end != log.steps else None,
        "seed": log.config.get("seed"), "gpus": log.gpus, "source": digest(log.source),
        "train_files": train, "val_files": val, "failure": log.failure or None,
    }


def runs(n: int, kind: str = "") -> str:
    """So many runs, in words."""
    return f"{n} {kind}run{'s' * (n != 1)}"


def finite(x: float) -> float | None:
    """JSON knows no nan."""
    return x if math.isfinite(x) else None


def statistics(logs: list[RunLog], target: float) -> dict:
    """Of the finished runs; p is one-sided, of a mean that is not below the target."""
    done = [log for log in logs if not log.failure]
    losses, enough = [log.loss for log in done], len(done) >= MIN_RUNS
    time = mean_interval([log.seconds for log in done]) if done else None
    equal = len(set(losses)) == 1  # the test divides by a deviation of 0 then
    return {
        "runs": len(logs), "finished": len(done),
        "loss_mean": np.mean(losses).item() if done else None,
        "loss_std": np.std(losses, ddof=1).item() if enough else None,
        "p": stats.ttest_1samp(losses, target, alternative="less").pvalue.item() if enough and not equal else None,
        "time_mean_s": time.value if time else None,
        "time_95_s": [time.low, time.high] if enough else None,
    }


def source_diff(first: RunLog, other: RunLog) -> list[str]:
    """The first lines of the difference between two sources."""
    lines = list(difflib.unified_diff(first.source.splitlines(), other.source.splitlines(), str(first.path),
                                      str(other.path), n=1, lineterm=""))
    more = [f"... {len(lines) - DIFF_LINES} more lines"] if len(lines) > DIFF_LINES else []
    return lines[:DIFF_LINES] + more


def differing(logs: list[RunLog]) -> list[str]:
    """Settings, other than each run's own, that are not the same in all logs."""
    keys = sorted(set(itertools.chain.from_iterable(log.config for log in logs)) - set(OWN_KEYS))
    return [key for key in keys if len({log.config.get(key) for log in logs}) > 1]


def problems(logs: list[RunLog], facts: dict, target: float) -> list[str]:
    """Why the logs make no valid record; empty if they do."""
    found = [f"{log.path}: {log.failure}" for log in logs if log.failure]
    if facts["finished"] < MIN_RUNS:
        found.append(f"{runs(facts['finished'], 'finished ')}, the t-test needs {MIN_RUNS}")
    elif facts["p"] is None:
        found.append("all losses are equal, which a t-test cannot judge")
    elif not facts["p"] < P_LIMIT:
        found.append(f"p = {facts['p']:.3g} in the test for a mean below {target}; it must be below {P_LIMIT}")
    for log in logs:
        if changed := [key for key in log.changed if key not in (*OWN_KEYS, "resume")]:
            found.append(f"{log.path}: resumed with another {', '.join(changed)}")
        if log.config.get("val_tokens", str(VAL_TOKENS)) != str(VAL_TOKENS):
            found.append(f"{log.path}: {log.config['val_tokens']} validation targets, not {VAL_TOKENS}")
    # a loss that is looked at to decide when to stop is no fair sample of losses at that step
    if len(ends := sorted({log.end for log in logs if not log.failure})) > 1:
        found.append(f"the runs end at different steps: {', '.join(map(str, ends))}")
    if len({log.source for log in logs}) > 1:
        found.append("the sources differ")
    found += [f"{key} differs" for key in differing(logs)]
    if len({(log.versions, log.gpus) for log in logs}) > 1:
        found.append("the environments differ")
    seeds = Counter(log.config["seed"] for log in logs if "seed" in log.config)
    found += [f"{n} runs with seed {seed}" for seed, n in seeds.items() if n > 1]
    copies = Counter(log.results for log in logs if log.results)
    found += [f"{n} logs with the same results: copies" for n in copies.values() if n > 1]
    return found


def check(logs: list[RunLog], baseline: list[RunLog], target: float) -> dict:
    """All that is printed, as a dictionary for JSON."""
    facts = statistics(logs, target)
    found = problems(logs, facts, target)
    by_source = {log.source: log for log in reversed(logs)}  # the first log of each
    by_environment = {(*log.versions, log.gpus): log for log in reversed(logs)}
    result = {
        "valid": not found, "problems": found, "target": target, "p_limit": P_LIMIT, "clock": CLOCK, "note": NOTE,
        "logs": [run_facts(log) for log in logs], **facts,
        "environments": [list(lines) for lines in reversed(by_environment)],
        "source_diffs": [source_diff(logs[0], log) for source, log in by_source.items() if source != logs[0].source],
        "seeds": "different" if len({log.config.get("seed") for log in logs} - {None}) == len(logs) else
                 "unknown" if any("seed" not in log.config for log in logs) else "repeated",
    }
    if baseline:
        done, old = ([log for log in x if not log.failure] for x in (logs, baseline))
        result["baseline"] = {"logs": [run_facts(log) for log in baseline], **statistics(baseline, target)}
        if done and old:
            loss = difference([x.loss for x in old], [x.loss for x in done])
            time = difference([x.seconds for x in old], [x.seconds for x in done])
            result["baseline"] |= {
                "loss_difference": loss.value, "loss_difference_95": [finite(loss.low), finite(loss.high)],
                "loss_p": finite(loss.p), "time_difference_s": time.value,
                "time_difference_95_s": [finite(time.low), finite(time.high)],
            }
    return result


def number(x: float | None, form: str) -> str:
    """x in this format, or a dash for None."""
    return "-" if x is None else format(x, form)


def interval(pair: list[float | None] | None, form: str) -> str:
    """Both ends in this format, dashes for those that are unknown."""
    return "[" + ", ".join(number(x, form) for x in pair or (None, None)) + "]"


def table(rows: list[dict]) -> list[str]:
    """A header and a line for each of run_facts."""
    width = max(len(r["log"]) for r in rows)

    def row(r: dict) -> str:
        data = f"{r['train_files']} {r['val_files']}" if r["val_files"] else "unknown"
        last = f"{data}  FAILED: {r['failure']}" if r["failure"] else data
        steps = f"{r['stopped_at']}/{r['steps']}" if r["stopped_at"] else r["steps"]
        return ROW.format(r["log"], number(r["val_loss"], ".4f"), number(r["train_time_s"], ".3f"), steps,
                          r["seed"] or "unknown", r["gpus"], r["source"], last, width=width)

    header = ROW.format("log", "val loss", "time s", "steps", "seed", "devices", "source", "data", width=width)
    return [header, *map(row, rows)]


def summary(s: dict) -> list[str]:
    """The lines of `statistics`, but for the test."""
    return [f"{s['finished']} of {runs(s['runs'])} finished",
            f"validation loss: mean {number(s['loss_mean'], '.5f')}, standard deviation {number(s['loss_std'], '.5f')}",
            f"time: mean {number(s['time_mean_s'], '.3f')} s, 95 % interval {interval(s['time_95_s'], '.3f')}"]


def text(r: dict) -> str:
    """What `check` found, for people."""
    lines = [*table(r["logs"]), "", *summary(r),
             f"t-test of a mean below {r['target']}: p = {number(r['p'], '.3g')} (limit {r['p_limit']})", CLOCK]
    for i, environment in enumerate(r["environments"]):
        lines += ["", f"environment {i + 1} of {len(r['environments'])}:", *(f"  {line}" for line in environment)]
    lines += ["", f"sources: {len(r['source_diffs']) + 1} different" if r["source_diffs"] else "source: the same",
              *itertools.chain.from_iterable(r["source_diffs"]), f"seeds: {r['seeds']}"]
    if base := r.get("baseline"):
        lines += ["", "baseline:", *table(base["logs"]), *summary(base)]
        if "loss_p" in base:
            lines += [f"loss minus baseline: {base['loss_difference']:+.5f}, 95 % interval "
                      f"{interval(base['loss_difference_95'], '+.5f')}, Welch's t-test p = "
                      f"{number(base['loss_p'], '.3g')} (two-sided)",
                      f"time minus baseline: {base['time_difference_s']:+.3f} s, 95 % interval "
                      f"{interval(base['time_difference_95_s'], '+.3f')}"]
    verdict = "VALID" if r["valid"] else "NOT VALID: " + "; ".join(r["problems"])
    return "\n".join([*lines, "", NOTE, f"verdict: {verdict}"])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG",
                        help="logs of all runs of the record, or folders of them")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="LOG",
                        help="logs of an older record to compare with")
    parser.add_argument("--target", type=float, default=TARGET, help="loss to be below (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    args = parser.parse_args(argv)
    try:
        logs, baseline = ([log for path in paths for log in read_path(path)] for paths in (args.logs, args.baseline))
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = check(logs, baseline, args.target)
    print(json.dumps(result, indent=1) if args.json else text(result))
    return 0 if result["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
