"""
NanoGPT speedrun: train a GPT-2-small-class language model to 3.28 FineWeb validation loss as fast as possible.

This one file holds the whole run of record #80 of the public track (1.406 minutes on 8 H100s, 2026-04-08): schedule,
kernels, attention, model, optimizers, data and training loop. It runs on 1, 2, 4 or 8 GPUs with one trajectory, and
as a small demo on a CPU.

    ./run.sh                                    the record run on the GPUs that are there, or the demo without a GPU
    python train_gpt.py --preset=demo           the demo (CPU, bundled text, about two minutes)
    torchrun --nproc_per_node=8 train_gpt.py    the record run by hand
    python train_gpt.py --plan                  the schedule as CSV, a line a step
    python train_gpt.py --help                  every hyperparameter, settable as --key=value

Dimension letters, used in shape comments:
    S tokens of a segment    T tokens of one micro-batch on one rank: n segments, T = n*S
    D model width            H heads         d width of a head (D = H*d)
    V vocabulary, padded to a multiple of 128   F MLP width (4D)   B bigram rows   L layers
    R ranks (GPUs)   A segments of a rank in one step (R*A = 8)      K matrices of a bank   N optimizer steps

Map of the file. The algorithm, as a token meets it:
    1 this text    2 configuration: Hyperparameters, LAYERS, STAGES and plan(), PARAMS    3 what flows
    4 data         5 model        6 optimizer        7 the run: train_step, evaluate, warmup, train, main
The engine room, which decides nothing about the result:
    8 kernels, each with its reference    9 attention backends    10 keeping a run: errors, command line, ranks, log
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import glob
import importlib.util
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, NoReturn
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # CPU builds of PyTorch come without Triton; the references serve
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f

# ==== 2. Configuration: every tuned number of the run is in this part =================================================

SEGMENTS = 8  # a step's tokens come as 8 segments, whatever R is: segment s goes to rank s % R
MTP_MAX = 3  # most tokens ahead that one position predicts


@dataclass(frozen=True)
class Hyperparameters:
    """Everything that --key=value can set. The defaults are record #80; all values are tuned unless a comment says why.

    Lengths are in tokens. The dataclass is hashable and read-only: whatever depends on it is computed from it.
    """

    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"
    val_tokens: int = 10_485_760  # the track's fixed validation set: this many targets from the start of the val shard
    val_chunk: int = 262_144  # tokens that one rank scores in one pack
    # schedule
    num_scheduled_iterations: int = 1440
    num_extension_iterations: int = 40  # further steps at the final learning rate with longer windows
    val_every: int = 250  # validate every so many steps and at the end; 0: only at the end
    batch_unit: int = 131_072  # tokens a step in stage 1; STAGES counts in this unit
    block: int = 128  # tokens; STAGES counts windows and document cuts in this unit
    final_val_window: int = 20  # long window of the last validation, in blocks
    cooldown_start: float = 0.4  # fraction of the scheduled steps
    cooldown_floor: float = 0.15
    # model
    vocab_size: int = 50_257  # GPT-2 BPE; the last id, <|endoftext|>, begins every document
    model_dim: int = 768
    num_heads: int = 6
    head_dim: int = 128
    bigram_ratio: int = 5  # rows of the bigram table per row of the padded vocabulary
    attn_scale: float = 0.1  # softmax scale before YaRN
    rope_base: float = 1024.0
    # optimizers
    muon_lr: float = 0.023
    muon_wd: float = 1.2
    muon_beta2: float = 0.9
    muon_momentum: float = 0.95
    muon_momentum_low: float = 0.85  # at the first and the last step
    muon_momentum_warmup: int = 300  # steps
    muon_momentum_cooldown: int = 50  # steps
    adam_lr: float = 0.008
    adam_wd: float = 0.005
    adam_eps: float = 1e-10
    # how it runs
    seed: int = 0
    dtype: str = "bfloat16"  # of weights and activations: bfloat16 or float32
    fp8_head: bool = True  # the training head's products in FP8
    compile: bool = True  # torch.compile; plain eager PyTorch if false
    graphs: bool = True  # replay each micro-step as one CUDA graph (on a GPU, if compiled)
    micro_tokens: int = 65_536  # a rank's segments are joined to micro-batches up to this; less takes less memory
    attention: str = "auto"  # auto or a key of ATTENTION_BACKENDS
    kernels: str = "auto"  # auto or one of KERNELS
    device: str = "auto"  # auto, cuda or cpu
    log_dir: str = "logs"
    run_id: str = ""  # name of the log file; empty: date and time
    save_every: int = 0  # write a checkpoint, <run id>_step<N>.pt beside the log, every so many steps; 0: never
    save_final: bool = False  # write one after the last step
    resume: str = ""  # continue from this checkpoint as if the run had not stopped; empty: begin

    @property
    def num_steps(self) -> int:
        return self.num_scheduled_iterations + self.num_extension_iterations

    @property
    def bos(self) -> int:
        return self.vocab_size - 1

    @property
    def padded_vocab(self) -> int:
        return round_up(self.vocab_size, 128)

    @property
    def bigram_rows(self) -> int:
        return self.bigram_ratio * self.padded_vocab

    @property
    def mlp_dim(self) -> int:
        return 4 * self.model_dim


# What a run resumed from a checkpoint may change: no step's weights depend on it, but for rounding
MAY_CHANGE = ("val_files", "val_tokens", "val_chunk", "val_every", "final_val_window", "compile", "graphs",
              "micro_tokens", "attention", "kernels", "device", "log_dir", "run_id", "save_every", "save_final",
              "resume")
PRESETS = {
    "record80": {},
    # The same topology, optimizers and schedule shape at a size that two CPU cores train in about two minutes.
    "demo": dict(
        train_files="data/sample/fineweb_train_*.bin", val_files="data/sample/fineweb_val_*.bin",
        val_tokens=8192, val_chunk=1024, num_scheduled_iterations=60, num_extension_iterations=4, val_every=20,
        batch_unit=512, micro_tokens=512, block=16, model_dim=96, head_dim=16, bigram_ratio=1, muon_momentum_warmup=30,
        muon_momentum_cooldown=8, dtype="float32", fp8_head=False, compile=False, device="cpu",
    ),
}


class Layer(NamedTuple):
    """One layer: its kind of attention, and what it reads."""

    window: str | None  # attention window: "short", "long", or None for a layer without attention
    paired: bool = False  # two heads share keys: a token enters attention as two, heads 0..H/2-1 and then the rest
    value_table: int | None = None  # which value-embedding table is mixed into V
    reads: int | None = None  # attention reads the stream as it was after this layer; None: the stream itself
    skip_from: int | None = None  # in place of attention, add the gated stream as it was after this layer

    @property
    def key_offset(self) -> bool:
        """Long-window layers shift half of each key one position ahead, which gives induction in one layer."""
        return self.window == "long"


LAYERS = (
    Layer("short", paired=True),  # 0
    Layer("short", value_table=0),  # 1
    Layer("short", paired=True, value_table=1),  # 2
    Layer("long"),  # 3
    Layer("short"),  # 4
    Layer("short", paired=True),  # 5
    Layer(None, skip_from=3),  # 6
    Layer("short"),  # 7
    Layer("short", value_table=2, reads=7),  # 8
    Layer("short", paired=True, value_table=3, reads=7),  # 9
    Layer("long", value_table=4, reads=7),  # 10
)
ATTN_INDEX = {i: j for j, i in enumerate(i for i, layer in enumerate(LAYERS) if layer.window)}  # layer -> place in bank
NUM_VALUE_TABLES = sum(layer.value_table is not None for layer in LAYERS)
BACKOUT_LAYER = 7  # the stream after this layer is subtracted again before the head
GATE_INPUTS = 12  # the first channels of a vector that its gates read
SCALARS = 2 * len(LAYERS) + 3  # (a, b) of each layer, then the smear, backout and skip lambdas


class Stage(NamedTuple):
    """What is scheduled by stage."""

    batch: int  # tokens a step, in units of hp.batch_unit
    max_doc: int  # longer documents are cut, in blocks
    short: int  # attention windows, in blocks
    long: int
    lr: float
    mtp_start: tuple[float, ...]  # weights of predicting 1, 2, 3 tokens ahead: linear from start to end of the stage
    mtp_end: tuple[float, ...]


STAGES = (  # equal thirds of the scheduled steps, then the extension
    Stage(1, 7, 1, 3, 1.00, (1.0, 0.5, 0.25), (1.0, 0.5, 0.0)),
    Stage(2, 16, 3, 7, 1.52, (1.0, 0.5), (1.0, 0.0)),
    Stage(3, 16, 5, 11, 1.73, (1.0,), (1.0,)),
    Stage(3, 16, 6, 13, 1.73, (1.0,), (1.0,)),
)
UNTIE_STAGE = 2  # embed and lm_head part at the first Adam step of this stage


class Plan(NamedTuple):
    """Every scheduled value of one optimizer step. Windows, cut and batch in tokens."""

    step: int
    batch_tokens: int
    max_doc_len: int
    window_short: int
    window_long: int
    lr_factor: float
    muon_momentum: float
    mtp_weights: tuple[float, ...]
    update_adam: bool
    untie_embed: bool  # the step in which embed and lm_head part
    stage: int


def stage_bounds(hp: Hyperparameters) -> list[int]:
    """First step of each stage, and the number of steps as the last entry."""
    thirds = len(STAGES) - 1
    return [round(i * hp.num_scheduled_iterations / thirds) for i in range(thirds + 1)] + [hp.num_steps]


def plan(step: int, hp: Hyperparameters) -> Plan:
    """The schedule as a pure function of the step, 0 <= step < hp.num_steps."""
    bounds = stage_bounds(hp)
    index = max(i for i in range(len(STAGES)) if bounds[i] <= step)
    stage = STAGES[index]

    cooldown = int(hp.num_scheduled_iterations * hp.cooldown_start)
    t = min(max((step - cooldown) / (hp.num_scheduled_iterations - cooldown), 0.0), 1.0)
    lr_factor = stage.lr * (1 - t) + hp.cooldown_floor * t

    rise = hp.muon_momentum - hp.muon_momentum_low
    momentum, last = hp.muon_momentum, hp.num_steps - hp.muon_momentum_cooldown
    if step < hp.muon_momentum_warmup:
        momentum = hp.muon_momentum_low + rise * step / hp.muon_momentum_warmup
    if step > last:
        momentum = hp.muon_momentum - rise * (step - last) / hp.muon_momentum_cooldown

    t = (step - bounds[index]) / (bounds[index + 1] - bounds[index])
    mtp = tuple(a + (b - a) * t for a, b in zip(stage.mtp_start, stage.mtp_end))
    return Plan(
        step, stage.batch * hp.batch_unit, stage.max_doc * hp.block, stage.short * hp.block, stage.long * hp.block,
        lr_factor, momentum, mtp, step % 2 == 1, step == bounds[UNTIE_STAGE] | 1, index,
    )


def plan_csv(hp: Hyperparameters) -> Iterator[str]:
    """The schedule as CSV lines, a header and a line a step; absent MTP weights are 0, booleans 0 or 1."""
    mtp_names = [f"mtp_{k}" for k in range(MTP_MAX)]
    yield ",".join([*Plan._fields[:7], *mtp_names, "update_adam", "untie_embed"])
    for step in range(hp.num_steps):
        p = plan(step, hp)
        mtp = (p.mtp_weights + (0.0,) * MTP_MAX)[:MTP_MAX]
        yield ",".join(f"{v:.10g}" for v in (*p[:7], *mtp, p.update_adam, p.untie_embed))


def saves(step: int, hp: Hyperparameters) -> bool:
    """Whether a checkpoint is due when this many steps are done."""
    return (hp.save_every > 0 and step % hp.save_every == 0) or (hp.save_final and step == hp.num_steps)


class Param(NamedTuple):
    """How one parameter is trained, and how ranks share the work."""

    name: str
    optimizer: str  # "normuon" or "adam"
    betas: tuple[float, float] | None  # Adam's
    lr_mul: float
    wd_mul: float
    dtype: str  # "model": hp.dtype; "float32"
    reduce: str  # "shard": each rank owns an equal slice of dim 0 and updates it; "replicate": every rank updates all
    # or "sparse": as "shard", but from SPARSE_FROM ranks on, only the rows travel that a rank's gradient touched
    turn: int  # place in the order of updates and gathers: small ones, tables, then banks, whose compute hides traffic


PARAMS = (  # in the order in which gradient reductions launch: roughly the order in which other ranks need them
    Param("qk_bank", "normuon", None, 1, 1, "model", "shard", 13),
    Param("vo_bank", "normuon", None, 1, 1, "model", "shard", 14),
    Param("mlp_bank", "normuon", None, 1, 1, "model", "shard", 15),
    Param("scalars", "adam", (0.9, 0.99), 5, 0, "float32", "replicate", 0),
    Param("smear_gate", "adam", (0.9, 0.99), 0.01, 0, "model", "replicate", 1),
    Param("skip_gate", "adam", (0.9, 0.99), 0.05, 0, "model", "replicate", 2),
    Param("attn_gate_bank", "adam", (0.9, 0.99), 1, 1, "model", "replicate", 3),
    Param("ve_gate_bank", "adam", (0.9, 0.99), 1, 1, "model", "replicate", 4),
    Param("lm_head", "adam", (0.5, 0.95), 1, 150, "model", "shard", 11),
    Param("bigram_embed", "adam", (0.75, 0.95), 75, 5, "model", "sparse", 10),
    Param("post_lambdas", "adam", (0.9, 0.95), 1, 0, "float32", "replicate", 5),
    Param("x0_lambdas", "adam", (0.9, 0.95), 1, 0, "float32", "replicate", 6),
    Param("bigram_lambdas", "adam", (0.9, 0.95), 1, 0, "float32", "replicate", 7),
    Param("resid_lambdas", "adam", (0.9, 0.95), 5, 0, "float32", "replicate", 8),
    Param("value_embeds", "adam", (0.75, 0.95), 75, 5, "model", "shard", 9),
    Param("embed", "adam", (0.5, 0.95), 1, 150, "model", "shard", 12),
)
SPARSE_FROM = 8  # ranks; the fewer there are, the more of the table each touches


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


# ==== 3. What flows between the parts =================================================================================

class Batch(NamedTuple):
    """One micro-batch on one rank: segments of packed documents, one after the other."""

    tokens: Tensor  # [T] int32
    targets: Tensor  # [T] int64
    bigram_ids: Tensor  # [T] int32
    cu_seqlens: Tensor  # [documents + 1] int32, padded with T to a fixed length
    order: Tensor  # [T] int32, positions sorted by token, so that gradients of one table row are neighbours


class Rows(NamedTuple):
    """The rows of the embedding tables that a micro-batch reads. Lookups are no part of the compiled step, so that
    gradients come back as rows and the tables' own gradients need no dense passes (see NorMuonAdam.collect)."""

    embed: Tensor  # [T, D]
    bigram: Tensor  # [T, D]
    value: tuple[Tensor, ...]  # [T, D] of each value table


class Stream(NamedTuple):
    """The residual stream from one operation to the next; only a set of Ops looks inside."""

    x: Tensor  # [T, D]
    rstd: Tensor | None = None  # [T] fp32, 1 / rms of each row, which HOPPER's products take in place of norms


class Injection(NamedTuple):
    """x0_lambda x0 + bigram_lambda bigram, which a layer adds to the stream."""

    total: Tensor  # [T, D] PLAIN: this sum; HOPPER: what takes its gradient
    x0: Tensor  # [T, D], and so on: HOPPER's product adds these itself
    bigram: Tensor
    x0_lambda: Tensor  # 0-dim fp32
    bigram_lambda: Tensor


class AttentionWeights(NamedTuple):
    """The weights of one layer's attention, before its output."""

    qkv: Tensor  # [3D, D]
    gate: Tensor  # [H, GATE_INPUTS], of the heads
    value_gate: Tensor | None  # [H, GATE_INPUTS], of the value embedding, if there is one


class Ops(NamedTuple):
    """What the model computes with: PLAIN says it in PyTorch, HOPPER does it in fused kernels. See choose_ops."""

    stream: Callable  # x [T, D] -> Stream
    normed: Callable  # Stream -> Stream, each row over its rms
    thin_product: Callable  # x [T, n], w [m, n] -> x w^T, for few n and m
    attention_inputs: Callable  # normed Stream, AttentionWeights, value embedding, cos, sin, Layer -> q, k, v, gate
    attention: Callable  # softmax(scale q k^T) v inside documents and a window, times gate; see attention_reference
    injections: Callable  # x0, bigram [T, D], lambdas [n], lambdas [n] -> n of Injection
    linear_sum: Callable  # y, o, x: Stream, resid [T], Injection -> Stream: y o^T + resid x + what is injected
    mlp: Callable  # x: Stream, up, down, resid [T] -> Stream: relu(norm(x) up^T)^2 down + resid x
    head_loss: Callable  # x [T, D], w [D, V], targets, weights, fp8, grad_unit -> loss, 0-dim
    add_rows: Callable  # rows [T, D], ids [T], table, order: table[ids] += rows, in place


class Geometry(NamedTuple):
    """What the model needs besides tensors; constants to the compiler, so each stage has its own compiled step."""

    window_short: int
    window_long: int
    max_len: int  # no document is longer
    scale: float  # of the softmax
    segment: int = 0  # positions, smear, key offset and the list of targets begin anew every so many tokens; 0: never


class TouchedRows(NamedTuple):
    """The rows of the bigram table that gradients touched since Adam's last step, as far as one rank exchanges them.

    All from the tokens, which every rank's host can read: to ask the device or the other ranks would be to wait.
    """

    sent: Tensor  # [rows] int32, rising and thus by owner: touched by this rank
    received: Tensor  # [rows] int32, counted from the first of this rank's shard: touched there by rank 0, rank 1, ...
    send_counts: list[int]  # how many of `sent` each rank owns
    receive_counts: list[int]  # how many of `received` each rank touched


# ==== 4. Data =========================================================================================================

