"""What each idea of a recipe is worth: runs of it without one idea at a time, against runs of the recipe as it is.

    python tools/ablate.py --list                                             # the names, and what each changes
    python tools/ablate.py --out=quarter -- --num_scheduled_iterations=360 --num_extension_iterations=10
    python tools/ablate.py --out=quarter --gpus=2 --budget=1500 -- ...        # two at a time; none begins after 1500 s
    python tools/ablate.py --out=quarter --seeds=2 --close -- ...             # second seeds where the first do not tell
    python tools/ablate.py --out=demo --only 'no smear' 'no YaRN' -- --preset=demo

What follows -- goes to all runs. Run i of an edit has --seed=i, as control i has: its loss is compared with that one's,
its time with the mean of the controls on the same GPU, or of all where none ran there. Controls are spread over the
order, and each GPU begins with one. A part that is switched off by a factor of 0 is still computed, so its time stays.

The same command continues after an interruption, also on another machine to which OUT was copied; finished runs are
kept, as in tools/ab.py. More --seeds, --controls and names may be asked for later. OUT gets ablations.csv and
ablations.png: loss_change is what the edit adds to the loss, time_ratio its time to the recipe's, and since_record the
public record that brought the idea, where records/history.csv names it. Exit status: 0 all done, 1 some are missing,
2 bad input.
"""

import argparse
import csv
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ab import THREADS, RunError, check_arguments, finished_log, keep_command, result, run_tool, start, stop
from matplotlib.figure import Figure
from no_gpu import nvidia_smi
from runlogs import LogError, RunLog

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

COLUMNS = ("name", "since_record", "loss", "loss_change", "time_s", "time_ratio", "seeds")
CLOSE = 2  # standard deviations of the controls' losses, within which one seed does not tell
POLL_SECONDS = 0.1


class Edit(NamedTuple):
    """A recipe without one idea, or with another in its place."""

    name: str
    since: str  # numbers of the public records that brought the idea, as far as records/history.csv names it
    change: str  # cells, and keys with --, as in a shell
    patch: tuple[tuple[str, str], ...] = ()  # texts of the script and what replaces each, where no cell does
    preset: str = ""  # the one recipe that it is an edit of; empty: any

    @property
    def arguments(self) -> list[str]:
        """The change as arguments of train_gpt.py."""
        return [f"{'' if word.startswith('--') else '--set='}{word}" for word in shlex.split(self.change)]


def off(row: str) -> str:
    """The cells that set a learned factor to 0 and keep it there."""
    return f"PARAMS.{row}.init=0 PARAMS.{row}.lr=0"


