"""Small logs in the formats of train_gpt.py and of the public scripts, for the tests of tools/."""

from itertools import accumulate

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


def fake_log(loss=3.27, ms=1000, seed=0, source=SOURCE, torch="2.11.0+cu130", steps=8, stop=None, public=False,
             train=True, **config):
    """A log with validations at half and at the end; the stages of ours take 1, 2, 3 and 4 parts of ms a step.

    It breaks off before step `stop`. A public one has no configuration and no training losses.
    """
    config = {"train_files": "data/fineweb10B/fineweb_train_*.bin", "val_files": "data/fineweb10B/fineweb_val_*.bin",
              "num_scheduled_iterations": steps - 2, "num_extension_iterations": 2, "seed": seed} | config
    if public:
        head = [f"{source}{RULE}", "Running Python 3.12.7 (main)", f"Running PyTorch {torch} compiled for CUDA 13.0",
                SMI + RULE]
    else:
        head = [f"{source}{RULE}", "Python 3.12.3 (main)", f"PyTorch {torch} CUDA 13.0, 1 ranks", SMI + RULE,
                *(f"{key} = {value!r}" for key, value in config.items()), "attention used = torch", RULE]
    cost = [1 + min(3 * step // (steps - 2), 3) for step in range(steps)]
    total = sum(cost)
    time = [ms * spent / total for spent in accumulate(cost, initial=0)]
    lines = []
    for step in range(steps + 1 if stop is None else stop):
        end = f"/{steps} {{}}train_time:{time[step]:.0f}ms step_avg:{time[step] / max(step, 1):.2f}ms"
        value = loss + (steps - step) / 10
        if step and train:
            # As in a real log, a line shows the time a step late, unless a validation follows
            late = time[step] if step in (steps // 2, steps) else time[step + 1]
            kind = "" if public else f"train_loss:{value - 0.05:.4f} "
            lines.append(f"step:{step}/{steps} {kind}train_time:{late:.0f}ms step_avg:1.00ms")
        if step in (0, steps // 2, steps):
            lines.append(f"step:{step}" + end.format(f"val_loss:{value:.4f} "))
    if stop is None:
        lines.append("peak memory allocated: 30000 MiB reserved: 31000 MiB")
    return "\n".join([*head, *lines]) + "\n"
