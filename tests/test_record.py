"""Tests of tools/record.py on logs written here: what the folder holds, and which logs make none."""

import json
import re
import shutil
from pathlib import Path

import pytest
import record
import verify
from fake_logs import SOURCE, fake_log
from scipy import stats

LOSSES, TIMES = (3.2700, 3.2710, 3.2705), (81000, 81100, 81050)
NEW = SOURCE + "x = 1\n"


def texts(more=0, late=0, **same):
    return [fake_log(loss + more, ms + late, seed, **same) for seed, (loss, ms) in enumerate(zip(LOSSES, TIMES))]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Work in a new folder with out/; write logs there, returns their names."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()

    def write(prefix, logs, folder="."):
        Path(folder).mkdir(exist_ok=True, parents=True)
        names = [f"{folder}/{prefix}{i}.txt" for i in range(len(logs))]
        for name, text in zip(names, logs):
            Path(name).write_text(text)
        return names

    return write


def run(*args):
    return record.main(["mine", *args, "--out=out", "--date=2026-11-26"])


def rows(text):
    """The cells of the table of numbers, by the first words of their row."""
    found = (re.fullmatch(r"\| ([^|]+?) \| ([^|]*?) \| ([^|]*?) \|", line) for line in text.splitlines())
    return {row[1]: (row[2], row[3]) for row in found if row}


def test_the_whole_folder(write, capsys):
    """Logs, verdict, picture, differences, and a text whose numbers are those of the logs and whose links exist."""
    new = write("seed", texts(source=NEW, muon_lr=0.03, attention="fa4", kernels="hopper"))
    old = write("seed", texts(0.001, 3000, muon_lr=0.02, attention="fa4", kernels="hopper"), folder="old")
    assert run(*new, "--baseline", *old) == 0
    folder = Path("out/2026-11-26_mine")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "compare.png", "compare.txt", "script.diff", "settings.diff", "verify.json",
        *(f"{kind}seed{i}.txt" for i in range(3) for kind in ("", "baseline_"))}
    assert (folder / "seed1.txt").read_text() == Path(new[1]).read_text()
    assert (folder / "baseline_seed1.txt").read_text() == Path(old[1]).read_text()
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((folder / "verify.json").read_text())
    assert facts["valid"] and [log["log"] for log in facts["logs"]] == ["seed0.txt", "seed1.txt", "seed2.txt"]
    assert "+x = 1" in (folder / "script.diff").read_text().splitlines()
    changed = [line for line in (folder / "settings.diff").read_text().splitlines() if re.match(r"[-+]\w", line)]
    assert changed == ["-muon_lr = 0.02", "+muon_lr = 0.03"]  # not the seeds
    text = (folder / "README.md").read_text()
    assert text.startswith("# mine: ") and max(map(len, text.splitlines())) <= 120
    assert rows(text)["validation loss, mean over runs"] == ("3.27150", "3.27050")
    assert rows(text)["standard deviation over runs"] == ("0.00050", "0.00050")
    assert rows(text)["training time, mean over runs"][1].startswith("81.050 s, 95 % interval [80.926, 81.174]")
    p = stats.ttest_1samp(LOSSES, 3.28, alternative="less").pvalue
    assert rows(text)['p-value of "the mean is above 3.28"'][1] == f"{p:.3g}"
    assert rows(text)["runs"][1] == "3 of 3, seeds 0, 1, 2" and rows(text)["steps"] == ("8", "8")
    assert rows(text)["ms a step"] == ("10506.25", "10131.25")
    assert rows(text)["peak memory allocated"] == ("30,000 MiB", "30,000 MiB")
    assert len(rows(text)) == 9 and all("" not in cells for name, cells in rows(text).items() if name != "---")
    flat = " ".join(text.split())
    assert "loss -0.00100" in flat and "time -3.000 s" in flat and "Both columns come from the same kind" in flat
    assert "attention torch, kernels hopper" in flat and "script.diff): lines added: 1, removed: 0" in flat
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 8 and all((folder / link).exists() for link in links)
    facts = dict(re.findall(r"^- (Hardware|Data|Date): (\S.*)", text, re.M))  # as tests/test_records.py asks
    assert set(facts) == {"Hardware", "Data", "Date"} and facts["Date"].startswith("2026-11-26. 3 runs, seeds 0, 1, 2.")
    out = capsys.readouterr().out
    assert "valid" in out and "| [2026-11-26_mine](2026-11-26_mine/README.md) |" in out and str(folder) in out


def test_what_is_left_to_write_stays(write):
    """Only sentences that ask for the why are the template's; what asked for numbers is gone."""
    assert run(*write("seed", texts())) == 0
    template = (record.RECORDS / "TEMPLATE" / "README.md").read_text()
    left = {*template.splitlines()} & {*Path("out/2026-11-26_mine/README.md").read_text().splitlines()} - {""}
    sentences = {line for line in left if line[0] not in "#|"}
    assert {line.split()[0] for line in sentences} == {"The", "Fewer", "Who"} and len(sentences) == 3


