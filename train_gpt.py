"""
NanoGPT speedrun: a GPT-2-small-class model to 3.28 FineWeb validation loss, as fast as possible.

This file is the run of record #80 of the public track (84.4 s on 8 H100s, 2026-04-08), on 1, 2, 4 or
8 GPUs with one trajectory. One H100 takes 0.67 of the public script's time, two 0.34 (164M tokens of a
stand-in corpus, 2026-11-26). It has not been run on FineWeb or on more than two GPUs.

    ./run.sh                                  the record run on the GPUs that are there, or the demo
    ./run.sh --preset=frontier                the same with what later records found: faster
    python train_gpt.py --preset=demo         the demo (CPU, bundled text, about two minutes)
    torchrun --nproc_per_node=8 train_gpt.py  the record run by hand
    python train_gpt.py --plan                the schedule as CSV, a line a step
    python train_gpt.py --help                every key; --set TABLE.row.column=value sets a cell

Letters, in shape comments and in PARAMS' shapes:
    S tokens of a segment       T tokens of a micro-batch: segments, one after the other
    D model width               H heads                  d width of a head (D = H*d)
    F width of an MLP           G channels gates see     K matrices of a bank   P MLPs in all
    V vocabulary, padded        B bigram rows            M n-gram rows      E tables of value embeddings
    L layers                    A layers with attention  R ranks (GPUs)     N steps
    C mixers of dense connections: 2 or 0
and in code: x the residual stream, q k v, p a parameter, hp the Recipe of the run.

Map. The algorithm, as a token meets it:
    1 this text    2 configuration: tables, Recipe, plan()    3 what flows
    4 data         5 model    6 optimizer    7 the run: train_step, evaluate, train
The engine room, which decides nothing about the result:
    8 rows that travel between ranks    9 kernels, each under its reference    10 attention
    11 keeping a run: errors, log, checkpoints, main
"""

from __future__ import annotations

import argparse
import ast
import bisect
import contextlib
import ctypes
import difflib
import fnmatch
import glob
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import warnings
import zipfile
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial, reduce
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Literal, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":  # before torch, whose import takes seconds and reads the environment
    signal.signal(signal.SIGINT, lambda *_: (print("interrupted by SIGINT", file=sys.stderr), os._exit(130)))
    # Of OpenMP's threads (libgomp's) one spins 300,000 times for another before it sleeps, though that one may wait for
    # its core: with 3,000 the demo took 0.34 of the time beside some four busy processes, and no more on two idle cores
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import custom_op
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # CPU builds of PyTorch come without Triton; PLAIN serves
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f

# ==== 2. Configuration: every tuned number of the run is in this part ====

SEGMENTS = 8  # a step's tokens come as 8 segments, whatever R is: segment s goes to rank s % R
MTP_MAX = 3  # most tokens ahead that one position predicts
GATE_INPUTS = 12  # G


class Layer(NamedTuple):
    """One layer: attention and what it reads, then the MLP."""

    window: Literal["short", "long"] | None  # attention window; None: no attention
    name: str = ""  # for layers that others name
    narrower: int = 1  # its heads are d over this: they use the first rows of each head's Q, K, V, and of O's columns
    paired: bool = False  # a token enters attention as two, heads 0..H/2-1 and then the rest
    key_offset: bool = False  # half of each key moves one position ahead
    gate: bool = True  # each head's output is gated
    value_table: int | None = None  # which table of value embeddings is mixed into V
    value_gate: bool = True  # it is gated
    value_gate_mixed: bool = False  # on a paired layer, too, half of what the gate sees is the value embedding
    reads: str | None = None  # attention reads the stream after this layer; None: as it is
    skip_from: str | None = None  # at first, add the gated stream after this layer
    fp8_qkv: bool = False  # training multiplies with Q, K and V in FP8
    fp8_mlp: bool = False  # and with the MLP's matrices
    mlps: int = 1  # MLPs, side by side
    dense: str | None = None  # it and the readout mix earlier streams in, as that after this layer (record #81)


LAYERS = (
    Layer("short", paired=True),
    Layer("short", value_table=0),
    Layer("short", value_table=1, paired=True),
    Layer("long", "early", key_offset=True),
    Layer("short"),
    Layer("short", paired=True),
    Layer(None, skip_from="early"),
    Layer("short", "middle"),
    Layer("short", value_table=2, reads="middle"),
    Layer("short", value_table=3, reads="middle", paired=True),
    Layer("long", value_table=4, reads="middle", key_offset=True),
)


class Readout(NamedTuple):
    """From the stream to the capped logits: cap * sigmoid((logit + cap_shift) / cap_width)."""

    minus: str  # backout: the stream after this layer is subtracted again
    cap: float
    cap_shift: float
    cap_width: float


READOUT = Readout(minus="middle", cap=23.0, cap_shift=5.0, cap_width=7.5)


class Stage(NamedTuple):
    """What is scheduled by stage."""

    length: float | None  # fraction of the scheduled steps; None: the extension
    batch: int  # tokens a step, in units of hp.batch_unit
    max_doc: int  # longer documents are cut, in blocks
    short: int  # attention windows, in blocks
    long: int
    lr: float
    mtp_start: tuple[float, ...]  # weights of predicting 1, 2, 3 tokens ahead, linear to
    mtp_end: tuple[float, ...]  # those at the end of the stage
    classes: int = 0  # that a segment's training softmax is over, its targets and others in turn; 0: all
    tied: bool = False  # embed is lm_head, transposed
    fp8: bool = True  # FP8 products of LAYERS; bf16 at the end lets weights fit the precision of validation
    yarn: bool = True  # where the long window grows, rotary embeddings stretch with it
    prefix: tuple[float, float] = (0.0, 0.0)  # weight, from, to, of predicting the token that begins the next (#88)


STAGES = (
    Stage(1 / 3, 1, 7, 1, 3, 1.00, (1.0, 0.5, 0.25), (1.0, 0.5, 0.0), tied=True),
    Stage(1 / 3, 2, 16, 3, 7, 1.52, (1.0, 0.5), (1.0, 0.0), tied=True),
    Stage(1 / 3, 3, 16, 5, 11, 1.73, (1.0,), (1.0,)),
    Stage(None, 3, 16, 6, 13, 1.73, (1.0,), (1.0,)),
)


class Param(NamedTuple):
    """One parameter: what it is, how it is trained, and how ranks share the work."""

    name: str
    shape: str  # in the letters above
    init: str  # initial values, see initial_values
    rule: Literal["normuon", "twin_normuon", "muon", "adam", "row_adam"]  # a key of RULES
    lr: float = 1  # times hp.muon_lr or hp.adam_lr
    wd: float = 0  # times hp.muon_wd or hp.adam_wd
    betas: tuple[float, float] | None = None  # Adam's
    every: int = 1  # updated every so many steps; gradients add up meanwhile
    rarer: float = 1  # from this fraction of the run on, every twice as many, with betas squared and twice the decay
    reduce: Literal["replicate", "shard", "sparse", "rows"] = "replicate"
    # replicate: every rank updates all; shard: each rank owns and updates an equal slice of dim 0; sparse: a shard of
    # whose gradient, from SPARSE_FROM ranks on, only the touched rows travel; rows: a rank has its slice alone, and
    # between two updates a copy of the rows that it reads
    dtype: Literal["model", "float32"] = "model"  # model: hp.dtype
    cautious: bool = True  # decay only where the update and the weight have the same sign
    odd_lr: float = 1  # times lr, for matrices 1, 3, 5 .. of a bank


HEAD = dict(rule="adam", wd=150, betas=(0.5, 0.95), every=2, reduce="shard")
TABLE = dict(rule="adam", lr=75, wd=5, betas=(0.75, 0.95), every=2)
RARELY = dict(lr=70, rarer=0.2814)  # tables that change only every fourth step later on (record #92)
GATE = dict(rule="adam", betas=(0.9, 0.99), every=2)
SCALAR = dict(rule="adam", lr=5, betas=(0.9, 0.99), every=2, dtype="float32")
LAMBDA = dict(rule="adam", betas=(0.9, 0.95), every=2, dtype="float32")
DENSE_WEIGHTS, DENSE_SCALE = 14, 0.1  # of streams by a mixer, of which the readout takes 5; what makes them is larger
# At first they are those of a model without dense connections, but for value gates of 2; in bf16 the large ones stay
DENSE_BIAS = (0, 0, 0, 0, 0, 0, 2, 2, math.sqrt(1.1), 1, 0, 0.05, math.sqrt(1.1), 1), (0, -0.5, *[0] * 12)
PARAMS = (
    Param("qk_bank", "A*H 2*d D", "uniform", "normuon", wd=1, reduce="shard"),  # a layer's Q, then K
    Param("vo_bank", "2*A D D", "uniform", "normuon", wd=1, reduce="shard"),  # a layer's V, then O
    Param("mlp_bank", "2*P F D", "uniform, 0", "normuon", wd=1, reduce="shard", odd_lr=2),  # an MLP's up, then down
    Param("attn_lambdas", "2 L", "0.5, 1", **SCALAR),  # times QKV, times O
    Param("smear_lambda", "1", "0", **SCALAR),
    Param("backout_lambda", "1", "0.5", **SCALAR),
    Param("skip_lambda", "1", "-1.5", **SCALAR),
    Param("smear_gate", "1 G", "0", lr=0.01, **GATE),
    Param("skip_gate", "1 G", "0", lr=0.05, **GATE),
    Param("attn_gate_bank", "A H G", "0", wd=1, **GATE),
    Param("ve_gate_bank", "E H G", "0", wd=1, **GATE),
    Param("dense_in", "C 64 D", "uniform 1", lr=0.25, wd=1, **GATE),
    Param("dense_out", "C 14 64", "0", lr=0.25, wd=1, **GATE),
    Param("dense_bias", "C*14", ",".join(f"{x / DENSE_SCALE:.9g}" for x in sum(DENSE_BIAS, ())), lr=0.25, **GATE),
    Param("lm_head", "D V", "normal 0.005", **HEAD),
    Param("bigram_embed", "B D", "0", reduce="sparse", **TABLE),
    Param("ngram_embed", "M D", "0", "row_adam", wd=5, betas=(0.0, 0.95), every=2, reduce="rows", **RARELY),
    Param("post_lambdas", "L 2", "1", **LAMBDA),  # times the output of attention, of the MLP
    Param("x0_lambdas", "L", "0", **LAMBDA),
    Param("bigram_lambdas", "L", "0.05", **LAMBDA),
    Param("resid_lambdas", "L 2", f"{math.sqrt(1.1)!r}", lr=5, **LAMBDA),  # of attention, of the MLP
    Param("value_embeds", "E*V D", "normal 0.01", reduce="shard", **TABLE),
    Param("embed", "V D", "lm_head", **HEAD),
)
# Of reductions and updates, replicated ones first: banks' compute hides the tables' traffic; the last is not gathered
UPDATE_ORDER = ("value_embeds", "bigram_embed", "lm_head", "embed", "qk_bank", "vo_bank", "mlp_bank", "ngram_embed")
SPARSE_FROM = 8  # ranks; of fewer, each touches more of the table


class Average(NamedTuple):
    """An average of parameters over the last steps (record #92). Rates are for AVERAGE_STEPS, and larger for fewer."""

    params: str  # their names
    start: float  # fraction of the run; at the first tick from there on the average is a copy
    every: int  # steps between ticks, counted back from the parameters' last update
    rate: float  # how much of the weights a tick takes in
    blend: float  # how much of the average the last weights take; 0: none is kept
    last_rate: float = 0  # the last tick's, if it is another
    also: int = 0  # one more tick so many steps before the last step, if not 0
    norm: bool = True  # afterwards the weights' Frobenius norm is as before


AVERAGE_STEPS = 1194
AVERAGES = (  # in the order in which they blend
    Average("lm_head embed", 0.7497, 2, 1 - (1 - 2 / 299) ** 2, 0.65, last_rate=2 / 299),
    Average("vo_bank mlp_bank", 0.7906, 4, 4 / 53, 1.0),
    Average("value_embeds", 0.7906, 4, 4 / 53, 1.0, norm=False),
    Average("qk_bank", 0.7504, 4, 2 / 75, 0.55, also=1),
    Average("vo_bank mlp_bank", 0.7504, 4, 2 / 75, 0.3493, also=1),
)
# Of twin_normuon (record #92): the slow momentum's decay; when it begins to count; the fast one's decay and share then
SLOW_MOMENTUM, TWIN_START, FAST_MOMENTUM, FAST_SHARE = 0.98, 514 / AVERAGE_STEPS, 0.85, 0.4385


def key(default: object, text: str, least: float | None = None, above: float | None = None, choices: tuple = (),
        free: bool = False) -> object:
    """A key of the command line. A resumed run may change free ones: only rounding depends on them."""
    return field(default=default, metadata=dict(text=text, least=least, above=above, choices=choices, free=free))


