"""What the tests of parts of the model share: a model of random weights, and that no later token changes a loss."""

import numpy as np
import torch

import train_gpt as t


def disturbed_model(hp):
    """A model in which every parameter has an effect: those that begin with 0 have none."""
    model = t.GPT(hp).requires_grad_(False)
    model.initialize(hp)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model.set_stage(0)
    return model


def check_later_tokens(model, position):
    """A token changed at this position of some documents changes no earlier loss, but later ones."""
    tokens, found = np.random.default_rng(0).integers(0, 255, 97).astype(np.uint16), []
    for _ in range(2):
        batch = t.pack(model.hp, [(tokens.copy(), np.array([29, 30, 60, 96]))])
        batch = batch._replace(targets=torch.zeros_like(batch.targets))
        found.append(model.val_losses(batch, model.lookup(batch), t.Windows(16, 48, 96, 0.1)))
        tokens[position] += 1
    assert torch.equal(found[0][:position], found[1][:position])
    assert not torch.equal(found[0][position:], found[1][position:])