FRONTIER = "frontier"
EDITS = (
    Edit("no smear", "34", off("smear_lambda")),
    Edit("no bigram table", "62", f"{off('bigram_lambdas')} --bigram_ratio=1"),  # the table that stays is the smallest
    Edit("no value embeddings", "14", "LAYERS.*.value_table=none"),
    Edit("no attention gates", "28", "LAYERS.*.gate=false"),
    Edit("no value gates", "55", "LAYERS.*.value_gate=false"),
    Edit("no paired heads", "58", "LAYERS.*.paired=false"),
    Edit("no key offset", "49", "LAYERS.*.key_offset=false"),
    Edit("no skip", "11", "LAYERS.*.skip_from=none"),
    Edit("no backout", "40", off("backout_lambda")),
    Edit("no x0 injection", "9", off("x0_lambdas")),
    Edit("no residual decay", "", "PARAMS.resid_lambdas.init=1 PARAMS.resid_lambdas.lr=0"),
    Edit("MTP off", "53", "STAGES.*.mtp_start=1 STAGES.*.mtp_end=1"),
    # the same tokens in the scheduled steps, at the rate of the stage that has this batch
    Edit("one batch size", "46", "--batch_unit=262144 STAGES.*.batch=1 STAGES.*.lr=1.52"),
    Edit("one document cut", "72", "STAGES.*.max_doc=16"),
    Edit("one window", "13", "STAGES.*.short=6 STAGES.*.long=13"),  # the last stage's
    Edit("no YaRN", "31", "STAGES.*.yarn=false"),
    Edit("tied throughout", "53", "STAGES.*.tied=true"),
    Edit("untied throughout", "51", "STAGES.*.tied=false"),
    Edit("Adam every step", "39", "PARAMS.*.every=1"),
    Edit("no cautious decay", "43, 50", "PARAMS.*.cautious=false"),
    Edit("Muon without normalisation", "41", "PARAMS.qk_bank.rule=muon PARAMS.vo_bank.rule=muon "
                                             "PARAMS.mlp_bank.rule=muon"),
    Edit("Newton-Schulz", "38", "", (("else POLAR_COEFFICIENTS:",
                                      "else 5 * ((3.4445, -4.7750, 2.0315),):"),)),
    # at 0.0016, of the order of what this size is trained at by Adam alone; not tuned
    Edit("Adam for the banks", "3", " ".join(
        f"PARAMS.{bank}.rule=adam PARAMS.{bank}.betas=0.9,0.95 PARAMS.{bank}.lr=0.2"
        for bank in ("qk_bank", "vo_bank", "mlp_bank")) + " PARAMS.mlp_bank.odd_lr=1"),
    Edit("bf16 head", "19", "--fp8_head=false"),
    Edit("no softcap shift", "54", "READOUT.cap_shift=0"),
    Edit("zero O init", "64", "PARAMS.vo_bank.init='uniform, 0'"),
    Edit("zero V and O init", "64", "PARAMS.vo_bank.init=0"),  # layers without value embeddings never attend then
    Edit("final window not extended", "33", "--final_val_window=13"),  # the last stage's
    # of the frontier recipe; left out where a recipe has none of it
    Edit("softmax over all classes", "92", "STAGES.*.classes=0"),
    Edit("bf16 MLP", "84, 89, 90", "LAYERS.*.fp8_mlp=false"),
    Edit("bf16 QKV", "90", "LAYERS.*.fp8_qkv=false"),
    Edit("bigram table for n-grams", "92", "--ngram_rows=0"),
    Edit("FP8 in the extension, too", "", "STAGES.*.fp8=true"),
    Edit("24,576 classes", "", "STAGES.0.classes=24576 STAGES.1.classes=24576 STAGES.2.classes=24576", preset=FRONTIER),
    Edit("no dense connections", "81", "LAYERS.*.dense=none LAYERS.*.value_gate_mixed=false"),
    Edit("no prefix term", "88", "STAGES.*.prefix=0,0"),
    Edit("attention in 4", "92", "LAYERS.4.window=short LAYERS.4.fp8_qkv=true LAYERS.4.value_gate_mixed=true",
         preset=FRONTIER),
    Edit("attention in 9", "92", "LAYERS.9.window=short LAYERS.9.paired=true LAYERS.9.reads=middle "
         "LAYERS.9.value_table=3 LAYERS.10.value_table=4 LAYERS.9.fp8_qkv=true LAYERS.9.value_gate_mixed=true",
         preset=FRONTIER),
    Edit("no narrow heads", "", "LAYERS.*.narrower=1"),
    Edit("last steps as large", "92", "STAGES.5.batch=6", preset=FRONTIER),
    Edit("no taper", "92", "STAGES.4.batch=6 STAGES.4.lr=1.73", preset=FRONTIER),
    Edit("documents of 2,048", "92", " ".join(f"STAGES.{i}.max_doc=16" for i in range(2, 6)), preset=FRONTIER),
    Edit("no slow momentum", "92", "PARAMS.qk_bank.rule=normuon PARAMS.vo_bank.rule=normuon "
         "PARAMS.mlp_bank.rule=normuon --muon_wd=1.2 --muon_momentum=0.95 --muon_momentum_warmup=300", preset=FRONTIER),
    Edit("value embeddings every two steps", "92", "PARAMS.value_embeds.lr=75 PARAMS.value_embeds.rarer=1",
         preset=FRONTIER),
    Edit("rates jump", "", "--lr_ramp=0", preset=FRONTIER),
    Edit("10.6M n-gram rows", "92", "--ngram_rows=10575360", preset=FRONTIER),
    Edit("no averages", "92", "--tail_average=0"),
    Edit("no averages, cooldown of #80", "92", "--tail_average=0 --cooldown_start=0.4 --cooldown_floor=0.15"),
)


CONTROL = Edit("control", "", "")


