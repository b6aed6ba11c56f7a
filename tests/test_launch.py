"""tools/launch.py without ranks: its help, and its status if told to stop; tests/test_failures.py has the rest."""

import logging
import signal

import launch
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException


def test_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch.py", "--help"])
    assert launch.main() == 0 and capsys.readouterr().out == launch.__doc__ + "\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped(monkeypatch, number):
    def run(args):
        assert args.training_script == "train_gpt.py"
        raise SignalException("told to stop", number)

    monkeypatch.setattr(launch, "run", run)
    try:
        assert launch.main(["--standalone", "train_gpt.py"]) == 128 + number
    finally:
        logging.disable(logging.NOTSET)
