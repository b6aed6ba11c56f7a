"""torchrun for run.sh: takes its arguments, passes on the status of the first rank that failed, and leaves the message
to that rank, where torchrun adds a traceback of its own.

    python tools/launch.py --standalone --nproc_per_node=8 train_gpt.py --seed=1

Exit status: 0 on success; the rank's own; 128 + the signal that ended it, or that this launcher got and passed on.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(argv: list[str] | None = None) -> int:
    """Launch the ranks; returns the exit status."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    logging.disable(logging.ERROR)
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
