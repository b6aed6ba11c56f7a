"""Makes data/token_prefixes.npy, by which STAGES.*.prefix of train_gpt.py lets a position predict the beginning, too.

    python tools/token_prefixes.py

For each of GPT-2's tokens the longest other token that its bytes begin with; -1 where there is none, as of a single
byte or of the end of a text.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import END_OF_TEXT, tokenizer
from shards import DataError

import train_gpt as t


def token_prefixes(vocabulary: Iterable[bytes | None]) -> np.ndarray:
    """The prefix of each token, int32, from the tokens' bytes; None: a token without text."""
    vocabulary = list(vocabulary)
    numbers = {raw: token for token, raw in enumerate(vocabulary) if raw}
    found = ((numbers[raw[:n]] for n in range(len(raw) - 1, 0, -1) if raw[:n] in numbers) if raw else iter(())
             for raw in vocabulary)
    return np.array([next(longest, -1) for longest in found], dtype=np.int32)


def main() -> None:
    """Run the command line; a vocabulary that is not there is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=t.TOKEN_PREFIXES, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        vocabulary = tokenizer()
    except DataError as error:
        parser.exit(2, f"error: {error}\n")
    prefixes = token_prefixes(vocabulary.decode_single_token_bytes(token) if token != END_OF_TEXT else None
                              for token in range(vocabulary.n_vocab))
    np.save(args.out, prefixes)
    print(f"{args.out}: {np.count_nonzero(prefixes >= 0)} of {len(prefixes)} tokens have a prefix")


if __name__ == "__main__":
    main()
