"""A tokenizer small enough to see through, and files to read with it, for the tests of preferences and records."""

import gzip
import json

from mixdpo.config import InputError
from mixdpo.preferences import Pair, read_preferences


class Letters:
    """One id a character, `zero` being id 0 (with eos=0, none is); "th" is merged into 300, and "~" has no token."""

    def __init__(self, eos=256, zero="\x00", bos=None):
        self.eos, self.shift, self.bos = eos, ord(zero), bos

    def encode(self, text):
        if "~" in text:
            raise InputError(f"'~' at position {text.index('~')} has no token")
        ids = [300 if c == "\x01" else (ord(c) - self.shift) % 512 for c in text.replace("th", "\x01")]
        return [i + 1 for i in ids] if self.eos == 0 else ids

    def decode(self, ids):
        ids = [i - 1 for i in ids] if self.eos == 0 else ids
        return "".join("th" if i == 300 else chr((i + self.shift) % 512) for i in ids)


GOOD = {"prompt": "He said", "chosen": " yes", "rejected": " no"}


def write(folder, *records, name="prefs.jsonl"):
    """A preference file of objects, and of lines (str or bytes) that shall stand as they are."""
    texts = [r if isinstance(r, str | bytes) else json.dumps(r) for r in records]
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    with (gzip.open if name.endswith("gz") else open)(folder / name, "wb") as file:
        file.writelines(line + b"\n" for line in raw)
    return folder / name


def read(folder, *records, tokenizer=None, max_prompt=16, max_response=16, **options):
    return read_preferences(write(folder, *records), tokenizer or Letters(), max_prompt, max_response, **options)


def pair(prompt, chosen, rejected, **more):
    return Pair(list(prompt), list(chosen), list(rejected), **more)


PEOPLE = [pair([1], [2], [3], user=u, line=i + 1) for i, u in enumerate("babcabbccbbb")]