class Variant(NamedTuple):
    """The recipe, or an edit of it, ready to run."""

    name: str
    since: str
    folder: Path  # of its runs
    script: Path
    source: str
    arguments: list[str]

    def run_folder(self, seed: int) -> Path:
        return self.folder / str(seed)

    def logs(self) -> dict[int, RunLog]:
        """The finished runs by seed."""
        found = {int(path.name): finished_log(path) for path in sorted(self.folder.glob("[0-9]*"))}
        return {seed: log for seed, log in found.items() if log}


def patched(source: str, edit: Edit) -> str:
    """The script with an edit's replacements; raises LogError unless each text is there once."""
    for old, new in edit.patch:
        if source.count(old) != 1:
            raise LogError(f"{edit.name}: the script has {old!r} {source.count(old)} times, not once; adapt the patch "
                           "in EDITS")
        source = source.replace(old, new)
    return source


def recipe(edit: Edit, both: list[str]) -> t.Recipe:
    """The recipe of these arguments with the edit; raises LogError for those that train_gpt.py refuses."""
    try:
        return t.parse_args([*both, *edit.arguments])[0]
    except t.UserError as error:
        raise LogError(str(error) if edit is CONTROL else f"{edit.name}: {error}") from None


def folder_of(edit: Edit, out: Path) -> Path:
    """Where the runs of an edit are."""
    return out / re.sub(r"\W+", "_", edit.name)


def make_variant(edit: Edit, args: argparse.Namespace) -> Variant:
    """Prepare an edit's folder, with its script if it is patched; raises LogError if other runs are there."""
    folder = folder_of(edit, args.out)
    original = args.script.read_text(errors="replace")
    source, script = patched(original, edit), args.script
    arguments = [*args.both, *edit.arguments]
    keep_command(folder, {"script": str(args.script.name), "arguments": arguments, "patch": [*map(list, edit.patch)]})
    if source != original:
        script = folder.resolve() / args.script.name
        script.write_text(source)
        data = script.with_name("data")  # the script finds the bundled text beside itself
        data.unlink(missing_ok=True)
        data.symlink_to(args.script.with_name("data"))
    return Variant(edit.name, edit.since, folder, script, source, arguments)


def interspersed(jobs: list, among: list) -> list:
    """All of `among` in order, with the jobs at equal distances between them, from the beginning to the end."""
    places = {round(place): job for place, job in zip(np.linspace(0, len(among) + len(jobs) - 1, len(jobs)), jobs)}
    rest = iter(among)
    return [places[i] if i in places else next(rest) for i in range(len(among) + len(jobs))]


