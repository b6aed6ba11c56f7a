"""A short demo on the bundled text gives the training losses of tests/golden_demo.json.

    python tests/test_golden_demo.py --update        # after a deliberate change of the training; say why in the commit

Twelve steps of the preset at half its width and an eighth of its batch, which pass through all stages, the split of
embed and lm_head, and the extension, as the whole demo takes a minute or more. The file tells the command that logs the
same losses with four digits.

TOLERANCE: other CPUs add in other orders, so each number is off by some roundings. When every weight is changed by up
to one rounding, the losses change by 2e-6 at most, a last digit of float32; --update measures that again and the file
keeps it. So they do on one CPU without AVX-512, without AVX at all (ATEN_CPU_CAPABILITY=default, MKL_CBWR=COMPATIBLE),
or with two threads (2026-11-26). Fifty times that leaves room for libraries that none of this stands for, and is still
a hundredth of what a learning rate of Muon does that is off by 5 %.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as t

ROOT, FILE = Path(t.__file__).parent, Path(__file__).with_name("golden_demo.json")
SETTINGS = ["--preset=demo", "--model_dim=48", "--head_dim=8", "--batch_unit=64", "--num_scheduled_iterations=9",
            "--num_extension_iterations=3", "--seed=1"]
STEPS = 12
TOLERANCE = 1e-4


def settings():
    hp, _ = t.parse_args(SETTINGS)
    return dataclasses.replace(hp, train_files=str(ROOT / hp.train_files))


def losses(hp, steps=STEPS, roundings=0):
    """Training losses of the first steps, with each weight changed at first by up to so many roundings."""
    run = t.Run(hp, t.Ranks(0, 1, torch.device("cpu")))
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(1 + eps * torch.randint(-roundings, roundings + 1, p.shape, generator=generator))
        run.model.embed.copy_(run.model.lm_head.T)
    loader = t.load_batches(hp, run.ranks, range(steps))
    found = [run.train_step(*next(loader), t.plan(step, hp)).mean.item() for step in range(steps)]
    loader.close()
    return found


def furthest(ours, reference):
    return max(abs(a - b) for a, b in zip(ours, reference))


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


def test_losses(golden):
    assert len(golden["losses"]) == STEPS == settings().num_steps
    assert losses(settings()) == pytest.approx(golden["losses"], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("key", ["muon_lr", "adam_lr"])
def test_small_change_is_caught(golden, key):
    """A learning rate that is off by 5 % is ten tolerances away, or more, within four steps."""
    hp, steps = settings(), 4
    changed = dataclasses.replace(hp, **{key: 1.05 * getattr(hp, key)})
    assert furthest(losses(changed, steps), golden["losses"]) > 10 * TOLERANCE


def test_rounding_is_not(golden):
    """Weights that are off by a rounding stay a tenth of a tolerance away, or less."""
    assert furthest(losses(settings(), 4, roundings=1), golden["losses"]) < TOLERANCE / 10
    assert golden["one_rounding_changes_losses_by"] < TOLERANCE / 10


def update():
    t.reuse_cpu_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = losses(settings())
    FILE.write_text(json.dumps({
        "command": " ".join(["python train_gpt.py", *SETTINGS]), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "cpu": torch.backends.cpu.get_cpu_capability(), "seed": settings().seed,
        "one_rounding_changes_losses_by": furthest(losses(settings(), roundings=1), found), "losses": found,
    }, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()
