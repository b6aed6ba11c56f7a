"""What the tests of kernels share: errors against float64, exact losses, random inputs, a process that interprets."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt as t

EPS = torch.finfo(torch.float32).eps
BF16, FP32, FP64, E5M2 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2
CAP = 23.0, 5.0, 7.5  # and its shift and width
KINDS = list(itertools.product((False, True), repeat=3))  # paired, key offset, value embedding
needs_interpreter = pytest.mark.skipif(
    t.triton is None or t.triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton is not installed, or is 3.6, whose interpreter fails with NumPy 2.4")


def run_interpreted(file):
    """The file's TestInterpreted passes in a process whose Triton interprets the kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{Path(file)}::TestInterpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=Path(t.__file__).resolve().parent,
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


class Interpreted:
    """fp32 on a CPU: the interpreter's bf16 and fp8 arithmetic is wrong. What a kernel leaves unwritten is NaN here."""

    __test__ = t.INTERPRETED

    @pytest.fixture(autouse=True)
    def unwritten_is_nan(self):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)


def gradients(f, inputs, direction):
    """The outputs of f and the gradients of those inputs that are tensors, for the gradient `direction` of the outputs.

    f: takes copies of the inputs. Other inputs are passed on as they are.
    """
    inputs = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    grads = torch.autograd.grad(outputs, tensors, direction)
    return [x.detach() for x in (*outputs, *grads)]


class Inputs(torch.autograd.Function):
    """attention_inputs and attention_inputs_backward, as AttentionInputs uses them."""

    @staticmethod
    def forward(ctx, qkv, r, ve, gate, cos, sin, paired, key_offset):
        ctx.save_for_backward(qkv, r, ve, gate, cos, sin)
        ctx.options = paired, key_offset
        return t.attention_inputs(qkv, r, ve, gate, cos, sin, paired, key_offset)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        qkv, r, ve, *rest = ctx.saved_tensors
        dqkv, _, dve, dgate = t.attention_inputs_backward(qkv, r, ve, *rest, dq, dk, dv, *ctx.options, 0.0)
        return (dqkv.view(qkv.shape), None, *((dve, dgate) if ve is not None else (None, None)), *[None] * 4)


def to(dtype, *values):
    """The tensors among the values in another dtype; the rest as it is."""
    return [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in values]


def within(ours, exact, size, terms):
    """Each number is off by at most `terms` roundings of its `size`, of the sum without cancellation."""
    assert ours.shape == exact.shape and ours.dtype == FP32
    excess = (ours.double() - exact).abs() - terms * EPS * size
    assert (excess <= 0).all(), excess.max()


def rounding(cap):
    """Of exp(z), z in (0, cap): some roundings of the exponent."""
    return 8 * cap * EPS


def exact_loss(logits, targets, weights, grad_scale, *capping):
    """Loss and gradient of softcapped_mtp_loss in float64, by autograd, and the bound of the gradient's error, segment
    by segment.

    The gradient is (mass p - hits) du, p = softmax: the error of p is relative and that of du = u (1 - u), a difference
    of numbers up to 1, is absolute.
    """
    if len(targets) > 1:
        parts = zip(logits.chunk(len(targets)), targets.split(1))
        return [torch.cat(x) for x in zip(*(exact_loss(*part, weights, grad_scale, *capping) for part in parts))]
    cap, shift, width = capping
    x, T, targets = logits.double().requires_grad_(), targets.size(1), targets[0]
    z = cap * torch.sigmoid((x + shift) / width)
    hits, parts = torch.zeros_like(z), z.new_zeros(T)
    for k, weight in enumerate(weights.double()):
        n = T - k
        parts[:n] += weight * F.cross_entropy(z[:n], targets[k:], reduction="none")
        hits[torch.arange(n, device=x.device), targets[k:]] += weight
    (grad,) = torch.autograd.grad(parts.sum(), x)
    u, p = (z / cap).detach(), hits.sum(1, keepdim=True) * z.detach().softmax(1)
    bound = p * u * (1 - u) * rounding(cap) + (p + hits) * 8 * EPS
    return parts.detach(), grad / grad_scale, bound * cap / width / grad_scale


def rotation(S, d, paired, **kwargs):
    angles = 6 * torch.rand((1 + paired) * S, d // 4, **kwargs)
    return angles.cos(), angles.sin()


def qkv_inputs(T, H, d, mix, **kwargs):
    """qkv, value embedding, gate and the gradients of q, k, v."""
    qkv, *grads = torch.randn(T, 3, H, d, **kwargs), *(torch.randn(T, H, d, **kwargs) for _ in range(3))
    return qkv, *((torch.randn(T, H * d, **kwargs), torch.rand(T, H, **kwargs)) if mix else (None, None)), grads


def row_factors(T, absent, **kwargs):
    return None if absent else 0.5 + torch.rand(T, **kwargs)