class Job(NamedTuple):
    """A run to be made."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}/{self.seed}"


def card_file(job: Job) -> Path:
    """Where it is written on which GPU a run was made."""
    return job.variant.run_folder(job.seed) / "gpu"


def card_of(job: Job) -> str:
    """The GPU that a run was made on; empty if nothing tells."""
    return card_file(job).read_text().strip() if card_file(job).exists() else ""


def visible_gpus(number: int) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for so many runs side by side; raises LogError if it names fewer."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [*map(str, range(number))] if given is None else given.split(",")
    if len(names) < number:
        raise LogError(f"CUDA_VISIBLE_DEVICES={given} names fewer than --gpus={number}")
    return names[:number]


def begin(job: Job, gpu: str, card: str, out: Path) -> subprocess.Popen:
    """Start a run on one GPU."""
    command = [sys.executable, str(job.variant.script), *job.variant.arguments, f"--seed={job.seed}"]
    process = start(command, job.variant.run_folder(job.seed), out,
                    {"OMP_NUM_THREADS": THREADS} | os.environ | {"CUDA_VISIBLE_DEVICES": gpu})
    card_file(job).write_text(f"{card}\n")
    return process


def run_all(jobs: list[Job], args: argparse.Namespace, end: float) -> int:
    """Run what is not there yet, one at a time on each GPU, and begin none after `end`; returns how many are missing.

    A run that fails is told, and the others go on."""
    missing = 0
    waiting, cards, running = [], set(), {}  # the GPUs that have had a control; what each runs
    for job in jobs:
        if finished_log(job.variant.run_folder(job.seed)):
            result(job.variant.run_folder(job.seed), job.name, job.variant.source, None)
            cards |= {card_of(job)} if job.variant.name == CONTROL.name else set()
        else:
            waiting.append(job)
    gpus = {gpu: nvidia_smi("--query-gpu=uuid", "--format=csv,noheader", f"--id={gpu}").strip() or gpu
            for gpu in visible_gpus(args.gpus)} if waiting else {}
    try:
        while running or (waiting and time.monotonic() < end):
            for gpu, card in gpus.items():
                if gpu in running:
                    job, process = running[gpu]
                    if process.poll() is None:
                        continue
                    del running[gpu]
                    try:
                        result(job.variant.run_folder(job.seed), job.name, job.variant.source, process.returncode)
                    except RunError as error:
                        missing += 1
                        print(f"error: {error}", file=sys.stderr, flush=True)
                if waiting and time.monotonic() < end:
                    controls = [job for job in waiting if job.variant.name == CONTROL.name]
                    job = controls[0] if controls and card not in cards else waiting[0]
                    waiting.remove(job)
                    cards |= {card} if job.variant.name == CONTROL.name else set()
                    running[gpu] = job, begin(job, gpu, card, args.out)
            time.sleep(POLL_SECONDS)
    finally:
        stop(process for _, process in running.values())
    if waiting:
        print(f"{len(waiting)} runs not begun within {args.budget} s; the same command continues", flush=True)
    return missing + len(waiting)


def spread(logs: Iterable[RunLog]) -> float:
    """Standard deviation of the final losses; nan of fewer than two."""
    losses = [log.loss for log in logs]
    return float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan


def row(variant: Variant, control: Variant) -> dict | None:
    """A variant's line of the table; None as long as no run of it has a control of its seed."""
    controls = control.logs()
    logs = {seed: log for seed, log in variant.logs().items() if seed in controls}
    if not logs:
        return None
    by_card = {}
    for seed, log in controls.items():
        by_card.setdefault(card_of(Job(control, seed)), []).append(log.seconds)
    everywhere = [log.seconds for log in controls.values()]
    ratios = [log.seconds / np.mean(by_card.get(card_of(Job(variant, seed)), everywhere)) for seed, log in logs.items()]
    return {
        "name": variant.name, "since_record": variant.since,
        "loss": np.mean([log.loss for log in logs.values()]).item(),
        "loss_change": np.mean([log.loss - controls[seed].loss for seed, log in logs.items()]).item(),
        "time_s": np.mean([log.seconds for log in logs.values()]).item(), "time_ratio": np.mean(ratios).item(),
        "seeds": len(logs),
    }


def table(rows: list[dict], noise: float) -> str:
    """The rows for people, losses in thousandths, and how far apart the recipe's own seeds are."""
    width = max(len(x["name"]) for x in rows)
    lines = [f"{'':{width}}  {'since':>6}  {'loss':>7}  {'change':>8}  {'time s':>8}  {'ratio':>6}  seeds"]
    lines += [f"{x['name']:{width}}  {x['since_record']:>6}  {x['loss']:7.4f}  {1000 * x['loss_change']:+8.1f}  "
              f"{x['time_s']:8.2f}  {x['time_ratio']:6.3f}  {x['seeds']:5}" for x in rows]
    own = f"{1000 * noise:.1f}" if math.isfinite(noise) else "unknown"
    return "\n".join([*lines, "change: in thousandths of the loss, with the control's of the same seed taken off. "
                              f"Standard deviation of the controls' losses: {own}"])


def plot(rows: list[dict], noise: float, path: Path) -> None:
    """Write the PNG: a bar an edit for what its loss and its time are to the recipe's; in grey two deviations of the
    recipe's own losses."""
    figure = Figure(figsize=(11, 2 + 0.25 * len(rows)), layout="constrained")
    loss, cost = figure.subplots(1, 2, sharey=True)
    names = [x["name"] for x in rows]
    loss.barh(names, [1000 * x["loss_change"] for x in rows], color="C0")
    cost.barh(names, [100 * (x["time_ratio"] - 1) for x in rows], color="C1")
    if math.isfinite(noise):
        loss.axvspan(-CLOSE * 1000 * noise, CLOSE * 1000 * noise, color="black", alpha=0.1, lw=0, zorder=0)
    loss.set_xlabel("change of the loss, thousandths")
    loss.set_xscale("symlog", linthresh=10)  # one idea may be worth a hundred times another
    loss.xaxis.set_major_formatter("{x:g}")
    cost.set_xlabel("change of the training time, %")
    loss.invert_yaxis()  # the first row above
    for axis in (loss, cost):
        axis.axvline(0, color="black", lw=0.5)
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, format="png", dpi=120)


