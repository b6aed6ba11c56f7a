"""Scores a checkpoint of train_gpt.py on the validation set of HellaSwag (Zellers et al., arXiv 1905.07830).

    python tools/hellaswag.py logs/RUN_step1480.pt                            # the set comes from the Hugging Face hub
    python tools/hellaswag.py logs/RUN_step1480.pt --data=hellaswag_val.jsonl

An item is a context and four endings. Its answer is the ending with the lowest mean loss over its tokens, so that long
endings are not at a disadvantage; the score is the share of right answers, and guessing gives 0.25. The context is
taken as it is, without the activity label, as in Andrej Karpathy's llm.c.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from generate import DataError, load_model, pack, t, tokenizer

DATASET = "Rowan/hellaswag"
HUB_SECONDS = 3  # patience for any answer of the hub
PACK_TOKENS = 4096  # the logits of a pack are 0.8 GB
# Smear, n-gram ids and key offset cross a document's start. Three documents of one full stop before each make the same
# past for all: the last one knows nothing of what came before the first.
FILLERS = [13] * 3


class Document:
    """A context with one of its endings as tokens, <|endoftext|> first; the ending begins at `first`."""

    def __init__(self, context: str, ending: str):
        encode = tokenizer().encode_ordinary
        self.tokens = [tokenizer().eot_token, *encode(context)]
        self.first = len(self.tokens)
        self.tokens += encode(" " + ending)


def hub_answers(url: str) -> bool:
    """Whether anything answers there; without a network the hub's client would try for half a minute."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError):
            try:
                urllib.request.urlopen(url, timeout=HUB_SECONDS).close()
            except urllib.error.HTTPError:  # an answer too
                pass
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)  # to look up a name knows no timeout
    return bool(answers)


def read_items(path: str | None) -> list[dict]:
    """Items with "ctx", four "endings" and the right one's number "label", from a .jsonl file or the hub; UserError."""
    hub, offline = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", False
    try:
        if path is None:
            offline = not hub_answers(hub)
            if offline:
                os.environ["HF_HUB_OFFLINE"] = "1"  # what the client has in its cache is still good
            from datasets import load_dataset

            items = list(load_dataset(DATASET, split="validation"))
        else:
            with open(path, encoding="utf-8") as file:
                items = [json.loads(line) for line in file if line.strip()]
    except Exception as error:  # the library lets through those of its storage, HTTP and parsing libraries
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        cause = f"nothing answers at {hub}, and there is no earlier copy" if offline else cause
        raise t.UserError(f"cannot read {path or DATASET} ({cause}); give HellaSwag's .jsonl file as --data") from None
    for number, item in enumerate(items, 1):
        try:
            assert isinstance(item["ctx"], str) and len(item["endings"]) == 4 and int(item["label"]) in range(4)
            assert all(isinstance(ending, str) and ending for ending in item["endings"])
        except (AssertionError, KeyError, TypeError, ValueError):
            raise t.UserError(f"{path or DATASET}: item {number} has no ctx, four endings and a label from 0 to 3; "
                              "use the validation set") from None
    if not items:
        raise t.UserError(f"{path}: no items; give HellaSwag's .jsonl file as --data")
    return items


def packs(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    """Documents in order, in groups of at most `limit` tokens with their fillers; raises UserError if one is longer."""
    group, size = [], 1
    for document in documents:
        length = len(FILLERS) + len(document.tokens)
        if length >= limit:
            raise t.UserError(f"an item takes {length} tokens, the model {limit}; train with a larger --val_chunk")
        if size + length > limit:
            yield group
            group, size = [], 1
        group.append(document)
        size += length
    yield group


def score(model: t.GPT, windows: t.Windows, group: list[Document]) -> list[float]:
    """The mean loss of each document's ending, all scored in one pack."""
    tokens, ends, spans = FILLERS[:1], [1], []  # one more, as the first bigram id of a pack is its own
    for document in group:
        start = len(tokens) + len(FILLERS)
        tokens += [*FILLERS, *document.tokens]
        ends += [start - 2, start - 1, start, len(tokens)]
        spans.append((start + document.first - 1, len(tokens) - 1))  # a position's loss is that of the token after it
    batch = pack(model, tokens, ends)
    longest = max(len(document.tokens) for document in group)
    losses = model.val_losses(batch, model.lookup(batch), windows._replace(max_doc=longest))
    return [losses[a:b].mean().item() for a, b in spans]


def main() -> None:
    """Run the command line; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage=argparse.SUPPRESS)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", metavar="FILE", help=f"HellaSwag as .jsonl (default: {DATASET} from the hub)")
    args = parser.parse_args()
    try:
        model, windows = load_model(args.checkpoint)
        items = read_items(args.data)
        documents = [Document(item["ctx"], ending) for item in items for ending in item["endings"]]
        losses = []
        with tqdm(total=len(documents), unit="ending", disable=None) as progress:
            for group in packs(documents, min(PACK_TOKENS, len(model.cos) // 2)):
                losses += score(model, windows, group)
                progress.update(len(group))
    except (t.UserError, DataError) as error:
        parser.exit(2, f"error: {error}\n")
    right = np.reshape(losses, (-1, 4)).argmin(axis=1) == [int(item["label"]) for item in items]
    count = f"{len(items)} item{'s' * (len(items) != 1)}"
    print(f"accuracy {right.mean():.4f}: {right.sum()} of {count}, length-normalised; guessing gives 0.25")


if __name__ == "__main__":
    main()
