"""Makes data/token_prefixes.npy, by which STAGES.*.prefix of train_gpt.py lets a position predict the beginning, too.

    python tools/token_prefixes.py

For each of GPT-2's tokens the longest other token that its bytes begin with; -1 where there is none, as of a single
byte or of the end of a text.
"""

from collections.abc import Iterable

import numpy as np
from token_classes import make_table, t


def token_prefixes(vocabulary: Iterable[bytes | None]) -> np.ndarray:
    """The prefix of each token, int32, from the tokens' bytes; None: a token without text."""
    vocabulary = list(vocabulary)
    numbers = {raw: token for token, raw in enumerate(vocabulary) if raw}
    found = ((numbers[raw[:n]] for n in range(len(raw) - 1, 0, -1) if raw[:n] in numbers) if raw else iter(())
             for raw in vocabulary)
    return np.array([next(longest, -1) for longest in found], dtype=np.int32)


def main() -> None:
    """Write the table of prefixes."""
    make_table(__doc__, t.TOKEN_PREFIXES, token_prefixes,
               lambda x: f"{np.count_nonzero(x >= 0)} of {len(x)} tokens have a prefix")


if __name__ == "__main__":
    main()
