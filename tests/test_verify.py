"""Tests of tools/verify.py and of the reader in tools/runlogs.py, on logs written here."""

import json
import math

import pytest
import runlogs
import verify
from fake_logs import RULE, SOURCE, fake_log
from scipy import stats

LOSSES, TIMES = (3.270, 3.274, 3.272), (1000, 1020, 1010)


@pytest.fixture
def write(tmp_path):
    """Write logs; returns their paths as arguments."""
    def write(*texts, prefix="run"):
        paths = [tmp_path / f"{prefix}{i}.txt" for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text)
        return [str(path) for path in paths]

    return write


@pytest.fixture
def check(write, capsys):
    """Run the tool as --json on logs; returns status and facts."""
    def check(*texts, more=()):
        status = verify.main([*write(*texts), "--json", *more])
        return status, json.loads(capsys.readouterr().out)

    return check


def runs(**same):
    return [fake_log(loss, ms, seed, **same) for seed, (loss, ms) in enumerate(zip(LOSSES, TIMES))]


def test_statistics_by_hand_and_by_scipy(check):
    """Three losses 0.002 apart: t = (3.272 - 3.28) / (0.002 / sqrt 3) = -4 sqrt 3, with 2 degrees of freedom."""
    status, facts = check(*runs())
    assert status == 1 - facts["valid"]
    assert facts["loss_mean"] == pytest.approx(3.272) and facts["loss_std"] == pytest.approx(0.002)
    t = -4 * math.sqrt(3)
    assert facts["p"] == pytest.approx((1 + t / math.sqrt(2 + t * t)) / 2, rel=1e-6)  # Student's t of 2 degrees
    assert facts["p"] == pytest.approx(stats.ttest_1samp(LOSSES, 3.28, alternative="less").pvalue, rel=1e-6)
    half = 4.302653 * 0.010 / math.sqrt(3)  # the 97.5 % quantile of the same distribution, from a table
    assert facts["time_mean_s"] == pytest.approx(1.010)
    assert facts["time_95_s"] == pytest.approx([1.010 - half, 1.010 + half], rel=1e-6)


@pytest.mark.parametrize("target, status", [(3.28, 1), (3.29, 0)])
def test_verdict_follows_p(check, target, status):
    """t = -6.9 gives p = 0.0101, just too much; t = -15.6 gives 0.002."""
    found, facts = check(*runs(), more=[f"--target={target}"])
    assert found == status and facts["valid"] == (status == 0)
    assert [p for p in facts["problems"] if not p.startswith("p = 0.0101 ")] == []


def failing(check, *texts):
    """Problems of logs that were valid without their fault."""
    status, facts = check(*texts, more=["--target=3.4"])
    assert status == 1 and not facts["valid"]
    return facts


def test_crashed_log_is_a_failed_run(check):
    """A run without final line is listed and fails the record, but is not in the mean."""
    facts = failing(check, *runs(), fake_log(seed=3, stop=7))
    assert (facts["runs"], facts["finished"]) == (4, 3) and facts["loss_mean"] == pytest.approx(3.272)
    assert facts["logs"][3]["failure"] == "no final validation line, last step 6 of 8"
    assert facts["problems"] == [f"{facts['logs'][3]['log']}: no final validation line, last step 6 of 8"]


@pytest.mark.parametrize("text, reason", [
    (fake_log(seed=3, stop=0), "no step"),
    (fake_log(math.nan, seed=3), "final loss nan"),
    (fake_log(seed=3) + "step:8/8 val_loss:3.1000 train_time:9ms step_avg:1.00ms\n", "2 final validation lines"),
])
def test_other_failures(check, text, reason):
    assert failing(check, *runs(), text)["logs"][3]["failure"] == reason


def test_one_run_is_no_record(check):
    facts = failing(check, fake_log())
    assert facts["problems"] == ["1 finished run, the t-test needs 2"] and facts["p"] is None


def test_equal_losses_are_not_judged(check):
    facts = failing(check, fake_log(3.27, 1000, 0), fake_log(3.27, 1001, 1))
    assert facts["problems"] == ["all losses are equal, which a t-test cannot judge"]


def test_mixed_sources(check, write, capsys):
    """The difference is shown, also below a rule in the source; a long one is cut."""
    other = SOURCE.replace("seed = 99", "seed = 98")
    facts = failing(check, *runs(), fake_log(3.271, 1001, 3, source=other))
    assert facts["problems"] == ["the sources differ"]
    assert len({run["source"] for run in facts["logs"]}) == 2
    (diff,) = facts["source_diffs"]
    assert "-seed = 99" in diff and "+seed = 98" in diff
    assert verify.main(write(fake_log(), fake_log(seed=1, source=SOURCE + "pass\n" * 100))) == 1
    shown = capsys.readouterr().out
    assert "+pass" in shown and shown.count("+pass") < verify.DIFF_LINES and " more lines" in shown


