"""The shard file format and the one-line errors, shared by the data scripts.

A shard is a header of 256 little-endian int32 (magic, version, number of tokens, then zeros) followed by the tokens
as little-endian uint16. The training script holds its own reader.
"""

import os
import struct
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_FIELDS = struct.Struct("<3i")
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_TOKENS = 2**31 - 1  # the token count is an int32


class DataError(Exception):
    """A problem that the user can mend; the text is one line naming the file, the cause and the remedy."""


def one_line(error: Exception) -> str:
    """Return the text of an exception as a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def http_status(error: BaseException | None) -> int | None:
    """Return the status of the hub's answer that led to this exception, or None if there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def shard_name(prefix: str, index: int) -> str:
    """Return the file name of shard `index`; shard 0 is the validation shard."""
    return f"{prefix}_{'train' if index else 'val'}_{index:06d}.bin"


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write a numpy array of dtype "<u2" to `path`, which appears only once it is complete.

    Raises DataError when the disk refuses the file; nothing is left behind then.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(HEADER_FIELDS.pack(MAGIC, VERSION, len(tokens)).ljust(HEADER_BYTES, b"\0"))
            file.write(tokens.data)
        os.replace(temporary, path)
    except OSError as error:
        remedy = "free some space or choose another --out"
        raise DataError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)


def verify_shard(path: Path) -> None:
    """Check the header of the shard at `path`, and its token count against the file size in bytes.

    Raises DataError, with the cause alone, when the file is not an intact shard, and OSError when it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(header) < HEADER_BYTES:
        raise DataError(f"{path}: {size:,} bytes are too few for a shard's header of {HEADER_BYTES:,}")
    magic, version, tokens = HEADER_FIELDS.unpack_from(header)
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path}: magic {magic} and version {version} should be {MAGIC} and {VERSION}")
    promised = HEADER_BYTES + TOKEN_BYTES * tokens
    if tokens < 1 or size != promised:
        raise DataError(f"{path}: {size:,} bytes, but {tokens:,} tokens take {promised:,}")
