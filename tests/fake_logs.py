"""Small logs in the formats of train_gpt.py and of the public scripts, for the tests of tools/."""

from itertools import accumulate, pairwise

RULE = "=" * 100
# Text in a source that looks like a log: a rule, a result, a setting
SOURCE = f'''"""Trains."""
{RULE}
step:8/8 val_loss:1.0000 train_time:1ms step_avg:1.00ms
seed = 99
print(f"step:{{step}}/{{N}} val_loss:{{val_loss:.4f}} train_time:{{ms:.0f}}ms step_avg:{{avg:.2f}}ms")
'''
SMI = """Sun Nov 22 19:22:07 2026
| NVIDIA-SMI 580.1                  Driver Version: 580.1          CUDA Version: 13.0     |
|=========================================+========================+======================|
|   0  NVIDIA H200                    On  |   00000000:00:06.0 Off |                    0 |
|   1  NVIDIA H200                    On  |   00000000:00:07.0 Off |                    0 |
|    0   N/A  N/A             957      C   python3                                1720MiB |
"""


def tables(bounds):
    """The tables of a run with stages that begin at these steps, the last of which is the number of steps."""
    rows = [f"{i:5}  {f'{a}-{b - 1}':>9}  {i + 1:5}  {f'{i}-{i + 2}':>7}  1.50"
            for i, (a, b) in enumerate(pairwise(bounds))]
    return "\n".join(["", "LAYERS", "layer  window", "    0     0-1", "", "STAGES",
                      "stage      steps  batch  windows    lr", *rows, "", "PARAMS", "name   steps", "embed    1-2"])


def fake_log(loss=3.27, ms=1000, seed=0, source=SOURCE, torch="2.11.0+cu130", steps=8, stop=None, public=False,
             train=True, bounds=None, seconds=False, fields="", **config):
    """A log with validations at half and at the end; the steps of ours take 1, 2, 3 and 4 parts of ms in each third of
    the scheduled steps and in the extension.

    It breaks off before step `stop`. A public one has no configuration and no training losses. `bounds` puts a table
    of stages into it, of older logs there is none; `seconds` writes times so, and `fields` come before them.
    """
    config = {"train_files": "data/fineweb10B/fineweb_train_*.bin", "val_files": "data/fineweb10B/fineweb_val_*.bin",
              "num_scheduled_iterations": steps - 2, "num_extension_iterations": 2, "seed": seed} | config
    if public:
        head = [f"{source}{RULE}", "Running Python 3.12.7 (main)", f"Running PyTorch {torch} compiled for CUDA 13.0",
                SMI + RULE]
    else:
        head = [f"{source}{RULE}", "Python 3.12.3 (main)", f"PyTorch {torch} CUDA 13.0, 1 ranks", SMI + RULE,
                *(f"{key} = {value!r}" for key, value in config.items()), "attention used = torch",
                *([tables(bounds)] if bounds else []), RULE]
    cost = [1 + min(3 * step // (steps - 2), 3) for step in range(steps)]
    total = sum(cost)
    time = [ms * spent / total for spent in accumulate(cost, initial=0)]
    lines, clock = [], (lambda x: f"train_time:{x / 1000:.3f}s") if seconds else (lambda x: f"train_time:{x:.0f}ms")
    for step in range(steps + 1 if stop is None else stop):
        end = f"/{steps} {{}}{fields}{clock(time[step])} step_avg:{time[step] / max(step, 1):.2f}ms"
        value = loss + (steps - step) / 10
        if step and train:
            # As in a real log, a line shows the time a step late, unless a validation follows
            late = time[step] if step in (steps // 2, steps) else time[step + 1]
            kind = "" if public else f"train_loss:{value - 0.05:.4f} "
            lines.append(f"step:{step}/{steps} {kind}{clock(late)} step_avg:1.00ms")
        if step in (0, steps // 2, steps):
            lines.append(f"step:{step}" + end.format(f"val_loss:{value:.4f} "))
    if stop is None:
        lines.append("peak memory allocated: 30000 MiB reserved: 31000 MiB")
    return "\n".join([*head, *lines]) + "\n"
