"""Damaged shards: exact tokens or one clear error, from the training script's reader and the data scripts' check."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as t

sys.path.insert(0, str(Path(t.__file__).parent / "data"))
import shards as s

BOS = 50256
MUTATIONS = 10_000
NUMBERS = (0, 1, -1, 2, 255, 2**15, 2**16, 2**31 - 1, -(2**31), s.MAGIC, s.MAGIC ^ 1)  # for the fields of a header


def shard(tokens):
    return struct.pack("<256i", s.MAGIC, s.VERSION, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def mutated(raw, rng):
    """A copy with one to three of: a flipped bit, another field or token, bytes cut off, put in or taken out."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(raw) + 1))
        match rng.integers(0, 6):
            case 0 if at < len(raw):
                raw[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if len(raw) >= 12:
                struct.pack_into("<i", raw, 4 * int(rng.integers(0, 3)), int(rng.choice(NUMBERS)))
            case 2 if len(raw) > 1024:
                struct.pack_into("<B", raw, int(rng.integers(1024, len(raw))), int(rng.choice([0, 80, 196, 255])))
            case 3:
                del raw[at if rng.random() < 0.9 else 0 :]
            case 4:
                raw[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case _:
                del raw[at : at + int(rng.integers(1, 9))]
    return bytes(raw)


def contents(raw):
    """Tokens of a shard, field by field, or None if a header or a size is wrong."""
    if len(raw) < 1024:
        return None
    magic, version, count = struct.unpack_from("<3i", raw)
    if (magic, version) != (20240520, 1) or count < 1 or len(raw) != 1024 + 2 * count:
        return None
    return list(struct.unpack_from(f"<{count}H", raw, 1024))


def test_mutations(tmp_path):
    """Ten thousand damaged files: all that is intact is read exactly, all else is one line with cause and remedy."""
    rng, path, seen = np.random.default_rng(0), tmp_path / "train.bin", {"read": 0, "header": 0, "token": 0}
    for _ in range(MUTATIONS):
        tokens = rng.integers(0, BOS, rng.integers(1, 40))
        tokens[rng.random(len(tokens)) < 0.2] = BOS
        raw = mutated(shard(tokens), rng)
        path.unlink(missing_ok=True)  # some file systems flush a file that is truncated and written again
        path.write_bytes(raw)
        truth = contents(raw)
        try:
            s.verify_shard(path)
            assert truth is not None
        except s.DataError as error:
            assert truth is None and str(path) in str(error)
        try:
            read = t.check_shard(str(path), BOS)
            assert read.dtype == np.uint16 and read.tolist() == truth and max(truth) <= BOS
            seen["read"] += 1
        except t.UserError as error:
            assert truth is None or max(truth) > BOS
            assert str(error).startswith(f"{path}: ") and "again" in str(error) and "\n" not in str(error)
            seen["header" if truth is None else "token"] += 1
    assert min(seen.values()) > MUTATIONS // 50, seen


def test_shard_without_tokens(tmp_path):
    """It is refused by name: the advice on how many shards are missing divides by the tokens of those there are."""
    path = tmp_path / "train.bin"
    path.write_bytes(shard([]))
    with pytest.raises(t.UserError, match="train.bin: the header says 0 tokens"):
        t.check_shard(str(path), BOS)
    with pytest.raises(s.DataError, match="train.bin: 1,024 bytes, but 0 tokens"):
        s.verify_shard(path)


def test_what_is_no_file(tmp_path):
    """A folder in a shard's place costs one line too."""
    with pytest.raises(t.UserError, match=f"{tmp_path}: .*again"):
        t.check_shard(str(tmp_path), BOS)
