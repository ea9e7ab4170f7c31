"""Amazon's product reviews of four domains (Blitzer, Dredze, Pereira 2007): books, dvd, electronics, kitchen.

Sources, in this order, all in the user's own folder (DATA=FOLDER); none is fetched, since nobody publishes a sum that a
download could be checked by:

    amazon_multidomain.jsonl.gz      {"domain": "books", "label": "pos" | "neg", "text": ...} a line
    domain_sentiment_data.tar.gz     the official archive: members sorted_data_acl/DOMAIN/positive.review and
                                     negative.review, each review's text between <review_text> and </review_text>
    books.jsonl.gz                   as the first, books alone: tests on other domains are then left out, and said so
"""

import gzip
import html
import json
import re
import tarfile
from pathlib import Path

from data.texts.movies import LABELS, Review, clean
from mixdpo.config import InputError

MOST = 2**28  # bytes of a domain's reviews in the archive
OWN = ("amazon_multidomain.jsonl.gz", "domain_sentiment_data.tar.gz", "books.jsonl.gz")
PAGE = "https://www.cs.jhu.edu/~mdredze/datasets/sentiment/"


def load_products(data) -> tuple[dict[str, list[Review]], dict]:
    """Domain -> clean reviews, no text twice, and the counts: source, read, left by domain.
    Raises: InputError if there is no source, or it is not what it should be."""
    path = next((Path(data) / name for name in OWN if data is not None and (Path(data) / name).is_file()), None)
    if path is None:
        raise InputError(f"no book reviews: wanted one of {', '.join(OWN)} in a folder; get the second from {PAGE}, "
                         "put it into a folder, and name that with DATA=FOLDER", file=data)
    read = read_archive if path.suffixes[-2:] == [".tar", ".gz"] else read_jsonl
    found, seen, count = {}, set(), 0
    for domain, label, text in read(path):
        text, count = clean(html.unescape(text)), count + 1
        if text and text not in seen:
            seen.add(text)
            found.setdefault(domain, []).append(Review(text, "train", label))
    if not found.get("books"):
        raise InputError(f"{count} reviews, none of them of books; wanted the domain \"books\"", file=path)
    return found, {"source": path.name, "read": count} | {domain: len(rows) for domain, rows in found.items()}


def read_jsonl(path: Path):
    """Yields (domain, label, text)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                yield str(row["domain"]), LABELS[row["label"]], str(row["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f'{type(error).__name__} {error}; wanted {{"domain": "books", "label": "pos", "text": '
                                 '...} on a line', file=path, line=number) from None


def read_archive(path: Path):
    """Yields (domain, label, text); the domain's first word, so kitchen for kitchen_&_housewares."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if found := re.fullmatch(r"(?:.*/)?([a-z]+)[^/]*/(positive|negative)\.review", member.name):
                    if member.size > MOST:
                        raise InputError(f"{member.name} has {member.size} bytes, wanted {MOST} at most", file=path)
                    body = archive.extractfile(member).read().decode("utf-8", "replace")
                    for text in re.findall(r"<review_text>(.*?)</review_text>", body, re.DOTALL):
                        yield found[1], int(found[2] == "positive"), text
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"is not a whole archive ({error}); get it again from {PAGE}", file=path) from None
