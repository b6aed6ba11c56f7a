"""Documents, segments, the train and val streams and their batches, on random documents."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt as t

BOS = 50256
CPU = torch.device("cpu")
FEW = settings(max_examples=25, deadline=None)
HP = dataclasses.replace(t.PRESETS["demo"], batch_unit=64, micro_tokens=1, block=2)


def write(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return str(path)


def stream(seed, documents, longest, before=0):
    """Random documents; each token inside is random, so that equal slices are unlikely to be equal by chance."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(0, BOS, before)]
    for _ in range(documents):
        parts += [[BOS], rng.integers(0, BOS, rng.integers(0, longest))]
    return np.concatenate(parts).astype(np.uint16)


def documents_of(tokens):
    """(start, end) of each document, found token by token."""
    starts = [i for i, token in enumerate(tokens) if token == BOS]
    return list(zip(starts, starts[1:] + [len(tokens)]))


def slow_segments(documents, first, length, cut):
    """8 lists of slices by taking one token at a time; None if documents run out."""
    out = []
    for _ in range(8):
        slices, room = [], length
        while room > 0:
            if first >= len(documents):
                return None
            start, end = documents[first]
            first += 1
            took = 0
            while start + took < end and took < cut and room > 0:
                took, room = took + 1, room - 1
            slices.append((start, start + took))
        out.append(slices)
    return out, first


def slow_walk(streams, plans):
    """For each step (shard number, its 8 segments): what does not fill a step is dropped with its shard."""
    out, shard, first = [], 0, 0
    while len(out) < len(plans) and shard < len(streams):
        n = plans[len(out)].windows.segment
        found = slow_segments(documents_of(streams[shard]), first, n + 1, plans[len(out)].windows.max_doc)
        if found is None:
            shard, first = shard + 1, 0
        else:
            out.append((shard, found[0]))
            first = found[1]
    return out


