"""Download ready-made FineWeb token shards from the Hugging Face hub.

    python data/cached_fineweb10B.py        # the validation shard and all 103 train shards, 20.8 GB
    python data/cached_fineweb10B.py 9      # the validation shard and the first 9 train shards

Shards that are present and intact are kept, so an interrupted download continues where it stopped. Set HF_ENDPOINT to
download from a mirror of the hub.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from shards import DataError, one_line, shard_name, verify_shard

DATASETS = {  # name: (repository, prefix of its file names, number of train shards)
    "fineweb10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb100B": ("kjj0/fineweb100B-gpt2", "fineweb", 1030),
    "finewebedu10B": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
DOWNLOADS_PER_SHARD = 2  # one bad copy may be an accident on the way, a second one is the server's
REMEDY = (
    "Check the network and run this again (finished shards are kept), set HF_ENDPOINT to a mirror of the hub, build "
    "shards from your own text with data/fineweb.py, or try the bundled data/sample with the CPU demo"
)


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
        raise DataError(f"cannot download {name} from {repo}: {one_line(error)}. {REMEDY}") from error


def fetch_shard(repo: str, name: str, folder: Path) -> None:
    """Download the file `name` of `repo` into `folder` and verify it.

    A bad copy is deleted and fetched once more. Raises DataError or OSError; no bad file is left behind.
    """
    from huggingface_hub import hf_hub_download

    path = folder / name
    for attempt in range(DOWNLOADS_PER_SHARD):
        path.unlink(missing_ok=True)
        with hub_errors(repo, name):
            # Forcing the second download keeps the client from copying the same bad file out of its cache.
            hf_hub_download(repo, name, repo_type="dataset", local_dir=folder, force_download=attempt > 0)
        try:
            verify_shard(path)
            return
        except DataError as error:
            problem = error
    path.unlink()
    raise DataError(f"{repo} served a bad shard {DOWNLOADS_PER_SHARD} times ({problem}); the bad copy is deleted. "
                    f"If HF_ENDPOINT is set, try another mirror; otherwise try again later")


def download(dataset: str, train_shards: int, folder: Path) -> None:
    """Bring the validation shard and the first `train_shards` train shards of `dataset` into `folder`.

    Raises DataError or OSError; shards that are finished by then stay.
    """
    repo, prefix, _ = DATASETS[dataset]
    names = [shard_name(prefix, index) for index in range(train_shards + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not intact(folder / name)]
    if missing:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import logging
        from tqdm import tqdm

        # Every failure ends in one line of our own, which says the same.
        logging.set_verbosity_error()
        warnings.filterwarnings("ignore", message="Not enough free disk space")
        with hub_errors(repo, missing[0]):
            # A download retries for half a minute when nothing answers; this question does not.
            get_hf_file_metadata(hf_hub_url(repo, missing[0], repo_type="dataset"))
        with tqdm(total=len(names), initial=len(names) - len(missing), unit="shard", disable=None) as progress:
            for name in missing:
                fetch_shard(repo, name, folder)
                progress.update()
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
    try:
        download(args.dataset, train_shards, folder)
    except DataError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write to {folder}: {one_line(error)}. Free some space or choose another --out")
    except KeyboardInterrupt:
        sys.exit("interrupted; run this again to continue (finished shards are kept)")


if __name__ == "__main__":
    main()
