"""tools/generate.py: what it draws from is the training model's distribution, and the same seed draws the same text."""

import math
import sys
from pathlib import Path

import forks
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import generate as g

TOOL, t = g.__file__, g.t
PROMPT = "The old man said that the sea, the wind and the sea"


def run(*args):
    return forks.run(TOOL, *args)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return g.load_model(checkpoint[4])


def tokens_of(text):
    return [50256, *g.tokenizer().encode_ordinary(text)]


def test_next_token_distribution(loaded, checkpoint):
    """At each position -log p of the true next token is the model's loss, but for the columns that are padding."""
    model, _ = loaded
    tokens = tokens_of(PROMPT)
    saved = t.read_checkpoint(checkpoint[4])
    hp = saved["hp"]
    other = t.GPT(hp, 2)  # set up by hand, with validation's windows at the end of a run
    other.load_state_dict(saved["tensors"], strict=False)
    last = len(hp.stages) - 1
    other.set_stage(last)
    windows = t.Windows(6 * hp.block, hp.final_val_window * hp.block, len(tokens), t.rotation(hp, last)[1])
    batch = g.pack(other, tokens, [len(tokens)])
    batch = batch._replace(targets=torch.tensor([*tokens[1:], 11]))
    with torch.no_grad():
        losses = other.val_losses(batch, other.lookup(batch), windows)
        x = other.trunk(batch, other.lookup(batch), windows, other.val_layers)
        padding = t.softcap(x @ other.lm_head, *other.cap).softmax(-1)[:, 50257:]
    assert losses.std() > 0.05
    for n in range(1, len(tokens) + 1):
        logits = g.next_logits(*loaded, tokens[:n])
        assert logits.shape == (50257,) and logits.dtype == torch.float32
        expected = losses[n - 1] + math.log1p(-padding[n - 1].sum().item())
        assert -logits.log_softmax(0)[batch.targets[n - 1]].item() == pytest.approx(expected.item(), abs=2e-5)


def test_windows_follow_the_checkpoint(checkpoint):
    """During the run those of the next step, at its end those of the last validation."""
    for step, short, long in ((3, 6, 13), (4, 6, 20)):
        model, windows = g.load_model(checkpoint[step])
        assert windows[:2] == (short * 16, long * 16) and model.index == 3
        assert windows.scale == t.rotation(model.hp, 3)[1]


def test_long_texts_lose_their_beginning(loaded):
    """Only as much is read as documents had in training: 16 blocks."""
    tokens = tokens_of("One two three four five. " * 60)
    assert len(tokens) > 256
    whole, cut = (g.next_logits(*loaded, x) for x in (tokens, tokens[-256:]))
    assert torch.equal(whole, cut)
    assert not torch.equal(whole, g.next_logits(*loaded, tokens[-255:]))


def test_temperature_and_top_k(loaded, monkeypatch):
    """The likeliest at temperature 0 and top_k 1; else shares of the softmax of what top_k leaves."""
    logits = torch.full((50257,), -9.0)
    logits[[7, 8, 9]] = torch.tensor([2.0, 1.0, 0.0])
    monkeypatch.setattr(g, "next_logits", lambda *_: logits)

    def drawn(temperature, top_k, count=2000):
        return torch.tensor(list(g.sample(*loaded, [50256], count, temperature, top_k, seed=1)))

    assert set(drawn(0.0, 0, 9).tolist()) == set(drawn(1.0, 1, 9).tolist()) == {7}
    for temperature in (0.5, 2.0):
        found = drawn(temperature, 2)
        expected = 1 / (1 + math.exp(-1 / temperature))
        assert set(found.tolist()) == {7, 8}
        assert (found == 7).double().mean().item() == pytest.approx(expected, abs=5 * 0.5 / 2000**0.5)
    assert set(drawn(1.0, 3, 200).tolist()) == {7, 8, 9} and len(drawn(9.0, 0, 50).unique()) > 9
    logits[50256] = 99.0
    assert len(drawn(1.0, 50)) == 0  # the document ends


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    g.main()


def test_seed_and_prompt(checkpoint, monkeypatch, capsys):
    """The text begins with the prompt and depends on the seed alone; a character of several tokens comes whole."""
    args = [checkpoint[4], "--prompt", PROMPT, "--tokens=8"]
    done, texts = run(*args), []
    assert (done.returncode, done.stderr) == (0, "")
    for seed in (0, 1):
        main(monkeypatch, *args, f"--seed={seed}")
        out, err = capsys.readouterr()
        assert err == "" and out.startswith(PROMPT) and out.endswith("\n")
        texts.append(out)
    assert done.stdout == texts[0] != texts[1]


def test_streams_characters(checkpoint, monkeypatch, capsys):
    tokens = g.tokenizer().encode_ordinary("naïve 東京 🙂")
    monkeypatch.setattr(g, "sample", lambda *_: iter(tokens))
    main(monkeypatch, checkpoint[4], "--prompt=A ")
    assert capsys.readouterr().out == "A naïve 東京 🙂\n"


@pytest.mark.parametrize("args, parts", [
    (["nowhere.pt"], ["nowhere.pt", "no such checkpoint", "choose another"]),
    ([TOOL], ["generate.py", "zip", "choose another"]),
    ([], ["checkpoint", "required"]),
    (["x.pt", "--tokens=0"], ["--tokens", "positive"]),
    (["x.pt", "--temperature=nan"], ["--temperature", "negative"]),
    (["x.pt", "--top_k=-1"], ["--top_k", "negative"]),
])
def test_bad_input(args, parts, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        main(monkeypatch, *args)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == "" and err.count("\n") == 1
    assert all(part in err for part in parts)


def test_other_vocabulary(checkpoint, monkeypatch):
    monkeypatch.setattr(g, "tokenizer", lambda: type("Letters", (), {"n_vocab": 256}))
    with pytest.raises(t.UserError, match="50257 tokens"):
        g.load_model(checkpoint[4])
