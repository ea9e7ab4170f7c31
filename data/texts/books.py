"""Amazon's product reviews of four domains (Blitzer, Dredze, Pereira 2007): books, dvd, electronics, kitchen.

Sources, in this order, all in the user's data folder (DATA=FOLDER). Nothing is fetched, since no checksum of the
archive is published:

    amazon_multidomain.jsonl.gz      {"domain": "books", "label": "pos" | "neg", "text": ...} on each line
    domain_sentiment_data.tar.gz     the official archive: members sorted_data_acl/DOMAIN/positive.review and
                                     negative.review, each review's text between <review_text> and </review_text>
    books.jsonl.gz                   like the first, books only; the evaluation then leaves out other domains
"""

import html
import json
import re
import tarfile
from pathlib import Path

from data.texts.movies import LABELS, Review, clean
from mixdpo.config import InputError
from mixdpo.text.records import lines

MOST = 2**28  # largest size of a member of the archive, in bytes
OWN = ("amazon_multidomain.jsonl.gz", "domain_sentiment_data.tar.gz", "books.jsonl.gz")
PAGE = "https://www.cs.jhu.edu/~mdredze/datasets/sentiment/"


def load_products(data) -> tuple[dict[str, list[Review]], dict]:
    """Domain -> clean reviews without duplicates; and counts: source, read, kept in each domain. Raises: InputError if
    there is no source, or it is malformed."""
    path = next((Path(data) / name for name in OWN if data is not None and (Path(data) / name).is_file()), None)
    if path is None:
        raise InputError(f"no book reviews; wanted one of {', '.join(OWN)} in the data folder; get the second from "
                         f"{PAGE}, put it into a folder, and give DATA=FOLDER", file=data)
    read = read_archive if path.suffixes[-2:] == [".tar", ".gz"] else read_jsonl
    found, seen, count = {}, set(), 0
    for domain, label, text in read(path):
        text, count = clean(html.unescape(text)), count + 1
        if text and text not in seen:
            seen.add(text)
            found.setdefault(domain, []).append(Review(text, "train", label))
    if not found.get("books"):
        raise InputError(f"{count} reviews, none of books; wanted the domain \"books\"", file=path)
    return found, {"source": path.name, "read": count} | {domain: len(rows) for domain, rows in found.items()}


def read_jsonl(path: Path):
    """Yields (domain, label, text)."""
    for number, line in enumerate(lines(path), start=1):
        try:
            row = json.loads(line)
            yield str(row["domain"]), LABELS[row["label"]], str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{type(error).__name__} {error}; wanted {{"domain": "books", "label": "pos", "text": '
                             '...} on a line', file=path, line=number) from None


def read_archive(path: Path):
    """Yields (domain, label, text). domain is the first word: kitchen for kitchen_&_housewares."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if found := re.fullmatch(r"(?:.*/)?([a-z]+)[^/]*/(positive|negative)\.review", member.name):
                    if member.size > MOST:
                        raise InputError(f"{member.name} has {member.size} bytes, wanted at most {MOST}", file=path)
                    body = archive.extractfile(member).read().decode("utf-8", "replace")
                    for text in re.findall(r"<review_text>(.*?)</review_text>", body, re.DOTALL):
                        yield found[1], int(found[2] == "positive"), text
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"is not a complete archive ({error}); get it again from {PAGE}", file=path) from None