def plans_of(pairs):
    base = t.plan(0, HP)
    return [base._replace(windows=base.windows._replace(segment=tokens // 8, max_doc=cut)) for tokens, cut in pairs]


@given(seed=st.integers(0, 10**6), documents=st.integers(0, 120), longest=st.integers(1, 40), before=st.integers(0, 9),
       length=st.integers(1, 60), cut=st.integers(1, 50))
@FEW
def test_segments(seed, documents, longest, before, length, cut):
    """Slices start at BOS, lie inside one document, are cut, come in order and fill each segment exactly."""
    tokens = stream(seed, documents, longest, before)
    assume(len(tokens))  # a shard without any is refused
    shard = t.Documents(tokens, BOS)
    truth = documents_of(tokens)
    assert list(zip(shard.starts, shard.ends)) == truth
    windows = t.plan(0, HP).windows._replace(segment=length - 1, max_doc=cut)
    first = 0
    while True:
        found, slow = shard.segments(first, windows), slow_segments(truth, first, length, cut)
        assert found == slow
        if found is None:
            break
        segments, after = found
        used = [s for segment in segments for s in segment]
        assert len(segments) == 8 and [sum(b - a for a, b in s) for s in segments] == [length] * 8
        assert len(used) == after - first  # each document is visited once
        for (a, b), (start, end) in zip(used, truth[first:]):
            assert a == start and a < b <= min(end, a + cut) and tokens[a] == BOS and BOS not in tokens[a + 1 : b]
        first = after


def test_walk_moves_to_the_next_shard(tmp_path):
    """The rest of a shard that cannot fill a step is dropped; the walk ends early when no shard is left."""
    streams = [stream(seed, count, 30, before=3) for seed, count in ((1, 90), (2, 3), (3, 140), (4, 60))]
    files = [write(tmp_path / f"{i}.bin", tokens) for i, tokens in enumerate(streams)]
    plans = plans_of([(160, 12), (160, 12), (320, 20), (480, 100), (80, 1000)] * 9)
    expected = slow_walk(streams, plans)
    seen = [s for s, _ in expected]
    assert seen == sorted(seen) and set(seen) == {0, 2, 3} and len(expected) < len(plans)  # shard 1 fills no step
    got = list(t.walk(files, BOS, plans))
    assert [segments for _, segments in got] == [segments for _, segments in expected]
    for (documents, _), (shard, _) in zip(got, expected):
        assert (documents.tokens == streams[shard]).all()
    assert len(list(t.walk(files, BOS, plans[:2]))) == 2 and list(t.walk(files, BOS, [])) == []


def test_last_document_counts_and_first_tokens_do_not(tmp_path):
    """Exactly enough documents for one step: tokens before the first BOS are no document, the last document is."""
    tokens = np.array([7, 8, 9] + [BOS, 1, 2, 3] * 8, np.uint16)
    path = write(tmp_path / "a.bin", tokens)
    (_, segments), = t.walk([path], BOS, plans_of([(8 * 3, 99)] * 2))
    assert segments == [[(3 + 4 * i, 7 + 4 * i)] for i in range(8)]
    path = write(tmp_path / "b.bin", tokens[:-1])  # one token short
    assert list(t.walk([path], BOS, plans_of([(8 * 3, 99)]))) == []


def loader(hp, rank, world, steps):
    return [batches for batches, _ in t.train_batches(hp, t.Ranks(rank, world, CPU), range(steps))]


@pytest.fixture
def small_run(tmp_path):
    """Two shards and a small schedule over them, with the expected slices of each step."""
    streams = [stream(seed, 260, 24, before=2) for seed in (5, 6)]
    for name, tokens in (("other", streams[1]), ("train_2", streams[1]), ("train_10", streams[0])):  # sorted as text
        write(tmp_path / f"{name}.bin", tokens)
    hp = dataclasses.replace(HP, train_files=str(tmp_path / "train_*.bin"), num_scheduled_iterations=30,
                             num_extension_iterations=3)
    steps = 27
    truth = slow_walk(streams, [t.plan(step, hp) for step in range(steps)])
    assert {shard for shard, _ in truth} == {0, 1} and len(truth) == steps
    return hp, streams, truth


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_train_loader(small_run, world):
    """Every rank count sees the same documents: segment s is micro-step s // R of rank s % R; targets are shifted."""
    hp, streams, truth = small_run
    ranks = [loader(hp, rank, world, len(truth)) for rank in range(world)]
    for step, (shard, segments) in enumerate(truth):
        assert all(len(rank[step]) == 8 // world for rank in ranks)
        for s, slices in enumerate(segments):
            batch = ranks[s % world][step][s // world]
            want = np.concatenate([streams[shard][a:b] for a, b in slices]).astype(np.int64)
            assert len(batch.tokens) == t.plan(step, hp).batch_tokens // 8
            assert (batch.tokens.numpy() == want[:-1]).all() and (batch.targets.numpy() == want[1:]).all()
            check_cu_seqlens(batch)


@pytest.mark.parametrize("S,A,limit,together", [
    (16384, 8, 65536, 4), (32768, 8, 65536, 2), (49152, 8, 65536, 1), (16384, 4, 65536, 4), (16384, 2, 65536, 2),
    (16384, 1, 65536, 1), (16384, 8, 10**6, 8), (16384, 8, 65535, 2), (16384, 8, 1, 1), (10, 2, 20, 2), (10, 2, 19, 1)])
def test_segments_together(S, A, limit, together):
    """As many as fit, in micro-batches of one size; at least one, whatever the limit."""
    assert t.segments_together(S, A, limit) == together


@pytest.mark.parametrize("world,limit", [(1, 16), (1, 40), (1, 1000), (2, 40), (4, 1000), (8, 1000)])
def test_joined_segments(small_run, world, limit):
    """A joined micro-batch is its segments' batches one after the other, and each document begins where it did."""
    hp, _, truth = small_run
    for rank in range(world):
        alone = loader(hp, rank, world, len(truth))
        joined = loader(dataclasses.replace(hp, micro_tokens=limit), rank, world, len(truth))
        for step, (batches, singles) in enumerate(zip(joined, alone, strict=True)):
            S = t.plan(step, hp).batch_tokens // 8
            n = t.segments_together(S, 8 // world, limit)
            assert len(batches) * n == len(singles) and (limit < 1000 or len(batches) == 1)
            for i, batch in enumerate(batches):
                parts = singles[i * n : (i + 1) * n]
                for name in ("tokens", "targets", "bigram_ids"):
                    assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
                starts = [k * S + at for k, part in enumerate(parts) for at in part.cu_seqlens.tolist() if at < S]
                cu = batch.cu_seqlens.tolist()
                assert cu[: len(starts)] == starts and set(cu[len(starts) :]) == {n * S}
                assert len(cu) == sum(len(part.cu_seqlens) for part in parts)
                assert sorted(batch.order.tolist()) == list(range(n * S))
                assert (batch.tokens[batch.order.long()].diff() >= 0).all()


def check_cu_seqlens(batch, begins=True):
    """Strictly rising document starts, then only n; the starts are 0 and the BOS positions of the inputs."""
    n, cu = len(batch.tokens), batch.cu_seqlens.tolist()
    starts = [i for i, token in enumerate(batch.tokens.tolist()) if token == BOS]
    if starts[:1] != [0]:
        assert not begins
        starts = [0] + starts
    assert cu[: len(starts)] == starts and set(cu[len(starts) :]) == {n} and len(cu) > len(starts)
    types = [x.dtype for x in batch]
    i32, i64 = torch.int32, torch.int64
    assert types == [i32, i64, i32, i32, i32, i64, i32, i32, i64]


def numbered(seed, shards, longest):
    """Shards of random documents, each of this many, in which each token but BOS says its place in all of them."""
    parts, begin = [stream(seed + i, count, longest, before=i + 1) for i, count in enumerate(shards)], 0
    for i, part in enumerate(parts):
        begin, first = begin + len(part), begin
        parts[i] = np.where(part == BOS, BOS, np.arange(first, begin)).astype(np.uint16)
    return parts


def items_of(hp, rank, world, done=0):
    """All that a loader gives before its shards or its schedule end."""
    items = []
    try:
        for batches, _ in t.train_batches(hp, t.Ranks(rank, world, CPU), range(hp.num_steps), done):
            items.append(batches)
    except t.UserError as error:
        assert "ran out" in str(error)
    return items


@given(seed=st.integers(0, 10**6), shards=st.lists(st.integers(0, 250), min_size=1, max_size=4),
       longest=st.integers(1, 60), unit=st.integers(3, 40), block=st.integers(1, 4), steps=st.integers(3, 12),
       done=st.integers(0, 12))
@settings(max_examples=15, deadline=None)
def test_every_token_once_and_in_order(tmp_path_factory, seed, shards, longest, unit, block, steps, done):
    """For any documents, cuts, batch sizes, shards and numbers of ranks, and from any step on.

    Whole micro-batches only; tokens in the order of the shards and none twice; each document cut at its end alone and
    alone between two entries of cu_seqlens; the same segments for 1, 2, 4 and 8 ranks, so for any accumulation; a
    resumed loader goes on with the same batches.
    """
    folder = tmp_path_factory.mktemp("n")
    for i, tokens in enumerate(numbered(seed, shards, longest)):
        write(folder / f"train_{i}.bin", tokens)
    hp = dataclasses.replace(HP, train_files=f"{folder}/train_*.bin", batch_unit=8 * unit, block=block,
                             num_scheduled_iterations=steps, num_extension_iterations=1)
    runs = {world: [items_of(hp, rank, world) for rank in range(world)] for world in (1, 2, 4, 8)}
    last = -1
    for step, batches in enumerate(runs[1][0]):
        p, n = t.plan(step, hp), t.plan(step, hp).batch_tokens // 8
        for s, batch in enumerate(batches):
            for world, ranks in runs.items():
                assert all(map(torch.equal, batch, ranks[s % world][step][s // world]))
            assert [len(x) for x in batch[:3]] == [n] * 3 and len(batches) == 8
            tokens = [*batch.tokens.tolist(), batch.targets[-1].item()]
            assert tokens[1:] == batch.targets.tolist() and tokens[0] == BOS
            check_cu_seqlens(batch)
            for place, after in zip(tokens, [*tokens[1:], BOS]):
                if place != BOS:
                    assert place > last and after in (place + 1, BOS)
                    last = place
            assert batch.cu_seqlens.diff().max() <= p.windows.max_doc
    assert all(len(items) == len(runs[1][0]) for items in itertools.chain.from_iterable(runs.values()))
    world = (1, 2, 4, 8)[done % 4]
    resumed = items_of(hp, 0, world, done)
    assert len(resumed) == max(len(runs[1][0]) - done, 0)
    for ours, batches in zip(resumed, runs[world][0][done:]):
        assert all(all(map(torch.equal, *pair)) for pair in zip(ours, batches, strict=True))


def test_train_loader_ends_with_an_error(small_run):
    """When the shards run out early the loop gets an error, not a hang."""
    hp, _, _ = small_run
    made = t.load_batches(hp, t.Ranks(0, 1, CPU), [*range(30)] * 9)
    with pytest.raises(t.UserError, match="ran out"):
        for _ in range(270):
            next(made)
    made.close()


@pytest.mark.parametrize("n, entries", [(16384, 64), (32768, 96), (49152, 128), (262144, 896), (256, 128), (38700, 256),
                                        (38399, 128), (38699, 128)])
def test_fixed_length_of_cu_seqlens(n, entries):
    """The tuned lengths of the record, and floor(n / 300) rounded up to a multiple of 128 elsewhere."""
    assert t.max_docs(n) == entries
    tokens = np.full(n + 1, 5, np.uint16)
    tokens[[0, n // 2]] = BOS
    for ends in ([n // 2, n + 1], [n // 2, n]):
        batch = t.pack(HP, [(tokens, np.array(ends))])
        assert batch.cu_seqlens.tolist() == [0, n // 2] + [n] * (entries - 2)


@pytest.mark.parametrize("documents, entries", [(127, 128), (128, 512), (511, 512), (512, 2048)])
def test_many_tiny_documents(capsys, documents, entries):
    """More documents than expected still make a right batch; what is compiled for each length says so once a length."""
    hp, n = dataclasses.replace(HP, compile=True), 2 * documents
    tokens = np.tile(np.array([BOS, 3], np.uint16), documents + 1)[: n + 1]
    ends = np.append(np.arange(1, documents) * 2, n)
    t.warn_once.cache_clear()
    for _ in range(3):
        batch = t.pack(hp, [(tokens, ends)])
        assert len(batch.cu_seqlens) == entries
        check_cu_seqlens(batch)
    out, err = capsys.readouterr()
    assert out == ""
    warning = f"warning: more than the expected 127 documents in {n} tokens"
    assert err.count("\n") == err.count(warning) == (entries > 128)
    again = t.pack(HP, [(tokens, ends)])
    assert again.cu_seqlens.tolist() == batch.cu_seqlens.tolist()
    assert capsys.readouterr() == ("", "")  # nothing is compiled


@pytest.mark.parametrize("mean", [25, 40, 50, 75, 100, 150, 200, 300, 450, 700])
@pytest.mark.parametrize("A", [1, 8])
def test_few_lengths_of_cu_seqlens(mean, A):
    """Whatever length documents have: torch.compile stops a run at the ninth shape of a function."""
    rng, lengths = np.random.default_rng(mean), set()
    for number, stage in enumerate(t.STAGES):
        S = 16384 * stage.batch
        tokens = np.full(S + 1, 5, np.uint16)
        for _ in range(12):
            segments = []
            for _ in range(t.segments_together(S, A, 65536)):
                drawn = rng.lognormal(math.log(mean) - 0.5, 1.0, 4 * S // mean).astype(int)
                ends = np.cumsum(drawn.clip(1, stage.max_doc * 128))
                segments.append((tokens, np.append(ends[ends < S + 1], S + 1)))
            lengths.add((number, len(t.pack(HP, segments).cu_seqlens)))
    assert len(lengths) <= 8


def wrap(x):
    """Two's complement in 32 bits."""
    x &= 0xFFFFFFFF
    return x - 2**32 if x >= 2**31 else x


def slow_bigram(tokens, rows):
    ids = [rows - 1]
    for i in range(1, len(tokens)):
        before = rows - 1 if i == 1 else tokens[i - 1]
        ids.append((wrap(36313 * tokens[i]) ^ wrap(27191 * before)) % (rows - 1))
    return ids


@given(tokens=st.lists(st.one_of(st.integers(0, BOS), st.just(BOS)), min_size=1, max_size=40),
       rows=st.sampled_from([251520, 50304, 2560, 128]))
@settings(max_examples=150, deadline=None)
def test_bigram_ids(tokens, rows):
    """The hash against one in Python integers with an explicit wrap; the first two positions have their own rule."""
    given = np.array(tokens, np.uint16)
    ids = t.bigram_ids(given, rows)
    assert ids.tolist() == slow_bigram(tokens, rows)
    assert ids.dtype == np.int32 and ids.min() >= 0 and (ids[1:] < rows - 1).all() and ids[0] == rows - 1
    assert given.tolist() == tokens


def test_bigram_ids_negative_hash():
    """Known values by hand: the product with the last row's number wraps, and a negative hash is taken mod upwards."""
    rows = 251520
    assert 27191 * 251519 - 2**33 == -1750881463  # more than 2^32 + 2^31, so it wraps to a negative number
    assert wrap(27191 * 251519) == -1750881463
    # x ^ 0 = x for token 0, and Python's % is the non-negative one
    assert t.bigram_ids(np.array([5, 0, 0]), rows).tolist() == [251519, -1750881463 % 251519, 0]


@given(seed=st.integers(0, 10**6), n=st.integers(2, 300), share=st.floats(0, 1))
@FEW
def test_packer_reads_only(seed, n, share):
    """The tokens and ends given to the packer stay as they were, and the batch shares no memory with them."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(n + 1) < share, BOS, rng.integers(0, BOS, n + 1)).astype(np.uint16)
    tokens[0] = BOS
    starts = np.flatnonzero(tokens[:-1] == BOS)
    ends = np.append(starts[1:], n + 1)
    kept = tokens.copy(), ends.copy()
    tokens.flags.writeable = ends.flags.writeable = False
    batch = t.pack(HP, [(tokens, ends)])
    assert (batch.tokens.numpy() == tokens[:-1]).all() and (batch.targets.numpy() == tokens[1:]).all()
    assert batch.bigram_ids.tolist() == slow_bigram(tokens[:-1].tolist(), HP.sizes["B"])
    check_cu_seqlens(batch)
    assert sorted(batch.order.tolist()) == list(range(n)) and (batch.tokens[batch.order.long()].diff() >= 0).all()
    for x in batch:
        x.zero_()
    assert (tokens == kept[0]).all() and (ends == kept[1]).all()


def val_hp(path, tokens, chunk, chunks):
    """A recipe for so many chunks of a shard of these tokens, repeated as often as needed; and what it reads."""
    hp = dataclasses.replace(HP, val_chunk=chunk, val_tokens=chunk * chunks, val_files=str(path), train_files=str(path))
    tokens = np.resize(tokens, hp.val_tokens + 1)
    write(path, tokens)
    return hp, tokens


@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 90), longest=st.integers(1, 200), before=st.integers(0, 50))
@FEW
def test_val_stream(tmp_path_factory, seed, chunk, longest, before):
    """For 1, 2 and 4 ranks the chunks are the stream in order, uncut; documents begin where the input is BOS."""
    hp, tokens = val_hp(tmp_path_factory.mktemp("v") / "val.bin", stream(seed, 400, longest, before), chunk, 8)
    for world in (1, 2, 4):
        ranks = [list(t.Validation(hp, t.Ranks(rank, world, CPU)).batches()) for rank in range(world)]
        chunks = list(itertools.chain.from_iterable(zip(*ranks)))
        assert [len(r) for r in ranks] == [8 // world] * world and {len(b.tokens) for b in chunks} == {chunk}
        assert len({len(b.cu_seqlens) for b in chunks}) == 1
        assert (np.concatenate([b.tokens.numpy() for b in chunks]) == tokens[:-1]).all()
        assert (np.concatenate([b.targets.numpy() for b in chunks]) == tokens[1:]).all()
        for batch in chunks:
            check_cu_seqlens(batch, begins=False)
            assert batch.bigram_ids.tolist() == slow_bigram(batch.tokens.tolist(), hp.sizes["B"])


@given(seed=st.integers(0, 10**6), chunk=st.integers(1, 300), longest=st.integers(1, 120), before=st.integers(0, 200))
@FEW
def test_longest_document(tmp_path_factory, seed, chunk, longest, before):
    """No document of any chunk is longer; the bound is a power of two or the chunk itself, and not wasteful."""
    hp, tokens = val_hp(tmp_path_factory.mktemp("v") / "val.bin", stream(seed, 100, longest, before), chunk, 4)
    validation = t.Validation(hp, t.Ranks(0, 1, CPU))
    bound = validation.max_doc
    assert bound == chunk or math.log2(bound).is_integer()
    seen = max(batch.cu_seqlens.diff().max().item() for batch in validation.batches())
    whole = max(np.diff([0, *np.flatnonzero(tokens == BOS), len(tokens)]))
    assert seen <= bound <= chunk and bound < 2 * whole


def test_read_val_tokens(tmp_path):
    """The first val_tokens + 1 tokens of the first val shard, whatever follows."""
    first, second = stream(1, 60, 20), stream(2, 60, 20)
    hp, _ = val_hp(tmp_path / "val_1.bin", second, 16, 8)
    hp = dataclasses.replace(hp, val_files=str(tmp_path / "val_*.bin"))
    for tokens in (first, first[:129]):
        write(tmp_path / "val_0.bin", tokens)
        assert (t.Validation(hp, t.Ranks(0, 1, CPU)).tokens == first[:129]).all()
    write(tmp_path / "val_0.bin", first[:128])  # no target for the last token
    with pytest.raises(t.UserError, match="val_0.bin.*128 tokens.*129"):
        t.check_data(hp)