@pytest.mark.parametrize("change, problem", [
    (dict(torch="2.12.0"), "the environments differ"),
    (dict(device="cpu"), "the environments differ"),
    (dict(muon_lr=0.5), "muon_lr differs"),
    (dict(seed=1), "2 runs with seed 1"),
    (dict(val_tokens=8192), "run3.txt: 8192 validation targets, not 10485760"),
])
def test_runs_must_match(check, change, problem):
    found = failing(check, *runs(), fake_log(3.271, 1001, **{"seed": 3} | change))["problems"]
    assert any(text.endswith(problem) for text in found), found


def test_own_settings_may_differ(check):
    logs = [fake_log(loss, 1000, seed, run_id=f"r{seed}", log_dir=f"d{seed}", save_final=not seed)
            for seed, loss in enumerate(LOSSES)]
    assert check(*logs, more=["--target=3.4"])[0] == 0


@pytest.mark.parametrize("change, problem", [
    (dict(resume="x.pt", save_every=2), ""), (dict(val_chunk=16), "val_chunk"), (dict(torch="2.12.0"), "versions"),
    (dict(source=SOURCE + "pass\n"), "source"), (dict(source=SOURCE + "pass\n", val_chunk=16), "source, val_chunk")])
def test_resumed_run(check, change, problem):
    """All parts of its log count, not just those that made the result."""
    logs = [*runs(), fake_log(3.271, 1001, 3, stop=5) + fake_log(3.271, 1001, **{"seed": 3} | change)]
    found = check(*logs, more=["--target=3.4"])[1]["problems"]
    assert [text.partition("resumed with another ")[2] for text in found] == [problem] * bool(problem), found


def test_copy_is_found_without_seeds(check):
    texts = [fake_log(loss, public=True) for loss in LOSSES]
    assert failing(check, *texts, texts[0])["problems"] == ["2 logs with the same results: copies"]


def test_public_logs(check):
    """Without configuration: seeds and data unknown, devices counted by nvidia-smi."""
    status, facts = check(*(fake_log(loss, ms, public=True) for loss, ms in zip(LOSSES, TIMES)), more=["--target=3.29"])
    assert status == 0 and facts["seeds"] == "unknown" and facts["loss_mean"] == pytest.approx(3.272)
    run = facts["logs"][0]
    assert (run["gpus"], run["val_files"], run["seed"]) == ("2 x NVIDIA H200", None, None)
    assert facts["environments"] == [["Python 3.12.7 (main)", "PyTorch 2.11.0+cu130 compiled for CUDA 13.0",
                                      "Driver Version: 580.1          CUDA Version: 13.0", "2 x NVIDIA H200"]]


def test_public_logs_in_seconds(check, write, capsys):
    """Also with further fields around the loss, and training losses among them."""
    same = dict(public=True, seconds=True, fields="bits:1.5 lr:2e-4 ")
    status, facts = check(*(fake_log(loss, ms, **same) for loss, ms in zip(LOSSES, TIMES)), more=["--target=3.29"])
    assert status == 0 and [run["failure"] for run in facts["logs"]] == [None] * 3
    assert facts["loss_mean"] == pytest.approx(3.272) and facts["time_mean_s"] == pytest.approx(1.010)
    lines = runlogs.read_lines("step:3/4 lr:0.1 val_loss:3.2 tokens:7 train_time:1.5s step_avg:500ms\n"
                               "step:4/4 train_loss:3.1 lr:0.1 train_time:1600ms\nstep:4/4 val_loss:? train_time:2ms\n")
    assert lines == [("val", (3, 3.2, 1500), 4), ("train", (4, 3.1, 1600), 4)]


def several(write, *texts):
    """The runs of one file with all these texts."""
    (path,) = write("".join(texts), prefix="all")
    return path, runlogs.read_logs(runlogs.Path(path))


def test_several_runs_in_one_file(check, write):
    """Whether the script made them one after the other or whole logs were joined, each is judged alone."""
    texts = [fake_log(loss, ms, public=True) for loss, ms in zip(LOSSES, TIMES)]
    bare = [text[text.index("step:0/8") :] for text in texts]
    for parts in ([texts[0], *bare[1:]], texts):
        path, logs = several(write, *parts)
        assert [(log.loss, log.seconds) for log in logs] == [(3.27, 1), (3.274, 1.02), (3.272, 1.01)]
        assert not any(log.failure for log in logs)
        assert [str(log.path) for log in logs] == [f"{path} run {i}" for i in (1, 2, 3)]
        assert {log.source for log in logs} == {SOURCE} and not any(log.changed for log in logs)
        assert len({log.results for log in logs}) == 3 and all(len(log.train) == 8 for log in logs)
    assert verify.main([path, "--target=3.29"]) == 0
    _, logs = several(write, texts[0], fake_log(3.274, public=True, source="other\n"))
    assert [log.loss for log in logs] == [3.27, 3.274] and logs[1].source.endswith("other\n")
    _, logs = several(write, fake_log(stop=6, public=True), texts[0])  # a crash, and once more
    assert [log.failure for log in logs] == ["no final validation line, last step 5 of 8", ""]
    _, logs = several(write, *runs()[:2])  # two of ours
    assert [(log.loss, log.config["seed"]) for log in logs] == [(3.27, "0"), (3.274, "1")]
    with pytest.raises(runlogs.LogError, match="holds 2 runs"):
        runlogs.read_log(logs[0].path.with_name("all0.txt"))


