"""Sentences with human ratings (Hutto & Gilbert 2014, ICWSM): of product reviews, editorials, film reviews and tweets.

The archive hutto_ICWSM_2014.tar.gz is taken from the user's data folder, the cache, or the source distribution of the
package vaderSentiment, and checked by sha256. Two files of each domain are read:

    NAME_GroundTruth.txt        ID, mean rating, text, separated by tabs; an ID is DOCUMENT_SENTENCE or SENTENCE
    NAME_anonDataRatings.txt    ID, mean, deviation, [ratings] by ten people or more, each from -4 to 4

The sentences of a document keep their order, so the preceding text can be the prompt of a sentence.
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
MOST = 2**24  # largest size of a member, in bytes


@dataclass(frozen=True)
class Sentence:
    text: str
    domain: str
    document: str           # "" for a single sentence
    ratings: tuple[int, ...]

    @property
    def rating(self) -> float:
        """Mean rating: -4 very negative, 4 very positive."""
        return sum(self.ratings) / len(self.ratings)


def load_sentences(data=None) -> dict[str, list[Sentence]]:
    """Domain -> its sentences in order. Raises: InputError naming the malformed line."""
    path, out = fetch.asset("sentences", data), {}
    with tarfile.open(path) as archive:
        for domain, name in FILES.items():
            texts, ratings = (fields_of(archive, path, f"{name}_{what}.txt", count)
                              for what, count in (("GroundTruth", 3), ("anonDataRatings", 4)))
            out[domain] = []
            for key, (_, text) in texts.items():
                rated = ratings.get(key, [None])[-1]
                if rated is None or not re.fullmatch(r"\[-?\d+(, -?\d+)*\]", rated):
                    raise InputError(f"{name}, {key}: ratings {rated!r:.80}, wanted [1, -2, ...]", file=path)
                document = key.split("_")[0] if "_" in key else ""
                out[domain].append(Sentence(clean(text), domain, document, tuple(json.loads(rated))))
    return out


def fields_of(archive: tarfile.TarFile, path, name: str, count: int) -> dict[str, list[str]]:
    """ID -> the other fields, from a member with `count` fields on each line. Raises: InputError."""
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
