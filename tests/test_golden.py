"""The algorithm's numbers on small inputs: forward, gradients, YaRN, optimizers, loss, loader (tests/golden)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt as t

GOLDEN = Path(__file__).parent / "golden"
MODEL, PARTS = np.load(GOLDEN / "model.npz"), np.load(GOLDEN / "parts.npz")
SCALARS = "smear_lambda", "backout_lambda", "skip_lambda"
TOLERANCE = 4e-6  # of max |difference| / max |reference|, in float32
# how far a golden number, itself of float32, is from the one that this model gives in float64, if over TOLERANCE: CPUs
# that add in another order than the one that made it come out on either side
GOLDEN_ROUNDING = {"attn_gate_bank": 4.9e-6}
WINDOWS = t.Windows(16, 48, 256, 0.1)
HP = t.Recipe(
    vocab_size=512, model_dim=96, head_dim=16, dtype="float32", fp8_head=False, val_chunk=256, batch_unit=2048, block=16
)


def error(ours, reference):
    ours = ours.detach().double().numpy() if torch.is_tensor(ours) else np.asarray(ours, np.float64)
    return np.abs(ours - reference).max() / (np.abs(reference).max() or 1.0)  # the scale of zeros is 1


def golden_model():
    """The model with the golden weights, drawn in the documented order, and the golden batch."""
    rng = np.random.default_rng(20260408)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    width = 1 / np.sqrt(np.float32(96))
    weights = {
        "attn_gate_bank": 0.5 * draw(10, 6, 12),
        "bigram_embed": 0.5 * draw(2560, 96),
        "bigram_lambdas": 0.1 * draw(11),
        "embed": 0.5 * draw(512, 96),
        "lm_head": 0.5 * draw(96, 512),
        "mlp_bank": (width * draw(12, 2, 384, 96))[:11],
        "post_lambdas": 1 + 0.1 * draw(11, 2),
        "qk_bank": width * draw(60, 32, 96),
        "resid_lambdas": 1 + 0.1 * draw(11, 2),
        "scalars": 0.5 + 0.2 * draw(25),
        "skip_gate": 0.5 * draw(1, 12),
        "smear_gate": 0.5 * draw(1, 12),
        "value_embeds": 0.5 * draw(2560, 96),
        "ve_gate_bank": 0.5 * draw(5, 6, 12),
        "vo_bank": width * draw(20, 96, 96),
        "x0_lambdas": 0.1 * draw(11),
    }
    tokens = rng.integers(0, 511, 256)
    starts = [0, 37, 38, 120, 200]
    tokens[starts] = 511
    assert (tokens == MODEL["tokens"]).all()
    scalars = weights.pop("scalars")
    weights |= {"attn_lambdas": scalars[:22].view(11, 2).T} | dict(zip(SCALARS, scalars[22:]))
    model = t.GPT(HP)
    with torch.no_grad():
        for name, weight in weights.items():
            parameter = getattr(model, name)
            parameter.copy_(weight.reshape(parameter.shape))
    batch = t.pack(HP, [(np.append(tokens, 511), np.array([*starts[1:], 256]))])
    return model, batch


def set_rotation(model, frequencies):
    angle = torch.outer(torch.arange(len(model.cos)), frequencies)
    model.cos.copy_(angle.cos())
    model.sin.copy_(angle.sin())


BASE = HP.rope_base ** -torch.linspace(0, 1, 4)


def test_bigram_ids():
    _, batch = golden_model()
    assert (batch.bigram_ids.numpy() == MODEL["bigram_ids"]).all()


def test_forward_and_gradients():
    model, batch = golden_model()
    set_rotation(model, BASE)
    loss = model.val_losses(batch, model.lookup(batch), WINDOWS)
    assert error(loss, MODEL["loss_a"]) < TOLERANCE
    loss.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.numel()}  # without the n-gram table
    # as they were stored: all scalars as one parameter, two matrices of zeros after mlp_bank
    grads["scalars"] = torch.cat([grads.pop("attn_lambdas").T.flatten(), *(grads.pop(name) for name in SCALARS)])
    grads["mlp_bank"] = torch.nn.functional.pad(grads["mlp_bank"], (0, 0, 0, 0, 0, 2))
    for name, grad in grads.items():
        name += ".weight" * (name in ("embed", "bigram_embed", "lm_head", "skip_gate", "smear_gate"))
        grad = grad.flatten()
        assert error(grad.double().norm(), MODEL[f"gradnorm_a/{name}"]) < TOLERANCE, name
        sample = grad[:: max(1, grad.numel() // 16)][:16]
        assert error(sample, MODEL[f"grad16_a/{name}"]) < TOLERANCE + GOLDEN_ROUNDING.get(name, 0.0), name


def test_training_loss_matches_validation_loss():
    """With one predicted token and no FP8, the training head gives the same loss and gradients."""
    grads = []
    for training in (False, True):
        model, batch = golden_model()
        set_rotation(model, BASE)
        inputs = batch, model.lookup(batch), WINDOWS
        one = torch.ones(1) / model.loss_scale
        loss = model.train_loss(*inputs, one) if training else model.val_losses(*inputs).sum()
        loss.backward()
        grads.append((loss, model.lm_head.grad, model.embed.grad, model.qk_bank.grad))
    for a, b in zip(*grads):
        assert error(a, b.detach().numpy()) < TOLERANCE


def test_yarn():
    frequencies, scale = t.yarn(BASE, 0.1, 48, 112)
    listed = torch.cat([frequencies.repeat_interleave(2), torch.zeros(8)])
    assert error(listed, MODEL["angular_freq_48_112"]) < TOLERANCE
    assert error(scale, MODEL["attn_scale_48_112"]) < TOLERANCE
    model, batch = golden_model()
    set_rotation(model, frequencies)
    loss = model.val_losses(batch, model.lookup(batch), t.Windows(32, 112, 256, scale))
    assert error(loss, MODEL["loss_b"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["tall", "wide", "square"])
def test_normuon(kind):
    p = torch.from_numpy(PARTS[f"opt/{kind}/p0"])
    K, rows, columns = p.shape
    second = (K, rows, 1) if rows >= columns else (K, 1, columns)
    # the direction in float64 throughout, as the golden one; the parameter in float32
    momentum64, second64 = torch.zeros_like(p, dtype=torch.float64), torch.zeros(second, dtype=torch.float64)
    state = dict(momentum=torch.zeros_like(p), second=torch.zeros(second), rate=torch.ones(K, 1, 1))
    mu, beta2 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    hypers = torch.tensor([0.02, 1.2 * 0.02, 0.9, 0.9])
    for step in range(3):
        g = torch.from_numpy(PARTS[f"opt/{kind}/g{step}"])
        x = t.normuon_direction(g, momentum64, second64, mu, beta2, torch.float64)
        assert error(x, PARTS[f"opt/{kind}/x{step}"]) < TOLERANCE
        t.normuon_update([(p, g, state, hypers, True)])
        assert error(p, PARTS[f"opt/{kind}/p{step + 1}"]) < TOLERANCE


def test_adam():
    p = torch.from_numpy(PARTS["adam/p0"])
    state = dict(first=torch.zeros_like(p), second=torch.zeros_like(p))
    lr, beta1, beta2 = 0.008 * 75 * 0.5, 0.75, 0.95
    for step in range(1, 4):
        hypers = torch.tensor([lr, lr**2 * 0.005 * 5, beta1, beta2, 1 - beta1**step, 1 - beta2**step, 1e-10, 0.0])
        t.adam_update([(p, torch.from_numpy(PARTS[f"adam/g{step - 1}"]), state, hypers, True)])
        assert error(p, PARTS[f"adam/p{step}"]) < TOLERANCE


def test_loss():
    logits = torch.from_numpy(PARTS["loss/logits"]).float()
    targets, weights = torch.from_numpy(PARTS["loss/targets"]), torch.from_numpy(PARTS["loss/weights"]).float()
    targets = t.next_targets(targets[None], len(weights))
    loss, grad = t.softcapped_mtp_loss_reference(logits, targets, weights, torch.float32, 1.0, *HP.readout[1:])
    assert error(loss, PARTS["loss/value"]) < TOLERANCE
    assert error(grad, PARTS["loss/grad"]) < TOLERANCE


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_loader(make_shard, world):
    """The slices that ranks take, step by step, whatever the number of ranks."""
    bos, per_shard = 50256, {}
    files = [make_shard(f"train_{i}.bin", PARTS[f"loader/shard{i}"]) for i in (1, 2)]
    shapes = [(4096, 96)] * 3 + [(8192, 256)] * 2
    plans = [t.plan(0, HP)._replace(windows=WINDOWS._replace(segment=n // 8, max_doc=m)) for n, m in shapes]
    ours = []
    for step, (documents, segments) in enumerate(t.walk(files, bos, plans)):
        shard = per_shard.setdefault(id(documents), len(per_shard) + 1)
        for rank in range(world):
            for micro, slices in enumerate(segments[rank::world]):
                s = micro * world + rank
                ours += [(step, s // 8, s % 8, shard, *ends) for ends in slices]
    assert sorted(ours) == sorted(map(tuple, PARTS["loader/rows_R8"].tolist()))
