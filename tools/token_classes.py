"""Makes data/token_classes.npy, by which the n-gram table of train_gpt.py takes tokens of nearly the same text for one.

    python tools/token_classes.py

For each of GPT-2's tokens the smallest one whose text is equal but for case, accents, compatibility forms and white
space. What is no text of its own (the end of a text, a part of a character, accents alone) keeps its number.
"""

import argparse
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import END_OF_TEXT, tokenizer
from shards import DataError

import train_gpt as t


def normal(text: str) -> str:
    """What tokens of a class have in common; a token of white space alone is one space."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M")).lower()
    text = re.sub("[ \t\r\n]+", " ", text)
    return text.strip() or text[:1]


def token_classes(vocabulary: Iterable[bytes | None]) -> np.ndarray:
    """The class of each token, uint16, from the tokens' bytes; None: a token without text."""
    first, classes = {}, []
    for token, raw in enumerate(vocabulary):
        try:
            text = normal(raw.decode()) if raw is not None else ""
        except UnicodeDecodeError:
            text = ""
        classes.append(first.setdefault(text, token) if text else token)
    return np.array(classes, dtype=np.uint16)


def make_table(text: str, default: Path, table: Callable[[Iterable[bytes | None]], np.ndarray],
               told: Callable[[np.ndarray], str]) -> None:
    """Run the command line of a tool that makes a table of GPT-2's tokens and tells what it holds; a vocabulary that is
    not there is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=default, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        vocabulary = tokenizer()
    except DataError as error:
        parser.exit(2, f"error: {error}\n")
    found = table(vocabulary.decode_single_token_bytes(token) if token != END_OF_TEXT else None
                  for token in range(vocabulary.n_vocab))
    np.save(args.out, found)
    print(f"{args.out}: {told(found)}")


def main() -> None:
    """Write the table of classes."""
    make_table(__doc__, t.TOKEN_CLASSES, token_classes, lambda x: f"{len(np.unique(x))} classes of {len(x)} tokens")


if __name__ == "__main__":
    main()
