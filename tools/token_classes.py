"""Makes data/token_classes.npy, by which the n-gram table of train_gpt.py takes tokens of nearly the same text for one.

    python tools/token_classes.py

For each of GPT-2's tokens the smallest one whose text is equal but for case, accents, compatibility forms and white
space. What is no text of its own (the end of a text, a part of a character, accents alone) keeps its number.
"""

import argparse
import re
import sys
import unicodedata
from collections.abc import Iterable
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


def main() -> None:
    """Run the command line; a vocabulary that is not there is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=t.TOKEN_CLASSES, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        vocabulary = tokenizer()
    except DataError as error:
        parser.exit(2, f"error: {error}\n")
    classes = token_classes(vocabulary.decode_single_token_bytes(token) if token != END_OF_TEXT else None
                            for token in range(vocabulary.n_vocab))
    np.save(args.out, classes)
    print(f"{args.out}: {len(np.unique(classes))} classes of {len(classes)} tokens")


if __name__ == "__main__":
    main()
