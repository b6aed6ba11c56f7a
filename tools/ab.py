"""Runs two variants alternately, A B B A A B B A ..., on this machine, and compares them in pairs.

    python tools/ab.py --pairs=4 --out=ab_lr --a="train_gpt.py" --b="train_gpt.py --muon_lr=0.025" -- --preset=demo

A variant is a script with its arguments; what follows -- goes to both. Run i of A and run i of B get --seed=i. Each run
starts in its own directory, OUT/a/i or OUT/b/i, with a link to the data directory of this one, so paths in arguments
must be absolute or begin with data/. There it leaves its log (logs/*.txt) and its terminal output (output).

The same command continues after an interruption. Runs whose log has the final validation line are kept; any other is
moved to OUT/unfinished and run again. More --pairs may be asked for later. A changed command or script is refused,
since it would mix variants. Exit status: 0 all pairs done, 1 a run failed, 2 bad input.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from compare import plot, table
from runlogs import LogError, RunLog, mean_interval, read_log, told

THREADS = "4"  # of a process under torchrun, as in run.sh


class RunError(Exception):
    """A run that ended without a result."""


def finished_log(folder: Path) -> RunLog | None:
    """The log of the finished run in a folder."""
    files = list(folder.glob("logs/*.txt"))
    try:
        log = read_log(files[0]) if len(files) == 1 else None
    except LogError:  # ended before the versions were written
        return None
    return log if log and not log.failure else None


def start(command: list[str], folder: Path, out: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """Start a command in a new folder below OUT; what an unfinished run left there is moved aside.

    Whoever starts it ends it by `stop`, whatever happens, so that it outlives this process only if that is killed."""
    if folder.exists():
        aside = out / "unfinished"
        aside.mkdir(exist_ok=True)
        folder.rename(aside / f"{''.join(folder.parts[-2:])}_{time.time_ns()}")
    folder.mkdir(parents=True)
    if Path("data").is_dir():
        (folder / "data").symlink_to(Path("data").resolve())
    with open(folder / "output", "w") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=env)


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """End those that still run."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        process.wait()


def read_variant(text: str) -> tuple[Path, list[str]]:
    """Script and arguments of a variant; raises LogError."""
    script, *arguments = shlex.split(text) or [""]
    if not Path(script).is_file():
        raise LogError(f"no script {script!r}; give --a and --b a script and its arguments")
    return Path(script).resolve(), arguments


def keep_command(out: Path, command: dict) -> None:
    """Note in OUT what is run there; raises LogError if it was something else."""
    note = out / "command.json"
    if note.exists() and (before := json.loads(note.read_text())) != command:
        changed = ", ".join(key for key in command if before.get(key) != command[key])
        raise LogError(f"{out} holds runs of another command ({changed} changed); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(command, indent=1) + "\n")


def check_arguments(script: Path, source: str, arguments: list[str]) -> None:
    """Raises LogError if a script that knows --check finds fault, so that no time is spent on the other variant."""
    if "--check" in source:
        done = subprocess.run([sys.executable, script, *arguments, "--check"], capture_output=True, text=True)
        if done.returncode:
            raise LogError(f"{script.name} {shlex.join(arguments)}: {done.stderr.strip().rpartition(chr(10))[2]}")


def result(folder: Path, name: str, source: str, status: int | None) -> RunLog:
    """The log of a run that ended with this status, None of one that was there; raises RunError if it did not finish,
    LogError if the script changed."""
    log = finished_log(folder)
    if not log:
        raise RunError(f"run {name} ended with status {status} and without a final line; {folder}/output says why, and "
                       "the same command continues")
    if not log.source.startswith(source):
        raise LogError(f"{log.path} was made by another state of its script; choose another --out, and do not edit a "
                       "script while it is run")
    print(f"{name}: val_loss {log.loss:.4f}, {log.seconds:.3f} s{' (kept)' if status is None else ''}", flush=True)
    return log


def one_run(folder: Path, name: str, command: list[str], source: str, out: Path) -> RunLog:
    """Run a variant, unless its log is there; raises what `result` does."""
    if finished_log(folder):
        return result(folder, name, source, None)
    threads = {"OMP_NUM_THREADS": THREADS} if "--standalone" in command else {}
    process = start(command, folder, out, threads | os.environ)
    try:
        return result(folder, name, source, process.wait())
    finally:
        stop([process])


def paired(a: list[RunLog], b: list[RunLog]) -> str:
    """Mean differences of the pairs with their 95 % intervals."""
    lines = [f"paired differences, B - A, {len(a)} pair{'s' * (len(a) != 1)} (Student's t, two-sided):"]
    for name, key, digits in (("final val loss", "loss", 4), ("training time, s", "seconds", 3)):
        x = mean_interval([getattr(y, key) - getattr(x, key) for x, y in zip(a, b)])
        lines.append(f"  {name:<17} {x.text(digits)}  p = {x.p:.3g}")
    return "\n".join(lines)


def interleave(args: argparse.Namespace) -> int:
    """All runs in their order, then the comparison; returns the exit status."""
    variants = {name: read_variant(text) for name, text in (("a", args.a), ("b", args.b))}
    launcher = [sys.executable]
    if args.nproc_per_node:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc_per_node}"]
    sources = {name: script.read_text(errors="replace") for name, (script, _) in variants.items()}
    for name, (script, arguments) in variants.items():
        if args.seed and any(argument.startswith("--seed") for argument in (*arguments, *args.both)):
            raise LogError("ab.py gives each pair a --seed of its own; leave it out, or use --no_seed")
        check_arguments(script, sources[name], [*arguments, *args.both])
    keep_command(args.out, {"a": args.a, "b": args.b, "both": args.both, "nproc_per_node": args.nproc_per_node,
                            "seed": args.seed})
    logs = {"a": [], "b": []}
    for i in range(args.pairs):
        for name in "ab" if i % 2 == 0 else "ba":
            script, arguments = variants[name]
            command = [*launcher, str(script), *arguments, *args.both, *([f"--seed={i}"] if args.seed else [])]
            logs[name].append(one_run(args.out / name / str(i), f"{name}/{i}", command, sources[name], args.out))
    print(f"\nA: {args.a}\nB: {args.b}\n{table(logs['a'], logs['b'])}\n\n{paired(logs['a'], logs['b'])}")
    plot(logs["a"], logs["b"], ("A", "B"), args.out / "compare.png")
    return 0


def run_tool(work: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Do the work of a tool that starts runs in args.out; what ends it early is told in a line. Returns the status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; the same command continues"))
    try:
        return told(lambda: work(args), args.out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--a", required=True, metavar="'SCRIPT --key=value ...'", help="the variant to compare with")
    parser.add_argument("--b", required=True, metavar="'SCRIPT --key=value ...'", help="the other variant")
    parser.add_argument("--out", required=True, type=Path, help="directory of the runs")
    parser.add_argument("--pairs", type=int, default=4, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--nproc_per_node", type=int, default=0, metavar="N",
                        help="start N processes with torchrun; 0: python alone (default)")
    parser.add_argument("--no_seed", dest="seed", action="store_false", help="for scripts that do not know --seed")
    parser.add_argument("both", nargs="*", metavar="-- ARGUMENT", help="arguments of both variants")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.nproc_per_node < 0:
        parser.error("--pairs must be positive, --nproc_per_node not negative")
    return run_tool(interleave, args)


if __name__ == "__main__":
    sys.exit(main())
