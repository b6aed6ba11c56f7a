"""The sparse exchange of the bigram table's gradient: against the dense reduction, and the row counts it relies on."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the ranks
import train_gpt as t

R, CPU = 8, torch.device("cpu")
# eight steps, Adam in the odd ones, embed split off in step 5; 640 bigram rows, 8 to 24 tokens a micro-batch
HP = dataclasses.replace(t.PRESETS["demo"], model_dim=48, head_dim=8, bigram_ratio=5, vocab_size=120,
                         batch_unit=64, num_scheduled_iterations=6, num_extension_iterations=2,
                         muon_momentum_warmup=3, muon_momentum_cooldown=2)


def with_shard(folder):
    """HP with a shard of short documents, in which few tokens are frequent, so that some bigrams meet several ranks."""
    rng, header = np.random.default_rng(0), np.zeros(256, "<i4")
    tokens = np.minimum(rng.geometric(0.15, 4000), 118)
    tokens[rng.random(4000) < 0.1] = HP.bos
    header[:3] = 20240520, 1, len(tokens)
    (folder / "train.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return dataclasses.replace(HP, train_files=str(folder / "train.bin"))


class RandomGradients:
    """In Run.micro_step's place: positive random gradients of the bigram rows, whatever the weights are.

    As all terms of a sum have one sign, its relative error is that of the additions, which Adam does not magnify.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.generator = torch.Generator().manual_seed(optimizer.ranks.rank)

    def __call__(self, batch, windows, weights):
        shape = len(batch.tokens), HP.model_dim
        zero, grad = torch.zeros(shape), 0.5 + torch.rand(shape, generator=self.generator)
        zero, grad = SimpleNamespace(grad=zero), SimpleNamespace(grad=grad)
        self.optimizer.add_table_gradients(batch, t.Embeddings(zero, grad, (zero,) * HP.sizes["E"]))
        return torch.zeros(())


def train(hp, rank, sparse):
    """Eight steps of one rank: the bigram table, and the largest relative error of each averaged gradient of it."""
    t.SPARSE_FROM = R if sparse else R + 1
    run, errors = t.Run(hp, t.Ranks(rank, R, CPU)), []
    model, optimizer = run.model, run.optimizer

    def update(group, grads, hypers):
        (row, *_), (g, *_) = group, grads
        if row.name == "bigram_embed":  # other parameters have no gradients
            exact = optimizer.grads[row.name].to(model.bigram_embed.dtype).double()
            dist.all_reduce(exact)
            exact = exact.chunk(R)[rank] / R
            assert not g[exact == 0].any() and exact.any()
            errors.append(((g.double() - exact).abs() / exact.clamp_min(1e-30)).max().item())
            t.NorMuonAdam.update(optimizer, group, grads, hypers)

    optimizer.update = update
    run.micro_step = RandomGradients(optimizer)
    for step, (batches, touched) in enumerate(t.train_batches(hp, run.ranks, range(8))):
        assert (touched is not None) == (sparse and step % 2 == 1)
        run.train_step(batches, touched, t.plan(step, hp))
    assert len(errors) == 4
    return model.bigram_embed.detach().float(), torch.tensor(errors)


def worker(rank, hp, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=R)
    out = {}
    for dtype in ("float32", "bfloat16"):
        out[dtype] = {sparse: train(dataclasses.replace(hp, dtype=dtype), rank, sparse) for sparse in (False, True)}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What train returns on each of eight gloo ranks: [rank][dtype][sparse]."""
    folder = tmp_path_factory.mktemp("ranks")
    done = forks.run(__file__, folder)  # a process without threads or groups, which can fork
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(R)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sparse_exchange_equals_dense_reduction(trained, dtype):
    """Averaged gradients to the rounding of a sum over ranks; so, after four updates, the tables of all ranks."""
    eps = torch.finfo(getattr(torch, dtype)).eps
    for result in trained:
        for sparse, (table, errors) in result[dtype].items():
            assert torch.equal(table, trained[0][dtype][sparse][0])
            # R - 1 additions, each off by at most eps / 2; what came sparsely is added in fp32
            assert errors.max() <= (R - 1) / 2 * (torch.finfo(torch.float32).eps if sparse else eps)
    dense, sparse = (trained[0][dtype][kind][0] for kind in (False, True))
    rows = sparse.any(dim=1)
    assert 100 < rows.sum() < len(rows) and torch.equal(rows, dense.any(dim=1))
    # Both sums are off by (R - 1) / 2 eps, and m / sqrt(v) by at most twice their difference; the rest is for the
    # roundings of the weights, which no update moves by much more than its learning rate
    lr = sum(75 * HP.adam_lr * t.plan(step, HP).lr_factor for step in (1, 3, 5, 7))
    assert (sparse - dense).abs().max() <= 3 * R * eps * lr


def test_loader_counts(tmp_path):
    """Rank a sends to b what b receives from a: the rows of b's shard that a's batches read since Adam's last step."""
    hp = with_shard(tmp_path)
    size, steps = hp.sizes["B"] // R, (0, 1, 2, 3, 4, 5, 6, 7, 7, 0, 1)  # in some order, as in the warm-up
    loaders = [t.train_batches(hp, t.Ranks(rank, R, CPU), steps) for rank in range(R)]
    read = [set() for _ in range(R)]
    for step in steps:
        items = [next(loader) for loader in loaders]
        for ids, (batches, _) in zip(read, items):
            ids.update(i for batch in batches for i in batch.bigram_ids.tolist())
        if step % 2 == 0:
            assert all(touched is None for _, touched in items)
            continue
        exchanges = [touched.gradients for _, touched in items]
        received = [touched.received.split(touched.receive_counts) for touched in exchanges]
        for a, touched in enumerate(exchanges):
            assert touched.sent.dtype == touched.received.dtype == torch.int32
            assert touched.sent.tolist() == sorted(read[a])
            for b, rows in enumerate(touched.sent.split(touched.send_counts)):
                assert touched.send_counts[b] == exchanges[b].receive_counts[a]
                assert torch.equal(rows, received[b][a] + b * size)
        read = [set() for _ in range(R)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fewer_ranks_reduce_densely(tmp_path, world):
    items = t.train_batches(with_shard(tmp_path), t.Ranks(0, world, CPU), range(2))
    assert [touched for _, touched in items] == [None, None]


if __name__ == "__main__":
    mp.start_processes(worker, args=(with_shard(Path(sys.argv[1])), sys.argv[1]), nprocs=R, start_method="fork")
