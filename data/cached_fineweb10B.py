"""Download ready-made FineWeb token shards from the Hugging Face hub.

    python data/cached_fineweb10B.py        # the validation shard and all 103 train shards, 20.8 GB
    python data/cached_fineweb10B.py 9      # the validation shard and the first 9 train shards

Shards that are present and intact are kept, so an interrupted download goes on with the first one that is missing. A
shard's content is compared with the sha256 that the hub gives for it when it is downloaded, and with the same again
whenever the file has changed since. Set HF_ENDPOINT to download from a mirror of the hub.
"""

import argparse
import contextlib
import hashlib
import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards import DataError, http_status, one_line, shard_name, verify_shard

DATASETS = {  # name: (repository, prefix of its file names, number of train shards)
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
SUMS = ".cache/sha256.json"  # in the shards' folder; the hub's client keeps its own notes in .cache
SHA256 = re.compile("[0-9a-f]{64}")
REFUSED, BUSY = (401, 403), (429, 500, 502, 503, 504)  # statuses of answers
WAITS = (1, 2, 4, 8)  # seconds before a busy hub is asked again
LONGEST_WAIT = 60  # seconds, whatever the hub asks for
DOWNLOADS_PER_SHARD = 2  # one bad copy may be an accident on the way, a second one is the server's
REMEDY = (
    "Check the network and run this again (finished shards are kept), set HF_ENDPOINT to a mirror of the hub, build "
    "shards from your own text with data/fineweb.py, or try the bundled data/sample with the CPU demo"
)


ADVICE = dict.fromkeys(REFUSED, "The hub refuses this: renew or unset HF_TOKEN, or the token of hf auth login, and run "
                                "this again (finished shards are kept)")
ADVICE |= dict.fromkeys(BUSY, "The hub is busy: run this again later (finished shards are kept), or set HF_ENDPOINT to "
                              "a mirror of it")


def intact(path: Path) -> bool:
    """Tell whether `path` holds a complete shard."""
    try:
        verify_shard(path)
    except (DataError, FileNotFoundError):
        return False
    return True


@contextlib.contextmanager
def hub_errors(repo: str, name: str) -> Iterator[None]:
    """Turn every failure of the hub client over the file `name` of `repo` into a DataError, save a disk's OSError."""
    try:
        yield
    # The client lets through the errors of its HTTP library, which changed between its versions, and of its Rust
    # extension, so there is no narrower class to catch.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        advice = ADVICE.get(http_status(error), REMEDY)
        raise DataError(f"cannot download {name} from {repo}: {one_line(error)}. {advice}") from error


class Hub:
    """The hub's files of one repository. Methods raise what its client raises."""

    def __init__(self, repo: str):
        self.repo, self.token = repo, None  # None: the user's, if there is one

    def ask(self, call: Callable) -> Any:
        """Return call(), which shall use self.token. A busy hub is asked again; a refused token is not used again."""
        waits = list(WAITS)
        while True:
            try:
                return call()
            except Exception as error:  # of several libraries
                status = http_status(error)
                if status in REFUSED and self.token is None:
                    self.token = False  # what is public needs none
                elif status in BUSY and waits:
                    time.sleep(wait_for(error, waits.pop(0)))
                else:
                    raise

    def sha256(self, name: str) -> str | None:
        """Return the file's checksum, or None if the hub does not tell it."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repo, name, repo_type="dataset")
        etag = self.ask(lambda: get_hf_file_metadata(url, token=self.token)).etag
        return etag if SHA256.fullmatch(etag or "") else None

    def fetch(self, name: str, folder: Path, force: bool) -> None:
        """Download the file into `folder`; `force` ignores copies that the client has."""
        from huggingface_hub import hf_hub_download

        self.ask(lambda: hf_hub_download(self.repo, name, repo_type="dataset", local_dir=folder, force_download=force,
                                         token=self.token))


def wait_for(error: Exception, default: float) -> float:
    """Seconds to wait before a busy hub is asked again: as long as it says, within reason."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    asked = error.response.headers.get("Retry-After", "") if error else ""
    return min(int(asked), LONGEST_WAIT) if asked.isdecimal() else default


def checksum(path: Path) -> str:
    """Return the file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Sums:
    """The checksums of the shards in a folder that were compared with the hub's, kept in a file there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.known = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or damaged
            for name, entry in json.loads((folder / SUMS).read_text()).items():
                if SHA256.fullmatch(entry["sha256"]):
                    self.known[name] = {"sha256": entry["sha256"], "stamp": entry["stamp"]}

    def stamp(self, name: str) -> list[int]:
        """What changes with the file."""
        stat = (self.folder / name).stat()
        return [stat.st_size, stat.st_mtime_ns]

    def add(self, name: str, sha256: str) -> None:
        """Note that the shard has this checksum, where notes can be written."""
        self.known[name] = {"sha256": sha256, "stamp": self.stamp(name)}
        with contextlib.suppress(OSError):
            (self.folder / SUMS).parent.mkdir(exist_ok=True)
            (self.folder / SUMS).write_text(json.dumps(self.known, indent=1) + "\n")

    def holds(self, name: str) -> bool:
        """Tell whether a known shard is as it was; if it only looks changed, the stamp is renewed."""
        entry = self.known[name]
        if entry["stamp"] == self.stamp(name):
            return True
        same = checksum(self.folder / name) == entry["sha256"]
        if same:
            self.add(name, entry["sha256"])
        return same


def fetch_shard(hub: Hub, name: str, sums: Sums) -> None:
    """Download the file `name` and verify its form and its content.

    A bad copy is deleted and fetched once more. Raises DataError or OSError; no bad file is left behind.
    """
    path = sums.folder / name
    for attempt in range(DOWNLOADS_PER_SHARD):
        path.unlink(missing_ok=True)
        with hub_errors(hub.repo, name):
            promised = hub.sha256(name)
            # Forcing the second download keeps the client from copying the same bad file out of its cache.
            hub.fetch(name, sums.folder, force=attempt > 0)
        try:
            verify_shard(path)
            found = checksum(path)
            if promised not in (None, found):
                raise DataError(f"{path}: its sha256 is {found}, but should be {promised}")
            sums.add(name, found)
            return
        except DataError as error:
            problem = error
    path.unlink()
    raise DataError(f"{hub.repo} served a bad shard {DOWNLOADS_PER_SHARD} times ({problem}); the bad copy is deleted. "
                    f"If HF_ENDPOINT is set, try another mirror; otherwise try again later")


def compare(hub: Hub, names: list[str], sums: Sums) -> None:
    """Compare shards that came from elsewhere with the hub's; raises DataError if one differs.

    It may be damaged, or the user's own: that is for the user to say. Where no hub answers, they are taken as they are.
    """
    for name in names:
        try:
            promised = hub.sha256(name)
        except Exception as error:  # of several libraries
            if http_status(error) is None:
                return
            continue  # the hub lacks it, or is busy
        found = checksum(sums.folder / name)
        if promised not in (None, found):
            raise DataError(f"{sums.folder / name}: not the shard that {hub.repo} has (its sha256 differs); delete it "
                            "to download it, or keep shards of your own elsewhere and name them with --train_files "
                            "and --val_files")
        sums.add(name, found)


def download(dataset: str, train_shards: int, folder: Path) -> None:
    """Bring the validation shard and the first `train_shards` train shards of `dataset` into `folder`.

    Raises DataError or OSError; shards that are finished by then stay.
    """
    repo, prefix, _ = DATASETS[dataset]
    names = [shard_name(prefix, index) for index in range(train_shards + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    sums, hub = Sums(folder), Hub(repo)
    present = [name for name in names if intact(folder / name)]
    changed = [name for name in present if name in sums.known and not sums.holds(name)]
    missing = [name for name in names if name not in present or name in changed]
    foreign = [name for name in present if name not in sums.known]
    for name in changed:
        print(f"{folder / name}: not what was downloaded any more, so it is fetched again", file=sys.stderr)
    if missing or foreign:
        from huggingface_hub.utils import logging
        from tqdm import tqdm

        # Every failure ends in one line of our own, which says the same.
        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", message="Not enough free disk space")
        if missing:
            with hub_errors(repo, missing[0]):
                # A download retries for half a minute when nothing answers; this question does not.
                hub.sha256(missing[0])
        compare(hub, foreign, sums)
        with tqdm(total=len(names), initial=len(names) - len(missing), unit="shard", disable=None) as progress:
            for name in missing:
                fetch_shard(hub, name, sums)
                progress.update()
    for name in set(names) & sums.known.keys():  # parts of downloads that were killed; the client begins anew each time
        for part in folder.glob(f".cache/huggingface/download/*{sums.known[name]['sha256']}*.incomplete"):
            part.unlink(missing_ok=True)
    print(f"{folder}: {len(names)} shards ready, {len(missing)} of them downloaded now")


def main() -> None:
    """Download what the command line asks for; what goes wrong is one line and exit status 1."""
    parser = argparse.ArgumentParser(description="Download ready-made FineWeb token shards from the Hugging Face hub.")
    parser.add_argument("train_shards", nargs="?", type=int, metavar="N", help="number of train shards (default: all)")
    parser.add_argument("--dataset", choices=DATASETS, default="fineweb10B", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="target folder (default: the dataset's name, beside this script)")
    args = parser.parse_args()
    limit = DATASETS[args.dataset][2]
    train_shards = limit if args.train_shards is None else args.train_shards
    if not 1 <= train_shards <= limit:
        parser.error(f"N is {train_shards}, but {args.dataset} has train shards 1 to {limit}")
    folder = args.out or Path(__file__).resolve().parent / args.dataset
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: half a shard goes
    try:
        download(args.dataset, train_shards, folder)
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write to {folder}: {one_line(error)}. Free some space or choose another --out")
    except KeyboardInterrupt:
        sys.exit("interrupted; run this again for the rest (finished shards are kept, an unfinished one begins anew)")


if __name__ == "__main__":
    main()
