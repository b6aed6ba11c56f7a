"""tools/hellaswag.py on hand-written items in the format of the public validation set."""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import hellaswag as h

TOOL, t = h.__file__, h.t
ITEMS = Path(__file__).parent / "golden" / "hellaswag_handwritten.jsonl"


def run(*args):
    return forks.run(TOOL, *args)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """The model with fp32 rotary tables: those in bf16 are exact to 3 digits only, and differ by place in a pack."""
    model, windows = h.load_model(checkpoint[4])
    angle = torch.outer(torch.arange(len(model.cos)), t.rotation(model.hp, 3)[0])
    model.cos, model.sin = angle.cos(), angle.sin()
    return model, windows


def direct(model, windows, context, ending):
    """The mean loss of one ending, alone behind three full stops, from the probability of each token."""
    encode = h.tokenizer().encode_ordinary
    before, after = [50256, *encode(context)], encode(" " + ending)
    tokens = [13, 13, 13, *before, *after]
    ids = t.bigram_ids(np.array(tokens), model.sizes["B"])
    batch = t.Batch(torch.tensor(tokens), None, torch.from_numpy(ids), torch.tensor([0, 1, 2, 3, len(tokens)]).int(),
                    torch.tensor(tokens).argsort(stable=True).int(), torch.empty(1, 0), *[torch.empty(0)] * 3)
    x = model.trunk(batch, model.lookup(batch), windows._replace(max_doc=len(tokens)), model.val_layers)
    first = len(tokens) - len(after)
    p = t.softcap(x[first - 1 : -1] @ model.lm_head, *model.cap).double().softmax(-1)  # of each token of the ending
    return float(np.mean([-row[token].log().item() for row, token in zip(p, after, strict=True)]))


@pytest.fixture(scope="module")
def expected(loaded):
    """Losses [items, 4], one ending at a time."""
    return np.array([[direct(*loaded, item["ctx"], e) for e in item["endings"]] for item in h.read_items(str(ITEMS))])


@pytest.mark.parametrize("limit", [80, 200, 256])
def test_packs_score_as_endings_alone(loaded, expected, limit):
    documents = [h.Document(item["ctx"], e) for item in h.read_items(str(ITEMS)) for e in item["endings"]]
    groups = list(h.packs(documents, limit))
    assert [d for group in groups for d in group] == documents and max(map(len, groups)) > 1
    assert all(1 + sum(len(d.tokens) + 3 for d in group) <= limit for group in groups)
    losses = np.reshape([x for group in groups for x in h.score(*loaded, group)], (-1, 4))
    assert np.abs(losses - expected).max() < 2e-5
    assert np.diff(np.sort(expected, axis=1)[:, :2]).min() > 1e-3  # no item is decided by rounding


def test_ending_begins_after_the_context():
    document = h.Document("A man walks. he", "sits down.")
    decode = h.tokenizer().decode
    assert decode(document.tokens[: document.first]) == "<|endoftext|>A man walks. he"
    assert decode(document.tokens[document.first :]) == " sits down."


@pytest.mark.parametrize("shift, right", [(0, 5), (1, 0)])
def test_accuracy(checkpoint, expected, tmp_path, monkeypatch, capsys, shift, right):
    """All right if the labels are the lowest losses, none if they are others; labels may be strings, as on the hub."""
    items = h.read_items(str(ITEMS))
    for item, losses in zip(items, expected):
        item["label"] = str((losses.argmin() + shift) % 4)
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, items)) + "\n")
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", checkpoint[4], f"--data={path}"])
    h.main()
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"accuracy {right / 5:.4f}: {right} of 5 items, length-normalised")


def test_length_is_normalised(expected):
    """The sum of losses would choose otherwise."""
    items = h.read_items(str(ITEMS))
    lengths = np.array([[len(h.tokenizer().encode_ordinary(" " + e)) for e in item["endings"]] for item in items])
    assert ((expected * lengths).argmin(axis=1) != expected.argmin(axis=1)).any()


@pytest.mark.parametrize("content, parts", [
    (None, ["items.jsonl", "No such file", "--data"]),
    ("", ["items.jsonl", "no items", "--data"]),
    ("{", ["items.jsonl", "JSON", "--data"]),
    ('{"ctx": "a", "endings": ["b", "c", "d"], "label": 0}', ["item 1", "four endings"]),
    ('{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": ""}', ["item 1", "label from 0 to 3"]),
    ('{"ctx": "a", "endings": ["b", "c", "d", ""], "label": 1}', ["item 1", "four endings"]),
    (json.dumps({"ctx": "a " * 300, "endings": ["b", "c", "d", "e"], "label": 1}), ["306 tokens", "256", "val_chunk"]),
])
def test_bad_data(checkpoint, tmp_path, content, parts, monkeypatch, capsys):
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", checkpoint[4], f"--data={path}"])
    with pytest.raises(SystemExit) as exit:
        h.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.splitlines()[-1].startswith("error: ")
    assert all(part in err for part in parts), err


def test_without_a_network(tmp_path):
    """One line after a second or two, in a new process, as the hub's client looks for the network when imported."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        hub = f"http://127.0.0.1:{free.getsockname()[1]}"
    script = tmp_path / "script.py"
    script.write_text(f"import sys, time; sys.path.insert(0, {str(Path(TOOL).parent)!r}); import hellaswag\n"
                      "start = time.monotonic()\n"
                      "try:\n    hellaswag.read_items(None)\n"
                      "except hellaswag.t.UserError as error:\n    print(time.monotonic() - start, error)")
    done = forks.run(script, env=os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)})
    seconds, line = done.stdout.strip().split(" ", 1)
    assert done.stderr == "" and float(seconds) < 10  # nearly all of it the import of a library; tries took 23 more
    assert line == (f"cannot read Rowan/hellaswag (nothing answers at {hub}, and there is no earlier copy); give "
                    "HellaSwag's .jsonl file as --data")


@pytest.mark.parametrize("answer, seconds", [(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", None), (None, 0.2)])
def test_hub_answers(monkeypatch, answer, seconds):
    """Any answer is one; a line that is silent is given up."""
    monkeypatch.setattr(h, "HUB_SECONDS", seconds or h.HUB_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def reply():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer or b"")
                time.sleep(2 * (seconds or 0))

        thread = threading.Thread(target=reply)
        thread.start()
        assert h.hub_answers(f"http://127.0.0.1:{server.getsockname()[1]}") == bool(answer)
        thread.join()


def test_bad_checkpoint():
    done = run(ITEMS)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "choose another" in done.stderr
