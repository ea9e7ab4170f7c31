"""Sentences with human ratings (Hutto & Gilbert 2014, ICWSM): of product reviews, editorials, film reviews and tweets.

The archive, hutto_ICWSM_2014.tar.gz, is looked for in the user's own folder, in the cache, and in the package
vaderSentiment, whose source distribution ships it; it is checked by its sha256. Two files a domain are read:

    NAME_GroundTruth.txt        ID, mean rating, text, with tabs between; an ID is DOCUMENT_SENTENCE, where there are
    NAME_anonDataRatings.txt    ID, mean, deviation, [ratings]: -4 to 4 of ten people or more, each for itself

A document's sentences stand in their order, so what comes before a sentence can be its prompt.
"""

import json
import re
import tarfile
from dataclasses import dataclass

from data.texts.movies import clean
from mixdpo.config import InputError
from mixdpo.files import fetch

FILES = {"product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets", "film": "movieReviewSnippets",
         "tweet": "tweets"}
MOST = 2**24  # bytes of a member


@dataclass(frozen=True)
class Sentence:
    text: str
    domain: str
    document: str           # "" where a sentence stands alone
    ratings: tuple[int, ...]

    @property
    def rating(self) -> float:
        """What people make of it on average: -4 very negative, 4 very positive."""
        return sum(self.ratings) / len(self.ratings)


def load_sentences(data=None) -> dict[str, list[Sentence]]:
    """Domain -> its sentences in their order. Raises: InputError naming the line that is not what it should be."""
    path, out = fetch.asset("sentences", data), {}
    with tarfile.open(path) as archive:
        for domain, name in FILES.items():
            texts, ratings = (fields_of(archive, path, f"{name}_{what}.txt", count)
                              for what, count in (("GroundTruth", 3), ("anonDataRatings", 4)))
            out[domain] = []
            for key, (_, text) in texts.items():
                said = ratings.get(key, [None])[-1]
                if said is None or not re.fullmatch(r"\[-?\d+(, -?\d+)*\]", said):
                    raise InputError(f"{name}, {key}: got {said!r:.80} for its ratings, wanted [1, -2, ...]", file=path)
                document = key.split("_")[0] if "_" in key else ""
                out[domain].append(Sentence(clean(text), domain, document, tuple(json.loads(said))))
    return out


def fields_of(archive: tarfile.TarFile, path, name: str, count: int) -> dict[str, list[str]]:
    """ID -> the other fields, of a member with `count` fields a line."""
    member = next((m for m in archive if re.fullmatch(rf"[^/]+/{name}", m.name)), None)
    if member is None or member.size > MOST:
        raise InputError(f"{name} is missing, or has more than {MOST} bytes; get the archive again", file=path)
    rows = {}
    for number, line in enumerate(archive.extractfile(member).read().decode("utf-8-sig", "replace").splitlines(), 1):
        fields = line.split("\t")
        if len(fields) != count:
            raise InputError(f"got {len(fields)} fields, wanted {count}", file=f"{path}: {name}", line=number)
        rows[fields[0]] = fields[1:]
    return rows