def test_verdict(write):
    """A record needs 8 H100s, too; a valid verdict alone says where it ran."""
    eight = [text.replace("NVIDIA H200", "NVIDIA H100").replace(", 1 ranks", ", 8 ranks") for text in texts()]
    assert run(*write("seed", eight)) == 0
    text = Path("out/2026-11-26_mine/README.md").read_text()
    assert "**A record by `tools/verify.py`**" in text and "Not a record" not in text and "8 x NVIDIA H100" in text


def test_no_record(write):
    """Other hardware, a failed run and a loss above the target are told first, and the folder is made all the same."""
    assert run(*write("seed", [*texts(0.02), fake_log(seed=3, stop=7)]), "--target=3.27") == 0
    text = " ".join(Path("out/2026-11-26_mine/README.md").read_text().split())
    assert "Not a record: seed3.txt: no final validation line, last step 6 of 8; p = " in text
    assert "it ran on 1 x NVIDIA H200, not on 8 H100s" in text and "There is no baseline" in text
    assert "Left out of the means: seed3.txt: no final" in text and "| 3 of 4, seeds 0, 1, 2, 3 |" in text
    assert not Path("out/2026-11-26_mine/script.diff").exists()


def test_public_logs_and_a_baseline_beside_it(write):
    """Logs without settings; a baseline that has a folder stays there and is linked."""
    old = write("run", texts(0.001, public=True), folder="out/2026-11-25_old")
    assert run(*write("seed", texts()), "--baseline", *old) == 0
    text = Path("out/2026-11-26_mine/README.md").read_text()
    assert "(../2026-11-25_old/run0.txt)" in text and "The record before ran on" in text.replace("\n", " ")
    assert rows(text)["runs"][0] == "3 of 3, seeds unknown, unknown, unknown"
    assert "The script is the one of the record before." in " ".join(text.split())
    assert not list(Path("out/2026-11-26_mine").glob("baseline*"))


def test_several_runs_in_a_file(write):
    """As scripts that make one after the other write them; the file is there once."""
    head, *parts = [text.partition("=" * 100 + "\nRunning") for text in texts(public=True)]
    whole = "".join(["".join(head), *(text.rpartition("=" * 100 + "\n")[2] for text in texts(public=True)[1:])])
    assert run(*write("all", [whole]), "--baseline", *write("old", texts(0.001))) == 0 and len(parts) == 2
    text = Path("out/2026-11-26_mine/README.md").read_text()
    assert rows(text)["runs"][1].startswith("3 of 3") and text.count("(all0.txt)") == 1
    logs = json.loads(Path("out/2026-11-26_mine/verify.json").read_text())["logs"]
    assert [log["log"] for log in logs] == ["all0.txt run 1", "all0.txt run 2", "all0.txt run 3"]


@pytest.mark.parametrize("new, old, words", [
    ([*texts(), fake_log(seed=3, source=NEW)], [], "the logs of the record hold 2 sources"),
    (texts(), [*texts(), fake_log(seed=3, source=NEW)], "the logs of the baseline hold 2 sources"),
    ([fake_log(), fake_log(seed=1, stop=7)], [], f"1 finished run, but verify.py's t-test needs {verify.MIN_RUNS}"),
    (texts(), [fake_log(stop=7)], "no run of the baseline finished"),
    (["no log"] * 2, [], "is not a log")])
def test_refused(write, capsys, new, old, words):
    """In one line, and no folder is left."""
    args = write("seed", new) + (["--baseline", *write("old", old)] if old else [])
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err and not list(Path("out").iterdir())


def test_names(write, capsys):
    """Of logs that would overwrite each other, of a folder that is there, of one that cannot be."""
    new, other = write("seed", texts()), write("seed", texts(), folder="other")
    assert run(*new, *other) == 2 and "have the same name" in capsys.readouterr().err
    clash = write("baseline_seed", texts())
    assert run(*new, *clash, "--baseline", *other) == 2 and "rename it" in capsys.readouterr().err
    assert run(*clash, "--baseline", *new) == 0
    assert (mine := Path("out/2026-11-26_mine")).joinpath("seed1.txt").read_text() == Path(new[1]).read_text()
    assert len(list(mine.glob("*seed?.txt"))) == 6
    shutil.rmtree(mine)
    assert run(*new) == 0 and run(*new) == 2 and "is there; choose another name" in capsys.readouterr().err
    assert record.main(["a/b", *new, "--out=out"]) == 2 and "is no name of a folder" in capsys.readouterr().err
    assert record.main(["mine", *new, "--out=none"]) == 2 and "choose another --out" in capsys.readouterr().err


def test_a_template_that_lacks_a_line(write, capsys, tmp_path, monkeypatch):
    template = (record.RECORDS / "TEMPLATE" / "README.md").read_text()
    (tmp_path / "TEMPLATE").mkdir()
    (tmp_path / "TEMPLATE" / "README.md").write_text(template.replace("| steps |", "| number of steps |"))
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert run(*write("seed", texts())) == 2
    assert "needs one line that begins with '| steps'" in capsys.readouterr().err