def test_early_stop(check):
    """A public script that stops on seeing a loss is finished, at the step of that loss; ours never stops so."""
    early = [text[: text.index("step:5/8")] for text in (fake_log(x, public=True) for x in LOSSES)]
    status, facts = check(*early, more=["--target=3.7"])
    assert status == 0 and facts["loss_mean"] == pytest.approx(3.672)
    assert [(run["stopped_at"], run["steps"]) for run in facts["logs"]] == [(4, 8)] * 3
    facts = failing(check, *early, fake_log(3.2, public=True))
    assert "the runs end at different steps: 4, 8" in facts["problems"]
    text = fake_log(3.271, seed=3)
    facts = failing(check, *runs(), text[: text.index("step:5/8")])
    assert facts["logs"][3]["failure"] == "no final validation line, last step 4 of 8"
    facts = failing(check, *early, fake_log(public=True, stop=1))  # ended after the first validation, at step 0
    assert facts["logs"][3]["failure"] == "no final validation line, last step 0 of 8"


def test_folders(tmp_path, capsys):
    """A folder stands for its logs, at any depth; what is none is named."""
    (tmp_path / "old").mkdir()
    for i, text in enumerate(runs()):
        (tmp_path / f"{i}.txt").write_text(text)
        (tmp_path / "old" / f"{i}.txt").write_text(text)
    new = tmp_path / "new"
    new.mkdir()
    for i in range(3):
        (tmp_path / f"{i}.txt").rename(new / f"{i}.txt")
    (new / "notes.txt").write_text("no log")
    assert verify.main([str(new), "--baseline", str(tmp_path / "old"), "--target=3.29", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["runs"] == facts["baseline"]["runs"] == 3 and err.count("\n") == 1 and "notes.txt" in err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.csv").write_text("step,train_loss\n1,9\n")
    assert verify.main([str(tmp_path / "empty")]) == 2
    assert "no log here" in capsys.readouterr().err


def test_baseline(check, write):
    """Welch's test and the interval of the time, against scipy."""
    losses, times = (3.279, 3.275, 3.281, 3.277), (1200, 1230, 1190, 1250)
    old = write(*(fake_log(x, ms, i) for i, (x, ms) in enumerate(zip(losses, times))), fake_log(stop=3), prefix="old")
    _, facts = check(*runs(), more=["--baseline", *old])
    base = facts["baseline"]
    assert (base["runs"], base["finished"]) == (5, 4)
    assert base["loss_difference"] == pytest.approx(3.272 - 3.278)
    assert base["loss_p"] == pytest.approx(stats.ttest_ind(LOSSES, losses, equal_var=False).pvalue)
    interval = stats.ttest_ind(TIMES, times, equal_var=False).confidence_interval(0.95)
    assert base["time_difference_s"] == pytest.approx(1.010 - 1.2175)
    assert base["time_difference_95_s"] == pytest.approx([interval.low / 1000, interval.high / 1000])


def test_text(write, capsys):
    """Each run with data and devices, the failed one too, what the time is, the note, and the verdict at the end."""
    data = "/elsewhere/val_*.bin"
    assert verify.main([*write(*runs(val_files=data), fake_log(seed=3, stop=7)), "--baseline",
                        *write(fake_log(3.4), prefix="old")]) == 1
    shown = capsys.readouterr().out
    assert shown.count(data) == 3 and shown.count("1 x NVIDIA H200") >= 5 and "3.2740" in shown
    assert "FAILED: no final" in shown and verify.CLOCK in shown and verify.NOTE in shown
    assert shown.splitlines()[-1].startswith("verdict: NOT VALID: ")
    verify.main([*write(*runs()), "--target=3.29"])
    assert capsys.readouterr().out.endswith("verdict: VALID\n")


@pytest.mark.parametrize("content", [None, "", "step:8/8 val_loss:3.2 train_time:1ms step_avg:1ms\n", SOURCE])
def test_unreadable_input(tmp_path, write, capsys, content):
    """A missing file and a file that is no log end in one line and status 2."""
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_text(content)
    assert verify.main([*write(fake_log()), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and "bad.txt" in err


def test_large_log(write):
    """A log of 5 MB, half source, half steps."""
    source = SOURCE + "x = 1  # step:8/8 val_loss:1.0\n" * 80_000
    (path,) = write(fake_log(source=source, steps=50_000))
    log = runlogs.read_log(runlogs.Path(path))
    assert runlogs.Path(path).stat().st_size > 5e6
    assert log.source == source and len(log.train) == 50_000 and (log.loss, log.seconds) == (3.27, 1.0)


@pytest.mark.parametrize("source", [f"x = 1\n{RULE}\n", "x = 1"])
def test_end_of_the_source(write, source):
    """It may end with a rule of its own, or without newline."""
    (path,) = write(fake_log(source=source))
    assert runlogs.read_log(runlogs.Path(path)).source == source
