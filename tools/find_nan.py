"""Finds where a run's first nan or inf comes from: repeats the run and names operation, layer, rank and step.

    python tools/find_nan.py --muon_lr=9                        # the same arguments as the run; --resume begins later
    torchrun --nproc_per_node=8 tools/find_nan.py --muon_lr=9   # the same rounding as on eight ranks

It trains up to the first step that makes one, and repeats that step from the state before it without torch.compile and
graphs, looking at each operation's results. That takes more memory: less with a smaller --micro_tokens. Nothing is
written. Exit status: 0 if the operation was found; 1, with one line, if not.
"""

import contextlib
import itertools
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t


class FirstBad(TorchDispatchMode):
    """Finds the first operation whose result holds nan or inf; not -inf, of which attention makes masks."""

    def __init__(self):
        super().__init__()
        self.count = 0  # operations before it
        self.place = ""

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        # new memory holds anything, and so does what a collective has not yet filled
        if self.place or func.namespace not in ("aten", "speedrun") or "empty" in str(func):
            return result
        changed = args if result is None else result  # operations without a result change an argument
        tensors = [x for x in tree_leaves(changed) if isinstance(x, Tensor) and x.is_floating_point()]
        wide = [x.float() if x.itemsize == 1 else x for x in tensors]
        self.count += 1
        if any((x.isnan() | (x == math.inf)).any() for x in wide):
            self.place = f"{func} in {caller()}"
        return result


def caller() -> str:
    """The innermost functions of train_gpt.py that run, and the layer that they are in."""
    frames = [f for f, _ in traceback.walk_stack(sys._getframe(1)) if f.f_code.co_filename == t.__file__]
    calls = [f"{f.f_code.co_name}:{f.f_lineno}" for f in frames[:3]]
    layer = [f", layer {f.f_locals['i']}" for f in frames if f.f_code.co_name == "trunk" and "i" in f.f_locals]
    # on a GPU, autograd has a thread of its own, without these frames
    return f"{' of '.join(calls) or 'the backward pass'}{''.join(layer)}"


def gathered(item: object) -> list:
    """Every rank's item."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def bad_parameters(run: t.Run) -> list[str]:
    """Those that hold nan or inf on some rank, or whose gradient, which may wait for an update, or moments do."""
    names = [state.name.split(".")[0] for state in run.optimizer.states()
             if state.tensor.is_floating_point() and not state.tensor.isfinite().all()]
    if (cycle := run.optimizer.cycle) and cycle.saved and not cycle.saved[1].isfinite().all():
        names.append("ngram_embed")
    return list(dict.fromkeys(itertools.chain(*gathered(names))))


def find(asked: t.Recipe, ranks: t.Ranks) -> str:
    """The answer in one line; UserError if there is none."""
    hp = t.on_every_rank(lambda: t.choose_backends(asked, ranks.device))
    saved = t.on_every_rank(lambda: t.read_checkpoint(hp.resume, hp))
    run = t.Run(hp, ranks, t.choose_ops(hp))
    plain = t.Run(replace(hp, compile=False, graphs=False), ranks, run.model.ops)  # holds the state before each step
    first, N = t.load_checkpoint(saved, run.optimizer, t.Clock(ranks.device)) if saved else 0, hp.num_steps
    if bad := bad_parameters(run):
        raise t.UserError(f"{hp.resume or 'the start'} holds nan or inf in {', '.join(bad)}: begin earlier")
    with contextlib.closing(t.load_batches(hp, ranks, range(N), first)) as loader:
        for step in tqdm(range(first, N), unit="step", disable=True if ranks.rank else None, leave=False):
            for ours, kept in zip(run.optimizer.states(), plain.optimizer.states()):
                kept.tensor.copy_(ours.tensor)
            if run.optimizer.cycle:  # sums of a checkpoint, which the first step after it gives slots
                plain.optimizer.cycle.saved = run.optimizer.cycle.saved
            (batches, touched), now = next(loader), t.plan(step, hp)
            loss = run.train_step(batches, touched, now)
            bad = bad_parameters(run) + ["the loss"] * (not loss.mean.isfinite())
            if bad:
                break
        else:
            raise t.UserError(f"all is finite in steps {first + 1} to {N}: suspect the hardware, or validation if the "
                              "losses of training were finite before, too")
    with FirstBad() as found:
        plain.train_step(batches, touched, now)
    _, _, rank, place = min(gathered((not found.place, found.count, ranks.rank, found.place)))
    reached = f"reached {', '.join(bad)}"
    if not place:
        raise t.UserError(f"step {step + 1} {reached}, but not without torch.compile and graphs: suspect what they "
                          "make, or the hardware; --compile=false trains without")
    return f"it began on rank {rank} in step {step + 1} with {place}, and {reached}"


def main() -> None:
    """Run the command line."""
    with t.one_line_errors():
        hp, _ = t.parse_args(sys.argv[1:])
        ranks = t.setup_ranks(hp)
        t.on_every_rank(lambda: t.check_data(hp))
        answer = find(hp, ranks)
        if ranks.rank == 0:
            print(answer)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
