"""The history of the public track is the same wherever it stands; each folder says how it was measured."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"
TEXT = (RECORDS / "README.md").read_text()
FOLDERS = sorted(path.parent for path in RECORDS.glob("*/README.md"))


def history():
    with open(RECORDS / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_table_is_the_csv():
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]
    assert cells == [list(row.values()) for row in history()] and len(cells) > 90


def test_minutes_fall():
    """Each record is later and faster than the one before; only #21 was timed again, and the text says so."""
    rows = history()
    slower = [b["number"] for a, b in zip(rows, rows[1:]) if float(b["minutes_8xH100"]) >= float(a["minutes_8xH100"])]
    assert slower == ["21", "21"] and "#21 stands here three times" in TEXT
    numbers = [int(row["number"]) for row in rows]
    assert sorted(set(range(1, numbers[-1])) - set(numbers)) == [45] and "There is no #45" in TEXT
    assert numbers == sorted(numbers)
    assert [row["date"] for row in rows] == sorted(row["date"] for row in rows)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_says_how_it_was_measured(folder):
    """Hardware, data and date; the date is the folder's, and the folder is in the table. The template has the keys."""
    facts = dict(re.findall(r"^- (Hardware|Data|Date): (\S.*)", (folder / "README.md").read_text(), re.M))
    assert set(facts) == {"Hardware", "Data", "Date"}
    if folder.name != "TEMPLATE":
        assert facts["Date"].startswith(folder.name.partition("_")[0])
        assert re.match(r"\d{4}-\d\d-\d\d", facts["Date"])
        assert f"| [{folder.name}]({folder.name}/README.md) |" in TEXT


def test_every_folder_has_a_text():
    assert FOLDERS == sorted(path for path in RECORDS.iterdir() if path.is_dir())
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (RECORDS / link).exists(), link


def test_plot(tmp_path):
    """The picture is drawn; a file that is no history is one line and status 2."""
    tool = [sys.executable, str(ROOT / "tools/plot_history.py")]
    subprocess.run([*tool, f"--out={tmp_path}/a.png"], check=True, timeout=60)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    bad = subprocess.run([*tool, f"--csv={ROOT}/requirements.txt", f"--out={tmp_path}/b.png"], capture_output=True,
                         text=True, timeout=60)
    assert bad.returncode == 2 and bad.stderr.startswith("error: cannot plot") and bad.stderr.count("\n") == 1
    assert not (tmp_path / "b.png").exists()
