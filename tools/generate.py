"""Samples text from a checkpoint of train_gpt.py, on the GPU if there is one.

    python tools/generate.py logs/RUN_step1480.pt --prompt "The capital of France is" --tokens 100 --temperature 0.8

The prompt begins a document, and sampling stops where the model ends it. Each token is a run of the model over the text
so far, or over as much of its end as a document of training had.
"""

import argparse
import codecs
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
from fineweb import tokenizer
from shards import DataError

import train_gpt as t


def load_model(path: str) -> tuple[t.GPT, t.Windows]:
    """A checkpoint's model, uncompiled and with plain operations, and the windows that it would validate with."""
    saved = t.read_checkpoint(path)
    step = saved["step"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hp = replace(saved["hp"], attention="auto", kernels="plain", compile=False)
    if hp.vocab_size != tokenizer().n_vocab:
        raise t.UserError(f"{path}: trained on {hp.vocab_size} tokens, GPT-2 has {tokenizer().n_vocab}; choose another")
    hp = t.choose_backends(hp, device)
    with torch.device(device):
        model = t.GPT(hp).requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(t.slice_of(saved["tensors"][name], 0, len(p)))
    model.ops = t.choose_ops(hp)
    last = step == hp.num_steps
    now = t.plan(step - last, hp)
    model.set_stage(now.index)
    long = hp.final_val_window * hp.block if last else now.windows.long
    return model, now.windows._replace(long=long, segment=0)


def pack(model: t.GPT, tokens: list[int], ends: list[int]) -> t.Batch:
    """Tokens [T] and the ends of their documents as a batch; the last target is 0."""
    return t.send(t.pack(model.hp, [(np.array([*tokens, 0], np.uint16), np.array(ends))]), model.cos.device)


def next_logits(model: t.GPT, windows: t.Windows, tokens: list[int]) -> torch.Tensor:
    """Logits [vocab_size], fp32 on the CPU, of the token after these of one document."""
    tokens = tokens[-min(model.hp.stages[-1].max_doc * model.hp.block, len(model.cos) // 2) :]
    batch = pack(model, tokens, [len(tokens)])
    x = model.trunk(batch, model.lookup(batch), windows._replace(max_doc=len(tokens)), model.val_layers)
    return t.softcap(x[-1] @ model.lm_head, *model.cap)[: model.hp.vocab_size].cpu()


def sample(model: t.GPT, windows: t.Windows, tokens: list[int], count: int, temperature: float, top_k: int,
           seed: int) -> Iterator[int]:
    """Up to `count` tokens that follow; temperature 0 takes the likeliest, top_k 0 draws from all."""
    generator, V = torch.Generator().manual_seed(seed), model.hp.vocab_size
    for _ in range(count):
        values, ids = next_logits(model, windows, tokens).topk(min(top_k or V, V) if temperature else 1)
        drawn = torch.multinomial((values / (temperature or 1)).softmax(0), 1, generator=generator)
        tokens = [*tokens, ids[drawn].item()]
        if tokens[-1] == model.hp.bos:
            return
        yield tokens[-1]


def main() -> None:
    """Run the command line; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt", default="", help="what the text begins with (default: nothing)")
    parser.add_argument("--tokens", type=int, default=100, help="sample at most so many (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="draw from so many; 0: from all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    args = parser.parse_args()
    if args.tokens < 1 or not 0 <= args.temperature < float("inf") or args.top_k < 0:
        parser.error("--tokens must be positive, --temperature and --top_k must not be negative")
    try:
        model, windows = load_model(args.checkpoint)
    except (t.UserError, DataError) as error:
        parser.exit(2, f"error: {error}\n")
    tokens = [model.hp.bos, *tokenizer().encode_ordinary(args.prompt)]
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # one may come as several tokens
    print(args.prompt, end="", flush=True)
    for token in sample(model, windows, tokens, args.tokens, args.temperature, args.top_k, args.seed):
        print(characters.decode(tokenizer().decode_single_token_bytes(token)), end="", flush=True)
    print(characters.decode(b"", final=True))


if __name__ == "__main__":
    main()
