"""Random numbers from a secret key. Every purpose, step and example has its own generator.

    secret       256 bits from the operating system
    generator    numpy's Philox 4x64, which is counter-based, under the 128-bit key
                 BLAKE2b(purpose, step or example), keyed with the secret

The keys of two generators are unrelated in all 128 bits. No generator reveals the secret or the key of another. A draw
for an example is keyed by the example's identity, not by its position in the file. So adding or removing an example
does not change the draws of the others.

Left out: a cryptographic generator. Philox is a statistical generator; only the keys are cryptographic.
"""

import hashlib
import secrets
from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Key:
    """A secret, from which every generator of a private run is derived."""

    secret: bytes = field(repr=False)               # 32 bytes

    @classmethod
    def fresh(cls) -> "Key":
        """A new secret from the operating system."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def public(cls, seed: int) -> "Key":
        """A key that anyone can recompute from the seed: for synthetic or public data, never for a release."""
        return cls(hashlib.sha256(f"public {seed}".encode()).digest())

    def generator(self, purpose: str, *about: int | str | bytes) -> np.random.Generator:
        """The generator for one purpose, and for one step or example (`about`). Equal arguments give a generator with
        equal numbers."""
        digest = hashlib.blake2b(repr((purpose, *about)).encode(), key=self.secret, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def identities(contents: list) -> list[str]:
    """A name for each example, from its content only. Copies of the same content are numbered, so they are drawn
    independently; removing any copy has the same effect as removing the last."""
    names: list[str] = []
    copies: Counter[str] = Counter()
    for content in contents:
        digest = hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()
        names.append(f"{digest}:{copies[digest]}")
        copies[digest] += 1
    return names
