"""Dense connections of the last layer and the prefix term: golden numbers, gradients, causality, ranks."""

import dataclasses
import re
import sys

import forks
import numpy as np
import pytest
import token_prefixes
import torch
import torch.nn.functional as F
from causality import check_later_tokens, disturbed_model
from test_golden import BASE, GOLDEN, HP, WINDOWS, error, set_rotation

import train_gpt as t

R89, PREFIXES = np.load(GOLDEN / "model89.npz"), np.load(GOLDEN / "prefix_table.npz")["prefix"]
R92, LOSS = (np.load(GOLDEN / f"r92_{name}.npz") for name in ("candidates", "loss"))
ONE = t.Ranks(0, 1, torch.device("cpu"))
DENSE = ["LAYERS.10.dense=early", "LAYERS.*.value_gate_mixed=true"]
PREFIX = ["STAGES.0.prefix=0.25,0.25", "STAGES.1.prefix=0.25,0"]
PARTS = {"dense": DENSE, "prefix": PREFIX, "all": DENSE + PREFIX}


def with_cells(hp, texts):
    for text in texts:
        hp = t.set_cells(hp, text)
    t.check_recipe(hp)
    return hp


def gate_bias():
    """Of record #89's gates by token, as they are stored."""
    bias = torch.zeros(2, 41)
    bias[:, 12:18] = 2.5
    bias[:, [19, 21, 23, 25]] = 0.5
    bias[1, 27], bias[1, 28], bias[1, 29:35] = 0.5, 5, 10
    return bias


