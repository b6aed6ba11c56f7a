"""Plot the history of the public track: the minutes of each record, on a log scale, against its date.

    python tools/plot_history.py --out=records/history.png
"""

import argparse
import csv
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECORDS = Path(__file__).resolve().parents[1] / "records"
OURS = "80"  # the record that train_gpt.py reproduces
TICKS = (45, 20, 10, 5, 3, 2, 1.4, 1, 0.7)  # minutes


def plot(rows: list[dict[str, str]], out: Path) -> None:
    """Draw the rows of records/history.csv into the picture `out`; KeyError or ValueError if a column is bad."""
    dates = [date.fromisoformat(row["date"]) for row in rows]
    minutes = [float(row["minutes_8xH100"]) for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.step(dates, minutes, where="post", linewidth=1, color="tab:gray")
    axes.plot(dates, minutes, ".", color="tab:blue")
    at = [row["number"] for row in rows].index(OURS)
    axes.plot(dates[at], minutes[at], "o", color="tab:red")
    axes.annotate(f"#{OURS}, whose algorithm\ntrain_gpt.py follows", (dates[at], minutes[at]), (-20, 40), ha="center",
                  textcoords="offset points", color="tab:red", arrowprops={"arrowstyle": "-", "color": "tab:red"})
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_ylabel("minutes on 8 H100s")
    axes.set_title("Records of the public NanoGPT speedrun")
    figure.savefig(out, dpi=100)
    plt.close(figure)


def main() -> None:
    """Run the command line; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RECORDS / "history.csv", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RECORDS / "history.png", help="default: %(default)s")
    args = parser.parse_args()
    try:
        with open(args.csv, newline="") as file:
            plot(list(csv.DictReader(file)), args.out)
    except OSError as e:
        parser.exit(2, f"error: {e.filename}: {e.strerror}; choose another --csv or --out\n")
    except (KeyError, ValueError) as e:
        parser.exit(2, f"error: cannot plot {args.csv} to {args.out}: {e}; take records/history.csv as the model\n")


if __name__ == "__main__":
    main()
