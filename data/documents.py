"""Read text documents from local files and from Hugging Face datasets, for data/fineweb.py."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards import DataError, one_line

# A dot may belong to a dataset's name (dclm-1.0), but what begins with a letter after the last dot is a file's suffix.
HUB_NAME = re.compile(r"[\w-][\w.-]*/(?!.*\.[A-Za-z]\w*$)[\w.-]+")


def text_of(value: object, where: str) -> str:
    """Return `value` if it is a string, else raise a DataError that names the place."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, found {type(value).__name__}; remove or mend this document")
    return value


def check_field(names: Iterable[str], field: str, where: str | Path) -> None:
    """Raise a DataError that names the place unless `field` is one of `names`."""
    if field not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise DataError(f"{where}: no field {field!r} (found: {found}); choose one with --field")


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """Yield the string, or the field of the object, of each line that is not blank; raise DataError with its number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({one_line(error)}); each line must be one JSON value") from error
            if isinstance(record, dict):
                check_field(record, field, where)
                record = record[field]
            yield text_of(record, where)


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """Yield the values of the column `field`; raise DataError with the row's number."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            check_field(file.schema_arrow.names, field, path)
            values = (value for batch in file.iter_batches(columns=[field]) for value in batch[field].to_pylist())
            for number, value in enumerate(values, 1):
                yield text_of(value, f"{path}: row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file ({one_line(error)}); convert it again") from error


def read_txt(path: Path, _field: str) -> Iterator[str]:
    """Yield the whole file, which must be UTF-8, as one document; raise DataError."""
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it first") from error


def read_hub(name: str, config: str | None, field: str) -> Iterator[str]:
    """Stream the field of each record of the hub dataset's train split; raise DataError."""
    try:
        from datasets import load_dataset

        for number, record in enumerate(load_dataset(name, config, split="train", streaming=True), 1):
            where = f"{name}: record {number}"
            check_field(record, field, where)
            yield text_of(record[field], where)
    except DataError:
        raise
    # The library lets through the errors of its storage, HTTP and parsing libraries, which share no narrower class.
    except Exception as error:
        raise DataError(f"cannot read the dataset {name}: {one_line(error)}. Check the name, --config and the network, "
                        f"set HF_ENDPOINT to a mirror of the hub, or give local files") from error


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet, ".txt": read_txt}


def check_source(source: str) -> Path | str:
    """Return a Path for a local file and the string itself for a hub dataset; raise DataError for anything else."""
    path = Path(source)
    if not path.exists() and HUB_NAME.fullmatch(source):
        return source
    if path.suffix not in READERS:
        raise DataError(f"{source}: neither a dataset OWNER/NAME nor a file that ends in {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{source}: no such file; check the path")
    if not path.stat().st_size:
        raise DataError(f"{source}: the file is empty; leave it out")
    return path


def read_sources(sources: Iterable[Path | str], config: str | None, field: str) -> Iterator[str]:
    """Yield the documents of checked sources in order, as strings; raise DataError or OSError on the way."""
    for source in sources:
        if isinstance(source, Path):
            yield from READERS[source.suffix](source, field)
        else:
            yield from read_hub(source, config, field)