class Record89(t.GPT):
    """The forward pass of record #89, of whose parts this script has dense_layer, dense_weights and mixed; the others,
    gates by token, exclusive attention and the composition of heads, are here."""

    def weights_by_token(self, x, j, n):
        hidden = F.gelu(F.linear(x, self.gate_w1[j]))
        return self.gate_scale * (F.linear(hidden, self.gate_w2[j, :n]) + self.gate_b2[j, :n])

    def attend(self, layer, j, h, qkv, ve, batch, windows):
        i, n, T = self.hp.attn_layers[j], 2 if layer.paired else 1, len(h.x)
        gate = None
        if ve is not None and not layer.dense:
            seen = torch.cat([h.x[:, :6], ve[:, :6]], dim=1)
            gate = 2 * torch.sigmoid(F.linear(seen, self.ve_gate_bank[layer.value_table]))
        qkv = F.linear(h.x, qkv).view(T, 3, 6, 16)
        inputs = t.attention_inputs_reference(
            qkv, None, ve, gate, self.cos[: n * T], self.sin[: n * T], layer.paired, layer.key_offset)
        q, k, v = (x.reshape(n * T, 6 // n, 16) for x in inputs)
        window = windows.short if layer.window == "short" else windows.long
        y = t.attention_reference(q, k, v, batch.cu_seqlens * n, windows.max_doc * n, window, windows.scale)
        if i == 10:
            scores = windows.scale * torch.einsum("ihd,jhd->hij", q, k)
            at = torch.arange(T)
            document = torch.searchsorted(batch.cu_seqlens, at.int(), right=True)
            back = at[:, None] - at
            seen = (back >= 0) & (back < 14) & (document[:, None] == document)
            p = scores.masked_fill(~seen, -torch.inf).softmax(dim=2)
            m1 = F.rms_norm(self.m1, (6,), eps=1e-6)
            y = y + self.m2[..., None] * torch.einsum("ih,hij,jgd->igd", m1, p, v)
        if i in self.strengths:
            along = (y * v).sum(-1) / v.square().sum(-1).clamp_min(1e-8)  # v's share of y
            y = y - (self.strengths[i].tanh() * along)[..., None] * v
        if i in self.head_gates:
            y = self.head_gates[i][..., None] * y
        return y.reshape(T, 96)

    def forward(self, batch):
        qkv, o, up, down = self.matrices()
        resid = self.resid_lambdas.bfloat16().float()
        embed = F.embedding(batch.tokens, self.embed)
        values = [F.embedding(batch.tokens, table) for table in self.value_embeds.view(5, 512, 96).unbind()]
        tokens = batch.tokens.numpy()
        ids = torch.from_numpy(t.bigram_ids(tokens, len(self.bigrams)))
        assert (ids.numpy() == R89["bigram_ids"]).all()
        signs = np.append(0, tokens[:-1] ^ tokens[1:]) % 64
        g = F.embedding(ids, self.bigrams) * torch.from_numpy(R89["sign_table"][signs])
        x0 = t.norm(self.smear(embed[None])[0])
        w = self.weights_by_token(x0, 0, 26)
        self.strengths, self.head_gates = {1: w[:, :6], 3: w[:, 6:12]}, {3: w[:, 12:18]}
        injected = {i: (w[:, 18 + 2 * i, None], w[:, 19 + 2 * i, None]) for i in range(4)}
        x = first = x0 + injected[0][1] * g
        early = middle = None
        for i, layer in enumerate(self.hp.layers):
            if i == 4:
                w = self.weights_by_token(x, 1, 41)
                self.strengths |= {4: w[:, :6], 7: w[:, 6:12]}
                self.head_gates[10], self.m1, self.m2 = w[:, 12:18], w[:, 29:35], w[:, 35:41]
                injected |= {i: (w[:, 18 + 2 * n, None], w[:, 19 + 2 * n, None]) for n, i in enumerate((4, 5, 7, 8, 9))}
            h = t.Stream(t.norm(x if layer.reads is None else middle))
            j, ve = self.bank_index.get(i), None if layer.value_table is None else values[layer.value_table]
            if layer.dense:
                before = x
                x = self.dense_layer(t.Stream(x), first, middle, g, ve,
                                     lambda ve, args=(layer, j, h, qkv[j]): self.attend(*args, ve, batch, WINDOWS),
                                     o[j], up[i], down[i], None).x
                break
            if i == 6:
                x = x + torch.sigmoid(self.skip_lambda) * w[:, 28:29] * early
            else:
                u, r = injected[i]
                y = self.attend(layer, j, h, qkv[j], ve, batch, WINDOWS)
                x = resid[i, 0] * x + F.linear(y, o[j]) + u * x0 + (r * g if i else 0)
            x = F.relu(F.linear(t.norm(x), up[i])).square() @ down[i] + resid[i, 1] * x
            if i == 3:
                early = x
            if i == 7:
                middle = x
        x = t.norm(t.mixed([1, *self.dense_weights(x, 1)], [x, first, middle, before, values[0], early]))
        return F.cross_entropy(t.softcap(x @ self.lm_head, *self.cap), batch.targets, reduction="none")


def test_golden_record89():
    """The last layer, its mixers and the readout, inside the rest of record #89."""
    rng = np.random.default_rng(20260717)

    def draw(*shape):
        return torch.from_numpy(np.asarray(rng.standard_normal(shape)).astype(np.float32))

    width = 1 / np.sqrt(np.float32(96))
    stored = torch.tensor(t.DENSE_BIAS) / t.DENSE_SCALE
    weights = {
        "_mudd_gate_scale": 0 * draw() + 0.1,
        "bigram_embed.weight": 0.5 * draw(3840, 96),
        "embed.weight": 0.5 * draw(512, 96),
        "lm_head.weight": 0.5 * draw(96, 512),
        "mlp_bank": width * draw(12, 2, 384, 96),
        "mudd_b2": stored + 0.5 * draw(2, 14),
        "mudd_gate_b2": gate_bias() + 0.5 * draw(2, 41),
        "mudd_gate_w1": width * draw(2, 64, 96),
        "mudd_gate_w2": 0.5 * draw(2, 41, 64),
        "mudd_w1": width * draw(2, 64, 96),
        "mudd_w2": 0.5 * draw(2, 14, 64),
        "post_lambdas": 1 + 0.1 * draw(11, 2),
        "qk_bank": width * draw(60, 32, 96),
        "resid_lambdas": 1 + 0.1 * draw(11, 2),
        "scalars": 0.5 + 0.2 * draw(24),
        "smear_gate.weight": 0.5 * draw(1, 12),
        "value_embeds": 0.5 * draw(2560, 96),
        "ve_gate_bank": 0.5 * draw(5, 6, 12),
        "vo_bank": width * draw(20, 96, 96),
    }
    weights = {name: torch.as_tensor(x).requires_grad_() for name, x in weights.items()}
    assert (np.where(rng.random((64, 96)) < 0.5, -1, 1) == R89["sign_table"]).all()
    model = Record89(with_cells(HP, DENSE))
    set_rotation(model, BASE)
    for name in [name for name, _ in model.named_parameters()]:
        delattr(model, name)
    names = {"bigram_embed.weight": "bigrams", "_mudd_gate_scale": "gate_scale", "mudd_b2": "dense_bias",
             "mudd_w1": "dense_in", "mudd_w2": "dense_out", "mudd_gate_w1": "gate_w1", "mudd_gate_w2": "gate_w2",
             "mudd_gate_b2": "gate_b2"}
    for name, x in weights.items():
        setattr(model, names.get(name, name.removesuffix(".weight")), x)
    scalars = weights["scalars"]
    model.attn_lambdas, model.smear_lambda, model.skip_lambda = scalars[:22].view(11, 2).T, scalars[22:23], scalars[23:]
    model.mlp_bank = weights["mlp_bank"].view(24, 384, 96)
    tokens = R89["tokens"]
    batch = t.pack(HP, [(np.append(tokens, 511), np.array([*np.flatnonzero(tokens == 511)[1:], 256]))])
    loss = model(batch)
    assert error(loss, R89["loss"]) < 1e-4
    loss.sum().backward()
    for name, x in weights.items():
        grad = x.grad.flatten()
        assert error(grad.double().norm(), R89[f"gradnorm/{name}"]) < 5e-3, name
        assert error(grad[:: max(1, len(grad) // 16)][:16], R89[f"grad16/{name}"]) < 5e-3, name


def close(ours, exact, bound=2e-6):
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


def results(f, tensors, dtype):
    """f of copies in dtype and, for cosines as its result's gradient, the gradients of these."""
    tensors = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    y = f(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, torch.arange(y.numel()).cos().view(y.shape).to(dtype))]


def test_last_layer(T=20, D=96):
    """The stream after it and all gradients, against the formulas in float64."""
    model, generator = t.GPT(with_cells(HP, DENSE)), torch.Generator().manual_seed(0)
    streams = [torch.randn(T, D, generator=generator) for _ in range(5)]
    o, up, down = (0.1 * torch.randn(n, D, generator=generator) for n in (D, 4 * D, 4 * D))
    mixer = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in ((2, 64, D), (2, 14, 64), (28,))]

    def ours(x, first, middle, bigram, ve, o, up, down, dense_in, dense_out, dense_bias):
        for name, p in dict(dense_in=dense_in, dense_out=dense_out, dense_bias=dense_bias).items():
            model._parameters.pop(name, None)
            setattr(model, name, p)
        return model.dense_layer(t.Stream(x), first, middle, bigram, ve, lambda ve: ve.sin(), o, up, down, None).x

    def exact(x, first, middle, bigram, ve, o, up, down, w1, w2, b):
        hidden = x @ w1[0].T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        mu = (0.1 * (hidden @ w2[0].T + b[:14]))[:, :, None].unbind(1)
        gate = torch.cat([mu[6].expand(-1, D // 2), mu[7].expand(-1, D // 2)], dim=1)
        v = gate * ve + mu[0] * first + mu[1] * middle + mu[2] * x
        x = (1 + mu[5]) * x + mu[3] * first + mu[4] * middle
        x = mu[8] * x + mu[9] * (v.sin() @ o.T) + mu[10] * first + mu[11] * bigram
        normed = x / (x.square().mean(1, keepdim=True) + t.FP32_EPS).sqrt()
        return mu[12] * x + mu[13] * ((normed @ up.T).relu().square() @ down)

    inputs = *streams, o, up, down, *mixer
    close(results(ours, inputs, torch.float32), results(exact, inputs, torch.float64))


def test_constant_weights_are_record80():
    """Where weights are record80's for all tokens, dense connections change nothing."""
    on, off = with_cells(HP, ["LAYERS.10.dense=early"]), with_cells(HP, ["LAYERS.10.value_gate=false"])
    models, generator = [t.GPT(hp).requires_grad_(False) for hp in (on, off)], torch.Generator().manual_seed(0)
    for p in models[1].parameters():
        p.copy_((0.1 * torch.randn(p.shape, generator=generator)).bfloat16())
    models[1].x0_lambdas[10] = 0  # the stream before the layers takes x0's place
    for name, p in models[1].named_parameters():
        if p.numel():
            getattr(models[0], name).copy_(p)
    resid, post = (getattr(models[1], name)[10] for name in ("resid_lambdas", "post_lambdas"))
    one = torch.ones(())
    layer = [0 * one] * 6 + [one, one, resid[0], post[0], 0 * one, models[1].bigram_lambdas[10], resid[1], post[1]]
    readout = [0 * one, -models[1].backout_lambda[0], *[0 * one] * 12]
    models[0].dense_bias.copy_(torch.stack(layer + readout) / t.DENSE_SCALE)
    models[0].dense_in.normal_(generator=generator)
    for name in ("resid_lambdas", "post_lambdas", "bigram_lambdas", "x0_lambdas"):
        getattr(models[0], name)[10] = 9.0  # unused
    tokens = np.random.default_rng(0).integers(0, 511, 257)
    batches = [t.pack(model.hp, [(tokens, np.array([30, 256]))]) for model in models]
    for model in models:
        set_rotation(model, BASE)
    a, b = (model.val_losses(x, model.lookup(x), WINDOWS) for model, x in zip(models, batches))
    assert (a - b).abs().max() < 1e-5


def test_golden_prefixes(tmp_path, monkeypatch, capsys):
    """The bundled table is the golden one, and the tool makes it from GPT-2's vocabulary."""
    assert (t.token_prefixes(50_257) == PREFIXES[:50_257]).all() and (PREFIXES[50_257:] == -1).all()
    assert (t.token_prefixes(300) == -1).all()
    monkeypatch.setattr(sys, "argv", ["token_prefixes.py", "--out", str(tmp_path / "a.npy")])
    token_prefixes.main()
    assert (tmp_path / "a.npy").read_bytes() == t.TOKEN_PREFIXES.read_bytes()
    assert "50000 of 50257 tokens have a prefix" in capsys.readouterr().out


def test_prefixes_of_a_vocabulary():
    words = [b"a", b"b", b"ab", b"abcd", b"abcde", b"cab", None, b"ba"]
    assert token_prefixes.token_prefixes(words).tolist() == [-1, -1, 0, 2, 3, -1, -1, 1]


@pytest.mark.parametrize("at,segment", [(0, 0), (1, 3), (2, 7)])
def test_golden_places(at, segment):
    """Of prefixes among the candidates; those outside are dropped."""
    for step in range(6):
        u = np.random.default_rng([92005, step, segment]).random(R92["tokens"][step])
        u4 = (u * u) * (u * u)
        targets = np.floor(50_257 * ((u4 * u4) * u4)).astype(np.int64)
        chosen = np.flatnonzero(np.unpackbits(R92["candidate_bits"][step, at]))
        prefixes = np.where(targets % 5 != 0, targets // 3, -1)
        found = t.places(prefixes, chosen)
        assert (found[:256] == R92["prefix_positions_256"][step, at]).all()
        assert found.sum() == R92["sums"][step, at, 3]
        assert (t.places(targets, chosen)[:256] == R92["target_positions_256"][step, at]).all()


@pytest.mark.parametrize("name,k,prefix", [("", 3, 0.25), ("_two", 2, 0.1), ("_one", 1, 0.0)])
def test_golden_loss(name, k, prefix):
    """Loss and gradient with a prefix among the targets, which may be one of the next tokens, too."""
    weights = torch.tensor([*((1.0, 0.3) if k == 2 else LOSS["mtp_weights"][:k]), prefix]).double()
    targets = t.next_targets(torch.from_numpy(LOSS["target_positions"]).long()[None], k)
    targets = torch.cat([targets, torch.from_numpy(LOSS["prefix_positions"]).long()[:, None]], dim=1)
    logits = torch.from_numpy(LOSS["logits"])
    loss, grad = t.softcapped_mtp_loss_reference(logits, targets, weights, torch.float64, 1.0, 23.0, 5.0, 7.5)
    assert error(loss, LOSS[f"loss{name}"]) < 4e-6  # of capped logits in fp32
    assert error(grad, LOSS[f"gradient_of_the_sum{name}"]) < 4e-6


@pytest.fixture(scope="module")
def base():
    """Eight steps, two of each stage, of a small model with GPT-2's vocabulary and, at first, candidates."""
    hp = dataclasses.replace(
        t.PRESETS["demo"], model_dim=16, num_heads=2, head_dim=8, batch_unit=128, val_tokens=512, val_chunk=256,
        val_every=4, num_scheduled_iterations=6, num_extension_iterations=2, run_id="run")
    return with_cells(hp, ["STAGES.0.classes=384"])


def test_batches_have_prefixes(base):
    """In stages with a weight, as places among the candidates; validation has none."""
    hp = with_cells(base, PREFIX)
    for step, (batches, _) in enumerate(t.train_batches(hp, ONE, range(8))):
        now, batch = t.plan(step, hp), batches[0]
        assert now.prefix_weights == ((0.25,) if step < 3 else (0.125,) if step < 4 else ())
        targets = batch.targets.numpy()
        if step >= 4:
            assert batch.prefixes.shape == (len(targets), 0)
            continue
        prefixes, n = batch.prefixes[:, 0].numpy(), len(batch.candidates)
        chosen = batch.candidates.numpy() if step < 2 else np.tile(np.arange(50_304), (n, 1))
        assert (prefixes >= 0).any()
        parts = zip(*(np.split(x, n) for x in (targets, prefixes)), chosen)
        for target, prefix, classes in parts:
            expected = PREFIXES[classes[target]]
            expected[~np.isin(expected, classes)] = -1
            assert (np.where(prefix >= 0, classes[prefix], -1) == expected).all()
    assert next(t.Validation(hp, ONE).batches()).prefixes.shape == (256, 0)


def test_off_is_record80():
    """Off in record80: no numbers, no columns."""
    for hp in (t.PRESETS[name] for name in ("record80", "mini", "demo")):
        assert hp.sizes["C"] == 0
        assert all(t.plan(step, hp).prefix_weights == () for step in range(0, hp.num_steps, 7))


def log_of(hp, texts, world, folder):
    """Losses by torchrun on `world` ranks, as (kind, step) and numbers."""
    keys = dataclasses.replace(hp, log_dir=str(folder))
    args = [f"--{name}={getattr(keys, name)}" for name in t.KEYS] + [f"--set={text}" for text in texts]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    done = forks.run(*launcher, t.__file__, "--preset=demo", "--set=STAGES.0.classes=384", *args)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step:(\d+)/8 (\w+)_loss:(\S+) ", done.stdout, re.M)
    return [x[:2] for x in lines], [float(x[2]) for x in lines]


def test_ranks_follow_the_same_trajectory(base, tmp_path):
    """With all parts on, which change it."""
    (names, one), (others, two) = (log_of(base, PARTS["all"], world, tmp_path / str(world)) for world in (1, 2))
    assert names == others and len(one) == 11 and two == pytest.approx(one, abs=2e-4)
    _, off = log_of(base, [], 1, tmp_path / "off")
    assert abs(off[-1] - one[-1]) > 1e-3


@pytest.mark.parametrize("part", PARTS)
def test_all_is_trained(base, part):
    """Losses are finite, and every new parameter moves."""
    hp = with_cells(base, PARTS[part])
    run = t.Run(hp, ONE)
    names = [name for name, p in run.model.named_parameters() if p.numel() and name.startswith("dense")]
    assert len(names) == {"dense": 3, "prefix": 0, "all": 3}[part]
    before = {name: getattr(run.model, name).detach().clone() for name in names}
    steps = t.train_batches(hp, ONE, range(4))
    losses = [run.train_step(*item, t.plan(step, hp)).mean.item() for step, item in enumerate(steps)]
    assert len(losses) == 4 and np.isfinite(losses).all()
    for name in names:
        assert not torch.equal(before[name], getattr(run.model, name))


@pytest.mark.parametrize("position", [1, 28, 29, 30, 59, 70, 95])
def test_later_tokens_change_no_earlier_loss(base, position):
    check_later_tokens(disturbed_model(dataclasses.replace(with_cells(base, PARTS["all"]), vocab_size=256)), position)


@pytest.mark.parametrize("cell,said", [
    ("LAYERS.10.value_gate_mixed=some", "LAYERS.10.value_gate_mixed='some': use true or false"),
    ("LAYERS.8.dense=early", "LAYERS.8.dense='early': use none, but in the last layer"),
    ("LAYERS.10.dense=true", "LAYERS.10.dense='true': use none or early or middle, a name of an earlier layer"),
    ("STAGES.0.prefix=0.25", "STAGES.0.prefix=(0.25,): use two numbers with a comma"),
    ("STAGES.1.prefix=0.25,-1", "STAGES.1.prefix=(0.25, -1.0): use two weights from 0 on"),
    ("PARAMS.dense_in.init=uniform 1 2", "PARAMS.dense_in.init='uniform 1 2': use a number, uniform"),
    ("PARAMS.dense_bias.shape=C 15", "PARAMS.dense_bias.shape='C 15': use 'C*14'"),
])
def test_bad_cells(cell, said):
    with pytest.raises(t.UserError, match=re.escape(said)):
        t.parse_args([f"--set={cell}"])


@pytest.mark.parametrize("cell", ["reads=none", "value_table=none", "mlps=0"])
def test_dense_needs(cell):
    with pytest.raises(t.UserError, match="LAYERS.10.dense='early': use none, but .* with reads, value_table and"):
        t.parse_args(["--set=LAYERS.10.dense=early", f"--set=LAYERS.10.{cell}"])


def test_missing_prefixes(monkeypatch, tmp_path):
    monkeypatch.setattr(t, "TOKEN_PREFIXES", tmp_path / "none.npy")
    with pytest.raises(t.UserError, match=r"none.npy is missing: .*tools/token_prefixes.py, .*STAGES.0.prefix=0,0"):
        t.parse_args([f"--set={PREFIX[0]}"])
    t.check_recipe(t.PRESETS["record80"])