@dataclass(frozen=True)
class Recipe:
    """A whole run: every --key=value, and the tables. The defaults are record #80, all of them tuned."""

    # data
    train_files: str = key("data/fineweb10B/fineweb_train_*.bin", "train shards", free=True)
    val_files: str = key("data/fineweb10B/fineweb_val_*.bin", "validation shards; the first one counts", free=True)
    val_tokens: int = key(10_485_760, "targets that are scored", above=0, free=True)
    val_chunk: int = key(262_144, "tokens that one rank scores in one pack", above=0, free=True)
    # schedule
    num_scheduled_iterations: int = key(1440, "steps before the extension", above=0)
    num_extension_iterations: int = key(40, "steps at the final rate with longer windows", least=0)
    val_every: int = key(250, "steps between validations; 0: only at the end", least=0, free=True)
    batch_unit: int = key(131_072, "tokens; STAGES counts a step's in this unit", above=0)
    block: int = key(128, "tokens; STAGES counts windows and document cuts in this unit", above=0)
    final_val_window: int = key(20, "long window of the last validation, in blocks", above=0, free=True)
    cooldown_start: float = key(0.4, "fraction of the scheduled steps, from which rates fall", least=0)
    cooldown_floor: float = key(0.15, "what they fall to, as a factor", least=0)
    lr_ramp: int = key(0, "steps in which rates go from a stage's factor to the next one's", least=0)
    # model
    vocab_size: int = key(50_257, "of GPT-2; the last token begins every document", above=1)
    model_dim: int = key(768, "width of the stream: num_heads * head_dim", above=0)
    num_heads: int = key(6, "heads of attention, an even number", above=0)
    head_dim: int = key(128, "width of a head, a multiple of 8", above=0)
    mlp_dim: int = key(0, "width of the MLP; 0: four times model_dim", least=0)
    bigram_ratio: int = key(5, "rows of the bigram table for each of V", above=0)
    ngram_rows: int = key(0, "rows of a table of bigrams and trigrams in its place; 0: the bigram table", least=0)
    attn_scale: float = key(0.1, "softmax scale before YaRN", above=0)
    rope_base: float = key(1024.0, "base of the rotary frequencies", above=0)
    # optimizers
    muon_lr: float = key(0.023, "learning rate of NorMuon", least=0)
    muon_wd: float = key(1.2, "its weight decay, times the rate", least=0)
    muon_beta2: float = key(0.9, "its second moment's decay", least=0)
    muon_momentum: float = key(0.95, "its momentum", least=0)
    muon_momentum_low: float = key(0.85, "the same at the first and the last step", least=0)
    muon_momentum_warmup: int = key(300, "steps in which it rises", above=0)
    muon_momentum_cooldown: int = key(50, "steps in which it falls", above=0)
    adam_lr: float = key(0.008, "learning rate of Adam", least=0)
    adam_wd: float = key(0.005, "its weight decay, times the rate squared", least=0)
    adam_eps: float = key(1e-10, "its epsilon", above=0)
    tail_average: float = key(0.0, "the last weights are averaged by AVERAGES, times this; 0: they are not", least=0)
    # how it runs
    seed: int = key(0, "draws the initial weights")
    dtype: str = key("bfloat16", "of weights and activations", choices=("bfloat16", "float32"))
    fp8_head: bool = key(True, "the training head's products in FP8")
    compile: bool = key(True, "torch.compile; plain eager PyTorch if false", free=True)
    graphs: bool = key(True, "replay micro-steps as CUDA graphs, on a GPU if compiled", free=True)
    micro_tokens: int | Literal["auto"] = key("auto", "join a rank's segments up to this; auto: what the GPU's memory "
                                              "holds, if need be without graphs and with recompute", above=0, free=True)
    recompute: bool = key(False, "compute MLPs again backward instead of keeping them; plain kernels only", free=True)
    ngram_slots: int = key(1_966_080, "n-gram rows that a rank may read between two updates", above=0, free=True)
    attention: str = key("auto", "backend", choices=("auto", "fa4", "torch", "reference"), free=True)
    kernels: str = key("auto", "operations", choices=("auto", "hopper", "plain"), free=True)
    device: str = key("auto", "where to run", choices=("auto", "cuda", "cpu"), free=True)
    log_dir: str = key("logs", "folder of the log and of checkpoints", free=True)
    run_id: str = key("", "name of the log file; empty: date and time", free=True)
    save_every: int = key(0, "steps between checkpoints; 0: none", least=0, free=True)
    save_final: bool = key(False, "a checkpoint after the last step", free=True)
    resume: str = key("", "go on from this checkpoint; empty: begin", free=True)
    # tables: --set LAYERS.3.key_offset=false
    layers: tuple[Layer, ...] = LAYERS
    readout: Readout = READOUT
    stages: tuple[Stage, ...] = STAGES
    params: tuple[Param, ...] = PARAMS
    averages: tuple[Average, ...] = AVERAGES

    @property
    def num_steps(self) -> int:
        return self.num_scheduled_iterations + self.num_extension_iterations

    @property
    def bos(self) -> int:
        return self.vocab_size - 1

    @property
    def attn_layers(self) -> list[int]:
        """The layers with attention, in the order of the banks."""
        return [i for i, layer in enumerate(self.layers) if layer.window]

    @property
    def head_dims(self) -> list[int]:
        """The widths of these layers' heads."""
        return [self.head_dim // self.layers[i].narrower for i in self.attn_layers]

    @property
    def rows(self) -> dict[str, Param]:
        return {row.name: row for row in self.params}

    @property
    def sizes(self) -> dict[str, int]:
        """What the letters in PARAMS' shapes stand for."""
        V = round_up(self.vocab_size, 128)
        E = sum(layer.value_table is not None for layer in self.layers)
        return dict(
            L=len(self.layers), A=len(self.attn_layers), E=E, V=V, B=0 if self.ngram_rows else self.bigram_ratio * V,
            M=self.ngram_rows, D=self.model_dim, H=self.num_heads, d=self.head_dim, G=GATE_INPUTS,
            F=self.mlp_dim or 4 * self.model_dim, P=sum(layer.mlps for layer in self.layers),
            C=2 * any(layer.dense for layer in self.layers))


def without_fp8(recipe: Recipe) -> Recipe:
    layers = tuple(layer._replace(fp8_qkv=False, fp8_mlp=False) for layer in recipe.layers)
    return replace(recipe, fp8_head=False, layers=layers)


def small(recipe: Recipe) -> Recipe:
    """The same recipe at a size that two CPU cores train in two minutes."""
    sample = Path(__file__).with_name("data") / "sample"
    return replace(
        without_fp8(recipe), train_files=f"{sample}/fineweb_train_*.bin", val_files=f"{sample}/fineweb_val_*.bin",
        val_tokens=8192, val_chunk=1024, num_scheduled_iterations=60, num_extension_iterations=4, val_every=20,
        batch_unit=recipe.batch_unit // 256, micro_tokens=512, block=16, model_dim=96, head_dim=16, bigram_ratio=1,
        lr_ramp=recipe.lr_ramp // 8, muon_momentum_warmup=30, muon_momentum_cooldown=8,
        ngram_rows=min(recipe.ngram_rows, 4096), dtype="float32", compile=False, device="cpu")


def mini(recipe: Recipe) -> Recipe:
    """The same recipe at a size for one GPU of 12 GB: two thirds of the width, a quarter of the batch."""
    return replace(recipe, model_dim=512, num_heads=4, batch_unit=recipe.batch_unit // 4, val_chunk=65_536,
                   bigram_ratio=1)


# Record #80 with what records #81 to #92 found: README says which cell switches each part off, records/ its worth
FOUND = dict(fp8_qkv=True, fp8_mlp=True, value_gate_mixed=True)
FRONTIER_LAYERS = (
    Layer("short", paired=True, **FOUND),
    Layer("short", narrower=2, value_table=0, **FOUND),
    Layer("short", value_table=1, paired=True, **FOUND),
    Layer("long", "early", key_offset=True, **FOUND),
    Layer(None, fp8_mlp=True),
    Layer("short", paired=True, **FOUND),
    Layer(None, skip_from="early", fp8_mlp=True),
    Layer("short", "middle", **FOUND),
    Layer("short", narrower=2, value_table=2, reads="middle", **FOUND),
    Layer(None, fp8_mlp=True),
    Layer("long", value_table=3, reads="middle", key_offset=True, dense="early", **FOUND),
)
FRONTIER_STAGES = (
    Stage(1 / 3, 2, 7, 1, 3, 1.00, (1.0, 0.5, 0.25), (1.0, 0.5, 0.0), classes=10_240, tied=True, prefix=(0.25, 0.25)),
    Stage(1 / 3, 4, 16, 3, 7, 1.52, (1.0, 0.5), (1.0, 0.0), classes=10_240, tied=True, prefix=(0.25, 0.0)),
    Stage(0.16, 6, 24, 5, 11, 1.73, (1.0,), (1.0,), classes=14_336),
    Stage(0.12, 6, 24, 5, 11, 1.73, (1.0,), (1.0,), classes=24_576),
    Stage(0.16 / 3, 5, 24, 5, 11, 1.58, (1.0,), (1.0,)),  # 1.73 times sqrt(5 / 6)
    Stage(None, 3, 24, 6, 13, 1.73, (1.0,), (1.0,), fp8=False),
)
FRONTIER_PARAMS = tuple(row._replace(rule="twin_normuon") if row.rule == "normuon" else
                        row._replace(**RARELY) if row.name == "value_embeds" else row for row in PARAMS)
RECORD80 = Recipe()
FRONTIER = replace(
    RECORD80, layers=FRONTIER_LAYERS, stages=FRONTIER_STAGES, params=FRONTIER_PARAMS, batch_unit=65_536,
    cooldown_start=0.2, cooldown_floor=0.3, num_scheduled_iterations=1248, lr_ramp=24, muon_wd=2.25,
    muon_momentum=0.93, muon_momentum_warmup=240, tail_average=1.0, ngram_rows=15_863_040)  # #92: 84.6M; as 80 GB hold
PRESETS = {"record80": RECORD80, "frontier": FRONTIER, "mini": mini(RECORD80), "demo": small(RECORD80),
           "frontier_demo": small(FRONTIER)}


class Windows(NamedTuple):
    """What attention sees, in tokens; constants to the compiler, but see at_run_time."""

    short: int | Tensor
    long: int | Tensor
    max_doc: int  # no document is longer
    scale: float  # of the softmax
    segment: int = 0  # positions, smear, key offset and targets begin anew every so many tokens; 0: never
    fp8: bool = True  # not of attention: whether a stage's products are in LAYERS' FP8

    def at_run_time(self) -> Windows:
        """The same for an operation that reads a window with max_doc and scale, now units, from a tensor on the CPU: so
        code is compiled for them once."""
        short, long = (torch.tensor([x, self.max_doc, self.scale], dtype=torch.float64) for x in self[:2])
        return self._replace(short=short, long=long, max_doc=1, scale=1.0)


class Plan(NamedTuple):
    """Every scheduled value of one optimizer step."""

    step: int
    index: int  # of its stage
    stage: Stage
    batch_tokens: int
    windows: Windows
    lr_factor: float
    muon_momentum: float
    mtp_weights: tuple[float, ...]
    prefix_weights: tuple[float, ...]  # of the one prefix; without it none
    tied: bool
    unties: bool  # the step in which embed and lm_head part


def stage_bounds(hp: Recipe) -> list[int]:
    """First step of each stage, and the number of steps as the last entry."""
    ends = itertools.accumulate(stage.length for stage in hp.stages if stage.length is not None)
    scheduled = [0, *(round(end * hp.num_scheduled_iterations) for end in ends)]
    return scheduled + [hp.num_steps] * any(stage.length is None for stage in hp.stages)


def cycle(row: Param, step: int, hp: Recipe) -> tuple[int, int]:
    """Of the update that a step belongs to: from how many steps' gradients it is, and its number, from 1 on."""
    n = row.every
    later = 2 * n * round(row.rarer * hp.num_steps / (2 * n)) if row.rarer < 1 else hp.num_steps  # after an update
    return (n, step // n + 1) if step < later else (2 * n, later // n + (step - later) // (2 * n) + 1)


def due(row: Param, step: int, hp: Recipe) -> bool:
    """Whether a parameter is updated in this step."""
    return (step + 1) % cycle(row, step, hp)[0] == 0


def untie_step(hp: Recipe) -> int:
    """The update of embed and lm_head from which on they are apart."""
    bounds = zip(stage_bounds(hp), hp.stages)
    first = next((first for first, stage in bounds if not stage.tied), hp.num_steps)
    return round_up(first + 1, hp.rows["lm_head"].every) - 1


@cache
def ticks(average: Average, hp: Recipe) -> dict[int, float]:
    """After which steps it takes in the weights, and at what rates; at the first as they are."""
    row = hp.rows[average.params.split()[0]]
    last = max((step for step in range(hp.num_steps) if due(row, step, hp)), default=0)
    steps = {last, *range(last, round(average.start * hp.num_steps) - 1, -average.every)}
    steps |= {hp.num_steps - 1 - average.also} if average.also else set()
    rates = dict.fromkeys(sorted(steps), average.rate) | ({last: average.last_rate} if average.last_rate else {})
    return {step: min(1.0, rate * AVERAGE_STEPS / hp.num_steps) for step, rate in rates.items()} | {min(steps): 1.0}


def plan(step: int, hp: Recipe) -> Plan:
    """The schedule as a pure function of the step, 0 <= step < hp.num_steps."""
    bounds = stage_bounds(hp)
    index = bisect.bisect(bounds, step) - 1
    stage = hp.stages[index]

    cooldown = int(hp.num_scheduled_iterations * hp.cooldown_start)
    t = min(max((step - cooldown) / (hp.num_scheduled_iterations - cooldown), 0.0), 1.0)
    recent = range(max(0, step - hp.lr_ramp), step + 1)
    lr = math.fsum(hp.stages[bisect.bisect(bounds, x) - 1].lr for x in recent) / len(recent)
    lr_factor = lr * (1 - t) + hp.cooldown_floor * t

    momentum, rise = hp.muon_momentum, hp.muon_momentum - hp.muon_momentum_low
    last = hp.num_steps - hp.muon_momentum_cooldown
    if step < hp.muon_momentum_warmup:
        momentum = hp.muon_momentum_low + rise * step / hp.muon_momentum_warmup
    if step > last:
        momentum = hp.muon_momentum - rise * (step - last) / hp.muon_momentum_cooldown

    t = (step - bounds[index]) / (bounds[index + 1] - bounds[index])
    tokens = stage.batch * hp.batch_unit
    windows = Windows(short=stage.short * hp.block, long=stage.long * hp.block, max_doc=stage.max_doc * hp.block,
                      scale=rotation(hp, index)[1], segment=tokens // SEGMENTS, fp8=stage.fp8)
    return Plan(
        step=step, index=index, stage=stage, batch_tokens=tokens, windows=windows, lr_factor=lr_factor,
        muon_momentum=momentum, mtp_weights=tuple(a + (b - a) * t for a, b in zip(stage.mtp_start, stage.mtp_end)),
        prefix_weights=tuple(a + (b - a) * t for a, b in [stage.prefix] if stage.prefix != (0, 0)),
        tied=step < untie_step(hp), unties=step == untie_step(hp))


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple

# ==== 3. What flows between the parts ==================================

class Batch(NamedTuple):
    """One micro-batch on one rank: segments of packed documents, one after the other."""

    tokens: Tensor  # [T] int32
    targets: Tensor  # [T] int64; where there are candidates, places among these
    bigram_ids: Tensor  # [T] int32; with an n-gram table [2, T], of bigrams and trigrams: rows, or slots of copies
    cu_seqlens: Tensor  # [documents + 1] int32, padded with T to a fixed length
    order: Tensor  # [T] int32, positions sorted by token
    candidates: Tensor  # [n, classes] int64, rising: what the softmax of each of n segments is over; [n, 0]: all
    sign_ids: Tensor  # [2, T] int32: rows of the signs that n-gram rows are multiplied by
    slots: Tensor  # [2, T] int32: where n-gram rows' gradients are summed
    prefixes: Tensor  # [T, 1] int64, as targets: the longest token that each of these begins with, -1: none; or [T, 0]


class TouchedRows(NamedTuple):
    """What a step has to do with the rows of the bigram or n-gram table that ranks read since its last update."""

    first: int  # slot of
    ids: Tensor | None  # [rows] int32, rising: the n-gram rows that this rank had not read before
    copies: Exchange | None  # of these from their owners, from rows to slots; None of one rank
    owned: Tensor | None  # [rows] int32: n-gram rows of this rank's shard, which ranks read, at an update
    gradients: Exchange | None  # to the owners at an update: from slots to places in owned, or from row to row
    coming: Exchange | None = None  # the next step's copies, where this step does not change the table


class Embeddings(NamedTuple):
    """The table rows that a micro-batch reads, outside of the compiled step: so gradients come back as rows."""

    embed: Tensor  # [T, D]
    bigram: Tensor  # [T, D]
    value: tuple[Tensor, ...]  # [T, D] of each value table


class AttentionWeights(NamedTuple):
    """The weights of one layer's attention, before its output."""

    qkv: Tensor  # [3*H*d, D], for the layer's d
    gate: Tensor  # [H, G], of the heads
    value_gate: Tensor | None  # [H, G], of the value embedding, if it has one


class Fp8Weight(NamedTuple):
    """FP8 copies of a matrix or of a bank [K, m, n], made once for all micro-steps of a step; and scales."""

    bits: Tensor  # [m, n] e4m3
    turned: Tensor  # [n, m], the transpose
    forward: Tensor | float  # of products with it; 0-dim fp32, of a bank [K]
    backward: Tensor | float  # of gradients' products with it
    unit: float  # of gradients: what is stored as 1

    def part(self, first: int, count: int = 1) -> Fp8Weight:  # so many matrices of a bank, one above the other
        bits, turned, *scales = (x[first : first + count] for x in self[:4])
        return Fp8Weight(bits.flatten(0, 1), turned.transpose(0, 1).flatten(1), *(x[0] for x in scales), self.unit)


class Stream(NamedTuple):
    """The residual stream from one operation to the next; only a set of Ops looks inside."""

    x: Tensor  # [T, D]
    rstd: Tensor | None = None  # [T] fp32, 1 / rms of each row, for HOPPER's products


class Injection(NamedTuple):
    """x0_lambda x0 + bigram_lambda bigram, which a layer adds to the stream."""

    total: Tensor  # [T, D] the sum; HOPPER: what takes its gradient
    x0: Tensor  # [T, D]
    bigram: Tensor  # [T, D]
    x0_lambda: Tensor  # 0-dim fp32
    bigram_lambda: Tensor


class Ops(NamedTuple):
    """What the model computes with: PLAIN says it in PyTorch, HOPPER does it in fused kernels. fp8: None; or copies of
    w, of qkv, or of up and down, with which products are in FP8; gradients are the weights'."""

    stream: Callable  # x [T, D] -> Stream
    normed: Callable  # Stream -> Stream: each row over its rms
    first_columns: Callable  # x [T, n], k -> x, x[:, :k]
    attention_inputs: Callable  # normed Stream, AttentionWeights, ve, cos, sin, Layer, fp8 -> q, k, v, gate
    attention: Callable  # gate softmax(scale q k^T) v in documents and a window
    injections: Callable  # x0, bigram [T, D], their lambdas [A] -> A of Injection
    linear_sum: Callable  # y, o, x, resid [T], Injection -> Stream: y o^T + resid x + injected
    mlp: Callable  # x, up, down, resid [T], fp8 -> Stream: relu(norm(x) up^T)^2 down + resid x
    head_loss: Callable  # x [T, D], w [D, V], candidates, targets [T, k], weights, cap, fp8 -> loss
    add_rows: Callable  # rows [T, D], ids [T], table, order -> None: table[ids] += rows


# ==== 4. Data ==========================================================

HEADER_INTS, MAGIC, VERSION = 256, 20240520, 1  # a shard begins with int32s: these, token count, 0
MAX_DOCS = {16_384: 64, 32_768: 96, 49_152: 128}  # entries of cu_seqlens, by S
STEPS_AHEAD = 2  # that the loader prepares


def read_shard(path: str, count: int = -1) -> np.ndarray:
    """The first `count` tokens of a shard, or all, as uint16."""
    return np.fromfile(path, dtype="<u2", count=count, offset=4 * HEADER_INTS)


class Documents:
    """A shard and where its documents begin and end; tokens before the first BOS belong to none."""

    def __init__(self, tokens: np.ndarray, bos: int):
        self.tokens = tokens
        self.starts = np.flatnonzero(tokens == bos).tolist()
        self.ends = [*self.starts[1:], len(tokens)]

    def join(self, slices: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([self.tokens[start:end] for start, end in slices])

    def segments(self, doc: int, windows: Windows) -> tuple[list[list[tuple[int, int]]], int] | None:
        """SEGMENTS lists of document slices, a token more than a segment in each, from document number `doc` on, and
        the number of the next; None if too few are left. What is cut, to max_doc or at a segment's end, is skipped."""
        segments = []
        for _ in range(SEGMENTS):
            slices = []
            missing = windows.segment + 1
            while missing:
                if doc == len(self.starts):
                    return None
                start = self.starts[doc]
                end = min(self.ends[doc], start + windows.max_doc, start + missing)
                slices.append((start, end))
                missing -= end - start
                doc += 1
            segments.append(slices)
        return segments, doc


def walk(files: list[str], bos: int, plans: Iterable[Plan],
         read: Callable = read_shard) -> Iterator[tuple[Documents, list[list[tuple[int, int]]]]]:
    """For each step its shard, and the slices of each segment: a pure function of files and plans. A step never spans
    shards: what is too little for one is dropped. Ends early if the shards run out."""
    plans = deque(plans)
    with contextlib.closing(Ahead((Documents(read(path), bos) for path in files), 1)) as shards:
        for documents in shards:
            first = 0
            while plans and (found := documents.segments(first, plans[0].windows)):
                segments, first = found
                plans.popleft()
                yield documents, segments
            if not plans:
                return


SIGN_ROWS = 8192  # of the fixed +1 and -1 that n-gram rows are multiplied by
TOKEN_CLASSES = Path(__file__).with_name("data") / "token_classes.npy"  # of GPT-2's tokens, by tools/token_classes.py
TOKEN_PREFIXES = TOKEN_CLASSES.with_name("token_prefixes.npy")  # by tools/token_prefixes.py


@cache
def token_classes(vocab_size: int) -> np.ndarray:
    """For each token the first one of the same text but for case, accents and white space, int32; of GPT-2's tokens."""
    return np.load(TOKEN_CLASSES).astype(np.int32) if vocab_size == 50_257 else np.arange(vocab_size, dtype=np.int32)


@cache
def token_prefixes(vocab_size: int) -> np.ndarray:
    """For each token the longest other one that its bytes begin with, int32, -1: none; of GPT-2's tokens."""
    return np.load(TOKEN_PREFIXES) if vocab_size == 50_257 else np.full(vocab_size, -1, dtype=np.int32)


def hashed(t: np.ndarray, *factors: int) -> np.ndarray:
    """For each token but the first ones the XOR of it and of those before it, each times its factor; wrapping int32."""
    first = len(factors) - 1
    return reduce(np.bitwise_xor, (np.int32(x) * t[first - i : len(t) - i] for i, x in enumerate(factors)))


def bigram_ids(tokens: np.ndarray, rows: int) -> np.ndarray:
    """Row of the bigram table for each token and the one before it. Position 0 has the last row, whose number stands
    for its token in the hash of position 1."""
    t = np.append(np.int32(rows - 1), tokens[1:].astype(np.int32))
    return np.append(t[:1], modulo(hashed(t, 36313, 27191), rows - 1))


def table_ids(tokens: np.ndarray, hp: Recipe) -> np.ndarray:
    """Rows of the bigram table [T], or of the n-gram table [2, T], int32: of a token's bigram in one half, of its
    trigram in the other, whatever documents they are of. The last row of a half where tokens are missing."""
    if hp.ngram_rows == 0:
        return bigram_ids(tokens, hp.sizes["B"])
    half, t = hp.ngram_rows // 2, token_classes(hp.vocab_size).take(tokens)
    ids = np.full((2, len(t)), 2 * half - 1, dtype=np.int32)
    ids[0] = bigram_ids(t, half)
    ids[1, 2:] = half + modulo(hashed(t, 17351, 60961, 45259), half - 1)
    return ids


def sign_ids(tokens: np.ndarray, hp: Recipe) -> np.ndarray:
    """Rows of signs [2, T] int32, of a token's bigram and trigram; 0 where tokens are missing."""
    t = token_classes(hp.vocab_size).take(tokens)
    ids = np.zeros((2, len(t)), dtype=np.int32)
    ids[0, 1:], ids[1, 2:] = hashed(t, 48271, 30011), hashed(t, 58699, 39779, 26801)
    return ids & (SIGN_ROWS - 1)


def max_docs(S: int) -> int:
    """Fixed length of cu_seqlens for a segment of S tokens."""
    return MAX_DOCS.get(S) or max(128, round_up(S // 300, 128))


def segments_together(S: int, own: int, limit: int) -> int:
    """How many of a rank's own segments make a micro-batch: all, a half .. or one, as fit the limit."""
    return next((n for n in (own, own // 2, own // 4) if n and n * S <= limit), 1)


class Sweep:
    """Chooses what a segment's softmax is over: its targets, and other classes in turn. Each of the SEGMENTS walks over
    all classes in its own place, so that any number of ranks chooses the same (a part of record #92)."""

    STRIDE = 20_011  # a prime: its multiples modulo V are a permutation

    def __init__(self, hp: Recipe):
        self.V = hp.sizes["V"]
        self.walk = self.STRIDE * np.arange(self.V) % self.V
        self.places = [self.V * segment // SEGMENTS for segment in range(SEGMENTS)]

    def choose(self, segment: int, targets: np.ndarray, classes: int, more: int = 256) -> np.ndarray:
        """So many classes in rising order, among them all targets; none if classes is 0. Raises UserError."""
        if classes == 0:
            return np.empty(0, dtype=np.int64)
        chosen = np.zeros(self.V, dtype=bool)
        chosen[targets] = True
        distinct = np.count_nonzero(chosen)
        missing = classes - distinct
        require(missing >= 0, f"segment {segment} has {distinct} different targets, above STAGES.*.classes={classes}")
        if missing:
            length = min(self.V, 17 * missing // 10 + more)
            window = self.walk[(self.places[segment] + np.arange(length)) % self.V]
            self.places[segment] = (self.places[segment] + length) % self.V
            found = window[~chosen[window]][:missing]
            if len(found) < missing:
                free = np.flatnonzero(~chosen)
                found = free[:: len(free) // missing][:missing]
            chosen[found] = True
        return np.flatnonzero(chosen)


def places(tokens: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Where tokens are among rising classes, int64, -1: nowhere; without classes their own numbers."""
    if len(classes) == 0:
        return tokens.astype(np.int64)
    at = np.full(2**16 + 1, -1)  # a token has two bytes; -1, no token, has the last place
    at[classes] = np.arange(len(classes))
    return at[tokens]


def pack(
    hp: Recipe,
    segments: list[tuple[np.ndarray, np.ndarray]],
    documents: int = 0,
    candidates: list[np.ndarray] | None = None,  # of each segment; none or empty: all classes
    ids: list[np.ndarray] | None = None,  # table_ids of each segment; none or empty: to be found
    log: TouchLog | None = None,  # which knows the slots of n-gram rows; none: not needed
    prefix: bool = False,  # prefixes are predicted, too
) -> Batch:
    """Segments, each S+1 tokens and the ends of its documents, as a Batch with room for so many documents at least. If
    they are many, cu_seqlens grows by factors of 4: torch.compile takes eight shapes of a function."""
    S = len(segments[0][0]) - 1
    T = len(segments) * S
    bounds = np.unique([0, *(i * S + min(end, S) for i, (_, ends) in enumerate(segments) for end in ends)])
    expected = entries = len(segments) * max_docs(S)
    while entries < max(documents + 1, len(bounds)):
        entries *= 4
    if entries > expected and hp.compile:
        warn_once(f"more than the expected {expected - 1} documents in {T} tokens: compiled anew for lists of "
                  f"{entries}")
    cu_seqlens = np.pad(bounds, (0, entries - len(bounds)), constant_values=T).astype(np.int32)
    inputs = np.concatenate([tokens[:-1] for tokens, _ in segments])
    candidates = candidates or [np.empty(0, dtype=np.int64)] * len(segments)
    ahead, prefixes = [tokens[1:] for tokens, _ in segments], np.empty((T, 0), dtype=np.int64)
    targets = np.concatenate([*map(places, ahead, candidates)])
    if prefix:
        starts = [token_prefixes(hp.vocab_size)[tokens] for tokens in ahead]
        prefixes = np.concatenate([*map(places, starts, candidates)])[:, None]
    ids = np.concatenate(ids or [table_ids(tokens[:-1], hp) for tokens, _ in segments], axis=-1)
    signs = np.concatenate([sign_ids(tokens[:-1], hp) for tokens, _ in segments], axis=-1) if hp.ngram_rows else ids[:0]
    slots = log.slots.take(ids) if log and hp.ngram_rows else ids[:0]
    ids = slots if len(slots) and log.world > 1 else ids  # of copies
    order = np.argsort(inputs, kind="stable").astype(np.int32)  # fast for uint16
    arrays = inputs.astype(np.int32), targets, ids, cu_seqlens, order, np.stack(candidates), signs, slots, prefixes
    return Batch(*map(torch.from_numpy, arrays))


def train_batches(hp: Recipe, ranks: Ranks, steps: Iterable[int],
                  done: int = 0) -> Iterator[tuple[list[Batch], TouchedRows | None]]:
    """For each of `steps` but the first `done`, this rank's batches and, if rows travel or have slots, TouchedRows."""
    plans = [plan(step, hp) for step in steps]
    table = hp.rows["ngram_embed" if hp.ngram_rows else "bigram_embed"]
    log = TouchLog(hp, ranks) if hp.ngram_rows or (ranks.world >= SPARSE_FROM and table.reduce == "sparse") else None
    running = max((i for i, now in enumerate(plans[:done], 1) if due(table, now.step, hp)), default=0)  # cycle's begin
    sweep, found = Sweep(hp), walk(sorted(glob.glob(hp.train_files)), hp.bos, plans)
    for number, now in enumerate(plans):
        documents, segments = next(found, (None, None))
        require(documents, "the train shards ran out before the schedule")
        touched, rows = None, []
        if log and number >= running:
            if number and now.step != plans[number - 1].step + 1:
                log.begin()
            rows = log.mark(documents, segments)
        own = [(documents.join(slices), np.cumsum([b - a for a, b in slices]))
               for slices in segments[ranks.rank :: ranks.world]]
        candidates = [sweep.choose(segment, tokens[1:], now.stage.classes)
                      for segment, (tokens, _) in zip(range(ranks.rank, SEGMENTS, ranks.world), own)]
        if number < done:
            if log and number >= running:
                log.take_over()
            continue
        if log:
            touched = log.step(due(table, now.step, hp))
        n = segments_together(now.windows.segment, len(own), hp.micro_tokens)
        parts = [slice(i, i + n) for i in range(0, len(own), n)]
        yield ([pack(hp, own[x], 0, candidates[x], rows[x], log, now.prefix_weights != ()) for x in parts],
               touched if hp.ngram_rows or (touched and touched.gradients) else None)


class Validation:
    """The val_tokens inputs and, one further on, targets of validation."""

    def __init__(self, hp: Recipe, ranks: Ranks):
        self.hp = hp
        self.ranks = ranks
        self.tokens = read_shard(sorted(glob.glob(hp.val_files))[0], hp.val_tokens + 1)
        self.starts = np.flatnonzero(self.tokens[: hp.val_tokens] == hp.bos)
        # in any chunk, so that one graph does
        self.documents = np.bincount(self.starts // hp.val_chunk, minlength=1).max() + 1
        longest = np.diff([0, *np.flatnonzero(self.tokens == hp.bos), len(self.tokens)]).max()
        self.max_doc = min(hp.val_chunk, 2 ** math.ceil(math.log2(longest)))  # one value for all chunks

    def batches(self) -> Iterator[Batch]:
        """This rank's chunks of the stream, on the device: in order, neither cut nor aligned to documents."""
        chunk = self.hp.val_chunk
        for start in range(self.ranks.rank * chunk, self.hp.val_tokens, self.ranks.world * chunk):
            inside = self.starts[(self.starts > start) & (self.starts < start + chunk)]
            ends = np.append(inside, start + chunk) - start
            batch = pack(self.hp, [(self.tokens[start : start + chunk + 1], ends)], self.documents)
            yield send(batch, self.ranks.device)

# ==== 5. Model =========================================================

FP32_EPS = 1.19e-7  # of float32, also where activations are bf16
VALUE_GATE_MAX = 2.0
VAL_HEAD_ROWS = 32_768  # positions that the validation head takes at a time, to keep logits small
YARN_LOW, YARN_HIGH = 1.0, 32.0  # rotations in a window: fewer stretch fully, more not


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dim, without a learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=FP32_EPS)


def softcap(logits: Tensor, cap: float, shift: float, width: float) -> Tensor:
    """Logits of any shape and type, capped smoothly to (0, cap), in fp32."""
    return cap * torch.sigmoid((logits.float() + shift) / width)


def first_of_heads(x: Tensor, axis: int, heads: int, n: int) -> Tensor:
    """The first n places of each of so many heads, which lie one after the other along an axis of x."""
    if x.size(axis) == heads * n:
        return x
    return x.unflatten(axis, (heads, -1)).narrow(axis + 1, 0, n).flatten(axis, axis + 1)


def mixed(weights: Iterable[Tensor | float], streams: list[Tensor]) -> Tensor:
    """The sum of streams [T, D] times weights, [T, 1] or [T, D] fp32 or numbers, rounded once."""
    return sum(w * x for w, x in zip(weights, streams)).to(streams[0].dtype)


def next_targets(targets: Tensor, k: int) -> Tensor:
    """What each position predicts [n S, k]: its target and the next of its segment, for targets [n, S]; -1: none."""
    return F.pad(targets, (0, k - 1), value=-1).unfold(1, k, 1).flatten(0, 1).contiguous()


def yarn(frequencies: Tensor, scale: float, old: int, new: int) -> tuple[Tensor, float]:
    """Frequencies and softmax scale after the long window grows from old to new tokens (YaRN, arXiv 2309.00071)."""
    rotations = old * frequencies / (2 * math.pi)
    keep = ((rotations - YARN_LOW) / (YARN_HIGH - YARN_LOW)).clamp(0, 1)
    return frequencies * (old / new + keep * (1 - old / new)), scale * (0.2 * math.log(new / old) + 1)


@cache
def rotation(hp: Recipe, index: int) -> tuple[Tensor, float]:
    """Rotary frequencies [d/4] and softmax scale of a stage: every window growth up to it applied in turn."""
    frequencies = hp.rope_base ** -torch.linspace(0, 1, hp.head_dim // 4, device="cpu")
    scale = hp.attn_scale
    for before, after in itertools.pairwise(hp.stages[: index + 1]):
        if after.yarn:
            frequencies, scale = yarn(frequencies, scale, before.long * hp.block, after.long * hp.block)
    return frequencies, scale


def initial_values(row: Param, hp: Recipe) -> Tensor:
    """A parameter's initial values, fp32 on the CPU, from a generator of its own: no other's depend on it. init is a
    number; "uniform", of the standard deviation 0.5 / sqrt(fan-in), or up to a number / sqrt(fan-in) given after it; or
    "normal" and a deviation. Several, divided by commas, are for matrices 0, 1, .. of a bank in turn."""
    x = torch.zeros(param_shape(row, hp))
    seed = hashlib.sha256(f"{hp.seed} {row.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8]) >> 1)
    parts = row.init.split(",")
    for i, text in enumerate(parts):
        part = x[i :: len(parts)]
        match text.split():
            case ["uniform", *most]:
                bound = float(most[0] if most else math.sqrt(3) * 0.5) * x.size(-1) ** -0.5
                part.copy_(torch.empty(part.shape).uniform_(-bound, bound, generator=generator))
            case ["normal", deviation]:
                part.copy_(torch.empty(part.shape).normal_(0, float(deviation), generator=generator))
            case [number]:
                part.fill_(float(number))
    return x


def param_shape(row: Param, hp: Recipe) -> tuple[int, ...]:
    """The numbers for the letters of a row's shape; "2*A D" is (2 A, D)."""
    sizes = hp.sizes
    factors = [[sizes[x] if x in sizes else int(x) for x in axis.split("*")] for axis in row.shape.split()]
    return tuple(map(math.prod, factors))


def sum_ngrams(table: Tensor, ids: Tensor, signs: Tensor, sign_ids: Tensor) -> Tensor:
    """Each token's bigram row and trigram row, times their signs, rounded once; ids [2, T] -> [T, D]."""
    # compiled, a place in the table has the type of ids, and 15.9M rows of 768 numbers have no place in int32
    rows, signs = F.embedding(ids.long(), table), F.embedding(sign_ids, signs)
    return torch.addcmul(rows[0] * signs[0], rows[1], signs[1])


def add_ngrams(sums: Tensor, slots: Tensor, signs: Tensor, sign_ids: Tensor, grad: Tensor) -> None:
    """Add the gradients of these rows to fp32 sums, at slots [2, T], for that of sum_ngrams' result [T, D]."""
    for at, ids in zip(slots, sign_ids):
        sums.index_add_(0, at.long(), (grad * F.embedding(ids, signs)).to(sums.dtype))


class GPT(nn.Module):
    """Layers on one residual stream; matrices of a kind are stacked in a bank, which the optimizer shards."""

    def __init__(self, hp: Recipe, world: int = 1):
        super().__init__()
        self.hp = hp
        self.sizes = hp.sizes
        self.bank_index = {i: j for j, i in enumerate(hp.attn_layers)}  # -> place in banks
        self.named = {layer.name: i for i, layer in enumerate(hp.layers) if layer.name}
        self.cap = (hp.readout.cap, hp.readout.cap_shift, hp.readout.cap_width)
        self.loss_scale = world / SEGMENTS  # gradients are means over ranks, of sums over a rank's segments
        self.ops = PLAIN
        self.val_layers = without_fp8(hp).layers
        self.index = -1  # of the stage that the rotary tables are for
        self.sum_ngrams = maybe_compiled(sum_ngrams, hp)
        for row in hp.params:
            rows, *rest = param_shape(row, hp)
            rows = rows if row.reduce == "replicate" else round_up(rows, world)  # padding is and stays zero
            rows //= world if row.reduce == "rows" else 1
            dtype = torch.float32 if row.dtype == "float32" else getattr(torch, hp.dtype)
            self.register_parameter(row.name, nn.Parameter(torch.zeros(rows, *rest, dtype=dtype)))
        longest = max(hp.val_chunk, max(stage.batch for stage in hp.stages) * hp.batch_unit // SEGMENTS)
        shape = 2 * longest, hp.head_dim // 4  # row p is position p; paired heads use two for each token
        buffer = partial(nn.Buffer, persistent=False)
        self.cos, self.sin = (buffer(torch.empty(shape, dtype=torch.bfloat16)) for _ in range(2))
        signs = torch.randint(2, (SIGN_ROWS if hp.ngram_rows else 0, hp.model_dim), device="cpu", dtype=torch.int8,
                              generator=torch.Generator().manual_seed(0))
        self.signs = buffer((2 * signs - 1).to(self.cos.device, getattr(torch, hp.dtype)))
        self.dense = buffer(torch.tensor([[bool(layer.dense)] for layer in hp.layers]))
        self.attn_layers = buffer(torch.tensor(hp.attn_layers))
        mlp_layers = [i for i, layer in enumerate(hp.layers) for _ in range(layer.mlps)]
        self.mlp_layers = buffer(torch.tensor(mlp_layers, dtype=torch.int64))
        self.fp8 = {}  # of fp8_weights, in a run

    @torch.no_grad()
    def initialize(self, hp: Recipe) -> None:
        """Set all weights by the seed of hp. They are drawn on the CPU, so a seed means the same weights everywhere."""
        for row in self.hp.params:
            p = getattr(self, row.name).zero_()
            if row.reduce != "rows":  # which are zeros, too many for the CPU
                values = self.lm_head.mT if row.init == "lm_head" else initial_values(row, hp)
                p[: len(values)].copy_(values)
                dist.broadcast(p, 0)  # in case ranks have processors that draw differently

    @torch.no_grad()
    def set_stage(self, index: int) -> None:
        """Rebuild the rotary tables when a stage begins."""
        if index != self.index:
            frequencies = rotation(self.hp, index)[0].to(self.cos.device)
            angle = torch.outer(torch.arange(len(self.cos), device=self.cos.device), frequencies)
            self.cos.copy_(angle.cos())
            self.sin.copy_(angle.sin())
            self.index = index

    def lookup(self, batch: Batch, copies: Tensor | None = None) -> Embeddings:
        """The rows of the tables that a batch reads; n-gram rows as they are in copies, if given."""
        if self.hp.ngram_rows:
            table = self.ngram_embed if copies is None else copies
            bigram = self.sum_ngrams(table, batch.bigram_ids, self.signs, batch.sign_ids)
        else:
            bigram = F.embedding(batch.bigram_ids, self.bigram_embed)
        tables = self.value_embeds.view(*(self.sizes[letter] for letter in "EVD")).unbind()
        value = tuple(F.embedding(batch.tokens, table) for table in tables)
        return Embeddings(F.embedding(batch.tokens, self.embed), bigram, value)

    def smear(self, e: Tensor) -> Tensor:
        """Add to each embedding [n, S, D] a gated part of the one before it, across documents."""
        gate = self.smear_lambda[0] * torch.sigmoid(F.linear(e[:, 1:, :GATE_INPUTS], self.smear_gate))
        return torch.cat([e[:, :1], e[:, 1:] + gate * e[:, :-1]], dim=1)

    def matrices(self) -> tuple[Tensor, ...]:
        """What products multiply with: qkv [A, 3D, D], o [A, D, D], up and down [P, F, D]. The lambdas multiply these,
        as they are smaller than activations."""
        P, A, H, D = (self.sizes[letter] for letter in "PAHD")
        post_attn, post_mlp = self.post_lambdas.bfloat16().float().masked_fill(self.dense, 1.0).unbind(1)
        qkv_lambda, o_lambda = self.attn_lambdas.unbind()
        qkv_lambda = qkv_lambda[self.attn_layers]  # [A]
        o_lambda = (o_lambda * post_attn)[self.attn_layers]

        qk = self.qk_bank[: A * H].view(A, 2 * D, D)
        v, o = self.vo_bank[: 2 * A].view(A, 2, D, D).unbind(1)
        up, down = self.mlp_bank[: 2 * P].view(P, 2, self.sizes["F"], D).unbind(1)
        qkv, o, down = ((scale[:, None, None] * bank).to(bank.dtype) for scale, bank in (
            (qkv_lambda, torch.cat([qk, v], dim=1)), (o_lambda, o), (post_mlp[self.mlp_layers], down)))
        return qkv, o, up, down

    @torch.no_grad()
    def fp8_weights(self) -> dict[str, Fp8Weight | dict[int, Fp8Weight] | list[Fp8Weight]]:
        """FP8 copies of lm_head and of the banks qkv, up and down, as far as training multiplies with them in FP8; of
        qkv by width of heads, as each layer's must be contiguous, transposed, too."""
        (qkv, _, up, down), unit, copies = self.matrices(), GRADIENT_SCALE * self.loss_scale, {}
        if self.hp.fp8_head:
            copies["head"] = fp8_weight(self.lm_head, X_SCALE, GRAD_SCALE * self.loss_scale, W_SCALE)
        if any(layer.fp8_qkv for layer in self.hp.layers):
            copies["qkv"] = {d: fp8_weight(first_of_heads(qkv, 1, 3 * self.hp.num_heads, d), NORMED_SCALE, unit)
                             for d in {*self.hp.head_dims}}
        if any(layer.fp8_mlp and layer.mlps for layer in self.hp.layers):
            copies["mlp"] = [fp8_weight(up, NORMED_SCALE, unit, layers=self.mlp_layers),
                             fp8_weight(down, HIDDEN_SCALE, unit, layers=self.mlp_layers)]
        return copies

    def copy_weights(self) -> None:
        """Fill self.fp8 before the micro-steps of a step, in place, as graphs of these are replayed."""
        if self.fp8:
            tree_map(lambda old, new: old.copy_(new) if isinstance(old, Tensor) else old, self.fp8, self.fp8_weights())

    def attend(
        self,
        layer: Layer,
        j: int,  # its place in banks
        h: Stream,  # normed
        qkv: Tensor,  # [3D, D]
        ve: Tensor | None,  # [T, D]
        batch: Batch,
        windows: Windows,
    ) -> Tensor:
        """Gated attention before O; [T, H*d], for the layer's d."""
        T, H, d = len(h.x), self.hp.num_heads, self.hp.head_dims[j]
        n = 2 if layer.paired else 1

        gated = ve is not None and layer.value_gate and not layer.dense
        weights = AttentionWeights(qkv=first_of_heads(qkv, 0, 3 * H, d), gate=self.attn_gate_bank[j],
                                   value_gate=self.ve_gate_bank[layer.value_table] if gated else None)
        ve = None if ve is None else first_of_heads(ve, 1, H, d)
        cos, sin = (table[: n * (windows.segment or T), :: layer.narrower].contiguous()
                    for table in (self.cos, self.sin))
        fp8 = self.fp8["qkv"][d].part(j) if layer.fp8_qkv else None
        q, k, v, gate = self.ops.attention_inputs(h, weights, ve, cos, sin, layer, fp8)  # [T, H, d], gate [T, H]

        # a paired token becomes two: the same memory seen as [2T, H/2, d]
        q, k, v = (x.reshape(n * T, H // n, d) for x in (q, k, v))
        gate = gate.view(n * T, H // n) if layer.gate else None
        window = windows.short if layer.window == "short" else windows.long
        documents = batch.cu_seqlens * n, windows.max_doc * n
        # q and k are as long as the root of d: so scores vary as those of wide heads do
        y = self.ops.attention(q, k, v, *documents, window, windows.scale * layer.narrower**0.5, gate)
        return y.reshape(T, H * d)

    def dense_weights(self, x: Tensor, j: int) -> tuple[Tensor, ...]:
        """How much each token of the stream x [T, D] takes of others, 14 times [T, 1] fp32 (MUDD, arXiv 2502.12170)."""
        hidden = F.gelu(F.linear(x, self.dense_in[j]))
        bias = self.dense_bias.view(-1, DENSE_WEIGHTS)[j]
        return (DENSE_SCALE * (F.linear(hidden, self.dense_out[j]).float() + bias.float())).split(1, dim=1)

    def dense_layer(self, x: Stream, first: Tensor, middle: Tensor, bigram: Tensor, ve: Tensor, attend: Callable,
                    o: Tensor, up: Tensor, down: Tensor, fp8: list[Fp8Weight] | None) -> Stream:
        """The last layer, if its connections are dense: each token weighs what makes V, the stream and the result.
        first: the stream before the layers, middle: the one attention reads; attend: ve -> gated attention before O."""
        w, nothing = self.dense_weights(x.x, 0), x.x.new_zeros(len(x.x), dtype=torch.float32)
        half = x.x.size(1) // 2
        gate = torch.cat([g.expand(-1, half) for g in w[6:8]], dim=1)  # [T, D], one for half of the heads
        y = attend(ve=mixed([*w[:3], gate], [first, middle, x.x, ve]))
        stay = mixed([w[3], w[4], 1 + w[5]], [first, middle, x.x])
        x = self.ops.stream(mixed(w[8:12], [stay, F.linear(y, o), first, bigram]))
        y = self.ops.mlp(x, up, down, nothing, fp8).x
        return self.ops.stream(mixed(w[12:], [x.x, y]))

    def trunk(self, batch: Batch, rows: Embeddings, windows: Windows, layers: tuple[Layer, ...]) -> Tensor:
        """From tokens to the normalised last hidden state [T, D]."""
        ops = self.ops
        (qkv, o, up, down), mlps = self.matrices(), [layer.mlps for layer in layers]
        # by layer at once: the backward of each indexing would be a pass over the bank. MLPs side by side are joined
        qkv, o, up, down = qkv.unbind(), o.unbind(), *([x.flatten(0, 1) for x in w.split(mlps)] for w in (up, down))
        o = [first_of_heads(w, 1, self.hp.num_heads, d) for w, d in zip(o, self.hp.head_dims)]
        resid, x0_lambdas, bigram_lambdas = (
            p.bfloat16().float() for p in (self.resid_lambdas, self.x0_lambdas, self.bigram_lambdas))
        # repeated for each token, so that gradients are summed at once for all
        resid = resid[..., None].expand(-1, -1, len(batch.tokens))  # [L, 2, T]
        resid_attn, resid_mlp = (x.unbind() for x in resid.unbind(1))

        # Embed: x0, and the bigram embedding, which the layers add again
        embed = rows.embed.unflatten(0, (-1, windows.segment or len(rows.embed)))  # [n, S, D]
        x0 = norm(self.smear(embed).flatten(0, 1))  # [T, D]
        x0, gate_in = ops.first_columns(x0, GATE_INPUTS)
        x = ops.stream(x0 + bigram_lambdas[0] * rows.bigram)
        bigram_later = bigram_lambdas[self.attn_layers] * (self.attn_layers > 0)
        inject = ops.injections(x0, rows.bigram, x0_lambdas[self.attn_layers], bigram_later)

        # Layers; after: the stream after each layer; normed: its norm, which several layers read
        after, normed = {-1: x}, {-1: ops.normed(x)}
        for i, layer in enumerate(layers):
            fp8 = [w.part(sum(mlps[:i]), mlps[i]) for w in self.fp8["mlp"]] if layer.fp8_mlp and mlps[i] else None
            if layer.skip_from is not None:
                gate = 2 * torch.sigmoid(F.linear(gate_in, self.skip_gate))
                gate = torch.sigmoid(self.skip_lambda[0]) * gate
                x = ops.stream(x.x + gate * after[self.named[layer.skip_from]].x)
            if layer.window is not None:
                j = self.bank_index[i]
                h = normed[i - 1 if layer.reads is None else self.named[layer.reads]]
                ve = None if layer.value_table is None else rows.value[layer.value_table]
                if layer.dense:
                    attend = partial(self.attend, layer, j, h, qkv[j], batch=batch, windows=windows)
                    streams = after[-1].x, after[self.named[layer.reads]].x, rows.bigram, ve
                    x = after[i] = self.dense_layer(x, *streams, attend, o[j], up[i], down[i], fp8)
                    break
                y = self.attend(layer, j, h, qkv[j], ve, batch, windows)
                x = ops.linear_sum(y, o[j], x, resid_attn[i], inject[j])  # y o^T + resid x + injected
            if layer.mlps:
                x = ops.mlp(x, up[i], down[i], resid_mlp[i], fp8)  # relu(norm(x) up^T)^2 down + resid x
            else:
                x = ops.stream((resid_mlp[i][:, None] * x.x).to(x.x.dtype))
            after[i], normed[i] = x, ops.normed(x)

        # Read out, without what was there after the middle layer, or as much as each token says
        minus, dense = after[self.named[self.hp.readout.minus]].x, layers[-1].dense
        if dense is None:
            return norm(x.x - self.backout_lambda[0] * minus)
        streams = after[-1].x, minus, after[len(layers) - 2].x, rows.value[0], after[self.named[dense]].x
        return norm(mixed([1, *self.dense_weights(x.x, 1)], [x.x, *streams]))

    def train_loss(self, batch: Batch, rows: Embeddings, windows: Windows, weights: Tensor) -> Tensor:
        """The loss, summed over positions and times loss_scale; weights [k] of the next tokens and of a prefix."""
        x = self.trunk(batch, rows, windows, self.hp.layers if windows.fp8 else self.val_layers)
        targets = batch.targets.unflatten(0, (-1, windows.segment or len(batch.targets)))  # [n, S]
        targets = next_targets(targets, len(weights) - batch.prefixes.size(1))
        targets = torch.cat([targets, batch.prefixes], dim=1)
        return self.ops.head_loss(x, self.lm_head, batch.candidates, targets, self.loss_scale * weights, self.cap,
                                  self.fp8["head"] if self.hp.fp8_head else None)

    def val_losses(self, batch: Batch, rows: Embeddings, windows: Windows) -> Tensor:
        """The loss of each position [T], without FP8."""
        x = self.trunk(batch, rows, windows, self.val_layers)
        losses = []
        for rows, targets in zip(x.split(VAL_HEAD_ROWS), batch.targets.split(VAL_HEAD_ROWS)):
            logits = softcap(rows @ self.lm_head, *self.cap)
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(losses)

# ==== 6. Optimizer: NorMuon for the banks, Adam for the rest ===========

# Polar Express (Amsel et al., arXiv 2505.16932): a, b, c of X <- a X + (b S + c S^2) X, S = X X^T; 5 iterations,
# safety 2e-2, cushion 2
POLAR_COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SIX_COEFFICIENTS = (  # singular values end within 4e-4 of 1 (record #92)
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
)
POLAR_SAFETY, SIX_SAFETY = 1.02, 1.05


def polar_express(x: Tensor, six: bool = False) -> Tensor:
    """The orthogonal factor of each matrix in x [K, rows, columns], approximately."""
    tall = x.size(-2) > x.size(-1)
    x = x / ((SIX_SAFETY if six else POLAR_SAFETY) * x.float().norm(dim=(-2, -1), keepdim=True) + 1e-6).to(x.dtype)
    for a, b, c in SIX_COEFFICIENTS if six else POLAR_COEFFICIENTS:
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


# The scalars of one update, 0-dim fp32 tensors. bias1 and bias2: 1 - beta^t after t updates; beta: beta2 of `every`
# steps; time: steps until now, over `every`; fast, share: see normuon_direction
MuonHypers = namedtuple("MuonHypers", "lr decay momentum beta2 fast share", defaults=(0.0, 1.0))
AdamHypers = namedtuple("AdamHypers", "lr decay beta1 beta2 bias1 bias2 eps beta time", defaults=(None, None))
Part = tuple[Tensor, Tensor, dict[str, Tensor], Tensor, bool]  # a parameter, its gradient, state, hypers, cautious


def normuon_direction(
    g: Tensor,  # [K, rows, columns]
    momentum: Tensor,  # of the same shape
    second: Tensor | None,  # [K, rows, 1], or [K, 1, columns] of wide matrices; None: Muon, not normalised
    mu: Tensor,
    beta2: Tensor,
    dtype: torch.dtype,
    slow: Tensor | None = None,  # a second momentum; with it the first one's decay, and its share of the two
    fast: Tensor | None = None, share: Tensor | None = None,
) -> Tensor:
    """Nesterov momentum, orthogonalised in dtype, normalised and returned in momentum's (NorMuon, arXiv 2510.05491);
    updates momentum, second and slow."""
    g = g.to(momentum.dtype)
    both = momentum.lerp_(g, 1 - (mu if slow is None else fast))
    if slow is not None:
        both = torch.lerp(slow.lerp_(g, 1 - SLOW_MOMENTUM), momentum, share)
    x = polar_express(torch.lerp(g, both, mu).to(dtype), six=slow is not None).to(momentum.dtype)
    if second is None:
        return x
    short = -1 if x.size(-2) >= x.size(-1) else -2
    mean = x.square().mean(dim=short, keepdim=True)
    second.lerp_(mean, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    # the normalisation must not change the Frobenius norm; both norms follow from the means
    before = mean.sum(dim=(-2, -1), keepdim=True)
    after = (mean * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return x * (scale * (before / after.clamp_min(1e-30)).sqrt())


def normuon_update(parts: list[Part]) -> None:
    """One step of NorMuon, or Muon, on banks p [K, rows, columns], in place; state["rate"] [K, 1, 1] multiplies lr. A
    bf16 p has its low mantissa bits in state["low"] (int16), so that updates are exactly fp32. With a slow momentum in
    state["slow"], cautious decay asks that for its sign."""
    for p, g, state, hyper, cautious in parts:
        h, slow = MuonHypers(*hyper.unbind()[:6]), state.get("slow")
        x = normuon_direction(g, state["momentum"], state.get("second"), h.momentum, h.beta2, p.dtype, slow, *h[4:])
        full = join_bits(p, state["low"]) if "low" in state else p
        lr = h.lr * state["rate"]
        decay = torch.where((x if slow is None else slow) * full >= 0, full, 0.0) if cautious else full
        full = full - lr * h.decay * decay - lr * x
        if "low" in state:
            full, low = split_bits(full)
            state["low"].copy_(low)
        p.copy_(full)


def adam_update(parts: list[Part]) -> None:
    """One Adam step on each parameter, in place, with fp32 moments."""
    for p, g, state, hyper, cautious in parts:
        h = AdamHypers(*hyper.unbind())
        g, old = g.float(), p.float()
        state["first"].lerp_(g, 1 - h.beta1)
        state["second"].lerp_(g.square(), 1 - h.beta2)
        update = h.lr * (state["first"] / h.bias1) / ((state["second"] / h.bias2).sqrt() + h.eps)
        decay = torch.where(update * old > 0, h.decay * old, 0.0) if cautious else h.decay * old
        p.copy_(old - update - decay)


def row_adam_update(parts: list[Part]) -> None:
    """One Adam step on rows p [n, D] without first moments and with one second moment a row (record #92), in place.
    Rows without gradients may be left out: state["last"] [n] int32 tells how long a moment has still to decay."""
    for p, g, state, hyper, cautious in parts:
        h = AdamHypers(*hyper.unbind())
        g, old = g.float(), p.float()
        state["second"].mul_(h.beta ** (h.time - state["last"])).add_((1 - h.beta2) * g.square().mean(dim=1))
        state["last"].copy_(h.time)
        update = g * (h.lr * h.bias2.sqrt() / (state["second"].sqrt() + h.eps))[:, None]
        decay = torch.where(update * old > 0, h.decay * old, 0.0) if cautious else h.decay * old
        p.copy_(old - update - decay)


def normuon_hypers(row: Param, now: Plan, hp: Recipe) -> MuonHypers:
    lr = hp.muon_lr * now.lr_factor
    return MuonHypers(lr=lr * row.lr, decay=hp.muon_wd * lr * row.wd, momentum=now.muon_momentum, beta2=hp.muon_beta2)


def twin_hypers(row: Param, now: Plan, hp: Recipe) -> MuonHypers:
    twin = (FAST_MOMENTUM, FAST_SHARE) if now.step >= round(TWIN_START * hp.num_steps) else (now.muon_momentum, 1)
    return MuonHypers(*normuon_hypers(row, now, hp)[:4], *twin)


def adam_hypers(row: Param, now: Plan, hp: Recipe) -> AdamHypers:
    lr = hp.adam_lr * now.lr_factor * row.lr
    steps, updates = cycle(row, now.step, hp)
    times = steps // row.every
    beta1, beta2 = (beta**times for beta in row.betas)
    return AdamHypers(
        lr=lr, decay=lr**2 * hp.adam_wd * row.wd * times, beta1=beta1, beta2=beta2, bias1=1 - beta1**updates,
        bias2=1 - beta2**updates, eps=hp.adam_eps, beta=row.betas[1], time=(now.step + 1) // row.every)


def muon_state(p: Tensor) -> dict[str, Tensor]:
    low = {"low": torch.zeros_like(p, dtype=torch.int16)} if p.dtype == torch.bfloat16 else {}
    return {"momentum": torch.zeros_like(p, dtype=torch.float32)} | low


def normuon_state(p: Tensor) -> dict[str, Tensor]:
    K, rows, columns = p.shape
    second = (K, rows, 1) if rows >= columns else (K, 1, columns)
    return muon_state(p) | {"second": torch.zeros(second, device=p.device)}


def twin_state(p: Tensor) -> dict[str, Tensor]:
    return normuon_state(p) | {"slow": torch.zeros_like(p, dtype=torch.float32)}


def adam_state(p: Tensor) -> dict[str, Tensor]:
    return {key: torch.zeros_like(p, dtype=torch.float32) for key in ("first", "second")}


def row_adam_state(p: Tensor) -> dict[str, Tensor]:
    return {"second": p.new_zeros(len(p), dtype=torch.float32), "last": p.new_zeros(len(p), dtype=torch.int32)}


class Rule(NamedTuple):
    """How a parameter is updated."""

    state: Callable  # a rank's part of a parameter -> what its updates keep
    hypers: Callable  # Param, Plan, Recipe -> the scalars of one update, at most 9
    update: Callable  # list of Part -> None, in place
    bank: bool = False  # for banks [K, rows, columns] only, at rates by matrix


RULES = {
    "normuon": Rule(normuon_state, normuon_hypers, normuon_update, bank=True),
    "twin_normuon": Rule(twin_state, twin_hypers, normuon_update, bank=True),
    "muon": Rule(muon_state, normuon_hypers, normuon_update, bank=True),
    "adam": Rule(adam_state, adam_hypers, adam_update),
    "row_adam": Rule(row_adam_state, adam_hypers, row_adam_update),
}


LOOKED_UP = ("embed", "bigram_embed", "ngram_embed", "value_embeds")  # tables, see Embeddings
CHUNK_ROWS = 131_072  # of the n-gram table, updated at once, so that there is one shape to compile


class NorMuonAdam:
    """All updates and their communication, by the rows of hp.params; a rank keeps the state of its shard only."""

    def __init__(self, model: GPT, hp: Recipe, ranks: Ranks):
        self.hp, self.ranks = hp, ranks
        self.add_rows = model.ops.add_rows
        self.params = {row.name: getattr(model, row.name) for row in hp.params}
        self.row = hp.rows
        self.rules = {name: rule._replace(update=maybe_compiled(rule.update, hp)) for name, rule in RULES.items()}
        self.cycle = Cycle(model, hp, ranks) if hp.ngram_rows else None
        self.grads = self.make_gradients()
        self.moments = {row.name: self.rules[row.rule].state(self.shard(row)) for row in hp.params}
        self.rates = {row.name: {"rate": self.matrix_rates(row)} for row in hp.params if RULES[row.rule].bank}
        self.averages = {(average, name): torch.zeros_like(self.shard(self.row[name]), dtype=torch.float32)
                         for average in hp.averages if hp.tail_average * average.blend
                         for name in average.params.split()}
        self.reset()

    @torch.no_grad()
    def step(self, now: Plan, touched: TouchedRows | None = None) -> None:
        """Update what is due from its gradient, none sparse if touched is None."""
        if now.unties:
            self.untie()
        rows = [row for row in self.hp.params if due(row, now.step, self.hp) and self.params[row.name].numel()
                and not (now.tied and row.name == "embed")]
        tied = now.tied and self.row["lm_head"] in rows
        if tied:  # its gradient as an embedding joins that as a head
            self.grads["lm_head"] += self.grads["embed"].mT
            self.grads["embed"].zero_()
        hypers, groups = self.hypers(rows, now), [*self.update_groups(rows)]

        # 1. launch all reductions
        reducing = self.launch_reductions([*itertools.chain(*groups)], touched)

        # 2. in order: wait for gradients, update, launch the gather
        gathering = []
        for group in groups:
            grads = [self.reduced_gradient(row, *reducing.pop(row.name), touched) for row in group]
            if group[0].reduce == "rows":
                self.update_rows(group[0], grads[0], hypers, touched)
            else:
                self.update(group, grads, hypers)
            del grads
            gathering += [self.launch_gather(row) for row in group]

        # 3. wait for the gathers
        for work in gathering:
            wait(work)
        if tied:
            self.params["embed"].copy_(self.params["lm_head"].mT)
        for row in rows:
            self.grads[row.name][: self.cycle.filled if row.reduce == "rows" else None].zero_()
            if row.reduce == "rows":
                self.cycle.filled = 0
        self.average(now)

    def hypers(self, rows: list[Param], now: Plan) -> dict[str, Tensor]:
        """The scalars of each update as a small device tensor, so that compiled code never changes."""
        table = torch.zeros(len(rows), 9)
        for row, line in zip(rows, table):
            values = self.rules[row.rule].hypers(row, now, self.hp)
            line[: len(values)] = torch.tensor(values)
        return {row.name: line for row, line in zip(rows, send(table, self.ranks.device))}

    def launch_reductions(self, rows: list[Param],
                          touched: TouchedRows | None) -> dict[str, tuple[Tensor, dist.Work | None]]:
        """Start averaging gradients; where this rank's part of each (if sparse, rows) will be, and the work."""
        if self.ranks.world == 1:
            return {row.name: (self.grads[row.name], None) for row in rows}
        found, small, average = {}, {}, dict(op=dist.ReduceOp.AVG, async_op=True)
        for row in rows:
            grad, part = self.grads[row.name], self.shard(row)  # whose type halves what the tables' gradients send
            if row.reduce == "replicate":
                if grad.dtype not in small:
                    small[grad.dtype] = dist.all_reduce(self.flat[grad.dtype], **average)
                found[row.name] = grad, small[grad.dtype]
            elif row.reduce in ("sparse", "rows") and touched:
                found[row.name] = exchanged(grad, touched.gradients, part.dtype)
            else:
                part = torch.empty_like(part)
                found[row.name] = part, dist.reduce_scatter_tensor(part, grad.to(part.dtype), **average)
        return found

    def update_groups(self, rows: list[Param]) -> Iterator[list[Param]]:
        """Rows that are updated together: the replicated ones of each rule, then the others in UPDATE_ORDER."""
        for rule in RULES:
            if small := [row for row in rows if row.reduce == "replicate" and row.rule == rule]:
                yield small
        yield from ([row] for name in UPDATE_ORDER for row in rows if row.name == name and row.reduce != "replicate")

    def reduced_gradient(self, row: Param, part: Tensor, work: dist.Work | None, touched: TouchedRows | None) -> Tensor:
        """Wait for a gradient; of rows that were sent make this rank's part, in fp32."""
        wait(work)
        if work is None or row.reduce not in ("sparse", "rows") or touched is None:
            return part
        n = len(self.shard(row)) if row.reduce == "sparse" else round_up(len(touched.owned), self.cycle.chunk)
        whole = torch.zeros(n, part.size(1), device=part.device)
        self.add_rows(part.div_(self.ranks.world), touched.gradients.received, whole)
        return whole

    def update_rows(self, row: Param, grads: Tensor, hypers: dict[str, Tensor], touched: TouchedRows) -> None:
        """Update the rows of this rank's n-gram shard that a cycle touched, in chunks of one size."""
        rows = self.cycle.ids[: self.cycle.filled] if touched.owned is None else touched.owned
        tensors = [self.params[row.name].data, *self.moments[row.name].values()]
        for at, g in zip(rows.long().split(self.cycle.chunk), grads.split(self.cycle.chunk)):
            p, *moments = parts = [x[F.pad(at, (0, len(g) - len(at)))] for x in tensors]
            state = dict(zip(self.moments[row.name], moments))
            self.rules[row.rule].update([(p, g, state, hypers[row.name], row.cautious)])
            for x, part in zip(tensors, parts):
                x[at] = part[: len(at)]

    def update(self, group: list[Param], grads: list[Tensor], hypers: dict[str, Tensor]) -> None:
        states = [self.moments[row.name] | self.rates.get(row.name, {}) for row in group]
        self.rules[group[0].rule].update([(self.shard(row), g, state, hypers[row.name], row.cautious)
                                          for row, g, state in zip(group, grads, states)])

    def launch_gather(self, row: Param) -> dist.Work | None:
        """Start sending this rank's updated shard to all ranks, if it is not the whole."""
        p, part = self.params[row.name].data, self.shard(row)
        return dist.all_gather_into_tensor(p, part, async_op=True) if len(part) < len(p) else None

    def shard(self, row: Param) -> Tensor:
        """The part of a parameter that this rank updates, as a view."""
        p = self.params[row.name].data
        if row.reduce in ("replicate", "rows") or self.ranks.world == 1:
            return p
        return p.chunk(self.ranks.world)[self.ranks.rank]

    def matrix_rates(self, row: Param) -> Tensor:
        """Factors of the rate [K, 1, 1] for this rank's matrices of a bank: larger for tall ones; odd_lr."""
        p = self.shard(row)
        K, rows, columns = p.shape
        first = 0 if row.reduce == "replicate" else self.ranks.rank * K
        number = first + torch.arange(K, device=p.device)
        odd = torch.where(number % 2 == 1, row.odd_lr, 1.0)
        return math.sqrt(max(1, rows / columns)) * odd[:, None, None]

    def make_gradients(self) -> dict[str, Tensor]:
        """Where gradients are summed until an update: of looked-up tables in fp32, of others where autograd adds, of
        the replicated ones as views of one tensor a dtype, which one all-reduce takes."""
        grads = {"ngram_embed": self.cycle.sums} if self.cycle else {}
        self.flat = {}
        dtypes = {name: torch.float32 if name in LOOKED_UP else p.dtype for name, p in self.params.items()}
        for dtype in (torch.float32, torch.bfloat16):
            small = {row.name: self.params[row.name] for row in self.hp.params
                     if row.reduce == "replicate" and dtypes[row.name] == dtype}
            sizes = [round_up(p.numel(), 64) for p in small.values()]  # on addresses that kernels like
            self.flat[dtype] = torch.zeros(sum(sizes), dtype=dtype, device=self.ranks.device)
            parts = self.flat[dtype].split(sizes)
            grads |= {name: part[: p.numel()].view(p.shape) for part, (name, p) in zip(parts, small.items())}
        for name, p in self.params.items():
            if name not in grads:
                grads[name] = torch.zeros_like(p, dtype=dtypes[name], requires_grad=False)
            if name not in LOOKED_UP:
                p.grad = grads[name]
        return grads

    @torch.no_grad()
    def add_table_gradients(self, batch: Batch, rows: Embeddings) -> None:
        """Add the gradients of a micro-batch's table rows to the tables'; only these rows are touched."""
        add, cycle = self.add_rows, self.cycle
        add(rows.embed.grad, batch.tokens, self.grads["embed"], batch.order)
        if cycle:
            cycle.add_ngrams(cycle.sums, batch.slots, cycle.signs, batch.sign_ids, rows.bigram.grad)
        else:
            add(rows.bigram.grad, batch.bigram_ids, self.grads["bigram_embed"])
        tables = self.grads["value_embeds"].chunk(max(len(rows.value), 1))
        for row, table in zip(rows.value, tables):
            add(row.grad, batch.tokens, table, batch.order)

    def average(self, now: Plan) -> None:
        """Let averages take in the weights, of which each rank has its part; after the last step the reverse."""
        def norm_of(p: Tensor) -> Tensor:
            square = p.float().square().sum()
            dist.all_reduce(square)
            return square.sqrt()

        for (average, name), x in self.averages.items():
            if rate := ticks(average, self.hp).get(now.step):
                x.mul_(1 - rate).add_(self.shard(self.row[name]), alpha=rate)
        if now.step == self.hp.num_steps - 1:
            shards = {name: self.shard(self.row[name]) for _, name in self.averages}  # on all ranks in one order
            norms = {name: norm_of(shards[name]) for average, name in self.averages if average.norm}
            for (average, name), x in self.averages.items():
                shards[name].copy_(shards[name].float().lerp_(x, self.hp.tail_average * average.blend))
            for name, p in shards.items():
                if name in norms:
                    p.copy_(p.float() * (norms[name] / norm_of(p)))
                wait(self.launch_gather(self.row[name]))

    def untie(self) -> None:
        """From now on embed has a life of its own, beginning with lm_head's moments, transposed and sharded anew."""
        for key, part in self.moments["lm_head"].items():
            whole = part.new_empty(self.params["lm_head"].shape)
            dist.all_gather_into_tensor(whole, part)
            self.moments["embed"][key].copy_(whole.T.chunk(self.ranks.world)[self.ranks.rank])

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state before the first step, but for the weights."""
        for state in self.states():
            if state.name not in self.params:
                state.tensor.zero_()
        if self.cycle:
            self.cycle.filled, self.cycle.saved = 0, None

    def states(self) -> Iterator[State]:
        """All that steps change: what is reset after the warm-up and what a checkpoint holds."""
        for row in self.hp.params:
            kind = {"replicate": "same", "rows": "rows" if self.cycle else "same"}.get(row.reduce, "shard")
            yield State(row.name, self.params[row.name].data, "rows" if kind == "rows" else "same")
            for key, x in self.moments[row.name].items():
                yield State(f"{row.name}.{key}", x, kind)
            yield State(f"{row.name}.grad", self.grads[row.name], "slots" if kind == "rows" else "own")
        for (average, name), x in self.averages.items():
            kind = "same" if self.row[name].reduce == "replicate" else "shard"
            yield State(f"{name}.average{self.hp.averages.index(average)}", x, kind)
        if self.cycle:
            yield State("ngram_embed.ids", self.cycle.ids, "slots")
            yield from [State("ngram_embed.copies", self.cycle.copies, "slots")] * (self.ranks.world > 1)

# ==== 7. The run =======================================================

class StepLoss(NamedTuple):
    """A step's training loss a token, weighted over the predicted tokens, on the device."""

    mean: Tensor  # over ranks
    each: Tensor  # [R], the ranks'


class Run:
    """A model, its optimizer, and the steps that train and validate it."""

    def __init__(self, hp: Recipe, ranks: Ranks, ops: Ops | None = None):
        self.hp, self.ranks = hp, ranks
        with torch.device(ranks.device):
            self.model = GPT(hp, ranks.world)
        self.model.ops = ops or PLAIN
        self.model.initialize(hp)
        self.optimizer = NorMuonAdam(self.model, hp, ranks)
        self.loss_of = maybe_compiled(self.model.train_loss, hp)
        self.val_losses_of = maybe_compiled(self.model.val_losses, hp)
        self.model.fp8 = self.model.fp8_weights()
        self.copy_weights = maybe_compiled(self.model.copy_weights, hp)
        self.micro_step = Replay(self.add_gradients, with_graphs(hp) and ranks.device.type == "cuda")
        self.ready = False

    def attended(self, windows: Windows) -> Windows:
        return windows.at_run_time() if self.model.ops.attention is attention_flash4 else windows

    def restart(self, hp: Recipe) -> None:
        """Weights and optimizer as a run of hp begins with, whose seed and names alone are others."""
        self.hp = self.optimizer.hp = hp  # not the model's, which its compiled functions are bound to
        self.model.initialize(hp)
        self.optimizer.reset()

    def train_step(self, batches: list[Batch], touched: TouchedRows | None, now: Plan) -> StepLoss:
        """One optimizer step on this rank's batches."""
        self.model.set_stage(now.index)
        self.copy_weights()
        weights = send(torch.tensor(now.mtp_weights + now.prefix_weights), self.ranks.device)
        if self.optimizer.cycle:
            self.optimizer.cycle.read(touched)

        total = 0.0
        for batch in batches:
            total = total + self.micro_step(batch, now.windows, weights)
        own = total / (now.windows.segment * sum(now.mtp_weights + now.prefix_weights))
        each = own.new_empty(self.ranks.world)
        work = dist.all_gather_into_tensor(each, own.view(1), async_op=True)

        self.optimizer.step(now, touched)
        work.wait()
        return StepLoss(each.mean(), each)

    def add_gradients(self, batch: Batch, windows: Windows, weights: Tensor) -> Tensor:
        """Add a micro-batch's gradients to the optimizer's; returns its loss, 0-dim fp32."""
        with torch.no_grad():
            rows = self.model.lookup(batch, self.optimizer.cycle and self.optimizer.cycle.copies)
        for row in (rows.embed, rows.bigram, *rows.value):
            row.requires_grad_()
        loss = self.loss_of(batch, rows, self.attended(windows), weights)
        loss.backward()
        self.optimizer.add_table_gradients(batch, rows)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, validation: Validation, now: Plan, last: bool = False, chunks: int | None = None) -> float:
        """Mean loss over the val stream, or over each rank's first chunks, with the windows of plan now. A run's last
        validation widens the long window, not the rotary tables."""
        self.model.set_stage(now.index)
        long = self.hp.final_val_window * self.hp.block if last else now.windows.long
        windows = now.windows._replace(long=long, max_doc=validation.max_doc, segment=0, fp8=False)
        total = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)  # loss, count
        for batch in itertools.islice(validation.batches(), chunks):
            shared = self.optimizer.cycle and self.ranks.world > 1
            batch, copies = read_anywhere(self.model.ngram_embed, batch, self.ranks) if shared else (batch, None)
            losses = self.val_losses_of(batch, self.model.lookup(batch, copies), self.attended(windows))
            total += torch.stack([losses.double().sum(), total.new_tensor(len(losses))])
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def warm_up(self, validation: Validation, log: Log) -> None:
        """Compile everything by real steps on real batches, then put weights and optimizer back to their beginning.
        The first two steps of each stage have every shape, and every update; graphs come after all first ones, in the
        memory that these have given back."""
        bounds = stage_bounds(self.hp)
        # to draw them again takes 2.4 s (H100); the n-gram table, too large to keep, begins with zeros
        weights = {row.name: getattr(self.model, row.name).detach().to("cpu", copy=True)
                   for row in self.hp.params if row.reduce != "rows"}
        started = time.perf_counter()
        for steps in (bounds[:-1], [first + 1 for first, end in itertools.pairwise(bounds) if first + 1 < end]):
            with contextlib.closing(load_batches(self.hp, self.ranks, steps)) as loader:
                for step in steps:
                    now = plan(step, self.hp)
                    self.train_step(*next(loader), now)
                    if step in bounds:
                        self.evaluate(validation, now, chunks=1)
                    log(f"warm-up: step {step} after {time.perf_counter() - started:.0f} s")
            self.micro_step.capture_all()
            self.optimizer.reset()  # the next batches' cycles are their own
        self.evaluate(validation, now, last=True, chunks=1)
        for name, p in self.optimizer.params.items():
            p.data.copy_(weights.get(name, torch.zeros(1)))


def train(run: Run, log: Log, watch: Watch, saved: dict | None) -> int:
    """The whole run, or what a checkpoint leaves of it: warm up, train, validate. Returns the exit status."""
    hp = run.hp
    N = hp.num_steps
    validation = Validation(hp, run.ranks)
    if not run.ready:
        if hp.compile:
            run.warm_up(validation, log)
        check_ops(run.model.ops, run.ranks.device, hp.head_dims)
        run.ready = True

    clock = watch.clock = Clock(run.ranks.device)
    watch.micro_step = run.micro_step
    first = load_checkpoint(saved, run.optimizer, clock) if saved else 0
    loader = load_batches(hp, run.ranks, range(N), first)
    if saved:  # to find the place in the shards is no training
        loader.wait_for_one()
    reports = Reports(log, clock)

    clock.start()
    for step in range(first, N + 1):
        now = plan(min(step, N - 1), hp)
        stop = watch.stops(step)
        validating = step == N or (hp.val_every and step % hp.val_every == 0)
        saving = step > first and (checkpoint_due(step, hp) or (stop and (hp.save_every or hp.save_final)))

        if stop or validating or saving:
            clock.stop()
            reports.write()
            path = save_checkpoint(log, run.optimizer, step, clock.ms()) if saving else None
            if stop:
                kept = f"--resume={path} goes on" if saving else "nothing saved; --save_final=true would have"
                log(f"interrupted by {watch.why} after step {step} of {N}: {kept}")
                loader.close()
                return 128 + signal.Signals[watch.why]
            if validating:
                val_loss = run.evaluate(validation, now, last=step == N)
                log.loss("val_loss", val_loss, step, clock.ms())
                require_finite(val_loss, f"validation loss after step {step}")
            if step == N:
                break
            clock.start()

        loss = run.train_step(*next(loader), now)
        reports.add(step + 1, loss, now.batch_tokens)
    loader.close()
    log.result(val_loss, hp, clock.ms(), run.ranks)
    return 0


# ==== 8. Rows that travel: of the bigram and the n-gram table, between ranks and between steps ====

class Exchange(NamedTuple):
    """Rows that all ranks send to each other at once. Known from the tokens, which every host can read: to ask the
    device or other ranks would be to wait."""

    sent: Tensor  # [rows] int32, by the rank that they go to
    received: Tensor  # [rows] int32, by the rank that they come from: where they go here
    send_counts: list[int]  # for rank 0, 1, ...
    receive_counts: list[int]


def cycle_slots(hp: Recipe, world: int) -> int:
    """How many n-gram rows a rank may read between two updates: two a token, half as many more in a resumed run."""
    tokens = max(stage.batch for stage in hp.stages) * hp.batch_unit // world
    tokens *= cycle(hp.rows["ngram_embed"], hp.num_steps, hp)[0]
    room = min(hp.ngram_rows, hp.ngram_slots, 3 * tokens)
    return round_up(room, CHUNK_ROWS) if room > CHUNK_ROWS else room


class TouchLog:
    """Which rows of the bigram or n-gram table each rank read since the table's last update: this rank all, the others
    those of its shard. The n-gram rows that it read have slots, in the order of steps and of rows.

    Each rank finds this by itself, so it walks through all segments, on eight ranks in an eighth of the time: hence
    compress and take, and whole indices, which are faster than brackets."""

    def __init__(self, hp: Recipe, ranks: Ranks):
        self.hp, self.rank, self.world = hp, ranks.rank, ranks.world
        rows = hp.ngram_rows or hp.sizes["B"]
        self.size = rows // self.world
        self.touched, self.slots = np.zeros((self.world, rows), dtype=bool), np.zeros(rows, dtype=np.int32)
        self.numbers = np.zeros(self.size, dtype=np.int32)  # of this shard's rows, among those to be updated
        self.read: list[list[np.ndarray]] = [[] for _ in range(self.world)]  # parts by rank
        self.begin()

    def begin(self) -> None:
        """A cycle, after an update or where steps are left out."""
        for touched, parts in zip(self.touched, self.read):  # all rows would take 16 ms
            for ids in parts:
                touched[ids.astype(np.intp)] = False
            parts.clear()
        self.filled, self.known = 0, [0] * self.world  # slots, parts that have them

    def mark(self, documents: Documents, segments: list[list[tuple[int, int]]]) -> list[np.ndarray]:
        """Note a step's rows; those of this rank's segments."""
        own = []
        for s, slices in enumerate(segments):
            rank, ids = s % self.world, table_ids(documents.join(slices)[:-1], self.hp)
            self.add(rank, ids.ravel() if rank == self.rank else self.in_shard(ids.ravel()))
            own += [ids] * (rank == self.rank)
        return own

    def in_shard(self, ids: np.ndarray) -> np.ndarray:
        place = ids - np.int32(self.rank * self.size)
        return np.compress(place.view(np.uint32) < self.size, ids)

    def add(self, rank: int, ids: np.ndarray) -> None:
        ids = distinct(np.compress(~self.touched[rank].take(ids), ids))
        self.touched[rank][ids.astype(np.intp)] = True
        self.read[rank].append(ids)

    def take_over(self) -> None:
        """A checkpoint of other ranks gives each its shard's gradients, which it then sends to itself."""
        for ids in [*itertools.chain(*self.read)]:
            self.add(self.rank, self.in_shard(ids))

    def exchange(self, first: list[int]) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
        """From these parts on: the rows that this rank read, those of its shard that each read, and counts by rank."""
        read = [np.sort(np.concatenate(parts[n:])) if len(parts) > n + 1 else parts[n]  # which is sorted
                for n, parts in zip(first, self.read)]
        own = read[self.rank]
        bounds = np.searchsorted(own, self.size * np.arange(self.world + 1, dtype=np.int32))
        read[self.rank] = own[bounds[self.rank] : bounds[self.rank + 1]]
        shard = np.concatenate(read) - np.int32(self.rank * self.size)
        return own, shard, np.diff(bounds).tolist(), [*map(len, read)]

    def step(self, update: bool) -> TouchedRows:
        """Slots for what was read since the last step, and the exchanges that are due; an update begins a cycle."""
        first, (ids, copies, owned, gradients) = self.filled, [None] * 4
        if self.hp.ngram_rows:
            own, shard, owners, readers = self.exchange(self.known)
            self.known, self.filled, room = [*map(len, self.read)], first + len(own), cycle_slots(self.hp, self.world)
            require(self.filled <= room, f"--ngram_slots={self.hp.ngram_slots}: use more, as the steps between two "
                    f"updates read more than {room} n-gram rows")
            self.slots[own.astype(np.intp)] = slots = np.arange(first, self.filled, dtype=np.int32)
            ids, copies = torch.from_numpy(own), Exchange(*map(torch.from_numpy, (shard, slots)), readers, owners)
        if update and self.world > 1:
            own, shard, owners, readers = self.exchange([0] * self.world)
            if self.hp.ngram_rows:
                own, rows = self.slots.take(own), distinct(shard)
                self.numbers[rows.astype(np.intp)] = np.arange(len(rows))
                shard, owned = self.numbers.take(shard), torch.from_numpy(rows)
            gradients = Exchange(*map(torch.from_numpy, (own, shard)), owners, readers)
        if update:
            self.begin()
        return TouchedRows(first, ids, copies if self.world > 1 else None, owned, gradients)


def distinct(ids: np.ndarray) -> np.ndarray:
    """Sorted, each once; ten times as fast as np.unique."""
    ids = np.sort(ids)
    return np.compress(np.append(True, ids[1:] != ids[:-1])[: len(ids)], ids)


def modulo(x: np.ndarray, n: int) -> np.ndarray:
    """x % n for int32, in an eighth of its time (NumPy 2.4)."""
    return x - x // np.int32(n) * np.int32(n)


def with_coming(items: Iterator[tuple[list[Batch], TouchedRows | None]]) -> Iterator:
    """The items of steps, whose TouchedRows have what can be fetched during a step for the next."""
    for (batches, touched), (_, following) in itertools.pairwise(itertools.chain(items, [(None, None)])):
        if touched and following and not touched.gradients:
            touched = touched._replace(coming=following.copies)
        yield batches, touched


class Cycle:
    """The n-gram rows that this rank reads between two updates of the table. Each has a slot."""

    def __init__(self, model: GPT, hp: Recipe, ranks: Ranks):
        self.table, self.signs = model.ngram_embed.data, model.signs
        self.add_ngrams = maybe_compiled(add_ngrams, hp)
        slots, D = cycle_slots(hp, ranks.world), hp.model_dim
        self.ids = torch.zeros(slots, dtype=torch.int32, device=ranks.device)
        self.sums = torch.zeros(slots, D, device=ranks.device)  # of gradients
        self.copies = self.table.new_zeros(slots, D) if ranks.world > 1 else None
        self.chunk = min(CHUNK_ROWS, slots)
        self.filled, self.saved = 0, None  # saved: ids and sums of a checkpoint, until they have slots
        self.coming = None  # rows for the next step, and the work

    def read(self, touched: TouchedRows) -> None:
        """Before a step: slots for the rows that it is the first to read and, of a table that ranks share, copies."""
        self.filled = touched.first + len(touched.ids)
        self.ids[touched.first : self.filled] = touched.ids
        if touched.copies:
            rows, work = self.coming or exchanged(self.table, touched.copies)
            wait(work)
            self.copies[touched.copies.received] = rows
        self.coming = exchanged(self.table, touched.coming) if touched.coming else None
        if self.saved:
            ids, sums = self.saved
            self.sums[torch.searchsorted(touched.ids, ids)] = sums
            self.saved = None


def exchanged(rows: Tensor, to: Exchange, dtype: torch.dtype | None = None) -> tuple[Tensor, dist.Work]:
    """Where the rows will be that come for those sent, in dtype if given, and the work."""
    sent = rows.index_select(0, to.sent).to(dtype or rows.dtype)
    part = sent.new_empty(len(to.received), sent.size(1))
    return part, dist.all_to_all_single(part, sent, to.receive_counts, to.send_counts, async_op=True)


def wait(work: dist.Work | None) -> None:
    """Until it is done; None is nothing to wait for."""
    if work is not None:
        work.wait()


def read_anywhere(table: Tensor, batch: Batch, ranks: Ranks) -> tuple[Batch, Tensor]:
    """Of a shared table, for validation: a copy of each n-gram row that a batch reads, and the batch with their places.
    Each rank puts its own among zeros for all ranks: simple, if too much traffic for training."""
    ids = batch.bigram_ids.new_empty(2 * ranks.world, len(batch.tokens))
    dist.all_gather_into_tensor(ids, batch.bigram_ids)
    own = (ids // len(table) == ranks.rank).flatten()
    rows = table.new_zeros(ids.numel(), table.size(1))
    rows[own] = table[ids.flatten()[own] % len(table)]
    copies = table.new_empty(batch.bigram_ids.numel(), table.size(1))
    dist.reduce_scatter_tensor(copies, rows)
    return batch._replace(bigram_ids=torch.arange(len(copies), device=table.device).view(2, -1)), copies

# ==== 9. Kernels: what PLAIN and HOPPER are made of, each kernel under its reference of the same signature ====

HOPPER_GPU = 9  # generation
FP8_CAPABILITY = (8, 9)


def gpu_generation(device: torch.device) -> int:
    """The first number of an NVIDIA GPU's compute capability; 0 of other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for the CPU 2, enough for Triton's interpreter to show mistakes."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def hopper_fits(hp: Recipe, device: torch.device) -> bool:
    """Whether HOPPER's operations work here."""
    return (triton is not None and gpu_generation(device) == HOPPER_GPU and hp.dtype == "bfloat16"
            and hp.head_dim.bit_count() == 1 and importlib.util.find_spec("quack") is not None)


def choose_ops(hp: Recipe) -> Ops:
    """The operations for hp.kernels and hp.attention as choose_backends left them."""
    plain = PLAIN._replace(mlp=recomputed_mlp) if hp.recompute else PLAIN
    return (HOPPER if hp.kernels == "hopper" else plain)._replace(attention=ATTENTION_BACKENDS[hp.attention]())


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on the CPU


def op(reference: Callable | None = None, shapes: Callable | None = None, cpu: bool = INTERPRETED,
       mutates: str | None = None) -> Callable:
    """Decorator: a custom operation whose kernel is the decorated function. On the CPU its numbers are those of the
    reference, which has the same signature; with cpu the kernel runs there, too. For a compiler's fake tensors the same
    function makes results but launches nothing, or `shapes` makes them. mutates: the argument that it changes."""
    def define(kernel: Callable) -> Callable:
        # without the tag, TorchInductor stores an input again for each of its readers
        operation = custom_op(f"speedrun::{kernel.__name__}", kernel, mutates_args=(mutates,) if mutates else (),
                              tags=[torch.Tag.flexible_layout], device_types=None if cpu else "cuda")
        operation.register_fake(shapes or kernel)
        if reference and not cpu:
            operation.register_kernel("cpu")(reference)
        return operation
    return define


def launch(kernel: Callable, first: Tensor, *more: object, **options: object) -> None:
    """Run a kernel, but not on fake tensors. A reference on these took a fifth of the start: it runs an operation for
    each of its lines, and a compiler asks for each use (records/2026-11-26_plain)."""
    if not isinstance(first, FakeTensor):
        kernel(first, *more, **options)


# --- Gates of heads and of value embeddings

def gates_reference(gate_in: Tensor, r: Tensor | None, ve_first: Tensor | None, w: Tensor,
                    w_value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gates of heads, sigmoid(gate_in w^T) [T, H] for gate_in [T, G], times r [T] if given, w [H, G]; and of values,
    [0, H] without w_value: up to VALUE_GATE_MAX, with ve_first [T, G/2], if given, as the second half of gate_in."""
    gate_in = gate_in if r is None else (r[:, None] * gate_in).to(gate_in.dtype)
    gate = torch.sigmoid(F.linear(gate_in, w))
    if w_value is None:
        return gate, gate.new_empty(0, len(w))
    gate_in = gate_in if ve_first is None else torch.cat([gate_in[:, : gate_in.size(1) // 2], ve_first], dim=1)
    return gate, VALUE_GATE_MAX * torch.sigmoid(F.linear(gate_in, w_value))


@jit
def gate_inputs(gate_in, stride, r, ve_first, ve_stride, rows, columns, inside, N: tl.constexpr):
    """What gates of heads see and what gates of values see, and the factor of the first; all fp32."""
    front = inside[:, None] & (columns < N)[None, :]
    x = tl.load(gate_in + rows[:, None] * stride + columns[None, :], mask=front, other=0.0).to(tl.float32)
    factor = tl.full(rows.shape, 1.0, tl.float32) if r is None else tl.load(r + rows, mask=inside, other=0.0)
    x *= factor[:, None]
    mixed = x
    if ve_first is not None:
        back = front & (columns >= N // 2)[None, :]
        v = tl.load(ve_first + rows[:, None] * ve_stride + columns[None, :] - N // 2, mask=back, other=0.0)
        mixed = tl.where((columns < N // 2)[None, :], x, v.to(tl.float32))
    return x, mixed, factor[:, None]


@jit
def gates_kernel(gate_in, stride, r, ve_first, ve_stride, w, w_value, gate, value_gate, T, MAX: tl.constexpr,
                 H: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: ROWS tokens."""
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside, used = rows < T, columns < N
    x, mixed, _ = gate_inputs(gate_in, stride, r, ve_first, ve_stride, rows, columns, inside, N)
    for head in tl.static_range(H):
        weight = tl.load(w + head * N + columns, mask=used, other=0.0).to(tl.float32)[None, :]
        tl.store(gate + rows * H + head, tl.sigmoid(tl.sum(x * weight, 1)), mask=inside)
        if w_value is not None:
            weight = tl.load(w_value + head * N + columns, mask=used, other=0.0).to(tl.float32)[None, :]
            tl.store(value_gate + rows * H + head, MAX * tl.sigmoid(tl.sum(mixed * weight, 1)), mask=inside)


@jit
def gates_backward_kernel(gate_in, stride, r, ve_first, ve_stride, w, w_value, gate, value_gate, dgate, dvalue_gate,
                          dgate_in, dve_first, dw, T, MAX: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
                          ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: ROWS tokens, whose part of the weights' gradients it stores."""
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside, used = rows < T, columns < N
    dw = dw + tl.program_id(0) * H * (1 if w_value is None else 2) * N + columns
    x, mixed, factor = gate_inputs(gate_in, stride, r, ve_first, ve_stride, rows, columns, inside, N)
    dx, dmixed = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for head in tl.static_range(H):
        weight = tl.load(w + head * N + columns, mask=used, other=0.0).to(tl.float32)[None, :]
        g = tl.load(gate + rows * H + head, mask=inside, other=0.0)
        dlogit = (tl.load(dgate + rows * H + head, mask=inside, other=0.0) * g * (1.0 - g))[:, None]
        dx += dlogit * weight
        tl.store(dw + head * N, tl.sum(dlogit * x, 0), mask=used)
        if w_value is not None:
            weight = tl.load(w_value + head * N + columns, mask=used, other=0.0).to(tl.float32)[None, :]
            g = tl.load(value_gate + rows * H + head, mask=inside, other=0.0)
            dlogit = tl.load(dvalue_gate + rows * H + head, mask=inside, other=0.0) * g * (1.0 - g / MAX)
            dmixed += dlogit[:, None] * weight
            tl.store(dw + (H + head) * N, tl.sum(dlogit[:, None] * mixed, 0), mask=used)
    mask = inside[:, None] & used[None, :]
    if ve_first is not None:
        to = dve_first + rows[:, None] * (N // 2) + columns[None, :] - N // 2
        tl.store(to, dmixed.to(dve_first.dtype.element_ty), mask=mask & (columns >= N // 2)[None, :])
        dmixed = tl.where((columns < N // 2)[None, :], dmixed, 0.0)
    dx = factor * (dx + dmixed)
    tl.store(dgate_in + rows[:, None] * N + columns[None, :], dx.to(dgate_in.dtype.element_ty), mask=mask)


GATE_ROWS = 256  # tokens of one program; of 64, both kernels take 2.5 in place of 1.95 ms of a stage-3 step (H200)


def gates_arguments(gate_in: Tensor, r: Tensor | None, ve_first: Tensor | None, w: Tensor,
                    w_value: Tensor | None) -> tuple[tuple, tuple]:
    """The first arguments of both kernels, and their constants."""
    assert gate_in.stride(1) == 1 and (ve_first is None or ve_first.stride(1) == 1) and w.is_contiguous()
    return (gate_in, gate_in.stride(0), r, ve_first, 0 if ve_first is None else ve_first.stride(0), w, w_value), (
        VALUE_GATE_MAX, *w.shape, GATE_ROWS, triton.next_power_of_2(w.size(1)))


@op(lambda *inputs: tuple(y.float() for y in gates_reference(*inputs)))
def gates(gate_in: Tensor, r: Tensor | None, ve_first: Tensor | None, w: Tensor,
          w_value: Tensor | None) -> tuple[Tensor, Tensor]:
    T, H = len(gate_in), len(w)
    gate, value_gate = (w.new_empty(n, H, dtype=torch.float32) for n in (T, 0 if w_value is None else T))
    inputs, constants = gates_arguments(gate_in, r, ve_first, w, w_value)
    launch(gates_kernel[(triton.cdiv(T, GATE_ROWS),)], *inputs, gate, value_gate, T, *constants)
    return gate, value_gate


@op()
def gates_backward(gate_in: Tensor, r: Tensor | None, ve_first: Tensor | None, w: Tensor, w_value: Tensor | None,
                   gate: Tensor, value_gate: Tensor, dgate: Tensor,
                   dvalue_gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate_in, of ve_first, and of both weights in parts [programs, H or 2 H, G] fp32."""
    (T, n), H, programs = gate_in.shape, len(w), triton.cdiv(len(gate_in), GATE_ROWS)
    dgate_in, dve_first = gate_in.new_empty(T, n), gate_in.new_empty(0 if ve_first is None else T, n // 2)
    dw = w.new_empty(programs, H if w_value is None else 2 * H, n, dtype=torch.float32)
    inputs, constants = gates_arguments(gate_in, r, ve_first, w, w_value)
    launch(gates_backward_kernel[(programs,)], *inputs, gate, value_gate, dgate.contiguous(),
           None if dvalue_gate is None else dvalue_gate.contiguous(), dgate_in, dve_first, dw, T, *constants)
    return dgate_in, dve_first, dw


def add_columns_reference(y: Tensor, c: Tensor) -> None:
    """y[:, :k] += c for y [m, n], c [m, k], in place: TorchInductor would pad c and read y twice."""
    y[:, : c.size(1)] += c


@jit
def add_columns_kernel(y, c, m, n, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask, to = (rows < m)[:, None] & (columns < COLUMNS)[None, :], y + rows[:, None] * n + columns[None, :]
    more = tl.load(c + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(to, (tl.load(to, mask=mask, other=0.0).to(tl.float32) + more).to(y.dtype.element_ty), mask=mask)


@op(add_columns_reference, mutates="y")
def add_columns(y: Tensor, c: Tensor) -> None:
    (m, n), k, rows = y.shape, c.size(1), 64
    assert y.is_contiguous() and c.stride(1) == 1
    launch(add_columns_kernel[(triton.cdiv(m, rows),)], y, c, m, n, c.stride(0), k, rows, triton.next_power_of_2(k))


class FirstColumns(torch.autograd.Function):
    """x [T, n] and its first k columns, whose gradient is added in place to the one that comes for x. That one must be
    x's alone: a single reader may not be an addition x + b, whose gradient is one tensor for both."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x[:, :k]

    @staticmethod
    def backward(ctx, dx: Tensor, dcolumns: Tensor):
        add_columns(dx, dcolumns)
        return dx, None


# --- Matrix products that do elementwise work before their result leaves the chip
# An RMSNorm before a product costs no pass of its own: norm(x) = r x with r = 1 / rms(x) of each row, and r multiplies
# what the product makes of x. r is no variable of differentiation: the classes below put its share into x's gradient.

def product_columns(kind: str) -> int:
    """Of a tile of 128 rows; both are tuned. root8, which stores most, takes 0.33 ms for 49,152 tokens with 128, and
    0.47 with 192 (H200)."""
    return 128 if kind == "root8" else 192


def epilogues(relu: Callable, square_root: Callable) -> dict[str, Callable]:
    """By kind, with these functions of PyTorch or of quack's compiler: what becomes of acc = a b [m, n], "D", in some
    kinds also transposed, "turned"; and "sums", two tensors whose products are summed over the columns of a tile.

    c, c1, c2, x [m, n], r, f [m, 1] and s, s0, s1, s2, t 0-dim. root: r times pre's gradient, for c = relu(pre)^2 and
    c's gradient acc. norm_grad: the gradient of what enters a norm by r and is read by a residual scaled by s. Those
    with 8 take FP8 numbers, whose scales are in t."""
    def squared(y):
        return {"D": y * y}

    def summed(y):
        return {"D": y, "sums": (y, y)}

    def root(acc, c, r):
        pre = square_root(c)
        y = 2.0 * r * acc * pre
        return {"D": y, "sums": (y, pre)}

    def turned(results):
        return {**results, "turned": results["D"]}

    return {  # a line each, by which quack knows its compiled kernels again
        "none": lambda acc: {"D": acc},
        "relu_square": lambda acc, r: squared(relu(acc * r)),
        "sum1": lambda acc, c, s0: summed(acc + s0 * c),
        "sum3": lambda acc, c, s0, c1, s1, c2, s2: summed(acc + s0 * c + s1 * c1 + s2 * c2),
        "root": root,
        "norm_grad": lambda acc, c, x, s, r: {"D": acc + s * c + r * x, "sums": (c, x)},
        "scaled8": lambda acc, t: {"D": t * acc},
        "rows8": lambda acc, r, t: {"D": t * r * acc},
        "relu_square8": lambda acc, t: turned(squared(relu(t * acc))),
        "sum8": lambda acc, c, s, t: summed(t * acc + s * c),
        "root8": lambda acc, c, t: turned(root(acc, c, t)),
        "norm_grad8": lambda acc, c, x, s, r, f, t: {"D": t * r * acc + s * c + f * x, "sums": (c, x)},
    }


@cache
def epilogue_results(kind: str) -> frozenset[str]:
    """The names of what a kind's epilogue makes, tried on numbers."""
    f = epilogues(abs, math.sqrt)[kind]
    return frozenset(f(*[1.0] * len(inspect.signature(f).parameters)))


def product_reference(kind: str, a: Tensor, b: Tensor, operands: list[Tensor],
                      dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The epilogue of that kind on a b, for a [m, k], b [k, n]: y [m, n] of dtype; its sums [m, tiles] fp32, or none
    [0, tiles]; and y^T [n, m], or none [0, m]. Of FP8 numbers a must be row-major and b column-major."""
    operands = [x.float() if x.dtype.itemsize == 1 else x[:, None] if x.dim() == 1 else x for x in operands]
    y = fp8_product(a, b, 1.0, torch.float32) if a.dtype.itemsize == 1 else a @ b
    results, columns = epilogues(F.relu, torch.sqrt)[kind](y, *operands), product_columns(kind)
    sums = y.new_empty(0, -(-y.size(1) // columns), dtype=torch.float32)
    if "sums" in results:
        first, second = results["sums"]
        terms = first.float() * second.float()
        sums = F.pad(terms, (0, -terms.size(1) % columns)).view(len(y), -1, columns).sum(2)
    # a copy: torch 2.11's Dynamo returns zero gradients for a result of an autograd function that .to left as it was
    y = to_fp8(results["D"], dtype) if dtype.itemsize == 1 else results["D"].to(dtype, copy=True)
    return y, sums, y.mT.contiguous() if "turned" in results else y.new_empty(0, len(y))


@cache
def quack_products() -> dict[str, tuple[list[str], Callable]]:
    """Operands' names and kernel of each kind, built around its epilogue by quack (Guo, Dao et al.; quack-kernels)."""
    import cutlass.cute as cute
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce

    def relu(x):
        return cute.arch.fmax(x, 0.0)

    def square_root(x):
        return cute.math.sqrt(x, fastmath=True)

    kernels = {}
    for name, f in epilogues(relu, square_root).items():
        f.__name__ = f.__qualname__ = name
        names, results = list(inspect.signature(f).parameters)[1:], epilogue_results(name)
        kind = gemm_epilogue(
            outputs=("turned",) * ("turned" in results), ops={x: ColVecLoad(x) for x in "rf" if x in names},
            reduces={"sums": ColVecReduce("sums", scaled=True)} if "sums" in results else None)(f)
        kernels[name] = names, partial(
            kind.gemm, tile_M=128, tile_N=product_columns(name), pingpong=True, cluster_M=2, b_kn=True,
            post_init_attrs=(("fp8_slow_accum", False),))  # FP8's sums stay in the tensor cores
    return kernels


def quack_product(a: Tensor, b: Tensor, kind: str, operands: list[Tensor], y: Tensor, sums: Tensor,
                  turned: Tensor) -> None:
    names, kernel = quack_products()[kind]
    more = {name: x[None] if x.dim() == 1 else x for name, x in zip(names, operands, strict=True)}
    more |= {name: x for name, x in dict(sums=sums, turned=turned.mT).items() if name in epilogue_results(kind)}
    kernel(a, b, y, more.pop("c", None), epi_args=more)


@op(product_reference, cpu=False)
def product(kind: str, a: Tensor, b: Tensor, operands: list[Tensor],
            dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), results = (len(a), b.size(1)), epilogue_results(kind)
    y = a.new_empty(m, n, dtype=dtype)
    sums = a.new_empty(m if "sums" in results else 0, -(-n // product_columns(kind)), dtype=torch.float32)
    turned = y.new_empty(n if "turned" in results else 0, m)
    launch(quack_product, a, b, kind, operands, y, sums, turned)
    return y, sums, turned


def inverse_rms(squares: Tensor, n: int) -> Tensor:
    """r [T] fp32 from sums of squares [T, parts] over rows of n numbers."""
    return torch.rsqrt(squares.sum(1) / n + FP32_EPS)


class FoldedNorm(torch.autograd.Function):
    """norm(x [T, D]) but for the factor r [T]: x. The sum of its readers' gradients comes with that factor."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor) -> Tensor:
        ctx.save_for_backward(x, r)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, r = ctx.saved_tensors
        x, dy = x.float(), g.float()
        return (dy - x * (r.square() * (dy * x).mean(1))[:, None]).to(g.dtype), None


def injections_backward_reference(x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor,
                                  grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x0, bigram, and of s0 and s1 in parts [parts, 2, n] fp32, from those of s0[i] x0 + s1[i] bigram."""
    dx0, dbigram = (sum(a * g for a, g in zip(s.unbind(), grads)).to(x0.dtype) for s in (s0, s1))
    ds = [torch.stack([(g.float() * x.float()).sum() for g in grads]) for x in (x0, bigram)]
    return dx0, dbigram, torch.stack(ds)[None]


@jit
def injections_kernel(x0, bigram, s0, s1, grads, dx0, dbigram, ds, T, D: tl.constexpr, N: tl.constexpr, PROGRAMS,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: COLUMNS of every PROGRAMS-th ROWS tokens. `grads` is a tuple of N."""
    program, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    a, b, ds0, ds1 = (), (), (), ()
    for i in tl.static_range(N):
        a += (tl.load(s0 + i),)
        b += (tl.load(s1 + i),)
        ds0 += (tl.zeros([ROWS, COLUMNS], tl.float32),)
        ds1 += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    for start in range(program * ROWS, T, PROGRAMS * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask, at = (rows < T)[:, None] & (columns < D)[None, :], rows.to(tl.int64)[:, None] * D + columns[None, :]
        x, y = tl.load(x0 + at, mask=mask, other=0.0), tl.load(bigram + at, mask=mask, other=0.0)
        x, y, dx, dy = x.to(tl.float32), y.to(tl.float32), tl.zeros_like(ds0[0]), tl.zeros_like(ds0[0])
        sums0, sums1 = (), ()
        for i in tl.static_range(N):
            g = tl.load(grads[i] + at, mask=mask, other=0.0).to(tl.float32)
            dx += a[i] * g
            dy += b[i] * g
            sums0 += (ds0[i] + g * x,)
            sums1 += (ds1[i] + g * y,)
        ds0, ds1 = sums0, sums1
        tl.store(dx0 + at, dx.to(dx0.dtype.element_ty), mask=mask)
        tl.store(dbigram + at, dy.to(dbigram.dtype.element_ty), mask=mask)
    to = ds + (program * tl.num_programs(1) + tl.program_id(1)) * 2 * N
    for i in tl.static_range(N):
        tl.store(to + i, tl.sum(ds0[i]))
        tl.store(to + N + i, tl.sum(ds1[i]))


@op(injections_backward_reference)
def injections_backward(x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor,
                        grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    (T, D), n, dx0, dbigram = x0.shape, len(grads), torch.empty_like(x0), torch.empty_like(bigram)
    rows, columns = 2, 256  # what is summed fits the registers
    programs, chunks = multiprocessors(x0.device), triton.cdiv(D, columns)
    ds = s0.new_empty(programs * chunks, 2, n)
    launch(injections_kernel[(programs, chunks)], x0, bigram, s0, s1, tuple(g.contiguous() for g in grads), dx0,
           dbigram, ds, T, D, n, programs, rows, columns, num_warps=4)
    return dx0, dbigram, ds


class Injections(torch.autograd.Function):
    """A stand-in, x0, for each sum s0[i] x0 + s1[i] bigram, which LinearSum adds in its product: so all gradients come
    last, in one kernel that reads x0 and bigram once and not in each layer."""

    @staticmethod
    def forward(ctx, x0: Tensor, bigram: Tensor, s0: Tensor, s1: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x0, bigram, s0, s1)
        return tuple(x0.view_as(x0) for _ in range(len(s0)))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        dx0, dbigram, ds = injections_backward(*ctx.saved_tensors, list(grads))
        return dx0, dbigram, *ds.sum(0).unbind()


class LinearSum(torch.autograd.Function):
    """x w^T + s[0] c + s0 x0 + s1 bigram, for which `added` takes the gradient, and r [T] of the result."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, c: Tensor, s: Tensor, added: Tensor, x0: Tensor, bigram: Tensor, s0: Tensor,
                s1: Tensor) -> tuple[Tensor, Tensor]:
        y, squares, _ = product("sum3", x, w.mT, [c, s[0], x0, s0, bigram, s1], x.dtype)
        r = inverse_rms(squares, y.size(1))
        ctx.mark_non_differentiable(r)
        ctx.save_for_backward(x, w, c, s)
        return y, r

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        x, w, c, s = ctx.saved_tensors
        dc, ds = (s[:, None] * dy).to(dy.dtype), (dy.float() * c.float()).sum(1)
        return product("none", dy, w, [], dy.dtype)[0], dy.mT @ x, dc, ds, dy, None, None, None, None


class ReluSquareMLP(torch.autograd.Function):
    """relu(r x up^T)^2 down + scale[0] x, and r [T] of it (So et al., Primer, arXiv 2109.08668). Keeps the hidden layer
    h [T, F], whose root is half the square's slope."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        h, _, _ = product("relu_square", x, up.mT, [r], x.dtype)
        y, squares, _ = product("sum1", h, down, [x, scale[0]], x.dtype)
        new_r = inverse_rms(squares, y.size(1))
        ctx.mark_non_differentiable(new_r)
        ctx.save_for_backward(x, r, up, down, scale, h)
        return y, new_r

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        x, r, up, down, scale, h = ctx.saved_tensors
        d_down = h.mT @ dy
        dpre, sums, _ = product("root", dy, down.mT, [h, r], x.dtype)  # [T, F], times r
        # FoldedNorm's gradient of g = dpre up needs the sum of g x, which is that of dpre (x up^T): known before g is
        factor = -r / x.size(1) * sums.sum(1)
        dx, d_scale, _ = product("norm_grad", dpre, up, [dy, x, scale[0], factor], x.dtype)
        return dx, None, dpre.mT @ x, d_down, d_scale.sum(1)


# --- Products in FP8 (parts of record #92)
# Tensor cores multiply FP8 numbers only along contiguous rows, so a product's gradients need its operands transposed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_MAX, E5M2_MAX = torch.finfo(E4M3).max, torch.finfo(E5M2).max
# Of the numbers that are stored as 1; all but weights' are known beforehand. Rows after a norm are at most sqrt(D), 28;
# relu^2 is cut at 448, below 2^-6 loses precision, and has the unit 1, as root8 takes the root of what is stored;
# gradients, as e5m2, lie between 2^-29 and 7 times the loss scale
NORMED_SCALE, HIDDEN_SCALE, GRADIENT_SCALE = 2.0**-4, 1.0, 2.0**-13


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in FP8; what is too large becomes the largest number."""
    largest = torch.finfo(dtype).max
    return x.float().clamp(-largest, largest).to(dtype)


def fp8_product(a: Tensor, b: Tensor, scale: Tensor | float, out: torch.dtype) -> Tensor:
    """scale * (a @ b) for FP8 a [m, k] row-major and b [k, n] column-major, which is what the tensor cores take."""
    scale, one = (x if isinstance(x, Tensor) else a.new_full((), x, dtype=torch.float32) for x in (scale, 1.0))
    return torch._scaled_mm(a, b, scale_a=scale, scale_b=one, out_dtype=out)


def quantized_reference(x: Tensor, r: Tensor | None, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [m, n], each row times r [m] if given, in units of scale as FP8, and that transposed, [n, m]."""
    x = x if r is None else (r[:, None] * x).to(x.dtype)
    y = to_fp8(x.float() / scale, dtype)
    return y, y.mT.contiguous()


@jit
def quantized_kernel(x, r, y, turned, m, n, factor, MAX: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a tile. Without y, x is FP8 already and only turned."""
    tiles_m = tl.cdiv(m, BLOCK)
    rows = (tl.program_id(0) % tiles_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (tl.program_id(0) // tiles_m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    v = tl.load(x + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
    if r is not None:
        v = (v.to(tl.float32) * tl.load(r + rows, mask=rows < m, other=0.0)[:, None]).to(v.dtype)
    if y is not None:
        v = tl.clamp(v.to(tl.float32) * factor, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
        v = v.to(DTYPE).to(tl.int8, bitcast=True)
        tl.store(y + rows[:, None] * n + columns[None, :], v, mask=inside)
    tl.store(turned + columns[:, None] * m + rows[None, :], tl.trans(v), mask=tl.trans(inside))


@op(quantized_reference, cpu=False)  # Triton's interpreter cuts numbers to FP8 and does not round them
def quantized(x: Tensor, r: Tensor | None, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (m, n), block = x.shape, 128  # as of transposed
    y, turned = x.new_empty(m, n, dtype=dtype), x.new_empty(n, m, dtype=dtype)
    launch(quantized_kernel[(triton.cdiv(m, block) * triton.cdiv(n, block),)], x.contiguous(), r, y.view(torch.int8),
           turned.view(torch.int8), m, n, 1 / scale, torch.finfo(dtype).max,
           tl.float8e4nv if dtype == E4M3 else tl.float8e5, block, num_warps=8)
    return y, turned


def fp8_operations(fast: bool) -> tuple[Callable, Callable]:
    """quantized and product, as kernels or in PyTorch."""
    return (quantized, product) if fast else (quantized_reference, product_reference)


def fp8_weight(w: Tensor, x_scale: float, unit: float, scale: float = 0.0, layers: Tensor | None = None) -> Fp8Weight:
    """FP8 copies of a matrix or of a bank [K, m, n], for products with numbers of x_scale. With scale 0 the largest
    number of a matrix, or of all of one layer if a bank's `layers` [K] are given, is the format's."""
    if scale == 0:
        largest = w.abs().amax((-2, -1)).float().clamp_min(1e-12)
        scale = (largest if layers is None else torch.where(layers[:, None] == layers, largest, 0).amax(1)) / FP8_MAX
    bits = to_fp8(w.float() / (scale[..., None, None] if isinstance(scale, Tensor) else scale), E4M3)
    return Fp8Weight(bits, bits.mT.contiguous(), x_scale * scale, unit * scale, unit)


def fp8_linear(x: Tensor, r: Tensor | None, w: Fp8Weight, fast: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(r x) w^T for x [T, D], whose rows are normalised by r [T] if given, w [n, D]; and what its gradients need.
    fast: by kernels."""
    quantize, multiply = fp8_operations(fast)
    x8, x8_turned = quantize(x, r, NORMED_SCALE, E4M3)
    y, _, _ = multiply("scaled8", x8, w.bits.mT, [w.forward], x.dtype)
    return y, (x8_turned, w.turned, w.backward)


def fp8_linear_gradients(dy8: Tensor, dy8_turned: Tensor, r: Tensor | None, kept: list[Tensor], unit: float,
                         dtype: torch.dtype, fast: bool) -> tuple[Tensor, Tensor]:
    """Gradients of fp8_linear's x, times r for a FoldedNorm, and w, from that of its result [T, n] in units."""
    x8_turned, w8_turned, scale = kept
    _, multiply = fp8_operations(fast)
    kind, operands = ("scaled8", []) if r is None else ("rows8", [r])
    dx, _, _ = multiply(kind, dy8, w8_turned.mT, [*operands, scale], dtype)
    return dx, fp8_product(dy8_turned, x8_turned.mT, unit * NORMED_SCALE, dtype)


class Fp8Linear(torch.autograd.Function):
    """F.linear(x, w) in FP8, in PyTorch; x [T, D] is normalised."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, fp8: Fp8Weight) -> Tensor:
        y, kept = fp8_linear(x, None, fp8, False)
        ctx.save_for_backward(*kept)
        ctx.unit = fp8.unit
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        dy8 = quantized_reference(dy, None, ctx.unit, E5M2)
        return *fp8_linear_gradients(*dy8, None, ctx.saved_tensors, ctx.unit, dy.dtype, False), None


class Fp8MLP(torch.autograd.Function):
    """ReluSquareMLP in FP8. fast: by kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor, up: Tensor, down: Tensor, scale: Tensor, fp8: list[Fp8Weight],
                fast: bool) -> tuple[Tensor, Tensor]:
        (quantize, multiply), (up8, down8) = fp8_operations(fast), fp8
        x8, x8_turned = quantize(x, r, NORMED_SCALE, E4M3)
        h8, _, h8_turned = multiply("relu_square8", x8, up8.bits.mT, [up8.forward], E4M3)  # [T, F]
        y, squares, _ = multiply("sum8", h8, down8.turned.mT, [x, scale[0], down8.forward], x.dtype)
        new_r = inverse_rms(squares, y.size(1))
        ctx.mark_non_differentiable(new_r)
        weights = up8.turned, up8.backward, down8.bits, down8.forward
        ctx.save_for_backward(x, r, scale, x8_turned, h8, h8_turned, *weights)
        ctx.unit, ctx.fast = up8.unit, fast
        return y, new_r

    @staticmethod
    def backward(ctx, dy: Tensor, _):
        x, r, scale, x8_turned, h8, h8_turned, up8_turned, up_scale, down8, down_scale = ctx.saved_tensors
        (quantize, multiply), unit = fp8_operations(ctx.fast), ctx.unit
        dy8, dy8_turned = quantize(dy, None, unit, E5M2)
        dpre8, sums, dpre8_turned = multiply("root8", dy8, down8.mT, [h8, down_scale], E5M2)  # [T, F], in units
        factor = -unit / x.size(1) * r.square() * sums.sum(1)  # as in ReluSquareMLP
        dx, d_scale, _ = multiply("norm_grad8", dpre8, up8_turned.mT, [dy, x, scale[0], r, factor, up_scale], x.dtype)
        d_up = fp8_product(dpre8_turned, x8_turned.mT, unit * NORMED_SCALE, x.dtype)
        d_down = fp8_product(h8_turned, dy8_turned.mT, unit * HIDDEN_SCALE, x.dtype)
        return dx, None, d_up, d_down, d_scale.sum(1), None, None


# --- What attention reads: QK norm, rotary embedding, key offset, value-embedding mix

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs in the first half of the last dim; the second half carries no position."""
    half, rest = x.chunk(2, dim=-1)
    a, b = half.unflatten(-1, (-1, 2)).unbind(-1)  # [..., d/4]
    return torch.cat([torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2), rest], dim=-1)


def attention_inputs_reference(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor,
                               sin: Tensor, paired: bool, key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [T, H, d] from the projection qkv [T, 3, H, d], which lacks the factor r [T] if given. q and k are
    normalised and rotated by cos, sin [S, d/4]: by position t of a segment, or on paired layers, with cos, sin
    [2S, d/4], head 2m by 2t and head 2m+1 by 2t+1. key_offset moves the un-rotated half of each key one position ahead,
    across documents; position 0 keeps its own. v gains value embedding ve [T, H d], if any, times gate [T, H] or 1."""
    (T, _, H, d), n = qkv.shape, 2 if paired else 1
    q, k, v = qkv.unbind(1)
    S = len(cos) // n
    cos, sin = (table.view(S, 1, n, d // 4) for table in (cos, sin))
    q, k = (rotate(norm(x).reshape(T // S, S, H // n, n, d), cos, sin).view(T, H, d) for x in (q, k))
    if key_offset:
        still = k[..., d // 2 :].view(T // S, S, H, d // 2)
        k = torch.cat([k[..., : d // 2], torch.cat([still[:, :1], still[:, :-1]], dim=1).view(T, H, d // 2)], dim=-1)
    v = v if r is None else (r[:, None, None] * v).to(v.dtype)  # q and k are normalised
    if ve is None:
        return q, k, v.contiguous()
    ve = ve.view(T, H, d)
    return q, k, (v + (ve if gate is None else gate[..., None] * ve)).to(v.dtype)


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
                            D: tl.constexpr, PAIRED: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr):
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
    if r is not None:
        value = value.to(tl.float32) * tl.load(r + rows, mask=inside, other=0.0)[:, None]
    to = rows[:, None] * (H * D) + head * D + wide
    if ve is not None:
        g = tl.load(gate + rows * H + head, mask=inside, other=0.0).to(tl.float32)[:, None]
        value = value.to(tl.float32) + g * tl.load(ve + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(v + to, value.to(v.dtype.element_ty), mask=mask)


@jit
def store_gradient(x, qkv, out, turned, rows, columns, T, N: tl.constexpr, per_unit, MAX: tl.constexpr = E5M2_MAX):
    """x, of qkv's type, to those places of out [T, N]; with turned [N, T] to both, as e5m2, up to MAX, in units."""
    x, to, mask = x.to(qkv.dtype.element_ty), rows[:, None] * N + columns, rows < T
    if turned is not None:
        x = tl.clamp(x.to(tl.float32) * per_unit, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float8e5).to(tl.int8, bitcast=True)
        tl.store(turned + tl.trans(columns.to(tl.int64)) * T + rows[None, :], tl.trans(x), mask=mask[None, :])
    tl.store(out + to, x, mask=mask[:, None])


@jit
def attention_inputs_backward_kernel(qkv, r, ve, gate, cos, sin, dq, dk, dv, dqkv, turned, dve, dgate, T, S, per_unit,
                                     EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAIRED: tl.constexpr,
                                     OFFSET: tl.constexpr, ROWS: tl.constexpr):
    head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, half, position = rows < T, tl.arange(0, D // 2)[None, :], rows % S
    mask = inside[:, None]
    c, s = position_angles(cos, sin, position, head, inside, D, PAIRED)
    at = rows[:, None] * (H * D) + head * D + half
    for part in tl.static_range(2):  # q, k
        columns = (part * H + head) * D + half
        front, back, own = normalised(qkv + rows[:, None] * (3 * H * D) + columns, mask, D, EPS)
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
        store_gradient(own * (dfront - front * mean), qkv, dqkv, turned, rows, columns, T, 3 * H * D, per_unit)
        store_gradient(own * (dback - back * mean), qkv, dqkv, turned, rows, columns + D // 2, T, 3 * H * D, per_unit)
    wide = tl.arange(0, D)[None, :]
    at = rows[:, None] * (H * D) + head * D + wide
    dvalue = tl.load(dv + at, mask=mask, other=0.0).to(tl.float32)
    scaled = dvalue if r is None else dvalue * tl.load(r + rows, mask=inside, other=0.0)[:, None]
    store_gradient(scaled, qkv, dqkv, turned, rows, (2 * H + head) * D + wide, T, 3 * H * D, per_unit)
    if ve is not None:
        g = tl.load(gate + rows * H + head, mask=inside, other=0.0).to(tl.float32)[:, None]
        embedded = tl.load(ve + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dve + at, (g * dvalue).to(dve.dtype.element_ty), mask=mask)
        tl.store(dgate + rows * H + head, tl.sum(embedded * dvalue, 1).to(dgate.dtype.element_ty), mask=inside)


ATTENTION_INPUT_ROWS = 16  # tokens of one program; 32 where it stores columns, as memory takes 32 bytes at once


@op(attention_inputs_reference)
def attention_inputs(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor, sin: Tensor,
                     paired: bool, key_offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, _, H, d = qkv.shape
    q, k, v = (qkv.new_empty(T, H, d) for _ in range(3))
    launch(attention_inputs_kernel[(H, triton.cdiv(T, ATTENTION_INPUT_ROWS))], qkv, r, ve, gate, cos, sin, q, k, v, T,
           len(cos) // (1 + paired), FP32_EPS, H, d, paired, key_offset, ATTENTION_INPUT_ROWS)
    return q, k, v


@op()
def attention_inputs_backward(qkv: Tensor, r: Tensor | None, ve: Tensor | None, gate: Tensor | None, cos: Tensor,
                              sin: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, paired: bool, key_offset: bool,
                              unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv [T, 3 H d], ve and gate; the last two are empty without a value embedding. That of qkv is e5m2
    in these units, followed by its transpose; with unit 0 it is of qkv's type, followed by nothing."""
    (T, _, H, d), mix, fp8 = qkv.shape, ve is not None, unit > 0
    dqkv = qkv.new_empty(T, 3 * H * d, dtype=E5M2 if fp8 else qkv.dtype)
    turned, dve = dqkv.new_empty(3 * H * d if fp8 else 0, T), qkv.new_empty(T if mix else 0, H * d)
    dgate = torch.empty_like(gate) if mix else qkv.new_empty(0, H)
    dq, dk, dv = dq.contiguous(), dk.contiguous(), dv.contiguous()
    out = (dqkv.view(torch.int8), turned.view(torch.int8)) if fp8 else (dqkv, None)
    rows = 32 if fp8 else ATTENTION_INPUT_ROWS
    launch(attention_inputs_backward_kernel[(H, triton.cdiv(T, rows))], qkv, r, ve, gate, cos, sin, dq, dk, dv, *out,
           dve, dgate, T, len(cos) // (1 + paired), 1 / unit if fp8 else 1.0, FP32_EPS, H, d, paired, key_offset, rows)
    return dqkv, turned, dve, dgate


WEIGHT_GRAD_ROWS = 1536  # tuned (H200): cuBLAS makes 2,304 x 768 in 0.259 ms, as 1,536 + 768 rows in 0.242


class AttentionInputs(torch.autograd.Function):
    """plain_attention_inputs of a FoldedNorm x [T, D]. gated_by_ve: see value_gate_sees_ve."""

    @staticmethod
    def forward(ctx, x: Tensor, r: Tensor, w: Tensor, w_gate: Tensor, w_value: Tensor | None, ve: Tensor | None,
                cos: Tensor, sin: Tensor, paired: bool, key_offset: bool, gated_by_ve: bool,
                fp8: Fp8Weight | None) -> tuple[Tensor, ...]:
        first = ve[:, : GATE_INPUTS // 2] if gated_by_ve else None
        gate, value_gate = gates(x[:, :GATE_INPUTS], r, first, w_gate, w_value)
        qkv, kept = fp8_linear(x, r, fp8, True) if fp8 else (product("none", x, w.mT, [], x.dtype)[0], ())
        qkv = qkv.view(len(x), 3, -1, 4 * cos.size(1))
        mix = torch.ones_like(gate) if w_value is None else value_gate
        q, k, v = attention_inputs(qkv, None if fp8 else r, ve, mix, cos, sin, paired, key_offset)
        ctx.save_for_backward(x, r, w, w_gate, w_value, ve, cos, sin, qkv, gate, mix, *kept)
        ctx.options = paired, key_offset, gated_by_ve, fp8.unit if fp8 else 0.0
        return q, k, v, gate

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor):
        x, r, w, w_gate, w_value, ve, cos, sin, qkv, gate, mix, *kept = ctx.saved_tensors
        paired, key_offset, gated_by_ve, unit = ctx.options
        du, du_turned, dve, dmix = attention_inputs_backward(
            qkv, None if unit else r, ve, mix, cos, sin, dq, dk, dv, paired, key_offset, unit)
        if unit:
            dx, dw = fp8_linear_gradients(du, du_turned, r, kept, unit, x.dtype, True)
        else:
            # first: cuBLAS gives autograd's thread the CUDA context that tensor maps need. Compiled, no part is copied
            dw = torch.cat([part.mT @ x for part in du.split(WEIGHT_GRAD_ROWS, dim=1)])
            dx, _, _ = product("none", du, w, [], x.dtype)
        first = ve[:, : GATE_INPUTS // 2] if gated_by_ve else None
        dgate_in, dve_first, dw_gates = gates_backward(
            x[:, :GATE_INPUTS], r, first, w_gate, w_value, gate, mix, dgate, None if w_value is None else dmix)
        add_columns(dx, dgate_in)
        if first is not None:
            add_columns(dve, dve_first)
        dw_gate, dw_value = dw_gates.sum(0).to(w_gate.dtype).split([len(w_gate), dw_gates.size(1) - len(w_gate)])
        return dx, None, dw, dw_gate, None if w_value is None else dw_value, None if ve is None else dve, *[None] * 6


# --- Head: loss of logits, transposes, and product, loss and gradient at once

def softcapped_mtp_loss_reference(logits: Tensor, targets: Tensor, weights: Tensor, grad_dtype: torch.dtype,
                                  grad_scale: float, cap: float, shift: float, width: float) -> tuple[Tensor, Tensor]:
    """Multi-token cross entropy [T] fp32 on logits [T, V] capped as z = cap * sigmoid((logit + shift) / width), and
    d sum(loss) / d logits / grad_scale [T, V]. A position predicts its targets [T, k], with -1 for none, with weights
    [k]. z lies in (0, cap), so the softmax needs no pass for its maximum: cap itself is subtracted."""
    u = torch.sigmoid((logits.float() + shift) / width)  # [T, V]; z = cap * u
    e = torch.exp(cap * u - cap)
    total = e.sum(dim=1)  # [T]
    lse = total.log() + cap
    column = torch.arange(logits.size(1), device=logits.device)
    weights = torch.where(targets >= 0, weights, 0.0)  # [T, k]; below, a target of -1 matches no column
    loss = (weights * (lse[:, None] - cap * u.gather(1, targets.clamp_min(0)))).sum(1)
    hits = sum(w[:, None] * (column == target[:, None]) for w, target in zip(weights.unbind(1), targets.unbind(1)))
    dz = (weights.sum(1) / total)[:, None] * e - hits
    grad = dz * (cap / width / grad_scale) * u * (1 - u)
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
def mtp_loss_kernel(logits, targets, weights, total, grad, T, V: tl.constexpr, scale, HALF: tl.constexpr,
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
            mass += tl.where(tl.load(targets + row * K + j) >= 0, tl.load(weights + j), 0.0)
        tl.store(total + row, row_total)
        kept, slope, before = fresh, 0.25 * scale * mass / row_total, row
    for i in tl.static_range(BLOCKS):
        tl.store(grad + before.to(tl.int64) * V + i * BLOCK + columns,
                 (slope * unpacked(kept[i], PACK)).to(grad.dtype.element_ty), mask=i * BLOCK + columns < V)


@jit
def target_kernel(logits, targets, weights, total, loss, grad, T, V, scale, CAP: tl.constexpr, HALF: tl.constexpr,
                  SHIFT: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Each row's loss, and the targets' own columns of the gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, at = row < T, row.to(tl.int64) * V
    sums = tl.load(total + row, mask=inside, other=1.0)
    mass, row_loss, lse = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.log(sums) + CAP
    for j in tl.static_range(K):
        mass += tl.where(tl.load(targets + row * K + j, mask=inside, other=-1) >= 0, tl.load(weights + j), 0.0)
    for j in tl.static_range(K):
        target, hits = tl.load(targets + row * K + j, mask=inside, other=-1), tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(K):  # a token can be several of the targets
            same = tl.load(targets + row * K + i, mask=inside, other=-1) == target
            hits += tl.where(same, tl.load(weights + i), 0.0)
        seen = target >= 0
        t, e = capped(tl.load(logits + at + target, mask=seen, other=0.0).to(tl.float32), HALF, SHIFT, WIDTH, False)
        row_loss += tl.where(seen, tl.load(weights + j), 0.0) * (lse - 0.5 * CAP - 0.5 * CAP * t)
        g = 0.25 * scale * (mass / sums * e - hits) * (1.0 - t * t)
        tl.store(grad + at + target, g.to(grad.dtype.element_ty), mask=seen)
    tl.store(loss + row, row_loss, mask=inside)


@op(softcapped_mtp_loss_reference)
def softcapped_mtp_loss(logits: Tensor, targets: Tensor, weights: Tensor, grad_dtype: torch.dtype, grad_scale: float,
                        cap: float, shift: float, width: float) -> tuple[Tensor, Tensor]:
    (T, V), K, half = logits.shape, len(weights), 0.5 * cap * math.log2(math.e)
    loss, grad = logits.new_empty(T, dtype=torch.float32), logits.new_empty(T, V, dtype=grad_dtype)
    fast = grad_dtype.itemsize == 1 and logits.is_cuda  # e5m2 has two bits of mantissa: the errors are lost in it
    pack, total, scale = logits.dtype == torch.bfloat16, torch.empty_like(loss), cap / width / grad_scale
    assert grad_dtype == torch.float32 if not pack else V % 2 == 0 and grad_dtype.itemsize < 4  # kept as bf16 pairs
    assert targets.shape == (T, K) and targets.is_contiguous()
    programs, block, rows = min(T, multiprocessors(logits.device)), 4096, 64  # of a sweep on H200, with 16 warps
    launch(mtp_loss_kernel[(programs,)], logits.view(torch.int32) if pack else logits, targets, weights, total, grad,
           T, V, scale, half, shift, width, K, fast, pack, programs, block, block // 2 if pack else block,
           num_warps=16)
    launch(target_kernel[(triton.cdiv(T, rows),)], logits, targets, weights, total, loss, grad, T, V, scale, cap, half,
           shift, width, K, rows, num_warps=2)
    return loss, grad


@op(lambda src: src.mT.contiguous())
def transposed(src: Tensor) -> Tensor:
    """src^T for FP8 src [m, n], contiguous [n, m]."""
    (m, n), block = src.shape, 128  # of a sweep on H200, with 8 warps
    dst = src.new_empty(n, m)
    src8, dst8 = src.view(torch.int8), dst.view(torch.int8)  # Triton need not know the type
    launch(quantized_kernel[(triton.cdiv(m, block) * triton.cdiv(n, block),)], src8, None, None, dst8, m, n, 1.0,
           MAX=None, DTYPE=None, BLOCK=block, num_warps=8)
    return dst


X_SCALE, W_SCALE, GRAD_SCALE = 100 / FP8_MAX, 1.6 / FP8_MAX, 0.75 / FP8_MAX  # tuned: a step of the format's grid
PLAIN_HEAD_ROWS = 4096  # tokens whose logits the plain head holds at a time: 0.8 GB for each fp32 copy


def head_gradients(x: Tensor, w: Tensor, columns: Tensor | None, targets: Tensor, weights: Tensor,
                   cap: tuple[float, ...], fp8: Fp8Weight | None, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of HeadLoss over these columns of w, or all, and its gradients of x and of the columns."""
    loss_of = softcapped_mtp_loss if fast else softcapped_mtp_loss_reference
    turn = transposed if fast else lambda y: y.T.contiguous()
    rows = len(x) if fast else PLAIN_HEAD_ROWS
    if fp8 and columns is not None:
        gathered = fp8.turned[columns]  # whole rows
        fp8 = fp8._replace(bits=turn(gathered), turned=gathered)
    elif columns is not None:
        w = w[:, columns]
    scale = x.new_full((), fp8.forward, dtype=torch.float32) if fp8 else None

    total, dx, dw = 0.0, [], None
    for chunk, ahead in zip(x.split(rows), targets.split(rows)):
        if fp8:
            x8 = (chunk / X_SCALE).to(E4M3)
            # stored while the next tile is computed: 3.29 ms, where cuBLAS takes 3.66 (H200). Plain, no fp32 logits
            logits = (product("scaled8", x8, fp8.turned.mT, [scale], torch.bfloat16)[0] if fast else
                      fp8_product(x8, fp8.turned.mT, scale, torch.bfloat16))  # [rows, V]
            loss, grad = loss_of(logits, ahead, weights, E5M2, fp8.unit, *cap)
            dx.append(fp8_product(grad, fp8.bits.mT, fp8.backward, x.dtype))
            part = fp8_product(turn(x8), turn(grad).T, fp8.unit * X_SCALE, w.dtype)
        else:
            loss, grad = loss_of(chunk @ w, ahead, weights, x.dtype, 1.0, *cap)
            dx.append(grad @ w.T)
            part = chunk.T @ grad
        total = total + loss.sum()
        dw = part if dw is None else dw.float() + part
    return total, torch.cat(dx), dw


class HeadLoss(torch.autograd.Function):
    """sum over positions of softcapped_mtp_loss(x w): product, loss and both gradients at once, so that no logits are
    kept.

    x [T, D], w [D, V], candidates [n, classes], targets [T, k], weights [k] -> 0-dim fp32. The softmax of each of n
    segments is over its candidates, or over all columns of w if there are none. With fp8, the copies of w, the products
    run as e4m3 x e4m3 forward and e4m3 x e5m2 backward with fixed scales. fast: by kernels.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, candidates: Tensor, targets: Tensor, weights: Tensor,
                cap: tuple[float, ...], fp8: Fp8Weight | None, fast: bool):
        more = weights, cap, fp8, fast
        if candidates.size(1) == 0:
            total, dx, dw = head_gradients(x, w, None, targets, *more)
        else:
            total, dx, dw = 0.0, [], torch.zeros_like(w, dtype=torch.float32)
            n = len(candidates)
            for part, columns, ahead in zip(x.chunk(n), candidates, targets.chunk(n)):
                loss, dx_part, dw_part = head_gradients(part, w, columns, ahead, *more)
                total = total + loss
                dx.append(dx_part)
                dw.index_add_(1, columns, dw_part.float())
            dx = torch.cat(dx)
        ctx.save_for_backward(dx, dw.to(w.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        dx, dw = ctx.saved_tensors
        return grad_loss * dx, grad_loss * dw, *[None] * 6


# --- Gradients of embedding tables

def scatter_add_rows_reference(rows: Tensor, ids: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    """out[ids[i]] += rows[i] for rows [T, D], ids [T] int32, out [table rows, D] fp32, in place. order [T] int32, a
    permutation that makes equal ids neighbours, changes the speed only."""
    out.index_add_(0, ids, rows.to(out.dtype))


@jit
def scatter_add_kernel(rows, ids, order, out, T, D, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: COUNT rows, all in flight at once. Neighbours that go to one row of the table go there as a sum."""
    columns, first = tl.arange(0, BLOCK), tl.program_id(0) * COUNT
    mask, ats, values = columns < D, (), ()
    for i in tl.static_range(COUNT):
        row, inside = first + i, first + i < T
        row = tl.load(order + row, mask=inside, other=0).to(tl.int64) if order is not None else row.to(tl.int64)
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
    (T, D), count = rows.shape, 16
    blocks, columns = triton.cdiv(T, count), triton.next_power_of_2(D)
    scatter_add_kernel[(blocks,)](rows, ids, order, out, T, D, count, columns, num_warps=4)


# ==== 10. Attention: attention(q, k, v, cu_seqlens, max_len, window, scale, gate) with interchangeable backends ====

REFERENCE_BLOCK = 256  # queries at a time, so that the mask stays small
GATE_MIN = 1e-30  # what a gate counts as at least where its output is divided by it again


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """y [T, h, d], each head times gate [T, h] if given."""
    return y if gate is None else (gate[..., None] * y).to(y.dtype)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int, scale: float,
                        gate: Tensor | None = None) -> Tensor:
    """Causal attention inside documents with a left window, in plain PyTorch: a query sees itself and the `window`
    tokens before it in its document. q, k, v, the result [T, h, d], times gate [T, h] if given; cu_seqlens int32,
    document ends from 0 to T, padded with T. max_len, the longest document, is for other backends."""
    T = len(q)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, h, T, d]
    position = torch.arange(T, device=q.device)
    document = torch.searchsorted(cu_seqlens, position.to(cu_seqlens.dtype), right=True)
    out = []
    for lo in range(0, T, REFERENCE_BLOCK):
        query, key = slice(lo, lo + REFERENCE_BLOCK), slice(max(lo - window, 0), lo + REFERENCE_BLOCK)
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


def flash4_options(cu_seqlens: Tensor, max_len: int, window: Tensor, scale: float) -> dict[str, object]:
    """What the package calls the documents, a window of Windows.at_run_time and the scale, both in its units."""
    tokens, longest, softmax_scale = window.tolist()
    max_len *= int(longest)
    return dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_len, max_seqlen_k=max_len,
                softmax_scale=scale * softmax_scale, causal=True, window_size_left=int(tokens), window_size_right=0)


@op(shapes=lambda q, k, v, *_: (torch.empty_like(q), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)))
def flash4(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu_seqlens: Tensor, max_len: int, window: Tensor,
           scale: float) -> tuple[Tensor, Tensor]:
    """Output times gate [T, h], and log-sum-exp [h, T] fp32. window: as of Windows.at_run_time."""
    from flash_attn.cute import interface

    options = flash4_options(cu_seqlens, max_len, window, scale)
    kernel, kept = gated_flash4()
    lse = gate.mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    with patch.object(interface, "FlashAttentionForwardSm90", kernel), patch.object(
            interface._flash_attn_fwd, "compile_cache", kept):
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, lse=lse, return_lse=True, **options)
    return out, lse


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
    """Sums [T, h] fp32 over each head of dout times the output before the gate, from out, dout [T, h, d], gate [T, h]:
    the first part of flash4's backward. It also writes for padded rows, where document i begins at block
    floor(cu_seqlens[i] / block) + i: the sums [h, rows], lse2 = log2(e) (lse - log(gate)) [h, rows] from lse [h, T],
    and zeros into `zero` [h, rows d], where the package then sums q's gradient. Past a document's end, in its last
    block, sums are 0 and lse2 infinite."""
    (T, h, d), room, documents = out.shape, sums.size(1), len(cu_seqlens) - 1
    assert all(x.is_contiguous() for x in (out, dout, lse, cu_seqlens)) and zero.size(1) == room * d
    dots = lse.new_empty(T, h)
    flash4_preprocess_kernel[(room // block, h)](
        out, dout, lse, gate.contiguous(), cu_seqlens, sums, lse2, zero, dots, T, room, math.log2(math.e), GATE_MIN,
        documents, h, d, block, triton.next_power_of_2(documents))
    return dots


@op(shapes=lambda q, k, v, *_: (
    torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(q.shape[:2], dtype=torch.float32)))
def flash4_backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, gate: Tensor, cu_seqlens: Tensor,
        max_len: int, window: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of flash4's q, k, v and gate (fp32) from its results and the gradient dout of out. flash4_preprocess
    takes the place of the package's first kernel, which would not hand out the sums."""
    from flash_attn.cute import interface

    options = flash4_options(cu_seqlens, max_len, window, scale)
    dots = []

    def preprocess(out, dout, sums, lse, lse2, zero, cu_seqlens, _used, _dlse, _dtype, _d, _d_v, block, **_):
        dots.append(flash4_preprocess(out, dout, lse, gate, cu_seqlens, block, sums, lse2, zero))

    with patch.object(interface, "_bwd_preprocess", preprocess):
        dq, dk, dv, *_ = interface._flash_attn_bwd(q, k, v, out, dout.contiguous(), lse, **options)
    return dq, dk, dv, *dots


class Flash4(torch.autograd.Function):
    """attention_flash4. The gradients of q, k and v are linear in the softmax's weights exp(score - lse), so taking
    log(gate) from lse multiplies them by the gate, without a pass over dy. The gate's own: flash4_preprocess's sums."""

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
        return *grads, dgate.to(gate.dtype), *[None] * 4


def attention_flash4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: int | Tensor,
                     scale: float, gate: Tensor | None = None) -> Tensor:
    """attention_reference by FlashAttention-4 (package flash-attn-4)."""
    gate = q.new_ones(q.shape[:2]) if gate is None else gate
    window = window if isinstance(window, Tensor) else torch.tensor([window, 1, 1], dtype=torch.float64, device="cpu")
    return Flash4.apply(q, k, v, gate, cu_seqlens, max_len, window, scale)


def load_flash4() -> Callable:
    gated_flash4()  # fails here if it cannot work
    warnings.filterwarnings("ignore", message="Argument aux_data")  # of the package's compiler, harmless
    return attention_flash4


FLASH4_DIMS = 32, 64, 128  # widths of heads that flash4_preprocess takes


def flash4_fits(hp: Recipe, device: torch.device) -> bool:
    """Whether FlashAttention-4 can serve; on GPUs but Hopper its package has other kernels, without gates."""
    return gpu_generation(device) == HOPPER_GPU and hp.dtype == "bfloat16" and {*hp.head_dims} <= {*FLASH4_DIMS}


# How to get each; the fastest first: fa4 takes 0.6 of torch's time at 49,152 tokens (H200)
ATTENTION_BACKENDS = {"fa4": load_flash4, "torch": lambda: attention_torch, "reference": lambda: attention_reference}

MEMORY_USED = 0.9  # of a GPU's; the rest is for NCCL, fragments and the context
# Bytes, from peaks on an H100: of a parameter with its gradient and moments; of a token, a layer and a channel by
# kernels, plain, and plain with recompute; of a logit by kernels, and of one in a plain chunk; of a token and a channel
# in validation (H200). Counted on a CPU: what dense connections keep of them
PARAMETER_BYTES, KERNEL_BYTES, PLAIN_BYTES, RECOMPUTE_BYTES, LOGIT_BYTES, CHUNK_BYTES = 14, 27, 45, 29, 3, 12
VAL_BYTES, DENSE_BYTES = 93, 14


def with_graphs(hp: Recipe) -> bool:
    """Whether a GPU replays micro-steps as graphs; eager PyTorch has none."""
    return hp.graphs and hp.compile


def memory_needed(hp: Recipe) -> float:
    """Bytes of GPU memory, about. Graphs keep what a step needs, so that validation takes more beside it."""
    plain = hp.kernels == "plain"
    world, number = launched_ranks()[1], getattr(torch, hp.dtype).itemsize
    channel = RECOMPUTE_BYTES if hp.recompute else PLAIN_BYTES if plain else KERNEL_BYTES
    channel = sum(channel + DENSE_BYTES * bool(layer.dense) for layer in hp.layers)
    step = 0
    for stage in hp.stages:
        S = stage.batch * hp.batch_unit // SEGMENTS
        T = S * segments_together(S, SEGMENTS // world, hp.micro_tokens)
        row = CHUNK_BYTES * min(T, PLAIN_HEAD_ROWS) if plain else LOGIT_BYTES * T
        step = max(step, channel * hp.model_dim * T + row * (stage.classes or hp.vocab_size))
    numbers = sum(math.prod(param_shape(row, hp)) for row in hp.params if row.reduce != "rows")
    table = hp.ngram_rows / world * (number * hp.model_dim + 8)  # of two moments
    table += cycle_slots(hp, world) * hp.model_dim * (4 + number * (world > 1))
    D, F, V = map(hp.sizes.get, "DFV")
    copies = V * D * hp.fp8_head + sum(3 * D * D * x.fp8_qkv + 2 * F * D * x.mlps * x.fp8_mlp for x in hp.layers)
    averages = sum(math.prod(param_shape(row, hp)) for x in hp.averages if hp.tail_average * x.blend
                   for row in hp.params if row.name in x.params.split())
    validation = VAL_BYTES * hp.model_dim * hp.val_chunk * with_graphs(hp)
    return PARAMETER_BYTES * numbers + 2 * copies + table + 4 * averages / world + step + validation


def usable_memory(device: torch.device) -> float:
    """Bytes of a GPU for a run."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return MEMORY_USED * memory * torch.cuda.get_per_process_memory_fraction(device.index)


def fit_memory(hp: Recipe, device: torch.device) -> Recipe:
    """The recipe with the largest micro-batches, graphs and no recompute, as far as the memory holds them."""
    if device.type == "cpu":
        return replace(hp, micro_tokens=16_384)
    ways = [replace(hp, micro_tokens=tokens, graphs=graphs)
            for tokens, graphs in itertools.product((65_536, 32_768, 16_384), (hp.graphs, False))]
    ways += [replace(ways[-1], recompute=True)] * (hp.kernels == "plain")
    return next((way for way in ways if memory_needed(way) <= usable_memory(device)), ways[-1])


def choose_backends(hp: Recipe, device: torch.device) -> Recipe:
    """The recipe with the attention and the kernels that it asks for, or the fastest that work on this device."""
    fits = hopper_fits(hp, device)
    require(fits or hp.kernels != "hopper", "--kernels=hopper needs a Hopper GPU, Triton, the package quack-kernels, "
            "bfloat16 and a --head_dim that is a power of 2; use --kernels=auto")
    hp = replace(hp, kernels=("hopper" if fits else "plain") if hp.kernels == "auto" else hp.kernels)
    hp = fit_memory(hp, device) if hp.micro_tokens == "auto" else hp
    if hp.ngram_rows and device.type == "cuda":
        rows = range(2 * SEGMENTS, hp.ngram_rows + 1, 2 * SEGMENTS)
        fit = bisect.bisect(rows, usable_memory(device), key=lambda n: memory_needed(replace(hp, ngram_rows=n)))
        require(fit == len(rows), f"--ngram_rows={hp.ngram_rows}: beside the rest of the run the GPU's memory holds "
                f"{rows[fit - 1] if fit else 0}; use so many, or more GPUs")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        hp = without_fp8(hp)
    gpu = device.type == "cuda" and hp.dtype == "bfloat16"
    usable = {"fa4": triton is not None and flash4_fits(hp, device), "torch": gpu, "reference": True}
    for name in ATTENTION_BACKENDS if hp.attention == "auto" else [hp.attention]:
        reason = "it needs bfloat16 on a GPU, fa4 a Hopper one, Triton and heads of 32, 64 or 128"
        if usable[name]:
            try:
                ATTENTION_BACKENDS[name]()
                return replace(hp, attention=name)
            except Exception as e:  # whatever a package raises that does not fit this machine
                reason = f"{type(e).__name__}: {e}"
    raise UserError(f"--attention={hp.attention} does not work here ({reason}); use --attention=auto")


# Against the time with requirements-hopper.txt, on one H200 and on one H100
SLOWER = {("attention", "torch"): "PyTorch's attention takes 1.08 of the time",
          ("kernels", "plain"): "plain operations take 1.28 of the time"}


def missing_packages(asked: Recipe, hp: Recipe, device: torch.device) -> str:
    """What a Hopper GPU lacks for a faster run of hp, which choose_backends made of `asked`; empty if nothing."""
    packages = ("flash-attn-4", "flash_attn"), ("quack-kernels", "quack")
    lacks = [package for package, module in packages if importlib.util.find_spec(module) is None]
    costs = [cost for (key, name), cost in SLOWER.items() if (getattr(asked, key), getattr(hp, key)) == ("auto", name)]
    return (f"without {' and '.join(lacks)}, {' and '.join(costs)}; python -m pip install -r requirements-hopper.txt"
            if flash4_fits(hp, device) and lacks and costs else "")


def notices(asked: Recipe, hp: Recipe, device: torch.device) -> Iterator[str]:
    """What a user may not expect of hp, which choose_backends made of `asked`."""
    if missing := missing_packages(asked, hp, device):
        yield missing
    if asked.fp8_head and not hp.fp8_head:
        yield f"this GPU has no FP8 products: they are in {hp.dtype}"
    if device.type == "cuda" and memory_needed(hp) > usable_memory(device):
        need = memory_needed(hp) / MEMORY_USED / 2**30
        half = ", --graphs=false half" * with_graphs(hp)
        yield (f"the GPU's memory may be too small: about {need:.0f} GiB are needed; a smaller --micro_tokens, "
               f"--model_dim or --batch_unit needs less{half}")


# --- The two sets of operations

def value_gate_sees_ve(layer: Layer, w: AttentionWeights) -> bool:
    """Whether half of what a layer's gates of values see is the value embedding."""
    return w.value_gate is not None and (layer.value_gate_mixed or not layer.paired)


def plain_attention_inputs(h: Stream, w: AttentionWeights, ve: Tensor | None, cos: Tensor, sin: Tensor, layer: Layer,
                           fp8: Fp8Weight | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = (Fp8Linear.apply(h.x, w.qkv, fp8) if fp8 else F.linear(h.x, w.qkv)).view(len(h.x), 3, -1, 4 * cos.size(1))
    first = ve[:, : GATE_INPUTS // 2] if value_gate_sees_ve(layer, w) else None
    gate, value_gate = gates_reference(h.x[:, :GATE_INPUTS], None, first, w.gate, w.value_gate)
    value_gate = None if w.value_gate is None else value_gate
    return *attention_inputs_reference(qkv, None, ve, value_gate, cos, sin, layer.paired, layer.key_offset), gate


def plain_mlp(x: Stream, up: Tensor, down: Tensor, resid: Tensor, fp8: list[Fp8Weight] | None) -> Stream:
    if fp8:
        r = inverse_rms(x.x.detach().float().square(), x.x.size(1))
        return Stream(Fp8MLP.apply(x.x, r, up, down, resid, fp8, False)[0])
    return Stream(F.relu(F.linear(norm(x.x), up)).square() @ down + (resid[:, None] * x.x).to(x.x.dtype))


def recomputed_mlp(x: Stream, *weights: Tensor) -> Stream:
    return Stream(checkpoint(lambda x, *weights: plain_mlp(Stream(x), *weights).x, x.x, *weights, use_reentrant=False,
                             preserve_rng_state=False))


PLAIN = Ops(
    stream=Stream,
    normed=lambda x: Stream(norm(x.x)),
    first_columns=lambda x, k: (x, x[:, :k]),
    attention_inputs=plain_attention_inputs,
    attention=attention_reference,
    injections=lambda x0, bigram, s0, s1: [
        Injection(a * x0 + b * bigram, x0, bigram, a, b) for a, b in zip(s0.unbind(), s1.unbind())],
    linear_sum=lambda y, o, x, resid, inject: Stream(
        F.linear(y, o) + (resid[:, None] * x.x).to(x.x.dtype) + inject.total),
    mlp=plain_mlp,
    head_loss=lambda *inputs: HeadLoss.apply(*inputs, False),
    add_rows=scatter_add_rows_reference,
)

HOPPER = Ops(
    stream=lambda x: Stream(x, inverse_rms(x.detach().float().square(), x.size(1))),
    normed=lambda x: Stream(FoldedNorm.apply(*x), x.rstd),
    first_columns=FirstColumns.apply,
    attention_inputs=lambda h, w, ve, cos, sin, layer, fp8: AttentionInputs.apply(
        *h, *w, ve, cos, sin, layer.paired, layer.key_offset, value_gate_sees_ve(layer, w), fp8),
    attention=attention_reference,
    injections=lambda x0, bigram, s0, s1: [
        Injection(y, x0.detach(), bigram.detach(), a, b)
        for y, a, b in zip(Injections.apply(x0, bigram, s0, s1), s0.detach().unbind(), s1.detach().unbind())],
    linear_sum=lambda y, o, x, resid, inject: Stream(*LinearSum.apply(y, o, x.x, resid, *inject)),
    mlp=lambda x, up, down, resid, fp8: Stream(
        *(Fp8MLP.apply(*x, up, down, resid, fp8, True) if fp8 else ReluSquareMLP.apply(*x, up, down, resid))),
    head_loss=lambda *inputs: HeadLoss.apply(*inputs, True),
    add_rows=scatter_add_rows,
)


# --- Cases: inputs for every operation, for the check at the start, the tests and the bench

class Case(NamedTuple):
    """How to call an operation of Ops on random tensors."""

    op: str  # a field of Ops
    run: Callable  # ops, *tensors -> the results
    shapes: str  # of the tensors, in the letters of this file


def run_attention_inputs(layer: Layer, unit: float | None, ops: Ops, *tensors: Tensor) -> tuple[Tensor, ...]:
    x, qkv, gate, value_gate, ve, angles = tensors
    d = ve.size(1) // len(gate)
    angles = angles[: (1 + layer.paired) * len(x) // 2, : d // 4].float()  # two segments
    with_values = (value_gate, ve) if layer.value_table is not None else (None, None)
    weights, fp8 = AttentionWeights(qkv, gate, with_values[0]), unit and fp8_weight(qkv.detach(), NORMED_SCALE, unit)
    tables = (f(angles.detach()).bfloat16().to(x.dtype) for f in (torch.cos, torch.sin))
    return ops.attention_inputs(ops.normed(ops.stream(x)), weights, with_values[1], *tables, layer, fp8)


def run_attention(ops: Ops, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    T = len(q)
    ends = torch.tensor([0, T // 3, T // 3 + 1, T, T], dtype=torch.int32, device=q.device)
    return ops.attention(q, k, v, ends, T - T // 3, T // 4, 0.1, gate.sigmoid())


def run_linear_sum(ops: Ops, y: Tensor, o: Tensor, x: Tensor, x0: Tensor, bigram: Tensor, lambdas: Tensor) -> Tensor:
    resid = lambdas[0, 0].expand(len(x))
    stream = ops.stream(x)
    for inject in ops.injections(x0, bigram, *lambdas.unbind()):
        stream = ops.linear_sum(y, o, stream, resid, inject)
    return ops.normed(stream).x if stream.rstd is None else stream.rstd[:, None] * ops.normed(stream).x


def run_mlp(unit: float | None, ops: Ops, x: Tensor, up: Tensor, down: Tensor, lambdas: Tensor) -> Tensor:
    fp8 = unit and [fp8_weight(w.detach(), s, unit) for w, s in ((up, NORMED_SCALE), (down, HIDDEN_SCALE))]
    return ops.mlp(ops.stream(x), up, down, lambdas[0].expand(len(x)), fp8).x


def run_head_loss(fp8: bool, sampled: bool, ops: Ops, x: Tensor, w: Tensor) -> Tensor:
    V = w.size(1) // 2 * 2
    candidates = torch.arange(V * sampled, device=x.device).view(-1, 2).T  # of two segments: even ones, odd ones
    targets = torch.arange(2 * len(x), device=x.device).view(-1, 2) * 7 % min(50, V // 2)
    weights = torch.tensor([0.125, 0.0625], device=x.device)
    copies = fp8_weight(w.detach(), X_SCALE, GRAD_SCALE * 0.125, W_SCALE) if fp8 else None
    return ops.head_loss(norm(x), w, candidates, targets, weights, (23.0, 5.0, 7.5), copies)


def run_add_rows(ops: Ops, rows: Tensor) -> Tensor:
    ids = torch.arange(len(rows), dtype=torch.int32, device=rows.device) ** 2 % 37
    table = torch.zeros(37, rows.size(1), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    with torch.no_grad():
        ops.add_rows(rows, ids, table, ids.argsort().int())
    return table


INPUTS = "T D, 3*H*d D, H G, H G, T H*d, 2*T D"
CASES = {
    "first columns": Case("first_columns", lambda ops, x: ops.first_columns(x * 1, 12), "T D"),
    **{f"attention inputs{name}": Case("attention_inputs", partial(run_attention_inputs, layer, fp8), INPUTS)
       for name, layer, fp8 in (
           ("", Layer("short"), None), (", paired", Layer("short", paired=True, value_table=0), None),
           (", key offset", Layer("long", key_offset=True, value_table=0), None),
           (" in FP8", Layer("short", value_table=0), GRADIENT_SCALE))},
    "attention": Case("attention", run_attention, "T H d, T H d, T H d, T H"),
    "linear sum": Case("linear_sum", run_linear_sum, "T D, D D, T D, T D, T D, 2 L"),
    "MLP": Case("mlp", partial(run_mlp, None), "T D, F D, F D, 1"),
    "MLP in FP8": Case("mlp", partial(run_mlp, GRADIENT_SCALE), "T D, F D, F D, 1"),
    "head": Case("head_loss", partial(run_head_loss, False, False), "T D, D V"),
    "head in FP8": Case("head_loss", partial(run_head_loss, True, False), "T D, D V"),
    "head over candidates": Case("head_loss", partial(run_head_loss, False, True), "T D, D V"),
    "rows of a table": Case("add_rows", run_add_rows, "T D"),
}
CASE_SIZES = dict(T=384, D=256, H=2, d=128, F=512, V=1024, G=GATE_INPUTS, L=2)


def case_inputs(case: Case, sizes: dict[str, int], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Random tensors for a case, the same everywhere: activations of size 1, smaller weights, positive fp32 lambdas."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for text in case.shapes.split(", "):
        shape = [math.prod(sizes.get(x) or int(x) for x in axis.split("*")) for axis in text.split()]
        if text in ("2 L", "1"):
            x, kind = 0.5 + torch.rand(shape, generator=generator), torch.promote_types(dtype, torch.float32)
        else:
            x, kind = (1.0 if "T" in text else shape[-1] ** -0.5) * torch.randn(shape, generator=generator), dtype
        inputs.append(x.to(device, kind))
    return inputs


def case_results(case: Case, ops: Ops, inputs: list[Tensor]) -> list[Tensor]:
    """The results of a case and the gradients of its inputs, for cosines, the same in all dtypes, as the results'."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    results = case.run(ops, *inputs)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    if not results[0].requires_grad:
        return results
    directions = [torch.arange(x.numel(), device=x.device).cos().bfloat16().view(x.shape).to(x.dtype) for x in results]
    grads = torch.autograd.grad(results, inputs, directions, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*results, *grads)]


CASE_TOLERANCE = 2.0**-5  # two roundings to bf16 are 2^-7, FP8's a little more; the largest seen was 0.009 (H100)


def check_ops(ops: Ops, device: torch.device, head_dims: Iterable[int] = ()) -> None:
    """Compare each operation with PLAIN's on small inputs, if it asks for heads with each of these widths: an edit of
    the mathematics of only one ends the run."""
    first, *others = {*head_dims} or [CASE_SIZES["d"]]
    for (name, case), d in itertools.product(CASES.items(), (first, *others)):
        if getattr(ops, case.op) is getattr(PLAIN, case.op) or (d in others and "d" not in case.shapes):
            continue
        inputs = case_inputs(case, CASE_SIZES | {"d": d}, torch.bfloat16, device)
        ours, plain = (case_results(case, x, inputs) for x in (ops, PLAIN))
        off = math.inf if [x.shape for x in ours] != [x.shape for x in plain] else max(
            ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).nan_to_num(math.inf).item()
            for a, b in zip(ours, plain))
        key = "attention=reference" if case.op == "attention" else "kernels=plain"
        require(off < CASE_TOLERANCE, f"the operation {case.op} ({name}) is off by {off:.1%} from the plain one, as an "
                f"edit changed one of them only; --{key} trains with the plain one")


COMPILERS = 4  # processes


def compile_ahead(hp: Recipe, device: torch.device) -> list[subprocess.Popen]:
    """Compile kernels into their packages' caches on disk, in processes beside this one, which traces meanwhile: one
    after the other they took 25 of 185 s from start to training (records/2026-11-26_plain)."""
    if hp.kernels != "hopper" or int(os.environ.get("LOCAL_RANK") or 0):
        return []
    path = Path(__file__)
    call = f"__import__({path.stem!r}).compile_cases({hp.attention!r}, {str(device)!r}, %d)"
    return [subprocess.Popen([sys.executable, "-c", call % i], cwd=path.parent, stdin=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(COMPILERS)]


def compile_cases(attention: str, device: str, part: int) -> None:
    """Run this part of the cases, whatever comes of it, and no longer than stdin is open."""
    threading.Thread(target=lambda: os._exit(sys.stdin.read() != ""), daemon=True).start()
    ops = HOPPER._replace(attention=ATTENTION_BACKENDS[attention]())
    for case in [*CASES.values()][part::COMPILERS]:
        with contextlib.suppress(Exception):
            case_results(case, ops, case_inputs(case, CASE_SIZES, torch.bfloat16, device))
    os._exit(0)  # not waiting for the thread


# ==== 11. Keeping a run: errors, checks, command line, ranks, log, watch, checkpoints; no line decides a weight ====

class UserError(Exception):
    """A bad input, told in one line that names the cause and the remedy."""


def require(ok: object, text: str) -> None:
    if not ok:
        raise UserError(text)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A UserError, the same on every rank, costs one line for each machine, and exit status 1."""
    try:
        yield
    except UserError as e:
        if dist.is_initialized():
            dist.destroy_process_group()
        if os.environ.get("LOCAL_RANK", "0") in ("0", ""):
            print(f"error: {e}", file=sys.stderr)
        sys.exit(1)


@cache
def warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# --- Checks of every key and cell

TABLES = {"LAYERS": Layer, "READOUT": Readout, "STAGES": Stage, "PARAMS": Param, "AVERAGES": Average}
KEYS = {f.name: f for f in fields(Recipe) if f.metadata}
TYPES = {row: typing.get_type_hints(row) for row in (*TABLES.values(), Recipe)}
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", NoneType: "none",
         tuple[float, float]: "two numbers with a comma", tuple[float, ...]: "numbers with commas"}
LEAST = dict(batch=1, classes=0, max_doc=1, short=1, long=1, every=1, lr=0, wd=0, odd_lr=0, rarer=0,
             start=0, rate=0, blend=0, also=0, mlps=0)  # of cells, by column


def options(kind: object) -> tuple:
    """The alternatives of a type: what stands between |, or the words of a Literal."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return tuple(x for part in typing.get_args(kind) for x in options(part))
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else (kind,)


def in_words(kind: object) -> str:
    words = [x if isinstance(x, str) else KINDS[x] for x in options(kind)]
    return " or ".join(words if len(words) < 3 else [", ".join(words[:-1]), words[-1]])


def fits(value: object, kind: object) -> bool:
    """Whether a value is of that type, and finite."""
    def fits_one(option: object) -> bool:
        if typing.get_origin(option) is tuple:
            items = typing.get_args(option)
            return type(value) is tuple and (... in items or len(items) == len(value)) and all(
                fits(x, float) for x in value)
        if option is float:
            return type(value) in (int, float) and math.isfinite(value)
        return type(value) is option if isinstance(option, type) else value == option
    return any(map(fits_one, options(kind)))


def rows_of(hp: Recipe, table: str) -> Iterator[tuple[Callable, NamedTuple]]:
    """Each row of a table, after a function (column, ok, text) which requires that a cell of it is ok."""
    def require_cell(place: str, row: NamedTuple, column: str, ok: object, text: str) -> None:
        require(ok, f"{place}.{column}={getattr(row, column)!r}: {text}")
    found = getattr(hp, table.lower())
    for i, row in enumerate([found] if table == "READOUT" else found):
        place = {"READOUT": table, "PARAMS": f"PARAMS.{row[0]}"}.get(table, f"{table}.{i}")
        yield partial(require_cell, place, row), row


def check_recipe(hp: Recipe) -> None:
    """Raise UserError for keys and cells with which no run can work; it names them and what is allowed."""
    for name, f in KEYS.items():
        value, kind = getattr(hp, name), TYPES[Recipe][name]
        choices, least, above = (f.metadata[limit] for limit in ("choices", "least", "above"))
        key = f"--{name}={value}"
        require(fits(value, kind), f"{key} must be {in_words(kind)}")
        require(not choices or value in choices, f"{key}: use {', '.join(choices)}")
        require(least is None or value >= least, f"{key} must not be {f'below {least}' if least else 'negative'}")
        require(above is None or value == "auto" or value > above,
                f"{key} must be {f'above {above}' if above else 'positive'}")
    for table, columns in TABLES.items():
        for need, row in rows_of(hp, table):
            for column, kind in TYPES[columns].items():
                value, least = getattr(row, column), LEAST.get(column)
                need(column, fits(value, kind), f"use {in_words(kind)}")
                need(column, least is None or value >= least, f"use {least} or more")
    for check in (check_sizes, check_layers, check_params, check_stages):
        check(hp)


def check_sizes(hp: Recipe) -> None:
    """Keys that depend on each other."""
    _, world, _ = launched_ranks()
    require(world > 0 and SEGMENTS % world == 0, f"{world} ranks cannot share {SEGMENTS} segments: use 1, 2, 4 or 8")
    require(hp.cooldown_start < 1, f"--cooldown_start={hp.cooldown_start} must be below 1")
    require(hp.batch_unit % SEGMENTS == 0 and hp.batch_unit // SEGMENTS >= MTP_MAX,
            f"--batch_unit={hp.batch_unit} must be a multiple of {SEGMENTS}, and at least {MTP_MAX * SEGMENTS}")
    require(hp.model_dim == hp.num_heads * hp.head_dim, "--model_dim must equal num_heads * head_dim")
    require(hp.num_heads % 2 == 0 and hp.head_dim % 8 == 0, "--num_heads must be even, --head_dim a multiple of 8")
    require(hp.model_dim % SEGMENTS == 0, f"--model_dim must be a multiple of {SEGMENTS}, so that ranks can share it")
    require(hp.ngram_rows % (2 * SEGMENTS) == 0,
            f"--ngram_rows={hp.ngram_rows} must be a multiple of {2 * SEGMENTS}, for ranks and two kinds of rows")
    require(hp.ngram_rows == 0 or hp.vocab_size != 50_257 or TOKEN_CLASSES.exists(),
            f"{TOKEN_CLASSES} is missing: make it by tools/token_classes.py, or use --ngram_rows=0")
    require(hp.vocab_size <= 2**16, f"--vocab_size={hp.vocab_size}: shards hold 16-bit tokens")
    require(hp.val_tokens % (hp.val_chunk * world) == 0,
            f"--val_tokens={hp.val_tokens} must be a multiple of --val_chunk={hp.val_chunk} x {world} ranks")


def check_layers(hp: Recipe) -> None:
    names = [layer.name for layer in hp.layers if layer.name]
    tables = [layer.value_table for layer in hp.layers if layer.value_table is not None]
    require(len(names) == len(set(names)), f"LAYERS.*.name={', '.join(names)}: use each name once")
    require(sorted(tables) == [*range(len(tables))], f"LAYERS.*.value_table={tables}: use 0, 1, 2 .., each once")
    for i, (need, layer) in enumerate(rows_of(hp, "LAYERS")):
        earlier = [x.name for x in hp.layers[:i] if x.name]
        for column in ("reads", "skip_from", "dense"):
            need(column, getattr(layer, column) in (None, *earlier),
                 f"use {' or '.join(['none', *earlier])}, a name of an earlier layer")
        last = i + 1 == len(hp.layers)
        need("dense", layer.dense is None or (last and layer.reads and layer.value_table is not None and layer.mlps),
             "use none, but in the last layer, with reads, value_table and mlps")
        parts = layer.narrower if layer.window else 1
        need("narrower", layer.narrower == parts > 0 == hp.head_dim % (4 * parts),
             f"use 1, or with attention a divisor of a quarter of --head_dim={hp.head_dim}")
        for column in ("paired", "key_offset", "value_table", "reads", "fp8_qkv", "dense"):
            need(column, layer.window or any(getattr(layer, column) is x for x in (None, False)),  # 0 is a table
                 "a layer without attention (window=none) takes none or false")
    require(hp.attn_layers, "LAYERS.*.window: use short or long in one layer at least")
    (need, readout), = rows_of(hp, "READOUT")
    need("minus", readout.minus in names, f"use the name of a layer, {', '.join(names)}")
    need("cap", 0 < readout.cap <= 80, "use a number above 0 and up to 80")
    need("cap_width", readout.cap_width > 0, "use a number above 0")


@cache
def attributes_read(model: type) -> frozenset[str]:
    """The names x of self.x in a class."""
    return frozenset(re.findall(r"\bself\.(\w+)", inspect.getsource(model)))


def check_params(hp: Recipe) -> None:
    """PARAMS and the model name the same parameters, and each row can be trained."""
    require(hp.params and hp.stages, "PARAMS and STAGES need rows")
    names = [row.name for row in hp.params]
    params = dict(zip(names, rows_of(hp, "PARAMS")))
    reads = attributes_read(GPT)
    for name, (need, row) in params.items():
        require(names.count(name) == 1, f"PARAMS.{name} has two rows: leave one")
        require(name in reads, f"PARAMS.{name}: GPT never reads self.{name}; use it there or remove the row")
        for factor in re.split("[ *]", row.shape):
            need("shape", factor in hp.sizes or (factor.isdigit() and int(factor) > 0),
                 f"use numbers and {', '.join(hp.sizes)}, not {factor}")
        read = RECORD80.rows.get(name, row)
        need("shape", param_shape(row, hp) == param_shape(read, hp),
             f"use {read.shape!r}, as GPT reads it so, or edit both")
        for part in row.init.split(","):
            number = re.sub(r"^\s*(normal|uniform)\s", "", part)
            with contextlib.suppress(ValueError):
                number = float(number)
            need("init", fits(number, float) or part.strip() == "uniform" or part == "lm_head" != name,
                 "use a number, uniform, or normal and a deviation")
        bank = RULES[row.rule].bank
        need("betas", "adam" not in row.rule or (row.betas and 0 <= min(row.betas) and max(row.betas) < 1),
             "Adam needs two numbers from 0 to below 1")
        need("rule", not bank or len(row.shape.split()) == 3, "use adam: this is no bank [K, rows, columns]")
        need("odd_lr", bank or row.odd_lr == 1, f"use 1 with {row.rule}")
        need("reduce", row.reduce != "sparse" or name == "bigram_embed",
             "use shard or replicate, as only bigram_embed's rows are known beforehand")
        need("init", row.reduce != "rows" or row.init == "0", "use 0")
        for column, only in (("rule", "row_adam"), ("reduce", "rows")):
            need(column, (getattr(row, column) == only) == (name == "ngram_embed"),
                 f"ngram_embed uses {only}, and nothing else does")
        need("reduce", row.reduce == "replicate" or name in UPDATE_ORDER,
             f"use replicate, or add {name} to UPDATE_ORDER")
    with torch.device("meta"):
        missing = sorted(reads - set(dir(GPT(hp))))
    require(not missing, f"PARAMS: add a row for {', '.join(missing)}, which GPT reads")
    (_, head), (need_embed, embed) = pair = params["lm_head"], params["embed"]
    for column, only in dict(rule="adam", reduce="shard", every=head.every, dtype=head.dtype, rarer=1).items():
        for need, row in pair:
            need(column, getattr(row, column) == only, f"use {only}, as lm_head and embed are one at first")
    for need, average in rows_of(hp, "AVERAGES"):
        given = {*average.params.split()}
        need("params", given and given < {*names} - {"ngram_embed"}, "use names of PARAMS, but not ngram_embed")
    need_embed("init", embed.init == "lm_head" or not hp.stages[0].tied,
               "use lm_head, as they are one weight at first (STAGES.0.tied)")


def check_stages(hp: Recipe) -> None:
    lengths = [stage.length for stage in hp.stages]
    scheduled = [x for x in lengths if x is not None]
    extension = hp.num_extension_iterations
    require(scheduled and min(scheduled) > 0 and abs(sum(scheduled) - 1) < 1e-6 and None not in lengths[:-1],
            f"STAGES.*.length={lengths}: use positive fractions that add up to 1, and none only for the last row")
    require(extension == 0 or lengths[-1] is None,
            f"STAGES.{len(lengths) - 1}.length={lengths[-1]}: use none for the --num_extension_iterations={extension}")
    bounds = stage_bounds(hp)
    for i, (need, stage) in enumerate(rows_of(hp, "STAGES")):
        require(stage.length is None or bounds[i] < bounds[i + 1],
                f"--num_scheduled_iterations={hp.num_scheduled_iterations}: use more, as row {i} of STAGES has no step")
        need("mtp_end", len(stage.mtp_start) == len(stage.mtp_end),
             f"use {len(stage.mtp_start)} weights, as in mtp_start")
        for column in ("mtp_start", "mtp_end"):
            weights = getattr(stage, column)
            need(column, 1 <= len(weights) <= MTP_MAX and min(weights) >= 0 < sum(weights),
                 f"use 1 to {MTP_MAX} weights from 0 on, not all 0")
        need("prefix", min(stage.prefix) >= 0, "use two weights from 0 on")
        require(stage.prefix == (0, 0) or hp.vocab_size != 50_257 or TOKEN_PREFIXES.exists(),
                f"{TOKEN_PREFIXES} is missing: make it by tools/token_prefixes.py, or use STAGES.{i}.prefix=0,0")
        need("classes", stage.classes == 0 or (stage.classes % 128 == 0 and MTP_MAX < stage.classes <= hp.sizes["V"]),
             f"use 0, for all, or a multiple of 128 up to {hp.sizes['V']}")
        need("tied", not stage.tied or i == 0 or hp.stages[i - 1].tied,
             "use false, as embed and lm_head have parted before")


# --- Command line

def typed(text: str, kind: object) -> object:
    """The value that a text gives a key or a cell of this type; the text itself if it gives none, for check_recipe."""
    words = {"none": None, "true": True, "false": False} | ({"0": False, "1": True} if kind is bool else {})
    if str in options(kind):
        return None if kind is not str and text.lower() == "none" else text
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        value = ast.literal_eval(text)
        if typing.get_origin(options(kind)[0]) is tuple:
            return tuple(map(float, value if type(value) is tuple else (value,)))
        return float(value) if float in options(kind) else value
    return text


def parse_args(argv: list[str]) -> tuple[Recipe, argparse.Namespace]:
    """Turn arguments into a checked recipe; raises UserError. --help prints and exits."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = lambda message: require(False, f"{message}; python train_gpt.py --help lists every key")
    parser.add_argument("--preset", default="record80", choices=PRESETS)
    parser.add_argument("--set", action="append", default=[])
    for names in (["--plan"], ["--check"], ["-h", "--help"]):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--trials", type=int, default=1)
    for name in KEYS:
        parser.add_argument(f"--{name}", type=partial(typed, kind=TYPES[Recipe][name]), default=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        keys = [f"--{name}" for name in ("preset", "set", "plan", "check", "trials", *KEYS)]
        close = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
        require(not close, f"unknown key {key}; did you mean {' or '.join(close)}?")
        parser.error(f"unknown key {key}")
    if args.help:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head
        print(help_text(args.preset))
        sys.exit()
    keys = {name: getattr(args, name) for name in KEYS if name in args}
    hp = reduce(set_cells, args.set, replace(PRESETS[args.preset], **keys))
    check_recipe(hp)
    require(args.trials > 0, f"--trials={args.trials} must be positive")
    require(args.trials == 1 or not hp.resume, "--resume goes on with one run: use it without --trials")
    return hp, args


def help_text(preset: str) -> str:
    """Every key with its meaning, choices and value in the preset, from where it is declared; and how to set cells."""
    lines = [(__doc__ or "").split("\n\n")[0].strip(), "", f"--preset={preset}: one of {', '.join(PRESETS)}",
             "--plan: print the schedule as CSV and exit", "--check: check the arguments and the data, and exit",
             "--trials=N: N runs, of this seed, the next .., one after the other, and what verify.py says of them",
             "--set TABLE.row.column=value: set a cell; a row is a number or a name, with * as in file names"]
    lines += [f"    {table}: {', '.join(kind._fields)}" for table, kind in TABLES.items()]
    lines += ["", f"Every --key=value, with its value in {preset}:"]
    for name, f in KEYS.items():
        choices = f" (one of {', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        lines.append(f"  --{name}={getattr(PRESETS[preset], name)}".ljust(40) + f"  {f.metadata['text']}{choices}")
    return "\n".join(lines)


def set_cells(hp: Recipe, text: str) -> Recipe:
    """The recipe with the cells set that TABLE.row.column=value names, yet unchecked; raises UserError."""
    place, equals, value = text.partition("=")
    table, *middle, column = place.split(".")
    require(equals and table in TABLES and len(middle) == (table != "READOUT"),
            f"--set {text}: use TABLE.row.column=value, with a table of {', '.join(TABLES)} (READOUT has no rows)")
    types = TYPES[TABLES[table]]
    require(column in types, f"--set {text}: {table} has the columns {', '.join(types)}")
    value = typed(value, types[column])
    if table == "READOUT":
        return replace(hp, readout=hp.readout._replace(**{column: value}))
    rows = getattr(hp, table.lower())
    names = [getattr(row, "name", "") or str(i) for i, row in enumerate(rows)]
    found = [middle[0] == str(i) or fnmatch.fnmatch(name, middle[0]) for i, name in enumerate(names)]
    require(any(found), f"--set {text}: {table} has the rows {', '.join(names)}")
    rows = tuple(row._replace(**{column: value}) if set_here else row for row, set_here in zip(rows, found))
    return replace(hp, **{table.lower(): rows})


def print_plan(hp: Recipe) -> None:
    """The schedule as CSV, a header and a line a step; absent weights are 0, booleans 0 or 1."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --plan | head
    for step in range(hp.num_steps):
        now = plan(step, hp)
        weights = *now.mtp_weights, *[0.0] * MTP_MAX
        row = dict(
            step=step, batch_tokens=now.batch_tokens, max_doc_len=now.windows.max_doc, window_short=now.windows.short,
            window_long=now.windows.long, lr_factor=now.lr_factor, muon_momentum=now.muon_momentum,
            **{f"mtp_{k}": weights[k] for k in range(MTP_MAX)}, prefix=sum(now.prefix_weights),
            update_adam=any(row.rule == "adam" and due(row, step, hp) for row in hp.params), untie_embed=now.unties)
        if step == 0:
            print(",".join(row))
        print(",".join(f"{value:.10g}" for value in row.values()))


# --- Checks of the data

def check_shard(path: str, bos: int, count: int = -1) -> np.ndarray:
    """read_shard, after a look at the whole file; raises UserError for anything wrong about it."""
    def need(ok: object, text: str) -> None:
        require(ok, f"{path}: {text}; delete it and run data/cached_fineweb10B.py again")
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), os.path.getsize(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; download the shard again") from None
    need(len(header) == HEADER_INTS, f"{size} bytes are too few for a header")
    need(header[0] == MAGIC, f"magic number {header[0]}, not {MAGIC}, so this is no token shard")
    need(header[1] == VERSION, f"version {header[1]} instead of {VERSION}")
    told = 4 * HEADER_INTS + 2 * int(header[2])
    need(header[2] > 0 and size == told, f"the header says {header[2]} tokens, {told} bytes; the file has {size}")
    tokens = read_shard(path, count)
    if len(tokens) and tokens.max() > bos:
        where = int(np.argmax(tokens > bos))
        raise UserError(f"{path}: token {tokens[where]} at position {where} is above {bos}; delete the file and "
                        "download or make it again")
    return tokens


def check_files(hp: Recipe) -> list[str]:
    """The train shards; UserError if these or the validation shard are missing, damaged or too short."""
    val, train = (sorted(glob.glob(pattern)) for pattern in (hp.val_files, hp.train_files))
    for key, files in (("val_files", val), ("train_files", train)):
        require(files, f"no file matches --{key}={getattr(hp, key)}: run `python data/cached_fineweb10B.py 9` to "
                "download FineWeb, or `python data/fineweb.py` to make shards from your own text")
    found = len(check_shard(val[0], hp.bos, hp.val_tokens + 1))
    require(found > hp.val_tokens,
            f"{val[0]}: {found} tokens, but validation needs {hp.val_tokens + 1}; lower --val_tokens")
    for path in train:
        check_shard(path, hp.bos, 0)
    return train


def check_data(hp: Recipe) -> str:
    """Walk the whole schedule over the shards without training, and say so; UserError for what would stop a run."""
    files, train = check_files(hp), f"--train_files={hp.train_files}"
    plans = [plan(step, hp) for step in range(hp.num_steps)]
    done = 0
    for (documents, segments), now in zip(walk(files, hp.bos, plans, partial(check_shard, bos=hp.bos)), plans):
        done, classes = now.step + 1, now.stage.classes
        for number, slices in enumerate(segments if classes else []):
            distinct = np.count_nonzero(np.bincount(documents.join(slices)[1:]))
            require(distinct <= classes, f"STAGES.{now.index}.classes={classes}: segment {number} of step {now.step} "
                    f"has {distinct} different targets; use {round_up(distinct, 128)} or more")
    if done < len(plans):
        shards = (read_shard(path) for path in files)
        lengths = np.concatenate([np.diff([*np.flatnonzero(x == hp.bos), len(x)]) for x in shards])
        require(len(lengths), f"{train}: no document begins in them, as no token is {hp.bos}; use the --vocab_size "
                "that they were made for, or make them again")
        cut = max(now.windows.max_doc for now in plans)
        require(2 * np.minimum(lengths, cut).sum() >= lengths.sum(),
                f"{train}: documents are cut to {cut} tokens ({(lengths > cut).sum()} of {len(lengths)}) and the rest "
                f"is skipped, so the shards last {done} of {len(plans)} steps; make them again with shorter ones "
                "(data/fineweb.py --max_chars), or raise max_doc in STAGES")
        used, missing = (sum(now.batch_tokens for now in part) for part in (plans[:done], plans[done:]))
        # what a shard yields after cuts, or all of it if none lasted a step
        shards = math.ceil(missing / ((used or sum(map(os.path.getsize, files)) // 2) / len(files)))
        raise UserError(f"{train}: the shards ({len(files)}) last {done} of {len(plans)} steps; add about {shards} "
                        "more of this size, or lower --num_scheduled_iterations")
    return f"the train shards ({len(files)}) last all {len(plans)} steps; validation has its tokens"


# --- Ranks, trials

class Ranks(NamedTuple):
    """This process among all: its number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device


def launched_ranks() -> tuple[int, int, int]:
    """This process's number, how many there are, and its number on this machine, as torchrun says; alone 0, 1, 0."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if "RANK" not in given and given.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    require(len(given) == len(names) and all(given[name].isdigit() for name in names if name != "MASTER_ADDR"),
            f"the environment has {', '.join(f'{k}={v}' for k, v in given.items())}, where torchrun sets "
            f"{', '.join(names)}: start with torchrun, or unset these")
    return tuple(int(given[name]) for name in names[:3])


def setup_ranks(hp: Recipe) -> Ranks:
    """Join the process group that torchrun announces in the environment, or make a group of one."""
    # PyTorch 2.13 renames two collectives; the old names work in all versions that this script supports
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor")
    rank, world, local = launched_ranks()
    cuda = hp.device != "cpu" and torch.cuda.is_available()
    require(cuda or hp.device == "cpu", "no NVIDIA GPU that PyTorch can use here (python tools/doctor.py tells why); "
            "--preset=demo trains a small model on the CPU")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    require(not cuda or here <= torch.cuda.device_count(), f"{here} processes need a GPU each, but "
            f"{torch.cuda.device_count()} are visible: start fewer processes, or use --preset=demo to train on the CPU")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        reuse_cpu_memory()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # gloo carries Python objects and errors, NCCL a GPU's tensors
    if os.environ.get("RANK"):
        dist.init_process_group(backend, device_id=device if cuda else None)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world, device)


def reuse_cpu_memory() -> None:
    """Let glibc keep freed memory: to hand it back and fault it in anew made the demo 1.9 times slower."""
    libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL(None), -1, -3
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_every_rank(f: Callable) -> object:
    """f() on every rank; if it raises a UserError on any, all ranks raise the same."""
    try:
        result, error = f(), None
    except UserError as e:
        result, error = None, str(e)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for rank, error in enumerate(errors):
        require(error is None, error if rank == 0 else f"{error} (on rank {rank})")
    return result


def train_trials(hp: Recipe, count: int, ranks: Ranks, saved: dict | None, notes: list[str]) -> int:
    """Train hp, or so many trials of it with the next seeds, after one set-up; returns the last exit status."""
    name = hp.run_id or time.strftime("%Y%m%d-%H%M%S")
    run, logs, compilers = None, [], []
    for seed in range(hp.seed, hp.seed + count):
        hp = replace(hp, seed=seed, run_id=f"{name}_seed{seed}" if count > 1 else name)
        log = on_every_rank(partial(Log, hp, ranks))
        with Watch(ranks, log) as watch:
            log_environment(log, hp, ranks)
            for text in notes:
                log(f"warning: {text}")
            if run:
                run.restart(hp)
            else:
                compilers = compile_ahead(hp, ranks.device)
                run = Run(hp, ranks, choose_ops(hp))
            status = train(run, log, watch, saved)
        log.close()
        logs.append(log.path)
        if status:
            break
    for process in compilers:
        process.communicate()
    if len(logs) > 1 and ranks.rank == 0:
        subprocess.run([sys.executable, Path(__file__).with_name("tools") / "verify.py", *logs])
    return status


# --- What runs beside the training: a thread that prepares batches, and graphs

class Ahead(Iterator):
    """Items that a thread prepares, up to n ahead; what it raises is raised here. next() sends them to a device."""

    def __init__(self, items: Iterator, n: int, device: torch.device | None = None):
        self.items, self.device = items, device
        self.thread = ThreadPoolExecutor(1)
        self.waiting = deque(self.thread.submit(next, items) for _ in range(n + 1))  # one of them in work

    def __next__(self) -> object:
        self.waiting.append(self.thread.submit(next, self.items))
        item = self.waiting.popleft().result()
        return send(item, self.device) if self.device else item

    def wait_for_one(self) -> None:
        self.waiting[0].exception()

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.items.close()


def load_batches(hp: Recipe, ranks: Ranks, steps: Iterable[int], done: int = 0) -> Ahead:
    """train_batches, prepared ahead by a thread and moved to the device."""
    def items() -> Iterator[tuple[list[Batch], TouchedRows | None]]:
        if ranks.device.type == "cuda":  # pinning in a new thread would open a context on GPU 0
            torch.cuda.set_device(ranks.device)
        for item in with_coming(train_batches(hp, ranks, steps, done)):
            yield pinned(item, ranks.device)

    return Ahead(items(), STEPS_AHEAD, ranks.device)


def pinned(item: object, device: torch.device) -> object:
    """The tensors of nested tuples in memory that a GPU copies from without the CPU."""
    return tree_map_only(Tensor, Tensor.pin_memory, item) if device.type == "cuda" else item


def send(item: object, device: torch.device) -> object:
    """The tensors of nested tuples, from the CPU, on the device, without waiting for the copy."""
    return tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), pinned(item, device))


def maybe_compiled(f: Callable, hp: Recipe) -> Callable:
    """f as one graph, compiled anew for each shape; without hp.compile, f."""
    return torch.compile(f, dynamic=False, fullgraph=True) if hp.compile else f


class Replay:
    """f(batch, windows, weights), captured as a graph for each kind (shapes, windows) of calls, and replayed from then
    on: the GPU waits for no launches (8 batches of 16,384 tokens: 253 ms a step became 188, H200). A kind's first call
    runs and so compiles, and all calls before capture_all do. Without graphs, f."""

    def __init__(self, f: Callable, graphs: bool):
        self.f = f
        self.pool = torch.cuda.graph_pool_handle() if graphs else None  # graphs run one at a time: one memory
        self.first: dict[tuple, tuple] = {}  # by kind: the arguments of its first call
        self.captured: dict[tuple, tuple] = {}  # by kind: graph, its inputs and its result
        self.compiling = False  # in the first call of a kind, which takes long: kernels compile even without hp.compile

    def __call__(self, batch: Batch, windows: Windows, weights: Tensor) -> Tensor:
        kind = windows, *(x.shape for x in (*batch, weights))
        self.compiling = kind not in self.first
        self.first.setdefault(kind, (batch, windows, weights))
        if self.compiling or not self.captured:
            return self.f(batch, windows, weights)
        if kind not in self.captured:
            self.captured[kind] = self.capture(batch, windows, weights)
        graph, inputs, loss = self.captured[kind]
        for static, new in zip(inputs, (*batch, weights)):
            static.copy_(new)
        graph.replay()
        return loss

    def capture_all(self) -> None:
        """Graphs of all kinds so far, in the memory that their calls gave back, so that it counts once. The last kind,
        which is the largest, comes first, as its blocks serve the others."""
        if self.pool is not None:
            torch.cuda.empty_cache()
            for kind in [*self.first][::-1]:
                self.captured[kind] = self.captured.get(kind) or self.capture(*self.first[kind])

    def capture(self, batch: Batch, windows: Windows, weights: Tensor) -> tuple:
        inputs = [x.clone() for x in (*batch, weights)]
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.f(Batch(*inputs[:-1]), windows, inputs[-1])
        return graph, inputs, loss


# --- Log

COLUMNS = ("step", "train_loss", "val_loss", "train_time_ms", "tokens_per_s")  # of the .csv


class Log:
    """The terminal, logs/<run id>.txt, which begins with this script's source, and logs/<run id>.csv, which has a line
    for each step and each validation; on ranks but 0 nothing happens. If a file cannot be written at first, that is an
    error; later, training goes on with one warning for each."""

    def __init__(self, hp: Recipe, ranks: Ranks):
        self.bar = self.path = self.table = None
        self.N, self.files, self.lost = hp.num_steps, {}, []
        if ranks.rank:
            return
        self.path = path = Path(hp.log_dir, hp.run_id + ".txt")
        self.table = path.with_suffix(".csv")
        heads = {path: Path(__file__).read_text(encoding="utf-8") + "=" * 100, self.table: ",".join(COLUMNS)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for path in heads:
                finished = hp.resume and path.is_file() and "\nfinal: val_loss" in path.read_text(encoding="utf-8")
                require(not (finished if hp.resume else path.exists()),
                        f"{path} is another run's log; choose another --run_id or --log_dir")
            for path, head in heads.items():
                self.files[path] = file = open(path, "a" if hp.resume else "x", buffering=1, encoding="utf-8")
                if path == self.path or not file.tell():
                    print(head, file=file)
        except OSError as e:
            raise UserError(
                f"cannot write the log {path}: {e.strerror}; free some space or choose another --log_dir") from None

    def write(self, path: Path | None, text: str) -> None:
        if file := self.files.get(path):
            try:
                if os.fstat(file.fileno()).st_nlink == 0:
                    raise FileNotFoundError(0, "it was deleted")
                print(text, file=file)
            except OSError as e:
                with contextlib.suppress(OSError):  # it tries once more to write
                    self.files.pop(path).close()
                self.lost.append(f"warning: the log {path} is incomplete ({e.strerror})")
                with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
                    tqdm.write(f"{self.lost[-1]}; training goes on, copy what you need from the terminal", sys.stderr)

    def __call__(self, text: str, show: bool = True) -> None:
        self.write(self.path, text)
        if self.path and show:
            with contextlib.suppress(OSError):
                tqdm.write(text)

    def loss(self, name: str, loss: float, step: int, ms: float, rate: float | None = None) -> None:
        """A line of both files about a loss after so many steps, name being its column. One of training, which has a
        rate in tokens/s, moves a bar on a terminal, and is a plain line in a pipe."""
        bar = self.path and rate is not None and sys.stderr.isatty()
        average = ms / max(step, 1)
        self(f"step:{step}/{self.N} {name}:{loss:.4f} train_time:{ms:.0f}ms step_avg:{average:.2f}ms", show=not bar)
        values = {"step": step, name: loss, "train_time_ms": ms} | ({} if rate is None else {"tokens_per_s": rate})
        self.write(self.table, ",".join(f"{values[x]:.8g}" if x in values else "" for x in COLUMNS))
        if bar:
            with contextlib.suppress(OSError):
                if not self.bar:  # begins here, as neither set-up nor steps before a resumption tell how long one takes
                    self.bar = tqdm(total=self.N, initial=step, unit="step", leave=False)
                self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{rate:,.0f}", refresh=False)
                self.bar.update(step - self.bar.n)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        with contextlib.suppress(OSError):
            if self.bar:
                self.bar.close()
            for text in self.lost:
                print(text, file=sys.stderr)

    def result(self, val_loss: float, hp: Recipe, ms: float, ranks: Ranks) -> None:
        cuda = ranks.device.type == "cuda"
        self(f"final: val_loss {val_loss:.4f} after {hp.num_steps} steps, {ms / 1000:.1f} s of training on "
             f"{ranks.world} x {torch.cuda.get_device_name() if cuda else 'CPU'}")
        if cuda:
            self(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB "
                 f"reserved: {torch.cuda.max_memory_reserved() // 2**20} MiB")
        speed = run_flops(hp) / ranks.world / max(ms, 1e-3) / 1e9  # ms to TFLOP/s
        self(f"speed: {speed:.3g} TFLOP/s on each, counting products with weights")


def run_flops(hp: Recipe) -> int:
    """Of products with weights, for each and a token 2 forward and 4 backward; all of the head's, not attention's."""
    P, H, D, F, V = (hp.sizes[letter] for letter in "PHDFV")
    tokens = sum(plan(step, hp).batch_tokens for step in range(hp.num_steps))
    return 6 * (sum(hp.head_dims) * 4 * H * D + P * 2 * D * F + D * V) * tokens


def log_environment(log: Log, hp: Recipe, ranks: Ranks) -> None:
    """Write versions and GPUs, then the keys and the tables of the run, each followed by a rule."""
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        smi = "nvidia-smi: not available"
    versions = f"Python {sys.version}\nPyTorch {torch.__version__} CUDA {torch.version.cuda}, {ranks.world} ranks"
    rule = "=" * 100
    keys = "\n".join(f"{name} = {getattr(hp, name)!r}" for name in KEYS)
    log("\n".join([versions, smi, rule, keys, *tables_text(hp), rule]), show=False)


def tables_text(hp: Recipe) -> Iterator[str]:
    """The tables in aligned columns, with what follows from each row."""
    tables = {table: [{"row": i} | row._asdict() for i, row in enumerate(getattr(hp, table.lower()))]
              for table in ("LAYERS", "STAGES", "PARAMS")}
    for row, (first, end) in zip(tables["STAGES"], itertools.pairwise(stage_bounds(hp))):
        row |= {"steps": f"{first}-{end - 1}", "tokens": (end - first) * row["batch"] * hp.batch_unit}
    for row, param in zip(tables["PARAMS"], hp.params):
        row["sizes"] = "x".join(map(str, param_shape(param, hp)))
    for table, rows in tables.items():
        cells = [list(rows[0]), *([str(value).replace(", ", ",") or "-" for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        yield f"\n{table}"
        yield from ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)
    yield f"\nREADOUT\n{hp.readout}"


class Reports:
    """Lines of finished steps. A GPU's loss is read a step late, so that it always has work queued."""

    def __init__(self, log: Log, clock: Clock):
        self.log, self.clock = log, clock
        self.waiting, self.ms = deque(), clock.before

    def add(self, step: int, loss: StepLoss, tokens: int) -> None:
        losses = torch.cat([loss.mean[None], loss.each]).to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if loss.mean.is_cuda else None
        self.waiting.append((step, losses, event, tokens))
        self.write(1 if event else 0)

    def write(self, left: int = 0) -> None:
        """The lines of all but so many steps. A nan or inf on any rank is an error on all, which have the same losses;
        one that was in gradients only is in the next steps' losses."""
        while len(self.waiting) > left:
            step, losses, event, tokens = self.waiting.popleft()
            if event:
                event.synchronize()  # waits for no later work of the device
            loss, *each = losses.tolist()
            before, self.ms = self.ms, self.clock.ms()
            self.log.loss("train_loss", loss, step, self.ms, tokens / max(self.ms - before, 1e-3) * 1000)
            for rank, own in enumerate(each):
                require_finite(own, f"training loss of step {step}", f" on rank {rank}")


def require_finite(loss: float, name: str, where: str = "") -> None:
    require(math.isfinite(loss), f"the {name} is {loss}{where}; to find its origin: "
            f"{shlex.join(['python', 'tools/find_nan.py', *sys.argv[1:]])}")


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


# --- Watch

LOOK_EVERY = 1.0  # seconds; the limits below count looks, so that a process that was asleep blames no other
SILENT = 15  # looks without a sign of life: found before torchrun kills all, 30 s after a rank died
SILENT_COMPILING = 45  # the same before the first step, as a compiler may keep other threads from running
STALLED = 45  # looks without progress while the clock runs


class Watch:
    """The context of a run: on every rank a thread ends the process soon after a rank died, hangs or raised, and agrees
    with the others on a step before which all stop. It uses torchrun's store, not the device: the training clock shall
    not pay. NCCL's own watchdog waits for minutes, and cannot name what hangs."""

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
        self.leaving, self.thread = threading.Event(), threading.Thread(target=self.watch_loop, daemon=True)
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

    def watch_loop(self) -> None:
        while not self.leaving.wait(LOOK_EVERY):
            try:
                self.publish()
                states = [json.loads(text) for text in self.store.multi_get(self.keys)]
            except RuntimeError:
                self.end_process(f"error: rank {self.rank} cannot reach the launcher of the run: killed or cut off")
            self.judge(states)

    def judge(self, states: list[dict]) -> None:
        """Judge the states of all ranks, LOOK_EVERY after the last ones."""
        old, self.states, steps = self.states, states, [s["step"] for s in states]
        self.quiet = [n + 1 if a == b else 0 for n, a, b in zip(self.quiet, old, states)]
        moved = steps != [s.get("step") for s in old] or not all(s["timed"] for s in states)
        self.stalled = 0 if moved or self.world == 1 else self.stalled + 1
        errors, silence = [s["error"] for s in states if s["error"]], max(self.quiet)
        self.failing += bool(errors)
        if silence >= (SILENT if self.step >= 0 or self.wish or errors else SILENT_COMPILING):
            lost = self.quiet.index(silence)
            self.end_process(f"error: rank {lost} gave no sign of life for {silence * LOOK_EVERY:.0f} s, last in step "
                     f"{steps[lost] + 1} at {states[lost]['at']}: killed, out of memory, stopped or cut off")
        if errors and (self.world == 1 or self.failing > 2 and silence < 2):  # else it may follow from a rank's death
            self.end_process(errors[0])
        if self.stalled >= STALLED:
            places = ", ".join(f"rank {rank} in step {s['step'] + 1} at {s['at']}" for rank, s in enumerate(states))
            self.end_process(f"error: no rank finished a step for {STALLED * LOOK_EVERY:.0f} s, a rank hangs: {places}")
        if self.stop_from is None and (why := self.wish or next((s["why"] for s in states if s["why"]), "")):
            self.why, self.stop_from = why, self.step
        stops = [s["stop"] for s in states]
        if None not in stops:
            self.why = states[0]["why"]
            if min(stops) < 0:
                self.end_process(f"interrupted by {self.why} before the first step", 128 + signal.Signals[self.why])
            self.stop_before = max(stops) + 2  # a rank may have begun the step after the one that it published

    def stops(self, step: int) -> bool:
        """Whether all ranks stop before this step; to be asked before each."""
        self.step = step
        while (self.wish or self.stop_from is not None) and self.stop_before is None:
            time.sleep(0.01)
        return step == self.stop_before

    def end_process(self, text: str, status: int = 1) -> None:
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


# --- Checkpoints

def checkpoint_due(step: int, hp: Recipe) -> bool:
    """Whether a checkpoint is due when this many steps are done."""
    return (hp.save_every > 0 and step % hp.save_every == 0) or (hp.save_final and step == hp.num_steps)


def run_identity(hp: Recipe) -> dict:
    """What the weights of a run follow from; and the free keys."""
    tables = {table: [list(row) for row in getattr(hp, table.lower())] for table in TABLES if table != "READOUT"}
    shapes = {row.name: param_shape(row, hp) for row in hp.params}  # without padding
    digest = hashlib.sha256()  # of shards wherever they lie: their sizes and 256 samples of each
    for path in sorted(glob.glob(hp.train_files)):
        data = np.memmap(path, np.uint8, "r")
        samples = (data[len(data) * i // 256 :][:4096] for i in range(256))
        digest.update(b"".join([f"{len(data)} ".encode(), *samples]))
    return {name: getattr(hp, name) for name in KEYS} | tables | {
        "READOUT": list(hp.readout), "shapes": shapes, "the contents of --train_files": digest.hexdigest()}


def recipe_of(saved: dict) -> Recipe:
    """The recipe whose run_identity was saved; UserError if it is none."""
    tables = {table.lower(): tuple(kind(*row) for row in saved[table])
              for table, kind in TABLES.items() if table != "READOUT"}
    keys = {name: saved[name] for name in KEYS if name in saved}
    hp = Recipe(**keys, **tables, readout=Readout(*saved["READOUT"]))
    check_recipe(hp)
    return hp


class State(NamedTuple):
    """A tensor that steps change."""

    name: str
    tensor: Tensor
    ranks: Literal["same", "shard", "own", "rows", "slots"]
    # shard: slices of dim 0; rows: the same of a table that no rank holds; slots: as many as a Cycle has filled


def save_checkpoint(log: Log, optimizer: NorMuonAdam, step: int, ms: float) -> Path | None:
    """Write a checkpoint: tensors as one rank has them, but each rank's gradients that wait for an update; each rank's
    part of the n-gram table and its Cycle in a file beside it. Returns its path, on rank 0; raises UserError."""
    rank, R, _ = optimizer.ranks
    about, tensors, piece = run_identity(optimizer.hp), {}, {}
    for name, x, kind in optimizer.states():
        if kind in ("rows", "slots"):
            piece[name] = (x if kind == "rows" else x[: optimizer.cycle.filled].clone()).cpu()
            continue
        if kind != "same":
            part = x[None] if kind == "own" else x
            x = part.new_empty(R * len(part), *part.shape[1:])
            dist.all_gather_into_tensor(x.view(torch.uint8), part.view(torch.uint8))  # NCCL knows no int16
        if rank == 0 and (kind != "own" or x.any()):
            tensors[name] = (x if kind == "own" else x[: about["shapes"][name.split(".")[0]][0]]).cpu()
    first = [log.path and log.path.with_name(f"{log.path.stem}_step{step}.pt"), ms]
    dist.broadcast_object_list(first, 0)  # by which pieces know their checkpoint
    saved = {"settings": about, "step": step, "ms": ms, "tensors": tensors, "pieces": R if piece else 0}

    def write(path: Path, content: dict) -> Path:
        temporary = Path(f"{path}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # on machines without the log
            torch.save(content, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as e:  # the latter by torch's writer
            raise UserError(f"cannot write {path}: {e}; free some space or choose another --log_dir") from None
        finally:
            temporary.unlink(missing_ok=True)
        return path

    if piece:
        on_every_rank(lambda: write(Path(f"{first[0]}.{rank}of{R}"), {"ms": first[1], "tensors": piece}))
    return on_every_rank(lambda: write(first[0], saved) if rank == 0 else None)


def read_checkpoint(path: str, hp: Recipe | None = None) -> dict | None:
    """What save_checkpoint wrote, on the CPU, with "hp"; UserError unless it is intact and a run of hp can use it."""
    if not path:
        return None
    require(os.path.exists(path), f"{path}: there is no such checkpoint; choose another")

    def read(path: str) -> dict:
        require(not zipfile.ZipFile(path).testzip(), "wrong checksum")  # torch.load ignores it
        return torch.load(path, "cpu", weights_only=True, mmap=True)

    try:
        saved = read(path)
        old, R = saved["settings"], saved["pieces"]
        for piece in (read(f"{path}.{rank}of{R}") for rank in range(R)):
            for name, x in piece["tensors"].items():
                saved["tensors"].setdefault(name, []).append(x)
            require(piece["ms"] == saved["ms"], "pieces of several checkpoints")
        fit = [slice_of(saved["tensors"][name], 0, x[0], "meta").shape == x for name, x in old["shapes"].items()]
        require(isinstance(saved["step"], int) and all(fit), "wrong step or shapes")
        saved["hp"] = hp or recipe_of(old)
    except Exception as e:  # zipfile and torch raise many kinds
        cause = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"{path} is no intact checkpoint of this script ({cause}); choose another") from None
    given = run_identity(hp) if hp else {}
    other = [f"{name}={old.get(name)}" if name in KEYS else name for name, value in given.items()
             if old.get(name) != value and not (name in KEYS and KEYS[name].metadata["free"])]
    require(not other, f"{path} was trained with other values of what follows, use the same: {', '.join(other)}")
    return saved


def slice_of(saved: Tensor | list[Tensor], first: int, count: int, device: str = "cpu") -> Tensor:
    """Up to so many rows of a saved tensor, or of one in pieces."""
    found = []
    for piece in saved if isinstance(saved, list) else [saved]:
        found.append(piece[max(first, 0) : max(first + count, 0)].to(device))
        first -= len(piece)
    return torch.cat(found) if len(found) > 1 else found[0]


def load_checkpoint(saved: dict, optimizer: NorMuonAdam, clock: Clock) -> int:
    """Bring optimizer and model from the start to where they were, on any number of ranks; returns the steps done."""
    (rank, R, device), tensors = optimizer.ranks, saved["tensors"]
    for name, x, kind in optimizer.states():
        if name in tensors and kind != "slots":  # else a gradient of zeros
            y = tensors[name]
            if kind == "own":
                sparse = name == "bigram_embed.grad" and len(y) != R  # see TouchLog.take_over
                y = y[rank] if len(y) == R else y.float().mean(0)
                y = R * y * (torch.arange(len(y)) * R // len(y) == rank)[:, None] if sparse else y
            y = slice_of(y, rank * len(x), len(x)) if kind in ("shard", "rows") else y
            x[: len(y)].copy_(y)  # the rest is padding
    if optimizer.cycle and any(map(len, tensors["ngram_embed.ids"])):
        pieces = slice(rank, rank + 1) if saved["pieces"] == R else slice(None)
        ids, sums = (torch.cat(tensors[f"ngram_embed.{key}"][pieces]).to(device) for key in ("ids", "grad"))
        if saved["pieces"] != R:  # each rank takes those of its shard, see TouchLog.take_over
            own = ids // len(optimizer.cycle.table) == rank
            ids, places = ids[own].unique(return_inverse=True)
            sums = sums.new_zeros(len(ids), sums.size(1)).index_add_(0, places, sums[own]) * (R / saved["pieces"])
        optimizer.cycle.saved = ids, sums
    clock.before = saved["ms"]
    return saved["step"]


def main() -> None:
    """Run the command line; a UserError costs one line and exit status 1."""
    with one_line_errors():
        hp, args = parse_args(sys.argv[1:])
        if args.plan:
            print_plan(hp)
        elif args.check:
            found = check_data(hp)
            read_checkpoint(hp.resume, hp)
            print(found)
        else:
            ranks = setup_ranks(hp)
            asked, hp = hp, on_every_rank(lambda: choose_backends(hp, ranks.device))
            on_every_rank(lambda: check_data(hp))
            saved = on_every_rank(lambda: read_checkpoint(hp.resume, hp))
            status = train_trials(hp, args.trials, ranks, saved, [*notices(asked, hp, ranks.device)])
            dist.destroy_process_group()
            sys.exit(status)


if __name__ == "__main__":
    main()