def report(control: Variant, variants: list[Variant], out: Path) -> None:
    """Print and save the table and the picture of the runs that are there, what costs most to leave out first."""
    rows = [found for variant in (control, *variants) if (found := row(variant, control))]
    if not rows:
        return
    rows = [*rows[:1], *sorted(rows[1:], key=lambda x: -x["loss_change"])]
    noise = spread(control.logs().values())
    print(f"\n{table(rows, noise)}")
    with open(out / "ablations.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        digits = {"loss": 4, "loss_change": 4, "time_s": 3, "time_ratio": 4}
        writer.writerows({key: f"{x:.{digits[key]}f}" if key in digits else x for key, x in line.items()}
                         for line in rows)
    plot(rows, noise, out / "ablations.png")


def is_close(variant: Variant, control: Variant) -> bool:
    """Whether the first seed leaves open if the edit changes the loss."""
    found, noise = row(variant, control), spread(control.logs().values())
    return not found or not abs(found["loss_change"]) > CLOSE * noise


def ablate(args: argparse.Namespace) -> int:
    """All runs, then the table; returns the exit status."""
    end = time.monotonic() + args.budget
    if any(argument.startswith("--seed") for argument in args.both):
        raise LogError("ablate.py gives each run a --seed of its own; leave it out")
    if not args.script.is_file():
        raise LogError(f"no script {args.script}; choose another --script")
    args.script = args.script.resolve()
    edits = [edit for edit in EDITS if not args.only or edit.name in args.only]
    other = [edit for edit in edits if edit.preset and f"--preset={edit.preset}" not in args.both]
    if args.only and other:
        raise LogError(f"{other[0].name}: an edit of one recipe; add --preset={other[0].preset} behind --")
    edits = [edit for edit in edits if edit not in other]
    whole = recipe(CONTROL, args.both)
    if idle := [edit.name for edit in edits if recipe(edit, args.both) == whole and not edit.patch]:
        print(f"left out, as this recipe is the same with them: {', '.join(idle)}")
    check_arguments(args.script, args.script.read_text(errors="replace"), args.both)
    edits = [edit for edit in edits if edit.name not in idle]
    before = [edit for edit in EDITS if edit not in edits and folder_of(edit, args.out).exists()]
    control, *variants = [make_variant(edit, args) for edit in (CONTROL, *edits, *before)]
    missing = 0
    for seed in range(args.seeds):
        chosen = [x for x in variants[: len(edits)] if seed == 0 or not args.close or is_close(x, control)]
        controls = [Job(control, i) for i in range(seed, args.controls, args.seeds)]
        missing += run_all(interspersed(controls, [Job(x, seed) for x in chosen]), args, end)
    report(control, variants, args.out)
    return min(missing, 1)


def listed() -> Iterator[str]:
    """A line an edit: its name, the record that brought the idea, what changes."""
    width = max(len(edit.name) for edit in EDITS)
    for edit in EDITS:
        changes = [edit.change] * bool(edit.change) + [f"{old} -> {new}" for old, new in edit.patch]
        yield f"{edit.name:{width}}  {'#' * bool(edit.since)}{edit.since:7} {'; '.join(changes)}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names and what each changes, and exit")
    parser.add_argument("--out", type=Path, help="directory of the runs, the table and the picture")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[edit.name for edit in EDITS],
                        help="these edits (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each edit (default: %(default)s)")
    parser.add_argument("--close", action="store_true", help="further seeds only of edits whose first one is within "
                        "twice the controls' standard deviation")
    parser.add_argument("--controls", type=int, default=4, help="runs of the recipe as it is (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="runs side by side, a GPU each (default: 1)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS",
                        help="begin no run after so many seconds")
    parser.add_argument("--script", type=Path, default=Path(t.__file__), help="default: %(default)s")
    parser.add_argument("both", nargs="*", metavar="-- ARGUMENT", help="arguments of all runs")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(listed()))
        return 0
    if args.out is None:
        parser.error("--out is needed")
    if args.gpus < 1 or not 1 <= args.seeds <= args.controls:
        parser.error("--gpus and --seeds must be positive, and --controls at least --seeds")
    return run_tool(ablate, args)


if __name__ == "__main__":
    sys.exit(main())