HEADER_INTS, MAGIC, VERSION = 256, 20240520, 1  # a shard: 256 int32 (magic, version, token count, zeros), uint16 tokens
MAX_DOCS = {16_384: 64, 32_768: 96, 49_152: 128}  # entries of cu_seqlens that fit FineWeb, by tokens of a segment
QUEUE_STEPS = 2  # batches prepared ahead


def find_shards(pattern: str, key: str) -> list[str]:
    """The files that a pattern matches, in order of their names; raises UserError if none does."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"no file matches --{key}={pattern}: run `python data/cached_fineweb10B.py 9` to download "
                        "FineWeb, or `python data/fineweb.py` to make shards from your own text")
    return files


def read_header(path: str) -> int:
    """The number of tokens in a shard; raises UserError if its header or size is wrong."""
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
        size = os.path.getsize(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; download the shard again") from None
    again = "delete it and run data/cached_fineweb10B.py again"
    if len(header) < HEADER_INTS:
        raise UserError(f"{path}: {size} bytes are too few for a header; {again}")
    if header[0] != MAGIC:
        raise UserError(f"{path}: magic number {header[0]} instead of {MAGIC}, so this is no token shard; {again}")
    if header[1] != VERSION:
        raise UserError(f"{path}: version {header[1]} instead of {VERSION}; {again}")
    if header[2] < 1 or size != 4 * HEADER_INTS + 2 * int(header[2]):
        expected = 4 * HEADER_INTS + 2 * int(header[2])
        raise UserError(f"{path}: the header says {header[2]} tokens, {expected} bytes; the file has {size}; {again}")
    return int(header[2])


def read_shard(path: str, bos: int, count: int = -1) -> np.ndarray:
    """The first `count` tokens of a shard, or all, as uint16; raises UserError if anything about the file is wrong."""
    read_header(path)
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=4 * HEADER_INTS)
    if len(tokens) and tokens.max() > bos:
        where = int(np.argmax(tokens > bos))
        raise UserError(f"{path}: token {tokens[where]} at position {where} is above {bos}; delete the file and "
                        "download or make it again")
    return tokens


class Documents:
    """A shard and where its documents begin and end; tokens before the first BOS belong to none."""

    def __init__(self, path: str, bos: int):
        self.tokens = read_shard(path, bos)
        self.starts = np.flatnonzero(self.tokens == bos).tolist()
        self.ends = [*self.starts[1:], len(self.tokens)]

    def segments(self, first: int, length: int, max_doc: int) -> tuple[list[list[tuple[int, int]]], int] | None:
        """SEGMENTS lists of document slices of `length` tokens each, from document number `first` on.

        Documents are cut to max_doc tokens, and the last of a segment to what is missing; what is cut is skipped.
        Returns the lists and the next document's number, or None if too few documents are left for all of them.
        """
        segments, doc = [], first
        for _ in range(SEGMENTS):
            slices, missing = [], length
            while missing:
                if doc == len(self.starts):
                    return None
                start = self.starts[doc]
                end = min(self.ends[doc], start + max_doc, start + missing)
                slices.append((start, end))
                missing -= end - start
                doc += 1
            segments.append(slices)
        return segments, doc


def walk(files: list[str], bos: int, plans: Iterable[Plan]) -> Iterator[tuple[Documents, list[list[tuple[int, int]]]]]:
    """For each step its documents: the shard, and the slices of each segment. A pure function of files and plans.

    A step never spans shards: when one has too few documents left, what is left of it is dropped. Ends early if the
    shards run out. The next shard is read in a thread.
    """
    plans = list(plans)
    with ThreadPoolExecutor(1) as reader:
        coming = deque([reader.submit(Documents, files[0], bos)])
        at = 0
        for number in range(len(files)):
            if number + 1 < len(files) and at < len(plans):
                coming.append(reader.submit(Documents, files[number + 1], bos))
            documents, first = coming.popleft().result(), 0
            while at < len(plans):
                found = documents.segments(first, plans[at].batch_tokens // SEGMENTS + 1, plans[at].max_doc_len)
                if found is None:
                    break
                segments, first = found
                yield documents, segments
                at += 1
            if at == len(plans):
                return


def bigram_ids(tokens: np.ndarray, rows: int) -> np.ndarray:
    """Row of the bigram table for each token and the one before it: a hash in wrapping int32 arithmetic.

    Position 0 has the last row to itself, and in the hash of position 1 that row's number stands for its token.
    """
    tokens = tokens.astype(np.int32)
    tokens[0] = rows - 1
    ids = np.empty_like(tokens)
    ids[0] = rows - 1
    np.mod(np.int32(36313) * tokens[1:] ^ np.int32(27191) * tokens[:-1], np.int32(rows - 1), out=ids[1:])
    return ids


def max_docs(S: int) -> int:
    """Fixed length of cu_seqlens for a segment of S tokens."""
    return MAX_DOCS.get(S) or max(128, round_up(S // 300, 128))


def segments_together(S: int, A: int, limit: int) -> int:
    """How many of a rank's A segments of S tokens make a micro-batch: all, a half .. or one, as fit into the limit."""
    return next((n for n in (A, A // 2, A // 4) if n and n * S <= limit), 1)


@cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class Packer:
    """Turns segments, each S+1 tokens and the ends of its documents, into a Batch.

    Where documents are many, cu_seqlens is made longer by steps that all batches of a stage share, as torch.compile
    takes eight shapes of a function and no more, and four are the stages'.
    """

    def __init__(self, hp: Hyperparameters, ranks: Ranks):
        self.hp, self.rank, self.pin = hp, ranks.rank, ranks.device.type == "cuda"

    def __call__(self, *segments: tuple[np.ndarray, np.ndarray], documents: int = 0) -> Batch:
        """documents: how many to have room for at least."""
        S = len(segments[0][0]) - 1
        T, expected = len(segments) * S, len(segments) * max_docs(S)
        ends = np.unique([i * S + min(end, S) for i, (_, ends) in enumerate(segments) for end in ends])
        entries, needed = expected, max(documents, len(ends)) + 1
        while entries < needed:
            entries *= 4
        if entries > expected and self.hp.compile:
            warn_once(f"more than the expected {expected - 1} documents in {T} tokens: compiled anew for lists of "
                      f"{entries} (rank {self.rank})")
        cu_seqlens = np.full(entries, T, dtype=np.int32)
        cu_seqlens[0] = 0
        cu_seqlens[1 : len(ends) + 1] = ends
        inputs, targets = (np.concatenate([tokens[part] for tokens, _ in segments]) for part in (np.s_[:-1], np.s_[1:]))
        ids = np.concatenate([bigram_ids(tokens[:-1], self.hp.bigram_rows) for tokens, _ in segments])
        order = np.argsort(inputs, kind="stable").astype(np.int32)  # fast for uint16, as tokens are in shards
        arrays = inputs.astype(np.int32), targets.astype(np.int64), ids, cu_seqlens, order
        return Batch(*(t.pin_memory() if self.pin else t for t in map(torch.from_numpy, arrays)))


class TrainLoader:
    """Iterates over the steps in `steps` but the first `done`; each item, prepared in a thread, is this rank's list of
    batches and, in Adam's steps of SPARSE_FROM ranks or more, its TouchedRows (else None)."""

    def __init__(self, hp: Hyperparameters, ranks: Ranks, steps: Iterable[int], done: int = 0):
        self.files = find_shards(hp.train_files, "train_files")
        self.plans = [plan(step, hp) for step in steps]
        self.hp, self.ranks, self.pack, self.done = hp, ranks, Packer(hp, ranks), done
        self.touched = np.zeros((ranks.world, hp.bigram_rows), dtype=bool)  # by each rank, since Adam's last step
        self.queue: queue.Queue = queue.Queue(QUEUE_STEPS)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def batches(self) -> Iterator[tuple[list[Batch], TouchedRows | None]]:
        R, rank = self.ranks.world, self.ranks.rank
        for number, (documents, segments) in enumerate(walk(self.files, self.hp.bos, self.plans)):
            adam = self.plans[number].update_adam
            touched = self.touch(documents, segments, adam) if R >= SPARSE_FROM else None
            if number < self.done:
                self.touched |= self.touched.any(axis=0)  # a checkpoint of fewer ranks gives all of them its gradients
                continue
            own = [(np.concatenate([documents.tokens[a:b] for a, b in slices]), np.cumsum([b - a for a, b in slices]))
                   for slices in segments[rank::R]]
            n = segments_together(self.plans[number].batch_tokens // SEGMENTS, len(own), self.hp.micro_tokens)
            yield [self.pack(*own[i : i + n]) for i in range(0, len(own), n)], touched

    def touch(self, documents: Documents, segments: list[list[tuple[int, int]]], adam: bool) -> TouchedRows | None:
        """Mark the rows that a step touches on each rank; when Adam steps, return what is exchanged and start anew."""
        R, rank = self.ranks.world, self.ranks.rank
        for s, slices in enumerate(segments):
            tokens = np.concatenate([documents.tokens[a:b] for a, b in slices])
            self.touched[s % R, bigram_ids(tokens[:-1], self.hp.bigram_rows)] = True
        if not adam:
            return None
        owned = self.touched.reshape(R, R, -1)  # [rank that touched, rank that owns, row of the shard]
        counts, ids = np.count_nonzero(owned, axis=2), (np.flatnonzero(owned[rank]), owned[:, rank].nonzero()[1])
        ids = [torch.from_numpy(a.astype(np.int32)) for a in ids]
        self.touched[:] = False
        return TouchedRows(*(t.pin_memory() if self.pack.pin else t for t in ids),
                           counts[rank].tolist(), counts[:, rank].tolist())

    def work(self) -> None:
        try:
            if self.ranks.device.type == "cuda":  # pinning in a new thread would open a context on GPU 0
                torch.cuda.set_device(self.ranks.device)
            for item in self.batches():
                self.put(item)
                if self.stopped.is_set():
                    return
            self.put(UserError("the train shards ran out before the schedule"))
        except BaseException as e:  # handed to the training loop, which raises it
            self.put(e)

    def put(self, item: object) -> None:
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> tuple[list[Batch], TouchedRows | None]:
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        (batches, touched), move = item, lambda t: t.to(self.ranks.device, non_blocking=True)
        return [Batch(*map(move, b)) for b in batches], touched and TouchedRows(*map(move, touched[:2]), *touched[2:])

    def close(self) -> None:
        self.stopped.set()
        self.thread.join()  # the interpreter would end it in the middle of C++ code and abort


def read_val_tokens(hp: Hyperparameters) -> np.ndarray:
    """The val_tokens inputs and, one further on, targets of validation."""
    path = find_shards(hp.val_files, "val_files")[0]
    tokens = read_shard(path, hp.bos, hp.val_tokens + 1)
    if len(tokens) <= hp.val_tokens:
        raise UserError(f"{path}: {len(tokens)} tokens, but validation needs {hp.val_tokens + 1}; lower --val_tokens")
    return tokens


def val_batches(hp: Hyperparameters, ranks: Ranks, tokens: np.ndarray) -> Iterator[Batch]:
    """This rank's chunks of the val stream: in order, neither cut nor aligned to documents."""
    pack, starts = Packer(hp, ranks), np.flatnonzero(tokens[: hp.val_tokens] == hp.bos)
    documents = np.bincount(starts // hp.val_chunk, minlength=1).max() + 1  # in any chunk, so that one graph does
    for start in range(ranks.rank * hp.val_chunk, hp.val_tokens, ranks.world * hp.val_chunk):
        end = start + hp.val_chunk
        ends = np.append(starts[(starts > start) & (starts < end)], end) - start
        batch = pack((tokens[start : end + 1], ends), documents=documents)
        yield Batch(*(t.to(ranks.device, non_blocking=True) for t in batch))


def longest_document(tokens: np.ndarray, hp: Hyperparameters) -> int:
    """A power of two that no document of the val stream exceeds: one value for all chunks, so one compiled graph."""
    edges = np.concatenate([[0], np.flatnonzero(tokens == hp.bos), [len(tokens)]])
    return min(hp.val_chunk, 2 ** math.ceil(math.log2(np.diff(edges).max())))


def check_data(hp: Hyperparameters) -> None:
    """Walk the whole schedule over the shards without training; raises UserError for whatever would stop a run."""
    read_val_tokens(hp)
    files = find_shards(hp.train_files, "train_files")
    sizes = [read_header(path) for path in files]
    plans = [plan(step, hp) for step in range(hp.num_steps)]
    done = sum(1 for _ in walk(files, hp.bos, plans))
    if done < len(plans):
        if not any((read_shard(path, hp.bos) == hp.bos).any() for path in files):
            raise UserError(f"--train_files={hp.train_files}: no document begins in them, as no token is {hp.bos}; use "
                            "the --vocab_size that they were made for, or make them again")
        used, missing = (sum(p.batch_tokens for p in part) for part in (plans[:done], plans[done:]))
        # what a shard yields after cuts, or all of it if none lasted a step
        shards = math.ceil(missing / ((used or sum(sizes)) / len(files)))
        raise UserError(f"--train_files={hp.train_files}: {len(files)} shards last {done} of {len(plans)} steps; add "
                        f"about {shards} more of this size, or lower --num_scheduled_iterations")


# ==== 5. Model ========================================================================================================

FP32_EPS = 1.19e-7  # of float32, also where activations are bf16
# Logits are capped smoothly to (0, CAP): z = CAP * sigmoid((logit + CAP_SHIFT) / CAP_WIDTH)
CAP, CAP_SHIFT, CAP_WIDTH = 23.0, 5.0, 7.5
# FP8 scales of the head, tuned: what a step of the number format's grid stands for
FP8_MAX = 448.0  # largest e4m3 number
X_SCALE, W_SCALE, GRAD_SCALE = 100 / FP8_MAX, 1.6 / FP8_MAX, 0.75 / FP8_MAX


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dim, without a learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=FP32_EPS)


def softcap(logits: Tensor) -> Tensor:
    """Logits of any shape and type, capped smoothly to (0, CAP), in fp32."""
    return CAP * torch.sigmoid((logits.float() + CAP_SHIFT) / CAP_WIDTH)


VAL_HEAD_ROWS = 32_768  # positions that the validation head takes at a time, to keep logits small
YARN_LOW, YARN_HIGH = 1.0, 32.0  # rotations within the old window: fewer than LOW stretch fully, more than HIGH not


def yarn(frequencies: Tensor, scale: float, old: int, new: int) -> tuple[Tensor, float]:
    """Frequencies and softmax scale after the long window grows from old to new tokens (YaRN, arXiv 2309.00071)."""
    rotations = old * frequencies / (2 * math.pi)
    keep = ((rotations - YARN_LOW) / (YARN_HIGH - YARN_LOW)).clamp(0, 1)
    return frequencies * (old / new + keep * (1 - old / new)), scale * (0.2 * math.log(new / old) + 1)


def stage_rotation(hp: Hyperparameters, stage: int) -> tuple[Tensor, float]:
    """Rotary frequencies [d/4] and softmax scale of a stage: every window growth up to it applied in turn."""
    frequencies, scale = hp.rope_base ** -torch.linspace(0, 1, hp.head_dim // 4), hp.attn_scale
    for before, after in zip(STAGES[:stage], STAGES[1 : stage + 1]):
        frequencies, scale = yarn(frequencies, scale, before.long * hp.block, after.long * hp.block)
    return frequencies, scale


class GPT(nn.Module):
    """11 layers on one residual stream; all matrices of a kind are stacked in a bank, which the optimizer shards."""

    def __init__(self, hp: Hyperparameters, world: int = 1):
        super().__init__()
        self.hp = hp
        D, V, H, dtype = hp.model_dim, hp.padded_vocab, hp.num_heads, getattr(torch, hp.dtype)
        L, attn = len(LAYERS), len(ATTN_INDEX)
        shapes = {
            "qk_bank": (round_up(attn * H, world), 2 * hp.head_dim, D),  # per layer: Q, then K, in pairs of heads
            "vo_bank": (round_up(attn * 2, world), D, D),  # per layer: V, then O
            "mlp_bank": (round_up((L + 1) * 2, world), hp.mlp_dim, D),  # per layer: up, then down; one layer of padding
            "scalars": (SCALARS,),
            "smear_gate": (1, GATE_INPUTS),
            "skip_gate": (1, GATE_INPUTS),
            "attn_gate_bank": (attn, H, GATE_INPUTS),
            "ve_gate_bank": (NUM_VALUE_TABLES, H, GATE_INPUTS),
            "lm_head": (D, V),
            "bigram_embed": (hp.bigram_rows, D),
            "post_lambdas": (L, 2),  # of attention, of the MLP
            "x0_lambdas": (L,),
            "bigram_lambdas": (L,),
            "resid_lambdas": (L, 2),
            "value_embeds": (NUM_VALUE_TABLES * V, D),
            "embed": (V, D),
        }
        check_tables(shapes)
        for row in PARAMS:
            kind = dtype if row.dtype == "model" else torch.float32
            self.register_parameter(row.name, nn.Parameter(torch.empty(shapes[row.name], dtype=kind)))
        longest = max(hp.val_chunk, max(stage.batch for stage in STAGES) * hp.batch_unit // SEGMENTS)
        for name in ("cos", "sin"):  # row p is position p; paired heads use two for each token
            table = torch.empty(2 * longest, hp.head_dim // 4, dtype=torch.bfloat16)
            self.register_buffer(name, table, persistent=False)
        self.register_buffer("attn_layers", torch.tensor(list(ATTN_INDEX)), persistent=False)
        self.ops = PLAIN
        self.stage, self.scale = -1, hp.attn_scale

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set all weights. Drawn on the CPU from one generator, so a seed means the same weights everywhere."""
        generator = torch.Generator().manual_seed(seed)
        hp, D = self.hp, self.hp.model_dim
        bound = math.sqrt(3) * 0.5 * D**-0.5

        def uniform(*shape: int) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        for p in self.parameters():
            p.zero_()
        self.lm_head.copy_(torch.empty(self.lm_head.shape).normal_(0, 0.005, generator=generator))
        self.embed.copy_(self.lm_head.T)
        self.value_embeds.copy_(torch.empty(self.value_embeds.shape).normal_(0, 0.01, generator=generator))
        attn, layers = len(ATTN_INDEX), len(LAYERS)
        self.qk_bank[: attn * hp.num_heads].copy_(uniform(attn * hp.num_heads, 2 * hp.head_dim, D))
        self.vo_bank[: attn * 2].copy_(uniform(attn * 2, D, D))
        self.mlp_bank[0 : 2 * layers : 2].copy_(uniform(layers, hp.mlp_dim, D))  # up; down starts at zero
        self.post_lambdas.fill_(1.0)
        self.resid_lambdas.fill_(math.sqrt(1.1))
        self.bigram_lambdas.fill_(0.05)
        self.scalars.copy_(torch.tensor([0.5, 1.0] * layers + [0.0, 0.5, -1.5]))  # (a, b), smear, backout, skip
        for p in self.parameters():  # in case ranks have processors that draw differently
            dist.broadcast(p, 0)

    @torch.no_grad()
    def set_stage(self, stage: int) -> None:
        """Rebuild the rotary tables when a stage begins."""
        if stage != self.stage:
            frequencies, self.scale = stage_rotation(self.hp, stage)
            positions = torch.arange(len(self.cos), device=self.cos.device)  # on the CPU it takes 0.2 s
            angle = torch.outer(positions, to_device(frequencies, self.cos.device))
            self.cos.copy_(angle.cos())
            self.sin.copy_(angle.sin())
            self.stage = stage

    def lookup(self, batch: Batch) -> Rows:
        """The rows of the tables that a batch reads."""
        tables = self.value_embeds.view(NUM_VALUE_TABLES, self.hp.padded_vocab, self.hp.model_dim).unbind()
        return Rows(F.embedding(batch.tokens, self.embed), F.embedding(batch.bigram_ids, self.bigram_embed),
                    tuple(F.embedding(batch.tokens, table) for table in tables))

    def smear(self, e: Tensor) -> Tensor:
        """Add to each embedding [n, S, D] a gated part of the one before it, across documents."""
        gate = self.scalars[2 * len(LAYERS)] * torch.sigmoid(F.linear(e[:, 1:, :GATE_INPUTS], self.smear_gate))
        return torch.cat([e[:, :1], e[:, 1:] + gate * e[:, :-1]], dim=1)

    def attend(self, i: int, h: Stream, qkv: Tensor, ve: Tensor | None, batch: Batch, g: Geometry) -> Tensor:
        """Gated attention of layer i on normed h, with weights qkv [3D, D], before O; [T, D]."""
        layer, T, H, d = LAYERS[i], len(h.x), self.hp.num_heads, self.hp.head_dim
        value_gate = None if ve is None else self.ve_gate_bank[layer.value_table]
        weights = AttentionWeights(qkv, self.attn_gate_bank[ATTN_INDEX[i]], value_gate)
        n = 2 if layer.paired else 1
        cos, sin = (table[: n * (g.segment or T)] for table in (self.cos, self.sin))
        q, k, v, gate = self.ops.attention_inputs(h, weights, ve, cos, sin, layer)
        # A paired token becomes two, heads 0..H/2-1 and then the rest: the same memory seen as [2T, H/2, d]
        q, k, v = (x.reshape(n * T, H // n, d) for x in (q, k, v))
        window = g.window_short if layer.window == "short" else g.window_long
        return self.ops.attention(q, k, v, batch.cu_seqlens * n, g.max_len * n, window, g.scale,
                                  gate.view(n * T, H // n)).reshape(T, H * d)

    def matrices(self) -> Iterator[tuple[Tensor, ...]]:
        """What products multiply with, a matrix a layer: qkv [3D, D], o [D, D], up, down [F, D].

        The lambdas that else multiply activations multiply these: they are smaller, and no activation is read for the
        lambdas' gradients."""
        L, D, F_, attn = len(LAYERS), self.hp.model_dim, self.hp.mlp_dim, len(ATTN_INDEX)
        post_attn, post_mlp = self.post_lambdas.bfloat16().float().unbind(1)
        a, b = self.scalars[: 2 * L].view(L, 2).unbind(1)
        a, b = (x[self.attn_layers] for x in (a, b * post_attn))
        qk = self.qk_bank[: attn * self.hp.num_heads].view(attn, 2 * D, D)
        v, o = self.vo_bank[: 2 * attn].view(attn, 2, D, D).unbind(1)
        up, down = self.mlp_bank[: 2 * L].view(L, 2, F_, D).unbind(1)
        qkv, o, down = ((scale[:, None, None] * bank).to(bank.dtype) for scale, bank in (
            (a, torch.cat([qk, v], dim=1)), (b, o), (post_mlp, down)))
        # Unbound once: the backward of an unbind is one stack, that of each indexing a pass over the whole bank
        return (x.unbind() for x in (qkv, o, up, down))

    def trunk(self, batch: Batch, rows: Rows, g: Geometry) -> Tensor:
        """From tokens to the normalised last hidden state [T, D]."""
        ops = self.ops
        backout_lambda, skip_lambda = self.scalars[-2:].unbind()
        resid, x0_lambdas, bigram_lambdas = (
            p.bfloat16().float() for p in (self.resid_lambdas, self.x0_lambdas, self.bigram_lambdas))
        # [2i] for attention, [2i+1] for the MLP; repeated for each token, so that gradients are summed at once for all
        resid = resid.flatten()[:, None].expand(-1, len(batch.tokens)).unbind()
        qkv, o, up, down = self.matrices()

        smeared = self.smear(rows.embed.unflatten(0, (-1, g.segment or len(rows.embed)))).flatten(0, 1)
        x0 = norm(smeared)
        first = x0[:, :GATE_INPUTS]
        x = ops.stream(x0 + bigram_lambdas[0] * rows.bigram)
        s0, s1 = (scales[self.attn_layers] for scales in (x0_lambdas, bigram_lambdas))
        s1 = F.pad(s1[1:], (1, 0))  # the first layer's bigram is in the stream already
        inject = ops.injections(x0, rows.bigram, s0, s1)

        after, normed = {}, {-1: ops.normed(x)}  # layer -> the stream after it; its norm, which several layers read
        for i, layer in enumerate(LAYERS):
            if layer.skip_from is not None:
                gate = torch.sigmoid(skip_lambda) * 2 * torch.sigmoid(ops.thin_product(first, self.skip_gate))
                x = ops.stream(x.x + gate * after[layer.skip_from].x)
            else:
                j, h = ATTN_INDEX[i], normed[i - 1 if layer.reads is None else layer.reads]
                ve = None if layer.value_table is None else rows.value[layer.value_table]
                y = self.attend(i, h, qkv[j], ve, batch, g)
                x = ops.linear_sum(y, o[j], x, resid[2 * i], inject[j])  # y o^T + resid x + what is injected
            x = ops.mlp(x, up[i], down[i], resid[2 * i + 1])  # relu(norm(x) up^T)^2 down + resid x
            after[i], normed[i] = x, ops.normed(x)
        return norm(x.x - backout_lambda * after[BACKOUT_LAYER].x)

    def forward(self, batch: Batch, rows: Rows, g: Geometry, mtp_weights: Tensor, grad_unit: float) -> Tensor:
        """Training loss, summed over positions; mtp_weights [k] include 1/A, and grad_unit is 1/A."""
        x = self.trunk(batch, rows, g)
        targets = batch.targets.unflatten(0, (-1, g.segment or len(batch.targets)))
        return self.ops.head_loss(x, self.lm_head, targets, mtp_weights, self.hp.fp8_head, grad_unit)

    def token_losses(self, batch: Batch, rows: Rows, g: Geometry) -> Tensor:
        """Validation loss of each position [T]."""
        x = self.trunk(batch, rows, g)
        parts = zip(x.split(VAL_HEAD_ROWS), batch.targets.split(VAL_HEAD_ROWS))
        return torch.cat([F.cross_entropy(softcap(x @ self.lm_head), t, reduction="none") for x, t in parts])


# ==== 6. Optimizer: NorMuon for the banks, Adam for the rest ==========================================================

# Polar Express (Amsel et al., arXiv 2505.16932): a, b, c of X <- a X + (b S + c S^2) X, S = X X^T; 5 iterations,
# safety 2e-2, cushion 2
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_SAFETY = 1.02


def polar_express(x: Tensor) -> Tensor:
    """The orthogonal factor of each matrix in x [K, rows, columns], approximately."""
    tall = x.size(-2) > x.size(-1)
    x = x / (POLAR_SAFETY * x.float().norm(dim=(-2, -1), keepdim=True) + 1e-6).to(x.dtype)
    for a, b, c in POLAR_COEFFICIENTS:
        s = x.mT @ x if tall else x @ x.mT  # the smaller of the two Gram matrices
        m = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, x, m, beta=a) if tall else torch.baddbmm(x, m, x, beta=a)
    return x


def split_bits(p: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> its upper 16 bits as bf16 (truncated, not rounded) and its lower 16 bits as int16."""
    bits = p.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """Inverse of split_bits."""
    return ((high.view(torch.int16).to(torch.int32) << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def normuon_direction(g: Tensor, momentum: Tensor, second: Tensor, mu: Tensor, beta2: Tensor,
                      dtype: torch.dtype) -> Tensor:
    """Orthogonalised, row- or column-normalised Nesterov momentum of g [K, rows, columns] (NorMuon, arXiv 2510.05491).

    Updates momentum (shape of g) and second ([K, rows, 1], or [K, 1, columns] of wide matrices) in place. The
    orthogonalisation runs in dtype; the result is in momentum's dtype.
    """
    g = g.to(momentum.dtype)
    momentum.lerp_(g, 1 - mu)
    x = polar_express(torch.lerp(g, momentum, mu).to(dtype)).to(momentum.dtype)
    short = -1 if x.size(-2) >= x.size(-1) else -2
    mean = x.square().mean(dim=short, keepdim=True)
    second.lerp_(mean, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    # the normalisation must not change the Frobenius norm; both norms follow from the means
    before, after = mean.sum(dim=(-2, -1), keepdim=True), (mean * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return x * (scale * (before / after.clamp_min(1e-30)).sqrt())


def normuon_update(p: Tensor, low: Tensor | None, g: Tensor, momentum: Tensor, second: Tensor, lr_mul: Tensor,
                   knobs: Tensor) -> None:
    """One NorMuon step on p [K, rows, columns], in place.

    A bf16 p carries its low mantissa bits in `low` (int16), so that updates are exactly fp32. lr_mul [K, 1, 1];
    knobs = (lr, decay, mu, beta2). Decay is cautious: only where the update and the weight have the same sign.
    """
    lr, decay, mu, beta2 = knobs.unbind()
    x = normuon_direction(g, momentum, second, mu, beta2, p.dtype)
    full = p if low is None else join_bits(p, low)
    lr = lr * lr_mul
    full = full - lr * decay * torch.where(x * full >= 0, full, 0.0) - lr * x
    if low is None:
        p.copy_(full)
    else:
        high, bits = split_bits(full)
        p.copy_(high)
        low.copy_(bits)


def adam_update(params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor],
                knobs: list[Tensor]) -> None:
    """One Adam step on each parameter, in place, with fp32 moments and cautious decay.

    knobs = (lr, decay, beta1, beta2, 1 - beta1^t, 1 - beta2^t, eps, unused) of each parameter, t its updates so far.
    """
    for p, g, m, v, knob in zip(params, grads, firsts, seconds, knobs):
        lr, decay, beta1, beta2, bias1, bias2, eps, _ = knob.unbind()
        g, old = g.float(), p.float()
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        update = lr * (m / bias1) / ((v / bias2).sqrt() + eps)
        p.copy_(old - update - torch.where(update * old > 0, decay * old, 0.0))


class NorMuonAdam:
    """Both optimizers and their communication, in three visible phases (see step).

    PARAMS says how each parameter is treated. A rank keeps state only for its shard; with one rank the shard is all.
    """

    def __init__(self, model: GPT, hp: Hyperparameters, ranks: Ranks):
        self.hp, self.ranks = hp, ranks
        self.add_rows = model.ops.add_rows
        self.params = {row.name: getattr(model, row.name) for row in PARAMS}
        compiler = compiled if hp.compile else lambda f: f
        self.normuon_update, self.adam_update = compiler(normuon_update), compiler(adam_update)
        # Gradients of the looked-up tables, summed in fp32 (see collect); other parameters have autograd's
        self.table_grads = {name: torch.zeros_like(self.params[name], dtype=torch.float32, requires_grad=False)
                            for name in ("embed", "bigram_embed", "value_embeds")}
        self.state: dict[str, dict[str, Tensor]] = {}
        self.lr_mul: dict[str, Tensor] = {}
        for row in PARAMS:
            p = self.shard(row)
            if row.name not in self.table_grads:  # at a fixed address, which a CUDA graph needs
                self.params[row.name].grad = torch.zeros_like(self.params[row.name])
            if row.optimizer == "adam":
                self.state[row.name] = {k: torch.zeros_like(p, dtype=torch.float32) for k in ("first", "second")}
                continue
            K, rows, columns = p.shape
            second = (K, rows, 1) if rows >= columns else (K, 1, columns)
            state = {"momentum": torch.zeros_like(p, dtype=torch.float32)}
            state["second"] = torch.zeros(second, device=p.device)
            if p.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(p, dtype=torch.int16)
            self.state[row.name] = state
            # wide updates for tall matrices; down projections, the odd ones of the MLP bank, learn twice as fast
            down = ((ranks.rank * K + torch.arange(K, device=p.device)) % 2 == 1) & (row.name == "mlp_bank")
            self.lr_mul[row.name] = math.sqrt(max(1, rows / columns)) * torch.where(down, 2.0, 1.0)[:, None, None]
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state before the first step."""
        for state in self.state.values():
            for tensor in state.values():
                tensor.zero_()
        for row in PARAMS:
            self.gradient(row).zero_()
        self.tied, self.adam_steps = True, 0

    def gradient(self, row: Param) -> Tensor:
        """Where a parameter's gradient is summed until its update."""
        return self.table_grads.get(row.name, self.params[row.name].grad)

    @torch.no_grad()
    def collect(self, batch: Batch, rows: Rows) -> None:
        """Add the gradients of a micro-batch's table rows to the tables' gradients; only these rows are touched."""
        add, grads = self.add_rows, self.table_grads
        add(rows.embed.grad, batch.tokens, grads["embed"], batch.order)
        add(rows.bigram.grad, batch.bigram_ids, grads["bigram_embed"])
        for row, grad in zip(rows.value, grads["value_embeds"].chunk(NUM_VALUE_TABLES)):
            add(row.grad, batch.tokens, grad, batch.order)

    def shard(self, row: Param) -> Tensor:
        """The part of a parameter that this rank updates, as a view."""
        p = self.params[row.name].data
        if row.reduce == "replicate" or self.ranks.world == 1:
            return p
        return p.chunk(self.ranks.world)[self.ranks.rank]

    @torch.no_grad()
    def step(self, plan: Plan, touched: TouchedRows | None = None) -> None:
        """Update all parameters from their gradients, none sparse if touched is None. Adam's add up while it rests."""
        if plan.untie_embed:
            self.untie()
        rows = [row for row in PARAMS if row.optimizer == "normuon" or (
            plan.update_adam and not (self.tied and row.name == "embed"))]
        lm_head, embed = self.params["lm_head"], self.params["embed"]
        if plan.update_adam and self.tied:
            lm_head.grad += self.table_grads["embed"].mT
            self.table_grads["embed"].zero_()
        knobs = self.knobs(rows, plan)

        # 1. launch all reductions
        reducing = {row.name: self.launch_reduction(row, touched) for row in rows}

        # 2. by turn, the small replicated ones together: wait for the gradient, update, launch the gather
        rows, gathering = sorted(rows, key=lambda row: row.turn), []
        small = [row for row in rows if row.reduce == "replicate"]
        for group in [small] * bool(small) + [[row] for row in rows if row.reduce != "replicate"]:
            grads, works = zip(*(reducing.pop(row.name) for row in group))
            wait(works)
            if group[0].reduce == "sparse" and touched is not None:
                grads = [self.average(group[0], grads[0], touched)]
            self.update(group, grads, knobs)
            del grads
            gathering += [self.launch_gather(row) for row in group]

        # 3. wait for the gathers
        wait(gathering)
        if plan.update_adam and self.tied:
            embed.copy_(lm_head.mT)
        for row in rows:
            self.gradient(row).zero_()

    def launch_reduction(self, row: Param, touched: TouchedRows | None) -> tuple[Tensor, dist.Work | None]:
        """Start averaging a gradient; returns where the rank's part (if sparse, rows) will be, and what to wait for."""
        grad = self.gradient(row)
        if self.ranks.world == 1:
            return grad, None
        sparse = row.reduce == "sparse" and touched is not None
        grad = grad.index_select(0, touched.sent) if sparse else grad
        grad = grad.to(self.params[row.name].dtype)  # halves what the tables' gradients send
        if sparse:
            part = grad.new_empty(len(touched.received), grad.size(1))
            return part, dist.all_to_all_single(part, grad, touched.receive_counts, touched.send_counts, async_op=True)
        if row.reduce == "replicate":
            return grad, dist.all_reduce(grad, op=dist.ReduceOp.AVG, async_op=True)
        part = torch.empty_like(self.shard(row))
        return part, dist.reduce_scatter_tensor(part, grad, op=dist.ReduceOp.AVG, async_op=True)

    def average(self, row: Param, received: Tensor, touched: TouchedRows) -> Tensor:
        """This rank's part of a sparse gradient, in fp32, from the rows that came for it."""
        part = torch.zeros_like(self.shard(row), dtype=torch.float32)
        self.add_rows(received, touched.received, part)
        return part.div_(self.ranks.world)

    def launch_gather(self, row: Param) -> dist.Work | None:
        """Start sending this rank's updated shard to all ranks."""
        if row.reduce == "replicate" or self.ranks.world == 1:
            return None
        return dist.all_gather_into_tensor(self.params[row.name].data, self.shard(row), async_op=True)

    def knobs(self, rows: list[Param], plan: Plan) -> dict[str, Tensor]:
        """The scalars of each update as one small device tensor a parameter, so that compiled code never changes."""
        hp, table = self.hp, torch.zeros(len(rows), 8)
        self.adam_steps += plan.update_adam
        for row, knob in zip(rows, table):
            if row.optimizer == "normuon":
                lr = hp.muon_lr * plan.lr_factor * row.lr_mul
                decay = hp.muon_wd * hp.muon_lr * plan.lr_factor * row.wd_mul
                knob[:4] = torch.tensor([lr, decay, plan.muon_momentum, hp.muon_beta2])
            else:
                lr = hp.adam_lr * plan.lr_factor * row.lr_mul
                bias = [1 - beta**self.adam_steps for beta in row.betas]
                knob[:7] = torch.tensor([lr, lr**2 * hp.adam_wd * row.wd_mul, *row.betas, *bias, hp.adam_eps])
        return {row.name: knob for row, knob in zip(rows, to_device(table, self.ranks.device))}

    def update(self, group: list[Param], grads: list[Tensor], knobs: dict[str, Tensor]) -> None:
        shards, states = [self.shard(row) for row in group], [self.state[row.name] for row in group]
        if group[0].optimizer == "adam":
            firsts, seconds = ([state[k] for state in states] for k in ("first", "second"))
            self.adam_update(shards, grads, firsts, seconds, [knobs[row.name] for row in group])
        else:
            (row,), (p,), (g,), (s,) = group, shards, grads, states
            lr_mul, knob = self.lr_mul[row.name], knobs[row.name][:4]
            self.normuon_update(p, s.get("low"), g, s["momentum"], s["second"], lr_mul, knob)

    def untie(self) -> None:
        """From now on embed has a life of its own, beginning with lm_head's moments, transposed and sharded anew."""
        rows = {row.name: row for row in PARAMS}
        for key in ("first", "second"):
            part = self.state["lm_head"][key]
            whole = part.new_empty(self.params["lm_head"].shape)
            dist.all_gather_into_tensor(whole, part)
            mine = whole.T.chunk(self.ranks.world)[self.ranks.rank]
            assert mine.shape == self.shard(rows["embed"]).shape
            self.state["embed"][key].copy_(mine)
        self.tied = False

    def tensors(self) -> Iterator[tuple[str, Tensor, str]]:
        """All that steps change: a name, this rank's tensor, and what ranks have of it: "same", "shard" or "own"."""
        for row in PARAMS:
            yield row.name, self.params[row.name].data, "same"
            for key, x in self.state[row.name].items():
                yield f"{row.name}.{key}", x, "same" if row.reduce == "replicate" else "shard"
            yield f"{row.name}.grad", self.gradient(row), "own"


def wait(works: Iterable[dist.Work | None]) -> None:
    """Until all are done; None is nothing to wait for."""
    for work in works:
        if work is not None:
            work.wait()


def compiled(f: Callable) -> Callable:
    """f as one graph, compiled anew for each shape."""
    return torch.compile(f, dynamic=False, fullgraph=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


# ==== 7. The run ======================================================================================================

class MicroStep:
    """Forward, backward and collection of one micro-batch, called as micro_step(batch, geometry, weights, grad_unit).

    With graphs, the second call of a kind (shapes, geometry) is captured as a CUDA graph and replayed from then on, as
    the GPU waits for launches where batches are small: with 8 of 16,384 tokens, 253 ms a step became 188 (H200, fa4).
    The first call runs and so compiles.
    """

    def __init__(self, model: GPT, optimizer: NorMuonAdam, hp: Hyperparameters, ranks: Ranks):
        self.model, self.optimizer = model, optimizer
        self.loss_of = compiled(model.forward) if hp.compile else model.forward
        self.graphs = hp.graphs and hp.compile and ranks.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None  # graphs run one at a time: one memory
        self.replays: dict[tuple, Callable | None] = {}
        self.compiling = False  # in the first call of a kind, which takes long: kernels compile even without hp.compile

    def run(self, batch: Batch, geometry: Geometry, weights: Tensor, grad_unit: float) -> Tensor:
        """Add the micro-batch's gradients to the optimizer's; returns the loss, 0-dim fp32."""
        with torch.no_grad():
            rows = self.model.lookup(batch)
        for row in (rows.embed, rows.bigram, *rows.value):
            row.requires_grad_()
        loss = self.loss_of(batch, rows, geometry, weights, grad_unit)
        loss.backward()
        self.optimizer.collect(batch, rows)
        return loss.detach()

    def capture(self, batch: Batch, geometry: Geometry, weights: Tensor, grad_unit: float) -> Callable:
        inputs = Batch(*(t.clone() for t in batch)), weights.clone()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.run(inputs[0], geometry, inputs[1], grad_unit)

        def replay(batch: Batch, weights: Tensor) -> Tensor:
            for static, new in zip((*inputs[0], inputs[1]), (*batch, weights)):
                static.copy_(new)
            graph.replay()
            return loss

        return replay

    def __call__(self, batch: Batch, geometry: Geometry, weights: Tensor, grad_unit: float) -> Tensor:
        kind = (geometry, grad_unit, *(t.shape for t in (*batch, weights)))
        self.compiling = kind not in self.replays
        if not self.graphs or kind not in self.replays:
            self.replays[kind] = None
            return self.run(batch, geometry, weights, grad_unit)
        if self.replays[kind] is None:
            self.replays[kind] = self.capture(batch, geometry, weights, grad_unit)
        return self.replays[kind](batch, weights)


def train_step(micro_step: MicroStep, batches: list[Batch], touched: TouchedRows | None, p: Plan) -> Tensor:
    """One optimizer step; returns all ranks' loss a token, weighted over the predicted tokens, as a device tensor."""
    model, optimizer, S = micro_step.model, micro_step.optimizer, p.batch_tokens // SEGMENTS
    A = SEGMENTS // optimizer.ranks.world
    model.set_stage(p.stage)
    geometry = Geometry(p.window_short, p.window_long, p.max_doc_len, model.scale, S)
    weights = to_device(torch.tensor(p.mtp_weights) / A, optimizer.ranks.device)
    total = 0.0
    for batch in batches:
        total = total + micro_step(batch, geometry, weights, 1 / A)
    loss = total / (S * sum(p.mtp_weights))
    mean = dist.all_reduce(loss, op=dist.ReduceOp.AVG, async_op=True)
    optimizer.step(p, touched)
    mean.wait()
    return loss


def val_geometry(model: GPT, p: Plan, last: bool, max_len: int) -> Geometry:
    """Windows of plan p, whose stage is set; a run's last validation widens the long one, not the rotary tables."""
    model.set_stage(p.stage)
    long = model.hp.final_val_window * model.hp.block if last else p.window_long
    return Geometry(p.window_short, long, max_len, model.scale)


@torch.no_grad()
def evaluate(hp: Hyperparameters, ranks: Ranks, model: GPT, losses_of: Callable, tokens: np.ndarray, p: Plan,
             last: bool, limit: int | None = None) -> float:
    """Mean loss over the val stream, or over each rank's first `limit` chunks, with the windows of plan p."""
    geometry = val_geometry(model, p, last, longest_document(tokens, hp))
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, count
    for number, batch in enumerate(val_batches(hp, ranks, tokens)):
        if number == limit:
            break
        losses = losses_of(batch, model.lookup(batch), geometry)
        total += torch.stack([losses.double().sum(), total.new_tensor(len(losses))])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def warmup_steps(hp: Hyperparameters) -> list[int]:
    """The first two steps of each stage: one with Adam, one without, and every shape that training will meet."""
    bounds = stage_bounds(hp)
    return [step for first, end in zip(bounds, bounds[1:]) for step in range(first, min(first + 2, end))]


def warmup(hp: Hyperparameters, ranks: Ranks, micro_step: MicroStep, losses_of: Callable, val_tokens: np.ndarray,
           log: Log) -> None:
    """Compile everything by real steps on real batches, then put weights and optimizer back to their beginning."""
    steps, model = warmup_steps(hp), micro_step.model
    loader = TrainLoader(hp, ranks, steps)
    started = time.perf_counter()
    for step in steps:
        p = plan(step, hp)
        train_step(micro_step, *next(loader), p)
        if step in stage_bounds(hp):
            evaluate(hp, ranks, model, losses_of, val_tokens, p, last=False, limit=1)
        log(f"warm-up: step {step} after {time.perf_counter() - started:.0f} s")
    evaluate(hp, ranks, model, losses_of, val_tokens, p, last=True, limit=1)
    loader.close()
    model.initialize(hp.seed)
    micro_step.optimizer.reset()


def set_up(hp: Hyperparameters, ranks: Ranks, ops: Ops) -> MicroStep:
    """Model with its initial weights, optimizer, and the step that trains them."""
    with torch.device(ranks.device):
        model = GPT(hp, ranks.world)
    model.ops = ops
    model.initialize(hp.seed)
    return MicroStep(model, NorMuonAdam(model, hp, ranks), hp, ranks)


def train(hp: Hyperparameters, ranks: Ranks, attention: str, kernels: str, log: Log, saved: dict | None,
          watch: Watch) -> int:
    """The whole run, or what a checkpoint leaves of it: set up, warm up, train, validate. Returns the exit status."""
    log_environment(log, hp, ranks, attention, kernels)
    val_tokens, micro_step = read_val_tokens(hp), set_up(hp, ranks, choose_ops(attention, kernels))
    model = micro_step.model
    losses_of = compiled(model.token_losses) if hp.compile else model.token_losses
    if hp.compile:
        warmup(hp, ranks, micro_step, losses_of, val_tokens, log)

    N, clock, optimizer, pending = hp.num_steps, Clock(ranks.device), micro_step.optimizer, deque()
    first = load_checkpoint(saved, optimizer, clock) if saved else 0
    recent, loader = clock.before, TrainLoader(hp, ranks, range(N), first)
    while saved and loader.queue.empty():  # to find the place in the shards is no training
        time.sleep(0.01)
    watch.clock, watch.micro_step, rewind = clock, micro_step, Rewind(optimizer, first)
    clock.start()
    for step in range(first, N + 1):
        stop, last, p = watch.stops(step), step == N, plan(min(step, N - 1), hp)
        validating = last or (hp.val_every and step % hp.val_every == 0)
        saving = step > first and (saves(step, hp) or (stop and (hp.save_every or hp.save_final)))
        if stop or validating or saving:
            clock.stop()
            while pending:
                recent = report(log, watch, N, *pending.popleft(), recent)
            if stop and not watch.why.startswith("SIG"):
                find_bad(rewind, micro_step, log, step, clock.ms(), watch.why)
            if saving:
                path = save_checkpoint(log, optimizer, step, clock.ms())
            if stop:
                kept = f"--resume={path} goes on" if saving else "nothing saved; --save_final=true would have"
                log(f"interrupted by {watch.why} after step {step} of {N}: {kept}")
                break
            if validating:
                val_loss = evaluate(hp, ranks, model, losses_of, val_tokens, p, last)
                average = clock.ms() / max(step, 1)
                log(f"step:{step}/{N} val_loss:{val_loss:.4f} train_time:{clock.ms():.0f}ms step_avg:{average:.2f}ms")
                if not math.isfinite(val_loss):
                    find_bad(rewind, micro_step, log, step, clock.ms(), f"the validation loss is {val_loss}")
                rewind.keep(step)
            if last:
                break
            clock.start()
        loss = train_step(micro_step, *next(loader), p)
        # The loss is read a step late, so that the device always has the next step's work queued
        pending.append((step + 1, Reading(loss), p.batch_tokens))
        if len(pending) > 1:
            recent = report(log, watch, N, *pending.popleft(), recent)
    loader.close()
    if stop:
        return 128 + signal.Signals[watch.why]
    log(f"final: val_loss {val_loss:.4f} after {N} steps, {clock.ms() / 1000:.1f} s of training on {ranks.world} x "
        f"{torch.cuda.get_device_name() if ranks.device.type == 'cuda' else 'CPU'}")
    if ranks.device.type == "cuda":
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB "
            f"reserved: {torch.cuda.max_memory_reserved() // 2**20} MiB")
    return 0


class Reading:
    """A device scalar on its way to the host; only value() waits, and for no later work of the device."""

    def __init__(self, x: Tensor):
        self.host, self.event = x.to("cpu", non_blocking=True), torch.cuda.Event() if x.is_cuda else None
        if self.event:
            self.event.record()

    def value(self) -> float:
        if self.event:
            self.event.synchronize()
        return self.host.item()


def report(log: Log, watch: Watch, N: int, step: int, loss: Reading, tokens: int, before: float) -> float:
    """Log a finished step; returns the training time in ms, which the next call takes as `before`.

    A nan or inf on any rank stops all: one that was in gradients only is in the next steps' losses.
    """
    loss, ms = loss.value(), watch.clock.ms()
    if not math.isfinite(loss):
        watch.wish = watch.wish or f"the training loss of step {step} is {loss}"
    rate = tokens / max(ms - before, 1e-3) * 1000
    log.step(f"step:{step}/{N} train_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms", step,
             loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}")
    return ms


def main() -> None:
    """Run the command line; a UserError costs one line and exit status 1."""
    # PyTorch 2.13 renames two collectives; the old names work in all versions that this script supports
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor")
    try:
        hp, args = parse_args(sys.argv[1:])
        if args.plan:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --plan | head
            print("\n".join(plan_csv(hp)))
            return
        if args.check:
            check_data(hp)
            if hp.resume:
                read_checkpoint(hp.resume, hp)
            return
        ranks = setup_ranks(hp)
        chosen = on_every_rank(lambda: (choose_attention(hp, ranks.device), choose_kernels(hp, ranks.device)))
        on_every_rank(lambda: check_data(hp))
        saved = on_every_rank(lambda: read_checkpoint(hp.resume, hp) if hp.resume else None)
        log = on_every_rank(lambda: Log(hp, ranks))
        with Watch(ranks, log) as watch:
            status = train(hp, ranks, *chosen, log, saved, watch)
        log.close()
        dist.destroy_process_group()
        sys.exit(status)
    except UserError as e:  # the same on every rank: told once a machine
        if dist.is_initialized():
            dist.destroy_process_group()
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


# ==== 8. Kernels: each Triton kernel has its plain PyTorch reference, of the same signature, directly above it ========

HOPPER_GPU = 9  # generation


def gpu_generation(device: torch.device) -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 of other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for the CPU 2, enough for Triton's interpreter to show mistakes."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


KERNELS = ("hopper", "plain")  # the fastest first


def choose_kernels(hp: Hyperparameters, device: torch.device) -> str:
    """The one of KERNELS to use: the one asked for, or the fastest that works on this device."""
    usable = {"plain": True, "hopper": triton is not None and gpu_generation(device) == HOPPER_GPU
              and hp.dtype == "bfloat16" and hp.head_dim.bit_count() == 1
              and importlib.util.find_spec("quack") is not None}
    if hp.kernels == "auto":
        return next(name for name in KERNELS if usable[name])
    if not usable[hp.kernels]:
        raise UserError(f"--kernels={hp.kernels} needs a Hopper GPU, Triton, the package quack-kernels, bfloat16 and a "
                        "--head_dim that is a power of 2; use --kernels=auto")
    return hp.kernels


def choose_ops(attention: str, kernels: str) -> Ops:
    """The operations by one of KERNELS, with one of ATTENTION_BACKENDS."""
    return (HOPPER if kernels == "hopper" else PLAIN)._replace(attention=ATTENTION_BACKENDS[attention]())


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on the CPU


def op(reference: Callable | None = None, shapes: Callable | None = None, cpu: bool = INTERPRETED) -> Callable:
    """Decorator: a custom operation whose kernel is the decorated function. Its shapes, and on the CPU its numbers, are
    those of the reference, which has the same signature; `shapes` alone serves where there is none. With cpu the kernel
    runs there, too."""
    def define(kernel: Callable) -> Callable:
        # without the tag, TorchInductor stores an input again for each of its readers
        operation = custom_op(f"speedrun::{kernel.__name__}", kernel, mutates_args=(), tags=[torch.Tag.flexible_layout],
                              device_types=None if cpu else "cuda")
        operation.register_fake(shapes or reference)
        if reference and not cpu:
            operation.register_kernel("cpu")(reference)
        return operation
    return define


# --- Gates of heads and of value embeddings

VALUE_GATE_MAX = 2.0


def gates(thin: Callable, gate_in: Tensor, ve_first: Tensor | None,
          w: AttentionWeights) -> tuple[Tensor, Tensor | None]:
    """The gates of heads [T, H], and those of a value embedding or None. gate_in [T, n], thin(x, w) = x w^T.

    The second gates see ve_first [T, n/2], if given, in place of the second half of gate_in."""
    gate = torch.sigmoid(thin(gate_in, w.gate))
    if w.value_gate is None:
        return gate, None
    gate_in = gate_in if ve_first is None else torch.cat([gate_in[:, : gate_in.size(1) // 2], ve_first], dim=1)
    return gate, VALUE_GATE_MAX * torch.sigmoid(thin(gate_in, w.value_gate))


def thin_product(x: Tensor, w: Tensor) -> Tensor:
    """F.linear(x, w) in fp32 for x [T, n], w [m, n] with n and m so small that a matrix product is slower."""
    return (x.float()[:, None] * w.float()).sum(2)


# --- Matrix products that do elementwise work before their result leaves the chip
# An RMSNorm before a product costs no pass of its own: norm(x) = r x with r = 1 / rms(x) of each row, and r multiplies
# what the product makes of x. r is no variable of differentiation: the classes below put its share into x's gradient.

PRODUCT_TILE = (128, 192)  # rows, columns; tuned (H200)


def product_reference(a: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
    """a b [m, n] for a [m, k], b [k, n]; with r [m] fp32 relu(r a b)^2."""
    y = a @ b
    return y if r is None else F.relu(r[:, None] * y).square().to(y.dtype)


def tile_sums(y: Tensor) -> Tensor:
    """Sums of each PRODUCT_TILE[1] columns of y [m, n]: [m, tiles] fp32."""
    columns = PRODUCT_TILE[1]
    return F.pad(y.float(), (0, -y.size(1) % columns)).view(len(y), -1, columns).sum(2)


def empty_tile_sums(a: Tensor, b: Tensor) -> Tensor:
    """Room for the tile_sums of a product of a [m, k] and b [k, n]."""
    return a.new_empty(a.size(0), -(-b.size(1) // PRODUCT_TILE[1]), dtype=torch.float32)


def product_sum_reference(a: Tensor, b: Tensor, terms: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor]:
    """y = a b + scales[0] terms[0] + ... [m, n], scales 0-dim fp32; and tile_sums of y^2. quack_products has kernels
    for 1 and 3 terms."""
    y = a @ b
    for term, scale in zip(terms, scales):
        y = y + scale * term
    return y, tile_sums(y.float().square())


def product_root_reference(a: Tensor, b: Tensor, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """y [m, n] = r times pre's gradient, for c = relu(pre)^2 and c's gradient a b, r [m] fp32; tile_sums of y pre."""
    root = c.sqrt()
    y = (2 * root * r[:, None] * (a @ b)).to(c.dtype)
    return y, tile_sums(y * root)


def product_norm_grad_reference(a: Tensor, b: Tensor, dy: Tensor, x: Tensor, s: Tensor,
                                factor: Tensor) -> tuple[Tensor, Tensor]:
    """a b + s dy + factor x for dy, x [m, n], s 0-dim fp32, factor [m] fp32; and tile_sums of dy x."""
    return (a @ b + s * dy + factor[:, None] * x).to(x.dtype), tile_sums(dy.float() * x.float())


@cache
def quack_products() -> dict[str, Callable]:
    """The kernels by epilogue; quack (Guo, Dao et al., package quack-kernels) builds them around these lines."""
    import cutlass.cute as cute
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce
    from quack.gemm_config import GemmConfig

    def none(acc):
        return {"D": acc}

    def relu_square(acc, r):
        positive = cute.arch.fmax(acc * r, 0.0)
        return {"D": positive * positive}

    def sum1(acc, c, s0):
        y = acc + s0 * c
        return {"D": y, "sums": (y, y)}

    def sum3(acc, c, s0, c1, s1, c2, s2):
        y = acc + s0 * c + s1 * c1 + s2 * c2
        return {"D": y, "sums": (y, y)}

    def root(acc, c, r):
        pre = cute.math.sqrt(c, fastmath=True)
        y = 2.0 * r * acc * pre
        return {"D": y, "sums": (y, pre)}

    def norm_grad(acc, c, x, s, r):
        return {"D": acc + s * c + r * x, "sums": (c, x)}

    def scaled(acc, scale):
        return {"D": acc * scale}

    rows, columns = PRODUCT_TILE
    config = GemmConfig(tile_m=rows, tile_n=columns, pingpong=True, cluster_m=2, is_dynamic_persistent=False)
    ops, reduces = {"r": ColVecLoad("r")}, {"sums": ColVecReduce("sums", scaled=True)}
    plain, by_row = gemm_epilogue(), gemm_epilogue(ops=ops)
    summed, summed_by_row = gemm_epilogue(reduces=reduces), gemm_epilogue(ops=ops, reduces=reduces)
    kinds = {none: plain, relu_square: by_row, sum1: summed, sum3: summed, root: summed_by_row,
             norm_grad: summed_by_row}
    fp8 = partial(plain(scaled).gemm, tile_M=config.tile_m, tile_N=config.tile_n, pingpong=config.pingpong,
                  cluster_M=config.cluster_m, b_kn=True,
                  post_init_attrs=(("fp8_slow_accum", False),))  # its sums stay in the tensor cores
    return {f.__name__: partial(kind(f), config=config, tuned=False) for f, kind in kinds.items()} | {"scaled": fp8}


def product_and_sums(kind: str, a: Tensor, b: Tensor, c: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
    sums = empty_tile_sums(a, b)
    return quack_products()[kind](a, b, c, sums=sums, **more)["D"], sums


@op(product_reference, cpu=False)
def product(a: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
    f = quack_products()
    return (f["none"](a, b) if r is None else f["relu_square"](a, b, r=r[None]))["D"]


@op(product_sum_reference, cpu=False)
def product_sum(a: Tensor, b: Tensor, terms: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor]:
    more = {f"c{i}": c for i, c in enumerate(terms) if i} | {f"s{i}": scale for i, scale in enumerate(scales)}
    return product_and_sums(f"sum{len(terms)}", a, b, terms[0], **more)


@op(product_root_reference, cpu=False)
def product_root(a: Tensor, b: Tensor, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return product_and_sums("root", a, b, c, r=r[None])


@op(product_norm_grad_reference, cpu=False)
def product_norm_grad(a: Tensor, b: Tensor, dy: Tensor, x: Tensor, s: Tensor,
                      factor: Tensor) -> tuple[Tensor, Tensor]:
    return product_and_sums("norm_grad", a, b, dy, x=x, s=s, r=factor[None])


WEIGHT_GRAD_ROWS = 1536  # tuned (H200): cuBLAS makes 2,304 x 768 in 0.259 ms, as 1,536 + 768 rows in 0.242


def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x [n, k] for dy [T, n], x [T, k]; compiled, each product writes its part of the result in place."""
    return torch.cat([part.mT @ x for part in dy.split(WEIGHT_GRAD_ROWS, dim=1)])


def inverse_rms(squares: Tensor, n: int) -> Tensor:
    """r [T] fp32 from sums of squares [T, parts] over rows of n numbers."""
    return torch.rsqrt(squares.sum(1) / n + FP32_EPS)


def norm_grad(g: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """Gradient of x [T, n] from g, which is r [T] times the gradient of norm(x) = r x; fp32."""
    g, x = g.float(), x.float()
    return g - x * (r.square() * (g * x).mean(1))[:, None]


class FoldedNorm(torch.autograd.Function):
    """norm(x [T, D]) but for the factor r [T]: x. The sum of its readers' gradients comes with that factor."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x, r)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor):
        return norm_grad(g, *ctx.saved_tensors).to(g.dtype), None


class Linear(torch.autograd.Function):
    """F.linear(x, w) for x [T, D], w [n, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w.mT)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        dw = weight_grad(dy, x)  # first: cuBLAS gives autograd's thread the CUDA context that tensor descriptors need
        return product(dy, w), dw


def embedding_sums_reference(x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor) -> tuple[Tensor, ...]:
    """s0[i] x0 + s1[i] bigram [T, D] for each i, for x0, bigram [T, D] and s0, s1 [n] fp32."""
    return tuple(a * x0 + b * bigram for a, b in zip(s0.unbind(), s1.unbind()))


class EmbeddingSums(torch.autograd.Function):
    """In place of each of embedding_sums_reference a stand-in, x0, for LinearSum, which adds the sum in its product.

    So all gradients come last, in one pass that reads x0 and bigram once and not in each layer: compiled, sums of rows
    and what has the rows' shape are one kernel."""

    @staticmethod
    def forward(ctx, x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x0, bigram, s0, s1)
        return tuple(x0.view_as(x0) for _ in range(len(s0)))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x0, bigram, s0, s1 = ctx.saved_tensors
        dx0 = sum(s * g for s, g in zip(s0.unbind(), grads)).to(x0.dtype)
        dbigram = sum(s * g for s, g in zip(s1.unbind(), grads)).to(x0.dtype)
        ds0, ds1 = (torch.stack([(g.float() * x.float()).sum(1) for g in grads], 1).sum(0) for x in (x0, bigram))
        return dx0, dbigram, ds0, ds1


class LinearSum(torch.autograd.Function):
    """x w^T + s[0] c + s0 x0 + s1 bigram, for which `added` takes the gradient, and r [T] of the result."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, c: Tensor, s: Tensor, added: Tensor, x0: Tensor, bigram: Tensor, s0: Tensor,
                s1: Tensor) -> tuple[Tensor, Tensor]:
        y, squares = product_sum(x, w.mT, [c, x0, bigram], [s[0], s0, s1])
        r = inverse_rms(squares, y.size(1))
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(x, w, c, s)
        return y, r

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        x, w, c, s = ctx.saved_tensors
        dc, ds = (s[:, None] * dy).to(dy.dtype), (dy.float() * c.float()).sum(1)
        return product(dy, w), dy.mT @ x, dc, ds, dy, None, None, None, None


# --- MLP: relu(norm(x) up^T)^2 down + scale x (So et al., Primer, arXiv 2109.08668)

class ReluSquareMLP(torch.autograd.Function):
    """relu(r x up^T)^2 down + scale[0] x, and r [T] of it; keeps the hidden layer h: its root is the square's slope."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        h = product(x, up.mT, r)
        y, squares = product_sum(h, down, [x], [scale[0]])
        new_r = inverse_rms(squares, y.size(1))
        ctx.mark_non_differentiable(new_r)
        ctx.save_for_backward(x, r, up, down, scale, h)
        return y, new_r

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        x, r, up, down, scale, h = ctx.saved_tensors
        d_down = h.mT @ dy
        dpre, sums = product_root(dy, down.mT, h, r)  # [T, F], times r
        # norm_grad of g = dpre up needs the sum of g x, which is that of dpre (x up^T): known before g is
        factor = -r / x.size(1) * sums.sum(1)
        dx, d_scale = product_norm_grad(dpre, up, dy, x, scale[0], factor)
        return dx, None, dpre.mT @ x, d_down, d_scale.sum(1)


# --- What attention reads: QK norm, rotary embedding, key offset, value-embedding mix

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs in the first half of the last dim; the second half carries no position."""
    half, rest = x.chunk(2, dim=-1)
    a, b = half.unflatten(-1, (-1, 2)).unbind(-1)  # [..., d/4]
    return torch.cat([torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2), rest], dim=-1)


def segment_length(cos: Tensor, paired: bool) -> int:
    """S of a rotary table [S, d/4], or [2S, d/4] on paired layers."""
    return len(cos) // 2 if paired else len(cos)


def attention_inputs_reference(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor,
                               sin: Tensor, paired: bool, key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, H, d] from the projection qkv [T, 3, H, d], which lacks the factor r [T] if there is one.

    q and k are normalised and rotated by cos, sin [S, d/4]: by position t of a segment, or on paired layers, with
    cos, sin [2S, d/4], head 2m by 2t and head 2m+1 by 2t+1. key_offset moves the un-rotated half of each key one
    position ahead, across documents; position 0 keeps its own. v gains gate [T, H] times the value embedding
    ve [T, H * d], if there is one.
    """
    T, _, H, d = qkv.shape
    q, k, v = qkv.unbind(1)
    q, k = norm(q), norm(k)
    n, S = 2 if paired else 1, segment_length(cos, paired)
    cos, sin = (table.view(S, 1, n, d // 4) for table in (cos, sin))
    q, k = (rotate(x.reshape(T // S, S, H // n, n, d), cos, sin).view(T, H, d) for x in (q, k))
    if key_offset:
        still = k[..., d // 2 :].view(T // S, S, H, d // 2)
        k = torch.cat([k[..., : d // 2], torch.cat([still[:, :1], still[:, :-1]], dim=1).view(T, H, d // 2)], dim=-1)
    v = v if r is None else (r[:, None, None] * v).to(v.dtype)  # q and k are normalised
    return q, k, v if ve is None else v + gate[..., None] * ve.view(T, H, d)


@jit
def position_angles(cos, sin, position, head, inside, D: tl.constexpr, PAIRED: tl.constexpr):
    position = 2 * position + head % 2 if PAIRED else position
    at = position[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :]
    mask = inside[:, None]
    c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@jit
def normalised(x, mask, D: tl.constexpr, EPS: tl.constexpr):
    """The halves of the vectors at x, divided by their root mean square, and its inverse."""
    front = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    back = tl.load(x + D // 2, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(front * front, 1) + tl.sum(back * back, 1)) / D + EPS)[:, None]
    return front * r, back * r, r


@jit
def attention_inputs_kernel(qkv, r, ve, gate, cos, sin, q, k, v, T, S, EPS: tl.constexpr, H: tl.constexpr,
                            D: tl.constexpr, PAIRED: tl.constexpr, OFFSET: tl.constexpr, SCALED: tl.constexpr,
                            MIX: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS tokens of one head, whose width is D here."""
    head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, half, position = rows < T, tl.arange(0, D // 2)[None, :], rows % S
    mask = inside[:, None]
    c, s = position_angles(cos, sin, position, head, inside, D, PAIRED)
    to = rows[:, None] * (H * D) + head * D + half
    for part in tl.static_range(2):  # q, k
        front, back, _ = normalised(qkv + rows[:, None] * (3 * H * D) + (part * H + head) * D + half, mask, D, EPS)
        a, b = tl.split(front.reshape(ROWS, D // 4, 2))
        front = tl.join(a * c + b * s, b * c - a * s).reshape(ROWS, D // 2)
        out = q if part == 0 else k
        tl.store(out + to, front.to(out.dtype.element_ty), mask=mask)
        back = back.to(out.dtype.element_ty)
        if part == 1 and OFFSET:
            tl.store(out + to + H * D + D // 2, back, mask=(inside & (position + 1 < S))[:, None])
            tl.store(out + to + D // 2, back, mask=(inside & (position == 0))[:, None])
        else:
            tl.store(out + to + D // 2, back, mask=mask)
    wide = tl.arange(0, D)[None, :]
    value = tl.load(qkv + rows[:, None] * (3 * H * D) + (2 * H + head) * D + wide, mask=mask, other=0.0)
    if SCALED:
        value = value.to(tl.float32) * tl.load(r + rows, mask=inside, other=0.0)[:, None]
    to = rows[:, None] * (H * D) + head * D + wide
    if MIX:
        g = tl.load(gate + rows * H + head, mask=inside, other=0.0).to(tl.float32)[:, None]
        value = value.to(tl.float32) + g * tl.load(ve + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(v + to, value.to(v.dtype.element_ty), mask=mask)


@jit
def attention_inputs_backward_kernel(qkv, r, ve, gate, cos, sin, dq, dk, dv, dqkv, dve, dgate, T, S,
                                     EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr,
                                     OFFSET: tl.constexpr, SCALED: tl.constexpr, MIX: tl.constexpr,
                                     ROWS: tl.constexpr):
    head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, half, position = rows < T, tl.arange(0, D // 2)[None, :], rows % S
    mask = inside[:, None]
    c, s = position_angles(cos, sin, position, head, inside, D, PAIRED)
    at = rows[:, None] * (H * D) + head * D + half
    for part in tl.static_range(2):  # q, k
        here = rows[:, None] * (3 * H * D) + (part * H + head) * D + half
        front, back, own = normalised(qkv + here, mask, D, EPS)
        grad = dq if part == 0 else dk
        a, b = tl.split(tl.load(grad + at, mask=mask, other=0.0).to(tl.float32).reshape(ROWS, D // 4, 2))
        dfront = tl.join(a * c - b * s, a * s + b * c).reshape(ROWS, D // 2)
        if part == 1 and OFFSET:  # this token's half went to the next token; a segment's first to both
            moved, stayed = (inside & (position + 1 < S))[:, None], (inside & (position == 0))[:, None]
            dback = tl.load(grad + at + H * D + D // 2, mask=moved, other=0.0).to(tl.float32)
            dback += tl.load(grad + at + D // 2, mask=stayed, other=0.0).to(tl.float32)
        else:
            dback = tl.load(grad + at + D // 2, mask=mask, other=0.0).to(tl.float32)
        # y = own x: dx = own (dy - y mean(dy y))
        mean = ((tl.sum(dfront * front, 1) + tl.sum(dback * back, 1)) / D)[:, None]
        tl.store(dqkv + here, (own * (dfront - front * mean)).to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + here + D // 2, (own * (dback - back * mean)).to(dqkv.dtype.element_ty), mask=mask)
    wide = tl.arange(0, D)[None, :]
    at = rows[:, None] * (H * D) + head * D + wide
    dvalue = tl.load(dv + at, mask=mask, other=0.0).to(tl.float32)
    scaled = dvalue
    if SCALED:
        scaled = dvalue * tl.load(r + rows, mask=inside, other=0.0)[:, None]
    to = dqkv + rows[:, None] * (3 * H * D) + (2 * H + head) * D + wide
    tl.store(to, scaled.to(dqkv.dtype.element_ty), mask=mask)
    if MIX:
        g = tl.load(gate + rows * H + head, mask=inside, other=0.0).to(tl.float32)[:, None]
        embedded = tl.load(ve + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dve + at, (g * dvalue).to(dve.dtype.element_ty), mask=mask)
        tl.store(dgate + rows * H + head, tl.sum(embedded * dvalue, 1).to(dgate.dtype.element_ty), mask=inside)


ATTENTION_INPUT_ROWS = 16  # tokens of one program


@op(attention_inputs_reference)
def attention_inputs(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor,
                             sin: Tensor, paired: bool, key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, _, H, d = qkv.shape
    q, k, v = (qkv.new_empty(T, H, d) for _ in range(3))
    attention_inputs_kernel[(H, triton.cdiv(T, ATTENTION_INPUT_ROWS))](
        qkv, r, ve, gate, cos, sin, q, k, v, T, segment_length(cos, paired), FP32_EPS, H, d, paired, key_offset,
        r is not None, ve is not None, ATTENTION_INPUT_ROWS)
    return q, k, v


@op(shapes=lambda qkv, r, ve, gate, *_: (
    torch.empty_like(qkv), qkv.new_empty(0 if ve is None else qkv.size(0), qkv.shape[2:].numel()),
    qkv.new_empty(0, qkv.size(2)) if ve is None else torch.empty_like(gate)))
def attention_inputs_backward(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor,
                              sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, paired: bool,
                              key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, ve and gate; the last two are empty without a value embedding."""
    (T, _, H, d), mix = qkv.shape, ve is not None
    dqkv, dve = torch.empty_like(qkv), qkv.new_empty(T if mix else 0, H * d)
    dgate = torch.empty_like(gate) if mix else qkv.new_empty(0, H)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    attention_inputs_backward_kernel[(H, triton.cdiv(T, ATTENTION_INPUT_ROWS))](
        qkv, r, ve, gate, cos, sin, dq, dk, dv, dqkv, dve, dgate, T, segment_length(cos, paired), FP32_EPS, H, d,
        paired, key_offset, r is not None, mix, ATTENTION_INPUT_ROWS)
    return dqkv, dve, dgate


class AttentionInputs(torch.autograd.Function):
    """attention_inputs_reference, forward and backward in one kernel each; r counts as a constant."""

    @staticmethod
    def forward(ctx, qkv, r, ve, gate, cos, sin, paired, key_offset):
        ctx.save_for_backward(qkv, r, ve, gate, cos, sin)
        ctx.options = paired, key_offset
        return attention_inputs(qkv, r, ve, gate, cos, sin, paired, key_offset)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        qkv, r, ve, *rest = ctx.saved_tensors
        dqkv, dve, dgate = attention_inputs_backward(qkv, r, ve, *rest, dq, dk, dv, *ctx.options)
        return (dqkv, None, *((dve, dgate) if ve is not None else (None, None)), None, None, None, None)


# --- Loss of the head

def softcapped_mtp_loss_reference(logits: Tensor, targets: Tensor, weights: Tensor, grad_dtype: torch.dtype,
                                  grad_scale: float) -> tuple[Tensor, Tensor]:
    """Multi-token cross entropy on soft-capped logits, and its gradient.

    logits [T, V]; targets [n, S] of n segments; weights [k]: position i of a segment predicts its targets i, i+1 ..
    i+k-1 with these weights, as far as they exist. Returns (loss [T] fp32, d sum(loss) / d logits / grad_scale [T, V]
    in grad_dtype).
    Capped logits lie in (0, CAP), so the softmax needs no pass for its maximum: CAP itself is the shift.
    """
    V = logits.size(1)
    u = torch.sigmoid((logits.float() + CAP_SHIFT) / CAP_WIDTH)  # [T, V]; z = CAP * u
    e = torch.exp(CAP * u - CAP)
    total = e.sum(dim=1)  # [T]
    lse = total.log() + CAP
    column = torch.arange(V, device=logits.device)
    loss, hits, mass = torch.zeros_like(lse), 0.0, torch.zeros_like(lse)
    for k in range(len(weights)):
        target = F.pad(targets[:, k:], (0, min(k, targets.size(1))), value=-1).flatten()  # [T]; -1 matches no column
        weight = torch.where(target >= 0, weights[k], 0.0)
        z = softcap(logits.gather(1, target.clamp_min(0)[:, None])[:, 0])
        loss = loss + weight * (lse - z)
        mass = mass + weight
        hits = hits + weight[:, None] * (column == target[:, None])
    dz = (mass / total)[:, None] * e - hits
    grad = dz * (CAP / CAP_WIDTH / grad_scale) * u * (1 - u)
    return loss, grad.to(grad_dtype)


@jit
def capped(x, HALF: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """t = tanh((x + SHIFT) / WIDTH / 2): z = CAP (1 + t) / 2, dz/dx = CAP / WIDTH (1 - t^2) / 4; and exp(z - CAP)."""
    if FAST:  # an instruction each, error 2^-11: the special-function unit limits this kernel
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x * (0.5 / WIDTH) + 0.5 * SHIFT / WIDTH],
                                      dtype=tl.float32, is_pure=True, pack=1)
        e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [t * HALF - HALF],
                                      dtype=tl.float32, is_pure=True, pack=1)
    else:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(x * (1.4426950408889634 / WIDTH) + 1.4426950408889634 * SHIFT / WIDTH))
        e = tl.exp2(t * HALF - HALF)
    return t, e


@jit
def packed(x, PACK: tl.constexpr):
    """fp32 [n] as int32 [n / 2] of two bf16 each, which compilers keep in half the registers; without PACK, x."""
    if PACK:
        a, b = tl.split(x.reshape(x.shape[0] // 2, 2))
        x = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True,
                                      pack=1)
    return x


@jit
def unpacked(x, PACK: tl.constexpr):
    if PACK:
        low, high = (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
        x = tl.join(low, high).reshape(2 * x.shape[0])
    return x


@jit
def mtp_loss_kernel(logits, weights, total, grad, T, S, V: tl.constexpr, scale, HALF: tl.constexpr,
                    SHIFT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, FAST: tl.constexpr, PACK: tl.constexpr,
                    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """Sums of exp(z - CAP) of each row, and the gradient but for the targets' own columns, which target_kernel writes.

    Programs walk over rows. Each is read once, a row ahead. What the gradient needs of it, exp(z - CAP) (1 - t^2),
    stays in registers and becomes the gradient while the next row is computed: loads, arithmetic and stores overlap.
    """
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    N: tl.constexpr = V * WORDS // BLOCK  # words of a row
    first, columns, words = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, WORDS)
    kept, slope, before = (), 0.0, first
    for _ in tl.static_range(BLOCKS):
        kept += (tl.zeros([WORDS], logits.dtype.element_ty),)
    for done in tl.range(0, T - first, PROGRAMS, num_stages=3):
        row = first + done
        x, fresh = (), ()
        for i in tl.static_range(BLOCKS):
            x += (tl.load(logits + row.to(tl.int64) * N + i * WORDS + words, mask=i * WORDS + words < N, other=0,
                          eviction_policy="evict_first"),)
        sums = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(BLOCKS):
            inside = i * BLOCK + columns < V
            t, e = capped(unpacked(x[i], PACK), HALF, SHIFT, WIDTH, FAST)
            sums += tl.where(inside, e, 0.0)
            # the first time zeros go to the program's first row, whose gradient comes a turn later
            tl.store(grad + before.to(tl.int64) * V + i * BLOCK + columns,
                     (slope * unpacked(kept[i], PACK)).to(grad.dtype.element_ty), mask=inside,
                     eviction_policy="evict_first")
            fresh += (packed(e - e * (t * t), PACK),)
        mass, row_total = 0.0, tl.sum(sums)
        for j in tl.static_range(K):
            mass += tl.where(row % S + j < S, tl.load(weights + j), 0.0)
        tl.store(total + row, row_total)
        kept, slope, before = fresh, 0.25 * scale * mass / row_total, row
    for i in tl.static_range(BLOCKS):
        tl.store(grad + before.to(tl.int64) * V + i * BLOCK + columns,
                 (slope * unpacked(kept[i], PACK)).to(grad.dtype.element_ty), mask=i * BLOCK + columns < V)


@jit
def target_kernel(logits, targets, weights, total, loss, grad, T, S, V, scale, CAP: tl.constexpr, HALF: tl.constexpr,
                  SHIFT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Each row's loss, and the targets' own columns of the gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, left, at = row < T, S - row % S, row.to(tl.int64) * V  # left: positions in the segment from this one on
    left = tl.where(inside, left, 0)
    sums = tl.load(total + row, mask=inside, other=1.0)
    mass, row_loss, lse = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.log(sums) + CAP
    for j in tl.static_range(K):
        mass += tl.where(j < left, tl.load(weights + j), 0.0)
    for j in tl.static_range(K):
        seen = j < left
        target, hits = tl.load(targets + row + j, mask=seen, other=0), tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(K):  # a token can be several of the targets
            same = (i < left) & (tl.load(targets + row + i, mask=i < left, other=-1) == target)
            hits += tl.where(same, tl.load(weights + i), 0.0)
        t, e = capped(tl.load(logits + at + target, mask=seen, other=0.0).to(tl.float32), HALF, SHIFT, WIDTH, False)
        row_loss += tl.where(seen, tl.load(weights + j), 0.0) * (lse - 0.5 * CAP - 0.5 * CAP * t)
        g = 0.25 * scale * (mass / sums * e - hits) * (1.0 - t * t)
        tl.store(grad + at + target, g.to(grad.dtype.element_ty), mask=seen)
    tl.store(loss + row, row_loss, mask=inside)


LOSS_BLOCK, LOSS_ROWS = 4096, 64  # of a sweep on H200, with 16 warps


@op(softcapped_mtp_loss_reference)
def softcapped_mtp_loss(logits: Tensor, targets: Tensor, weights: Tensor, grad_dtype: torch.dtype,
                        grad_scale: float) -> tuple[Tensor, Tensor]:
    (T, V), K, half = logits.shape, len(weights), 0.5 * CAP * math.log2(math.e)
    loss, grad = logits.new_empty(T, dtype=torch.float32), logits.new_empty(T, V, dtype=grad_dtype)
    fast = grad_dtype.itemsize == 1 and logits.is_cuda  # e5m2 has two bits of mantissa: the errors are lost in it
    pack, total, scale = logits.dtype == torch.bfloat16, torch.empty_like(loss), CAP / CAP_WIDTH / grad_scale
    assert grad_dtype == torch.float32 if not pack else V % 2 == 0 and grad_dtype.itemsize < 4  # kept as bf16 pairs
    assert targets.numel() == T and targets.is_contiguous()
    programs, S = min(T, multiprocessors(logits.device)), targets.size(1)
    mtp_loss_kernel[(programs,)](
        logits.view(torch.int32) if pack else logits, weights, total, grad, T, S, V, scale, half, CAP_SHIFT, CAP_WIDTH,
        K, fast, pack, programs, LOSS_BLOCK, LOSS_BLOCK // 2 if pack else LOSS_BLOCK, num_warps=16)
    target_kernel[(triton.cdiv(T, LOSS_ROWS),)](logits, targets, weights, total, loss, grad, T, S, V, scale, CAP,
                                                half, CAP_SHIFT, CAP_WIDTH, K, LOSS_ROWS, num_warps=2)
    return loss, grad

# --- Transposes

@jit
def transpose_kernel(src, dst, m, n, BLOCK: tl.constexpr):
    tiles_m = tl.cdiv(m, BLOCK)
    rows = (tl.program_id(0) % tiles_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (tl.program_id(0) // tiles_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    x = tl.load(src + rows[:, None] * n + columns[None, :], mask=inside)
    tl.store(dst + columns[:, None] * m + rows[None, :], tl.trans(x), mask=tl.trans(inside))


@op(lambda src: src.mT.contiguous())
def transposed(src: Tensor) -> Tensor:
    """src^T for FP8 src [m, n], contiguous [n, m]."""
    (m, n), block = src.shape, 128  # of a sweep on H200, with 8 warps
    dst = src.new_empty(n, m)
    numbers = src.view(torch.int8), dst.view(torch.int8)  # Triton need not know the type
    transpose_kernel[(triton.cdiv(m, block) * triton.cdiv(n, block),)](*numbers, m, n, block, num_warps=8)
    return dst


# --- Head: product, loss and gradient

def fp8_product(a: Tensor, b: Tensor, scale: Tensor, out: torch.dtype) -> Tensor:
    """scale * (a @ b) for FP8 a [m, k] row-major and b [k, n] column-major, which is what the tensor cores take."""
    return torch._scaled_mm(a, b, scale_a=scale, scale_b=torch.ones_like(scale), out_dtype=out)


def quick_fp8_product_reference(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """fp8_product to bf16, accumulated in the tensor cores' own, shorter sums."""
    return torch._scaled_mm(a, b, scale_a=scale, scale_b=torch.ones_like(scale), out_dtype=torch.bfloat16,
                            use_fast_accum=True)


@op(quick_fp8_product_reference, cpu=False)
def quick_fp8_product(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """The result is stored while the next tile is computed: logits in 3.29 ms, where cuBLAS takes 3.66 (H200)."""
    y = a.new_empty(a.size(0), b.size(1), dtype=torch.bfloat16)
    quack_products()["scaled"](a, b, y, epi_args={"scale": scale})
    return y

class HeadLoss(torch.autograd.Function):
    """sum over positions of softcapped_mtp_loss(x w): head product, loss and gradient without keeping the logits.

    x [T, D], w [D, V], targets [n, S], weights [k] -> 0-dim fp32. With fp8, the products run as e4m3 x e4m3 forward and
    e4m3 x e5m2 backward with fixed scales. grad_unit is the size of the gradients' scale: 1/A, as in the weights.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, targets: Tensor, weights: Tensor, fp8: bool, grad_unit: float, fast: bool):
        loss_of = softcapped_mtp_loss if fast else softcapped_mtp_loss_reference
        if fp8:
            x8 = (x / X_SCALE).to(torch.float8_e4m3fn)
            w8 = (w.float() / W_SCALE).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            scale = x.new_full((), X_SCALE * W_SCALE, dtype=torch.float32)
            multiply = quick_fp8_product if fast else quick_fp8_product_reference
            logits = multiply(x8, w8.T.contiguous().T, scale)  # [T, V]
            grad_scale = GRAD_SCALE * grad_unit
            loss, grad = loss_of(logits, targets, weights, torch.float8_e5m2, grad_scale)
            ctx.save_for_backward(x8, w8, grad)
            ctx.grad_scale = grad_scale
        else:
            loss, grad = loss_of(x @ w, targets, weights, x.dtype, 1.0)
            ctx.save_for_backward(x, w, grad)
        ctx.fp8, ctx.fast, ctx.dtypes = fp8, fast, (x.dtype, w.dtype)
        return loss.sum()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        x, w, grad = ctx.saved_tensors
        if ctx.fp8:
            s = grad_loss.float() * ctx.grad_scale
            dx = fp8_product(grad, w.T, s * W_SCALE, ctx.dtypes[0])
            x, turned = (transposed(y) if ctx.fast else y.T.contiguous() for y in (x, grad))  # [D, T], [V, T]
            dw = fp8_product(x, turned.T, s * X_SCALE, ctx.dtypes[1])
        else:
            dx, dw = grad_loss * (grad @ w.T), grad_loss * (x.T @ grad)
        return dx.to(ctx.dtypes[0]), dw.to(ctx.dtypes[1]), None, None, None, None, None


# --- Gradients of embedding tables

def scatter_add_rows_reference(rows: Tensor, ids: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    """out[ids[i]] += rows[i] for rows [T, D], ids [T] int32, out [table rows, D] fp32, in place.

    order [T] int32, a permutation that makes equal ids neighbours, changes the speed only.
    """
    out.index_add_(0, ids, rows.to(out.dtype))


@jit
def scatter_add_kernel(rows, ids, order, out, T, D, ORDERED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: COUNT rows, all in flight at once. Neighbours that go to one row of the table go there as a sum."""
    columns, first = tl.arange(0, BLOCK), tl.program_id(0) * COUNT
    mask, ats, values = columns < D, (), ()
    for i in tl.static_range(COUNT):
        row, inside = first + i, first + i < T
        row = tl.load(order + row, mask=inside, other=0).to(tl.int64) if ORDERED else row.to(tl.int64)
        ats += (tl.load(ids + row, mask=inside, other=0).to(tl.int64),)
        values += (tl.load(rows + row * D + columns, mask=mask & inside, other=0.0),)
    sums = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(COUNT):
        sums += values[i].to(tl.float32)
        last = True if i == COUNT - 1 else ats[i] != ats[i + 1]
        tl.atomic_add(out + ats[i] * D + columns, sums, mask=mask & last, sem="relaxed")
        sums = tl.where(last, 0.0, sums)


def scatter_add_rows(rows: Tensor, ids: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    assert rows.is_contiguous() and out.is_contiguous() and out.dtype == torch.float32
    T, D = rows.shape
    scatter_add_kernel[(triton.cdiv(T, SCATTER_ROWS),)](rows, ids, order, out, T, D, order is not None, SCATTER_ROWS,
                                                        triton.next_power_of_2(D), num_warps=4)

SCATTER_ROWS = 16  # of one program


# ==== 9. Attention: attention(q, k, v, cu_seqlens, max_len, window, scale, gate) with interchangeable backends ========

REFERENCE_BLOCK = 256  # queries at a time, so that the mask stays small
GATE_MIN = 1e-30  # what a gate counts as at least where its output is divided by it again


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """y [T, h, d], each head times gate [T, h] if given."""
    return y if gate is None else (gate[..., None] * y).to(y.dtype)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int, scale: float,
                        gate: Tensor | None = None) -> Tensor:
    """Causal attention inside documents with a left window, in plain PyTorch; runs on any device.

    q, k, v [T, h, d]; cu_seqlens int32, document ends from 0 to T, padded with T. A query sees itself and the `window`
    tokens before it in its document. Returns [T, h, d], times gate [T, h] if given. max_len, the longest document, is
    for other backends.
    """
    T = q.size(0)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, h, T, d]
    position = torch.arange(T, device=q.device)
    document = torch.searchsorted(cu_seqlens, position.to(cu_seqlens.dtype), right=True)
    out = []
    for lo in range(0, T, REFERENCE_BLOCK):
        query = slice(lo, min(lo + REFERENCE_BLOCK, T))
        key = slice(max(lo - window, 0), query.stop)
        back = position[query, None] - position[None, key]
        seen = (back >= 0) & (back <= window) & (document[query, None] == document[None, key])
        out.append(F.scaled_dot_product_attention(q[:, :, query], k[:, :, key], v[:, :, key], seen, scale=scale))
    return gated(torch.cat(out, dim=2)[0].transpose(0, 1), gate)


def attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int, scale: float,
                    gate: Tensor | None = None) -> Tensor:
    """attention_reference by the varlen kernels that torch ships (FlashAttention-2; GPU, bf16)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, scale=scale, window_size=(window, 0))
    return gated(out, gate)


@cache
def gated_flash4() -> tuple[type, dict]:
    """FlashAttention-4's forward kernel for Hopper, which multiplies each head by its gate before it stores it: a pass
    less. The gates come in the memory where it then puts the log-sum-exp, so that it needs no further argument. And a
    place for its compiled forms, apart from the package's own."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
    from quack.layout_utils import reshape_acc_to_mn

    class Gated(FlashAttentionForwardSm90):
        @cute.jit
        def epilogue(self, acc_O, lse, mO, mLSE, sO, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma, tidx, m_block,
                     head_idx, batch_idx):
            # as the package's epilogue finds the rows whose log-sum-exp it stores
            document = seqlen.offset_batch_Q(mLSE, batch_idx, dim=2)[None, head_idx]
            tile = cute.local_tile(document, (self.tile_m,), (m_block,))
            wide = cute.append(tile.layout, cute.make_layout((self.tile_hdimv,), stride=(0,)))
            own = tiled_mma.get_slice(tidx)
            gates = reshape_acc_to_mn(own.partition_C(cute.make_tensor(tile.iterator, wide)))
            places = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
            places, y = reshape_acc_to_mn(own.partition_C(places)), reshape_acc_to_mn(acc_O)
            for m in cutlass.range(cute.size(y, mode=[0]), unroll_full=True):
                if places[m, 0][0] < seqlen.seqlen_q - m_block * self.tile_m:
                    y[m, None].store(y[m, None].load() * gates[m, 0])
            cute.arch.sync_warp()  # four threads share a row, and one of them writes its log-sum-exp now
            FlashAttentionForwardSm90.epilogue(
                self, acc_O, lse, mO, mLSE, sO, seqlen, gmem_tiled_copy_O, tma_atom_O, tiled_mma, tidx, m_block,
                head_idx, batch_idx)

    return Gated, {}


@op(shapes=lambda q, k, v, *_: (torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)))
def flash4(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu_seqlens: Tensor, max_len: int, window: int,
           scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, h, d], times gate [T, h], and log-sum-exp [h, T] fp32 of FlashAttention-4 (package flash-attn-4)."""
    from flash_attn.cute import interface

    kernel, kept = gated_flash4()
    lse = gate.mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    with patch.object(interface, "FlashAttentionForwardSm90", kernel), patch.object(
            interface._flash_attn_fwd, "compile_cache", kept):
        out, lse, *_ = interface._flash_attn_fwd(
            q, k, v, lse=lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len,
            max_seqlen_k=max_len, softmax_scale=scale, causal=True, window_size_left=window, window_size_right=0,
            return_lse=True)
    return out, lse


def flash4_preprocess_reference(out: Tensor, dout: Tensor, lse: Tensor, gate: Tensor, cu_seqlens: Tensor, block: int,
                                sums: Tensor, lse2: Tensor, zero: Tensor) -> Tensor:
    """Sums [T, h] fp32 over each head of dout times the output before the gate, from out, dout [T, h, d], gate [T, h]:
    the first part of flash4's backward.

    It also writes for padded rows, where document i begins at block floor(cu_seqlens[i] / block) + i: the sums
    [h, rows], lse2 = log2(e) (lse - log(gate)) [h, rows] from lse [h, T], and zeros into `zero` [h, rows d], where the
    package then sums the gradient of q. Where a document's last block goes on after its end, sums are 0 and lse2
    infinite.
    """
    dots = (out.float() * dout.float()).sum(-1) / gate.float().clamp_min(GATE_MIN)
    lse = lse - gate.float().mT.log()
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        at = (start // block + i) * block
        used = at + round_up(end - start, block)
        zero[:, at * out.size(2) : used * out.size(2)] = 0
        sums[:, at:used], lse2[:, at:used] = 0, math.inf
        sums[:, at : at + end - start] = dots[start:end].mT
        lse2[:, at : at + end - start] = math.log2(math.e) * lse[:, start:end]
    return dots


@jit
def flash4_preprocess_kernel(out, dout, lse, gate, cu_seqlens, sums, lse2, zero, dots, T, room, LOG2_E: tl.constexpr,
                             MIN: tl.constexpr, DOCUMENTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                             BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: a block of one head."""
    block, head, columns, documents = tl.program_id(0), tl.program_id(1), tl.arange(0, D), tl.arange(0, COLUMNS)
    # each document's first block: they rise, so the last one up to this block is this block's document
    begins = tl.load(cu_seqlens + documents, mask=documents < DOCUMENTS, other=0) // BLOCK + documents
    document = tl.sum(((documents < DOCUMENTS) & (begins <= block)).to(tl.int32), 0) - 1
    start, end = tl.load(cu_seqlens + document), tl.load(cu_seqlens + document + 1)
    first = start + (block - start // BLOCK - document) * BLOCK
    if first < end:
        rows, to = first + tl.arange(0, BLOCK), head.to(tl.int64) * room + block * BLOCK + tl.arange(0, BLOCK)
        inside, at = rows < end, rows.to(tl.int64)[:, None] * (H * D) + head * D + columns[None, :]
        x = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
        g = tl.load(gate + rows * H + head, mask=inside, other=1.0).to(tl.float32)
        dot = tl.sum(x * tl.load(dout + at, mask=inside[:, None], other=0.0).to(tl.float32), 1) / tl.maximum(g, MIN)
        value = tl.load(lse + head * T + rows, mask=inside, other=float("inf")) - tl.log(g)
        tl.store(dots + rows * H + head, dot, mask=inside)
        tl.store(sums + to, dot)
        tl.store(lse2 + to, LOG2_E * value)
        tl.store(zero + to[:, None] * D + columns[None, :], tl.zeros([BLOCK, D], tl.float32))


def flash4_preprocess(out: Tensor, dout: Tensor, lse: Tensor, gate: Tensor, cu_seqlens: Tensor, block: int,
                      sums: Tensor, lse2: Tensor, zero: Tensor) -> Tensor:
    (T, h, d), room, documents = out.shape, sums.size(1), len(cu_seqlens) - 1
    assert all(x.is_contiguous() for x in (out, dout, lse, cu_seqlens)) and zero.size(1) == room * d
    dots = lse.new_empty(T, h)
    flash4_preprocess_kernel[(room // block, h)](
        out, dout, lse, gate.contiguous(), cu_seqlens, sums, lse2, zero, dots, T, room, math.log2(math.e), GATE_MIN,
        documents, h, d, block, triton.next_power_of_2(documents))
    return dots


@op(shapes=lambda q, k, v, *_: (
    torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(q.shape[:2], dtype=torch.float32)))
def flash4_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, gate: Tensor,
                    cu_seqlens: Tensor, max_len: int, window: int,
                    scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of flash4's q, k, v and gate (fp32) from its results and the gradient dout of out.

    flash4_preprocess takes the place of the package's first kernel, which would not hand out the sums.
    """
    from flash_attn.cute import interface

    dots = []

    def preprocess(out, dout, sums, lse, lse2, zero, cu_seqlens, _used, _dlse, _dtype, _d, _d_v, block, **_):
        dots.append(flash4_preprocess(out, dout, lse, gate, cu_seqlens, block, sums, lse2, zero))

    with patch.object(interface, "_bwd_preprocess", preprocess):
        dq, dk, dv, *_ = interface._flash_attn_bwd(
            q, k, v, out, dout.contiguous(), lse, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_len, max_seqlen_k=max_len, softmax_scale=scale, causal=True, window_size_left=window,
            window_size_right=0)
    return dq, dk, dv, *dots


class Flash4(torch.autograd.Function):
    """attention_flash4. The gradients of q, k and v are linear in the softmax's weights exp(score - lse), so taking
    log(gate) from lse multiplies them by the gate, without a pass over dy. The gate's own is what backward begins with:
    the sums of the output before the gate times dy."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu_seqlens: Tensor, *options) -> Tensor:
        out, lse = flash4(q, k, v, gate, cu_seqlens, *options)
        ctx.save_for_backward(q, k, v, gate, cu_seqlens, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v, gate, cu_seqlens, out, lse = ctx.saved_tensors
        *grads, dgate = flash4_backward(q, k, v, out, dy, lse, gate, cu_seqlens, *ctx.options)
        return *grads, dgate.to(gate.dtype), None, None, None, None


def attention_flash4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int, scale: float,
                     gate: Tensor | None = None) -> Tensor:
    """attention_reference by FlashAttention-4."""
    gate = q.new_ones(q.shape[:2]) if gate is None else gate
    return Flash4.apply(q, k, v, gate, cu_seqlens, max_len, window, scale)


def load_flash4() -> Callable:
    gated_flash4()  # fails here if it cannot work
    warnings.filterwarnings("ignore", message="Argument aux_data")  # of the package's compiler, harmless
    return attention_flash4


def attention_flash3(varlen: Callable, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int,
                     scale: float, gate: Tensor | None = None) -> Tensor:
    """attention_reference by FlashAttention-3's function `varlen` (Hopper)."""
    out = varlen(q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, softmax_scale=scale, causal=True,
                 window_size=(window, 0))
    return gated(out[0] if isinstance(out, tuple) else out, gate)  # some versions add the log-sum-exp


def load_flash3() -> Callable:
    """FlashAttention-3 as installed, or the build that the package kernels downloads from the hub."""
    try:
        import flash_attn_interface as flash3
    except ImportError:
        from kernels import get_kernel

        flash3 = get_kernel("kernels-community/flash-attn3")
    return partial(attention_flash3, flash3.flash_attn_varlen_func)


# How to get each; the fastest first: fa4 takes 0.6 of torch's time at 49,152 tokens (H200); fa3 has not been measured
ATTENTION_BACKENDS = {"fa4": load_flash4, "fa3": load_flash3, "torch": lambda: attention_torch,
                      "reference": lambda: attention_reference}


def choose_attention(hp: Hyperparameters, device: torch.device) -> str:
    """The name of the backend to use: the one asked for, or the fastest that works on this device."""
    gpu = device.type == "cuda" and hp.dtype == "bfloat16"
    hopper = gpu and gpu_generation(device) == HOPPER_GPU  # elsewhere fa4's package has other kernels, without gates
    # flash4_preprocess needs Triton and takes these widths only
    fa4 = hopper and triton is not None and hp.head_dim in (32, 64, 128)
    fits = {"fa4": fa4, "fa3": hopper, "torch": gpu, "reference": True}
    for name in ATTENTION_BACKENDS if hp.attention == "auto" else [hp.attention]:
        if fits[name]:
            try:
                ATTENTION_BACKENDS[name]()
                return name
            except Exception as e:  # whatever a package raises that does not fit this machine
                reason = f"{type(e).__name__}: {e}"
        else:
            reason = ("it needs bfloat16 on a GPU, fa4 and fa3 a Hopper GPU, and fa4 Triton and a --head_dim of 32, 64 "
                      "or 128")
    raise UserError(f"--attention={hp.attention} does not work here ({reason}); use --attention=auto")


# --- The two sets of operations

def plain_attention_inputs(h: Stream, w: AttentionWeights, ve: Tensor | None, cos: Tensor, sin: Tensor,
                           layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = F.linear(h.x, w.qkv).view(len(h.x), 3, -1, 4 * cos.size(1))
    first = None if ve is None or layer.paired else ve[:, : GATE_INPUTS // 2]
    gate, value_gate = gates(F.linear, h.x[:, :GATE_INPUTS], first, w)
    return *attention_inputs_reference(qkv, None, ve, value_gate, cos, sin, layer.paired, layer.key_offset), gate


def plain_injections(x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor) -> list[Injection]:
    sums = embedding_sums_reference(x0, bigram, s0, s1)
    return [Injection(y, x0, bigram, a, b) for y, a, b in zip(sums, s0.unbind(), s1.unbind())]


def plain_linear_sum(y: Tensor, o: Tensor, x: Stream, resid: Tensor, inject: Injection) -> Stream:
    return Stream(F.linear(y, o) + (resid[:, None] * x.x).to(x.x.dtype) + inject.total)


def plain_mlp(x: Stream, up: Tensor, down: Tensor, resid: Tensor) -> Stream:
    return Stream(F.relu(F.linear(norm(x.x), up)).square() @ down + (resid[:, None] * x.x).to(x.x.dtype))


PLAIN = Ops(
    stream=Stream,
    normed=lambda x: Stream(norm(x.x)),
    thin_product=F.linear,
    attention_inputs=plain_attention_inputs,
    attention=attention_reference,
    injections=plain_injections,
    linear_sum=plain_linear_sum,
    mlp=plain_mlp,
    head_loss=lambda *inputs: HeadLoss.apply(*inputs, False),
    add_rows=scatter_add_rows_reference,
)


def hopper_attention_inputs(h: Stream, w: AttentionWeights, ve: Tensor | None, cos: Tensor, sin: Tensor,
                            layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = Linear.apply(h.x, w.qkv).view(len(h.x), 3, -1, 4 * cos.size(1))
    first = None if ve is None or layer.paired else ve[:, : GATE_INPUTS // 2]
    gate, value_gate = gates(thin_product, h.rstd[:, None] * h.x[:, :GATE_INPUTS], first, w)
    inputs = AttentionInputs.apply(qkv, h.rstd, ve, value_gate, cos, sin, layer.paired, layer.key_offset)
    return *inputs, gate


def hopper_injections(x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor) -> list[Injection]:
    sums, parts = EmbeddingSums.apply(x0, bigram, s0, s1), (s0.detach().unbind(), s1.detach().unbind())
    return [Injection(y, x0.detach(), bigram.detach(), a, b) for y, a, b in zip(sums, *parts)]


HOPPER = Ops(
    stream=lambda x: Stream(x, inverse_rms(x.detach().float().square(), x.size(1))),
    normed=lambda x: Stream(FoldedNorm.apply(*x), x.rstd),
    thin_product=thin_product,
    attention_inputs=hopper_attention_inputs,
    attention=attention_reference,
    injections=hopper_injections,
    linear_sum=lambda y, o, x, resid, inject: Stream(*LinearSum.apply(y, o, x.x, resid, *inject)),
    mlp=lambda x, up, down, resid: Stream(*ReluSquareMLP.apply(*x, up, down, resid)),
    head_loss=lambda *inputs: HeadLoss.apply(*inputs, True),
    add_rows=scatter_add_rows,
)


# ==== 10. Keeping a run: errors, command line, ranks, log, watch, clock, checkpoints ==================================

def check_tables(parameters: Iterable[str]) -> None:
    """PARAMS names each parameter of the model exactly once, each has its own turn, and layers read earlier ones."""
    names, turns = [p.name for p in PARAMS], [p.turn for p in PARAMS]
    assert sorted(names) == sorted(parameters), "PARAMS does not match the model"
    assert sorted(turns) == list(range(len(PARAMS))), "PARAMS: every row needs its own turn"
    assert all((layer.window is None) == (layer.skip_from is not None) for layer in LAYERS)
    assert all(layer.window in ("short", "long", None) for layer in LAYERS), "LAYERS: windows are short, long or None"
    sources = ((i, source) for i, layer in enumerate(LAYERS) for source in (layer.reads, layer.skip_from))
    assert all(source is None or 0 <= source < i for i, source in sources), "LAYERS: a layer reads only earlier ones"


class UserError(Exception):
    """A bad input, told in one line that names the cause and the remedy."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python train_gpt.py --help lists every key")


def boolean(text: str) -> bool:
    """For argparse: true, false, 1 or 0; raises ValueError."""
    try:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_args(argv: list[str]) -> tuple[Hyperparameters, argparse.Namespace]:
    """Turn --key=value arguments into checked hyperparameters; raises UserError."""
    parser = Parser(prog="train_gpt.py", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="record80", choices=PRESETS, help="start from these values")
    parser.add_argument("--plan", action="store_true", help="print the schedule as CSV and exit")
    parser.add_argument("--check", action="store_true", help="check the arguments and the data, and exit")
    for f in fields(Hyperparameters):
        kind = type(f.default)
        parser.add_argument(f"--{f.name}", type=boolean if kind is bool else kind, default=argparse.SUPPRESS,
                            metavar=kind.__name__, help=f"{f.default!r} in record80")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        keys = ["--preset", "--plan", "--check", *(f"--{f.name}" for f in fields(Hyperparameters))]
        close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; python train_gpt.py --help lists every key"
        raise UserError(f"unknown key {key}{hint}")
    given = {f.name: getattr(args, f.name) for f in fields(Hyperparameters) if hasattr(args, f.name)}
    hp = replace(Hyperparameters(), **PRESETS[args.preset] | given)
    check_hyperparameters(hp)
    return hp, args


def check_hyperparameters(hp: Hyperparameters) -> None:
    """Raise UserError for values with which no run can work."""

    def require(ok: bool, text: str) -> None:
        if not ok:
            raise UserError(text)

    world = int(os.environ.get("WORLD_SIZE", 1))
    require(world > 0 and SEGMENTS % world == 0, f"{world} ranks cannot share {SEGMENTS} segments: use 1, 2, 4 or 8")
    positive = ["num_scheduled_iterations", "batch_unit", "block", "val_tokens", "val_chunk", "model_dim", "num_heads",
                "head_dim", "bigram_ratio", "vocab_size", "muon_momentum_warmup", "muon_momentum_cooldown",
                "micro_tokens", "final_val_window", "rope_base", "adam_eps"]
    for key, value in asdict(hp).items():
        require(not isinstance(value, float) or math.isfinite(value), f"--{key}={value} must be a finite number")
    for key in positive:
        require(getattr(hp, key) > 0, f"--{key}={getattr(hp, key)} must be positive")
    for key in ("num_extension_iterations", "val_every", "save_every"):
        require(getattr(hp, key) >= 0, f"--{key}={getattr(hp, key)} must not be negative")
    require(-2**63 <= hp.seed < 2**64, f"--seed={hp.seed} must have at most 64 bits")
    require(hp.num_scheduled_iterations >= 3, "--num_scheduled_iterations must be at least 3, one for each stage")
    require(0 <= hp.cooldown_start < 1, f"--cooldown_start={hp.cooldown_start} must be in [0, 1)")
    choices = {"dtype": ("bfloat16", "float32"), "device": ("auto", "cuda", "cpu"),
               "attention": ("auto", *ATTENTION_BACKENDS), "kernels": ("auto", *KERNELS)}
    for key, allowed in choices.items():
        require(getattr(hp, key) in allowed, f"--{key}={getattr(hp, key)}: use {', '.join(allowed)}")
    require(hp.batch_unit % SEGMENTS == 0 and hp.batch_unit // SEGMENTS >= MTP_MAX,
            f"--batch_unit={hp.batch_unit} must be a multiple of {SEGMENTS}, and at least {MTP_MAX * SEGMENTS}")
    require(hp.model_dim == hp.num_heads * hp.head_dim, "--model_dim must equal num_heads * head_dim")
    require(hp.num_heads % 2 == 0 and hp.head_dim % 8 == 0, "--num_heads must be even, --head_dim a multiple of 8")
    require(hp.model_dim % SEGMENTS == 0, f"--model_dim must be a multiple of {SEGMENTS}, so that ranks can share it")
    require(hp.vocab_size <= 2**16, f"--vocab_size={hp.vocab_size}: shards hold 16-bit tokens")
    require(hp.val_tokens % (hp.val_chunk * world) == 0,
            f"--val_tokens={hp.val_tokens} must be a multiple of --val_chunk={hp.val_chunk} x {world} ranks")


class Ranks(NamedTuple):
    """This process among all: its number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device


def setup_ranks(hp: Hyperparameters) -> Ranks:
    """Join the process group that torchrun announces in the environment, or make a group of one."""
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = hp.device == "cuda" or (hp.device == "auto" and torch.cuda.is_available())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        raise UserError(f"{here} processes need a GPU each, but {torch.cuda.device_count()} are visible: start fewer "
                        "processes, or use --preset=demo to train on the CPU")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        reuse_cpu_memory()
    # gloo carries Python objects and errors, NCCL the tensors of a GPU run
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=device if cuda else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world, device)


def reuse_cpu_memory() -> None:
    """Let glibc keep freed memory: handing big blocks back and faulting them in anew made the demo 1.9 times slower."""
    libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_every_rank(f: Callable) -> object:
    """f() on every rank; if it raises a UserError on any, all ranks raise the same."""
    result = error = None
    try:
        result = f()
    except UserError as e:
        error = str(e)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, error in enumerate(errors):
        if error:
            raise UserError(error if rank == 0 else f"{error} (on rank {rank})")
    return result


class Log:
    """logs/<run id>.txt and the terminal, on rank 0; on other ranks nothing happens.

    The file begins with the source of this script, so that a log says by itself what was run; --resume appends to it.
    If it cannot be written at first, that is an error; later, training goes on with one warning, or without the
    terminal.
    """

    def __init__(self, hp: Hyperparameters, ranks: Ranks):
        self.file = self.bar = self.path = self.lost = None
        if ranks.rank == 0:
            self.path = path = Path(hp.log_dir, (hp.run_id or time.strftime("%Y%m%d-%H%M%S")) + ".txt")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(path, "a" if hp.resume else "x", buffering=1)
                print(Path(__file__).read_text() + "=" * 100, file=self.file)
            except FileExistsError:
                raise UserError(f"{path} is another run's log; choose another --run_id or --log_dir") from None
            except OSError as e:
                raise UserError(f"cannot write the log {path}: {e.strerror}; free some space or choose another "
                                "--log_dir") from None
            self.bar = tqdm(total=hp.num_steps, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, text: str, show: bool = True) -> None:
        if self.file:
            try:
                if os.fstat(self.file.fileno()).st_nlink == 0:
                    raise FileNotFoundError(0, "it was deleted")
                print(text, file=self.file)
            except OSError as e:
                with contextlib.suppress(OSError):  # it tries once more to write
                    self.file.close()
                self.file, self.lost = None, f"warning: the log {self.path} is incomplete ({e.strerror})"
                self.bar.write(f"{self.lost}; training goes on, copy what you need from the terminal", file=sys.stderr)
        if self.bar and show:
            with contextlib.suppress(OSError):
                self.bar.write(text)

    def step(self, line: str, done: int, **postfix: str) -> None:
        """A step's line: to the file, and to the terminal as a moving bar, or as a plain line in a pipe."""
        if self.bar:
            self(line, show=self.bar.disable)
            with contextlib.suppress(OSError):
                self.bar.set_postfix(postfix, refresh=False)
                self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.close()
        if self.file:
            self.file.close()
        if self.lost:
            print(self.lost, file=sys.stderr)


LOOK_EVERY = 1.0  # seconds; the limits below count looks, so that a process that was asleep blames no other
SILENT = 15  # looks without a sign of life: found before torchrun kills all, 30 s after a rank died
SILENT_COMPILING = 45  # the same before the first step, as a compiler may keep other threads from running
STALLED = 45  # looks without progress while the clock runs


class Watch:
    """The context of a run: on every rank a thread ends the process soon after a rank died, hangs or raised, and agrees
    with the others on a step before which all stop.

    It publishes its rank's state in torchrun's store and reads the others', without the device: the training clock
    shall not pay. NCCL's own watchdog waits for minutes, and cannot name what hangs.
    """

    def __init__(self, ranks: Ranks, log: Log):
        self.rank, self.world, self.log = ranks.rank, ranks.world, log
        self.clock = self.micro_step = None  # of the training loop
        self.stop_from = self.stop_before = None  # steps
        self.step, self.wish, self.why, self.error = -1, "", "", ""  # wish: why this rank wants all to stop
        self.states, self.beat, self.quiet = [{}] * ranks.world, 0, [0] * ranks.world
        self.stalled = self.failing = 0

    def __enter__(self) -> Watch:
        self.store = dist.HashStore()
        if self.world > 1:  # a connection of its own, as others may keep theirs busy
            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.keys = [f"watch {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {rank}" for rank in range(self.world)]
        self.publish()
        dist.barrier()
        heard = [signal.SIGINT, signal.SIGTERM]
        heard += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)  # which nohup asks for
        self.handlers = {n: signal.signal(n, self.on_signal) for n in heard}
        self.leaving, self.thread = threading.Event(), threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None:
            self.leaving.set()
        elif isinstance(error, UserError):
            self.error = f"error: {error}"
        else:
            trace = "".join(traceback.format_exception(error))
            self.error = f"{trace}error: rank {self.rank}, step {self.step + 1}: {kind.__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the launcher is gone: the thread finds out, too
            self.publish()
        self.thread.join()  # after an error it ends the process; till then no lost connection confuses the others
        dist.barrier()  # nobody leaves while others watch
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, frame) -> None:
        if self.world == 1:  # a second one ends the process at once; several get it twice, once from torchrun
            signal.signal(number, signal.SIG_DFL)
        self.wish = self.wish or signal.Signals(number).name

    def publish(self) -> None:
        self.beat += 1
        frame = sys._current_frames()[threading.main_thread().ident]
        place = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
        timed = bool(self.clock and self.clock.started and not self.micro_step.compiling)
        state = {"beat": self.beat, "step": self.step, "timed": timed, "at": place, "stop": self.stop_from,
                 "why": self.why, "error": self.error, "log": str(self.log.path)}
        self.store.set(self.keys[self.rank], json.dumps(state))

    def work(self) -> None:
        while not self.leaving.wait(LOOK_EVERY):
            try:
                self.publish()
                states = [json.loads(text) for text in self.store.multi_get(self.keys)]
            except RuntimeError:
                self.end(f"error: rank {self.rank} cannot reach the launcher of the run: killed or cut off")
            self.look(states)

    def look(self, states: list[dict]) -> None:
        """Judge the states of all ranks, LOOK_EVERY after the last ones."""
        old, self.states, steps = self.states, states, [s["step"] for s in states]
        self.quiet = [n + 1 if a == b else 0 for n, a, b in zip(self.quiet, old, states)]
        moved = steps != [s.get("step") for s in old] or not all(s["timed"] for s in states)
        self.stalled = 0 if moved or self.world == 1 else self.stalled + 1
        errors, silence = [s["error"] for s in states if s["error"]], max(self.quiet)
        self.failing += bool(errors)
        if silence >= (SILENT if self.step >= 0 or self.wish or errors else SILENT_COMPILING):
            lost = self.quiet.index(silence)
            self.end(f"error: rank {lost} gave no sign of life for {silence * LOOK_EVERY:.0f} s, last in step "
                     f"{steps[lost] + 1} at {states[lost]['at']}: killed, out of memory, stopped or cut off")
        if errors and (self.world == 1 or self.failing > 2 and silence < 2):  # else it may follow from a rank's death
            self.end(errors[0])
        if self.stalled >= STALLED:
            places = ", ".join(f"rank {rank} in step {s['step'] + 1} at {s['at']}" for rank, s in enumerate(states))
            self.end(f"error: no rank finished a step for {STALLED * LOOK_EVERY:.0f} s, a rank hangs: {places}")
        if self.stop_from is None and (why := self.wish or next((s["why"] for s in states if s["why"]), "")):
            self.why, self.stop_from = why, self.step
        stops = [s["stop"] for s in states]
        if None not in stops:
            self.why = states[0]["why"]
            if min(stops) < 0:
                self.end(f"interrupted by {self.why} before the first step", 128 + signal.Signals[self.why])
            self.stop_before = max(stops) + 2  # a rank may have begun the step after the one that it published

    def stops(self, step: int) -> bool:
        """Whether all ranks stop before this step; to be asked before each."""
        self.step = step
        while (self.wish or self.stop_from is not None) and self.stop_before is None:
            time.sleep(0.01)
        return step == self.stop_before

    def end(self, text: str, status: int = 1) -> None:
        """End this process; the first rank alive writes the reason to stderr and to the end of the log."""
        if self.rank == next((rank for rank, looks in enumerate(self.quiet) if looks < 2), self.rank):
            with contextlib.suppress(OSError):  # no log is no reason to stay
                fd = os.open(self.states[0].get("log", self.log.path), os.O_WRONLY | os.O_APPEND)
                os.write(fd, f"{text}\n".encode())
            with contextlib.suppress(OSError):  # nor is a closed terminal
                print(text, file=sys.stderr)
        else:
            time.sleep(2 * LOOK_EVERY)  # torchrun ends all ranks with the first
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)


def log_environment(log: Log, hp: Hyperparameters, ranks: Ranks, attention: str, kernels: str) -> None:
    """Write versions and GPUs, the configuration, and the chosen backends to the log, each followed by a rule."""
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        smi = "nvidia-smi: not available"
    versions = f"Python {sys.version}\nPyTorch {torch.__version__} CUDA {torch.version.cuda}, {ranks.world} ranks"
    log(f"{versions}\n{smi}", show=False)
    log("=" * 100 + "\n" + "\n".join(f"{f.name} = {getattr(hp, f.name)!r}" for f in fields(hp)), show=False)
    log(f"attention used = {attention}\nkernels used = {kernels}\n{'=' * 100}", show=False)


class Clock:
    """Training time in ms; synchronises the device when it starts and stops, so that only training is counted."""

    def __init__(self, device: torch.device):
        self.device, self.before, self.started = device, 0.0, None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def start(self) -> None:
        self.synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.synchronize()
        self.before, self.started = self.ms(), None

    def ms(self) -> float:
        return self.before + (1000 * (time.perf_counter() - self.started) if self.started else 0.0)


def settings(hp: Hyperparameters) -> dict:
    """What the weights of a run follow from, besides the contents of its shards; and MAY_CHANGE."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(hp).named_parameters()}  # without padding
    return asdict(hp) | {"LAYERS": str(LAYERS), "STAGES": str(STAGES), "PARAMS": str(PARAMS), "shapes": shapes}


def save_checkpoint(log: Log, optimizer: NorMuonAdam, step: int, ms: float) -> Path | None:
    """Write a checkpoint: tensors as one rank has them, but each rank's gradients that wait for Adam; or UserError.

    Returns its path, on rank 0."""
    (rank, R, _), about, tensors = optimizer.ranks, settings(optimizer.hp), {}
    for name, x, kind in optimizer.tensors():
        if kind != "same":
            part = x[None] if kind == "own" else x
            x = part.new_empty(R * len(part), *part.shape[1:])
            dist.all_gather_into_tensor(x.view(torch.uint8), part.view(torch.uint8))  # NCCL knows no int16
        if rank == 0 and (kind != "own" or x.any()):
            tensors[name] = (x if kind == "own" else x[: about["shapes"][name.split(".")[0]][0]]).cpu()

    def write() -> Path:
        path = log.path.with_name(f"{log.path.stem}_step{step}.pt")
        temporary = Path(f"{path}.tmp")
        try:
            torch.save({"settings": about, "step": step, "ms": ms, "tied": optimizer.tied,
                        "adam_steps": optimizer.adam_steps, "tensors": tensors}, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as e:  # the latter by torch's writer
            raise UserError(f"cannot write {path}: {e}; free some space or choose another --log_dir") from None
        finally:
            temporary.unlink(missing_ok=True)
        return path

    return on_every_rank(write if rank == 0 else lambda: None)


def read_checkpoint(path: str, hp: Hyperparameters | None = None) -> dict:
    """What save_checkpoint wrote, on the CPU, with "hp"; UserError unless it is intact and a run of hp can use it."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load ignores checksums
            raise ValueError("wrong checksum")
        saved = torch.load(path, "cpu", weights_only=True, mmap=True)
        old = saved["settings"]
        if not isinstance(saved["step"], int) or any(
                saved["tensors"][name].shape != shape for name, shape in old["shapes"].items()):
            raise ValueError("wrong step or shapes")
        if not hp:
            hp = Hyperparameters(**{f.name: old[f.name] for f in fields(Hyperparameters) if f.name in old})
            check_hyperparameters(hp)
        saved["hp"], current = hp, settings(hp)
    except Exception as e:  # zipfile and torch raise many kinds
        cause = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"{path} is no intact checkpoint of this script ({cause}); choose another") from None
    if other := [f"{key}={old.get(key)}" if hasattr(hp, key) else key for key, value in current.items()
                 if key not in MAY_CHANGE and old.get(key) != value]:
        raise UserError(f"{path} was trained with other values of what follows, use the same: {', '.join(other)}")
    return saved


def load_checkpoint(saved: dict, optimizer: NorMuonAdam, clock: Clock) -> int:
    """Bring optimizer and model from the start to where they were, on any number of ranks; returns the steps done."""
    rank, R, _ = optimizer.ranks
    for name, x, kind in optimizer.tensors():
        if name in saved["tensors"]:  # else a gradient of zeros
            y = saved["tensors"][name]
            if kind == "own":
                y = y[rank] if len(y) == R else y.float().mean(0)
            y = y[rank * len(x) :][: len(x)] if kind == "shard" else y
            x[: len(y)].copy_(y)  # the rest is padding
    clock.before, optimizer.tied, optimizer.adam_steps = (saved[key] for key in ("ms", "tied", "adam_steps"))
    return saved["step"]


class Rewind:
    """A copy, on the device, of all that steps change; made while the clock rests."""

    def __init__(self, optimizer: NorMuonAdam, step: int):
        self.optimizer, self.tensors = optimizer, [x for _, x, _ in optimizer.tensors()]
        self.copies = [torch.empty_like(x) for x in self.tensors]
        self.keep(step)

    def keep(self, step: int) -> None:
        torch._foreach_copy_(self.copies, self.tensors)
        self.step, self.tied, self.adam_steps = step, self.optimizer.tied, self.optimizer.adam_steps

    def restore(self) -> None:
        torch._foreach_copy_(self.tensors, self.copies)
        self.optimizer.tied, self.optimizer.adam_steps = self.tied, self.adam_steps


class FirstBad(TorchDispatchMode):
    """Finds the first operation whose result holds nan or inf; not -inf, of which attention makes masks."""

    def __init__(self):
        super().__init__()
        self.count, self.place = 0, ""  # operations before it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # new memory holds anything, and so does what a collective has not yet filled
        if self.place or func.namespace not in ("aten", "speedrun") or "empty" in str(func):
            return result
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]
        wide = [x.float() if x.itemsize == 1 else x for x in tensors]
        self.count += 1
        if any((x.isnan() | (x == math.inf)).any() for x in wide):
            frames = [f for f, _ in traceback.walk_stack(sys._getframe(1)) if f.f_code.co_filename == __file__]
            layer = [f", layer {f.f_locals['i']}" for f in frames if f.f_code.co_name == "trunk" and "i" in f.f_locals]
            calls = [f"{f.f_code.co_name}:{f.f_lineno}" for f in frames[:3]]
            # on a GPU, autograd has a thread of its own, without these frames
            self.place = f"{func} in {' of '.join(calls) or 'the backward pass'}{''.join(layer)}"
        return result


def find_bad(rewind: Rewind, micro_step: MicroStep, log: Log, end: int, ms: float, why: str) -> None:
    """Repeat the steps from `rewind` to before step `end` up to the first that makes a nan or inf, save the state
    before that and find the operation in a plain run of it. Always raises UserError, on all ranks."""
    optimizer, first = micro_step.optimizer, rewind.step
    hp, ranks, everywhere = optimizer.hp, optimizer.ranks, [None] * optimizer.ranks.world
    log(f"{why}: repeating the steps from {first + 1} on to find its origin")
    rewind.restore()
    loader = TrainLoader(hp, ranks, range(hp.num_steps), first)
    for step in range(first, end):
        batches, touched = next(loader)
        loss = train_step(micro_step, batches, touched, plan(step, hp))
        bad = [row.name for row in PARAMS if not optimizer.params[row.name].isfinite().all()]
        dist.all_gather_object(everywhere, bad + ["the loss"] * (not loss.isfinite()))
        if any(everywhere):
            break
        rewind.keep(step + 1)
    else:
        raise UserError(f"{why}, but repeated from step {first + 1} on all is finite: suspect the hardware")
    loader.close()
    rewind.restore()
    path = save_checkpoint(log, optimizer, step, ms)
    optimizer.normuon_update, optimizer.adam_update = normuon_update, adam_update
    plain = MicroStep(micro_step.model, optimizer, replace(hp, compile=False), ranks)
    with FirstBad() as found:
        train_step(plain, batches, touched, plan(step, hp))
    bad = max(everywhere, key=len)
    dist.all_gather_object(everywhere, (not found.place, found.count, ranks.rank, found.place))
    _, _, rank, place = min(everywhere)
    raise UserError(f"{why}; it began on rank {rank} in step {step + 1} with {place or 'a compiled operation'}, and "
                    f"reached {', '.join(bad)}; --resume={path} repeats this step")


if __name__ == "__main__":
    main()
