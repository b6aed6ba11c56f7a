"""Read text documents from local files and from Hugging Face datasets, for data/fineweb.py."""

import codecs
import contextlib
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from shards import DataError, http_status, one_line

# A dot may belong to a dataset's name (dclm-1.0), but what begins with a letter after the last dot is a file's suffix.
HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.[A-Za-z]\w*$)[\w.-]+")
# Windows editors begin a file with such a mark, which is no part of the text; UTF-32's begins like UTF-16's
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CUTS = ("\n\n", "\r\n\r\n", "\n", " ")  # a long document is cut behind the first of these that is there


def check_field(names: Iterable[str], field: str, where: str | Path) -> None:
    """Raise a DataError that names the place unless `field` is one of `names`."""
    if field not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{where}: no field {field!r} (found: {found}); choose one with --field")


def text_of(record: object, field: str, where: str) -> str | None:
    """Return the string that `record` is or has as its field, or None for a null; raise a DataError that names the
    place for anything else."""
    if isinstance(record, dict):
        check_field(record, field, where)
        record = record[field]
    if record is not None and not isinstance(record, str):
        raise DataError(f"{where}: expected a string, found {type(record).__name__}; choose another --field, or leave "
                        "this source out")
    return record


@contextlib.contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked if it ends in .gz; what goes wrong inside is a DataError that names the file."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: a damaged gzip file ({one_line(error)}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or one_line(error)}); leave it out") from error


def encoding_of(file: BinaryIO) -> str:
    """The encoding that the mark at the file's begin tells; without one, UTF-8."""
    head = file.peek(4)[:4]
    return next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), "utf-8")


def read_text(path: Path) -> str:
    """Return the whole file as text without its mark; raise DataError."""
    with open_binary(path) as file:
        encoding = encoding_of(file)
        try:
            text = file.read().decode(encoding)
        except UnicodeDecodeError as error:
            name = encoding.upper().removesuffix("-SIG")
            raise DataError(f"{path}: not {name} text ({error}); convert it to UTF-8 first") from error
    if "\0" in text:
        raise DataError(f"{path}: holds zero bytes, so it is no text, or UTF-16 without a mark; convert it to UTF-8")
    return text


def read_jsonl(path: Path, field: str) -> Iterator[str | None]:
    """Yield the value, or the field of the object, of each line that is not blank; raise DataError with its number."""
    with open_binary(path) as file:
        encoding, number, lines = encoding_of(file), 0, file
        if encoding == "utf-8-sig":
            file.read(len(codecs.BOM_UTF8))
        elif encoding != "utf-8":  # a line's end is more than one byte there
            lines = io.TextIOWrapper(file, encoding, newline="\n")
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield text_of(json.loads(line), field, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number + (lines is not file)}: not {encoding.upper()} text ({one_line(error)}); "
                            "convert it to UTF-8 first") from error
        except (ValueError, RecursionError) as error:
            problem = f"not JSON ({one_line(error)}); each line must be one JSON value"
            raise DataError(f"{path}:{number}: {problem}") from error


def read_json(path: Path, field: str) -> Iterator[str | None]:
    """Yield the documents of a list, of one object, or of JSON lines, which many .json files are; raise DataError."""
    with open_binary(path) as file, contextlib.suppress(ValueError, RecursionError):
        # json.loads knows marks; a first line that is a value of its own, but no list, is one of many
        if encoding_of(file).startswith("utf-8") and not isinstance(json.loads(file.readline()), list):
            yield from read_jsonl(path, field)
            return
    try:
        records = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({one_line(error)}); it must be a list, or a value in each line") from error
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield text_of(record, field, f"{path}: record {number}")


def read_parquet(path: Path, field: str) -> Iterator[str | None]:
    """Yield the values of the column `field`; raise DataError with the row's number."""
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            check_field(file.schema_arrow.names, field, path)
            values = (value for batch in file.iter_batches(columns=[field]) for value in batch[field].to_pylist())
            for number, value in enumerate(values, 1):
                yield text_of(value, field, f"{path}: row {number}")
    except DataError:
        raise
    # A damaged file may raise an ArrowException, an OSError without file name, or an error of Python's decoders.
    except Exception as error:
        raise DataError(f"{path}: not a readable parquet file ({one_line(error)}); fetch or write it again") from error


def read_txt(path: Path, _field: str) -> Iterator[str]:
    """Yield the whole file as one document; raise DataError."""
    yield read_text(path)


def read_hub(name: str, config: str | None, field: str) -> Iterator[str | None]:
    """Stream the field of each record of the hub dataset's train split; raise DataError."""
    try:
        from datasets import load_dataset

        try:
            records = load_dataset(name, config, split="train", streaming=True)
        except Exception as error:
            if http_status(error) != 401:
                raise
            # A token that is no longer valid is refused even where none is needed
            records = load_dataset(name, config, split="train", streaming=True, token=False)
        for number, record in enumerate(records, 1):
            yield text_of(record, field, f"{name}: record {number}")
    except DataError:
        raise
    # The library lets through the errors of its storage, HTTP and parsing libraries, which share no narrower class.
    except Exception as error:
        raise DataError(f"cannot read the dataset {name}: {one_line(error)}. Check the name, --config and the network, "
                        f"set HF_ENDPOINT to a mirror of the hub, or give local files") from error


READERS = {".jsonl": read_jsonl, ".json": read_json, ".txt": read_txt, ".parquet": read_parquet}


def reader_of(path: Path) -> Callable[[Path, str], Iterator[str | None]] | None:
    """The reader for a file's ending, in capitals or not; None if there is none."""
    name = path.name.lower()
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix)
    return None if reader is read_parquet and name.endswith(".gz") else reader


def check_source(source: str) -> Path | str:
    """Return a Path for a local file and the string itself for a hub dataset; raise DataError for anything else."""
    path = Path(source)
    if not path.exists() and HUB_NAME.fullmatch(source):
        return source
    if path.is_dir():
        raise DataError(f"{source}: a folder; name its files, for example {path}/*.jsonl")
    if not reader_of(path):
        raise DataError(f"{source}: neither a dataset OWNER/NAME nor a file that ends in {', '.join(READERS)}, or in "
                        ".jsonl.gz, .json.gz, .txt.gz; convert it, or correct the name")
    if not path.is_file():
        raise DataError(f"{source}: no such file; check the path")
    if not path.stat().st_size:
        raise DataError(f"{source}: the file is empty; leave it out")
    return path


def pieces(text: str, limit: int) -> Iterator[str]:
    """Cut a text into parts of at most `limit` characters (0: any number), which together are the text.

    A part ends behind an empty line if it has one in its second half, or else behind the end of a line or a space.
    """
    start = 0
    while limit and len(text) - start > limit:
        ends = (text.rfind(cut, start + limit // 2, start + limit) + len(cut) for cut in CUTS)
        end = next((end for end, cut in zip(ends, CUTS) if end > start + len(cut) - 1), start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def read_sources(sources: Iterable[Path | str], config: str | None, field: str, max_chars: Callable[[Path | str], int],
                 skipped: Counter) -> Iterator[str]:
    """Yield the documents of checked sources in order, as strings; raise DataError on the way.

    A document longer than max_chars(source) is cut. Nulls are left out and counted in `skipped`, by source.
    """
    for source in sources:
        texts = reader_of(source)(source, field) if isinstance(source, Path) else read_hub(source, config, field)
        for text in texts:
            if text is None:
                skipped[source] += 1
            else:
                yield from pieces(text, max_chars(source))
