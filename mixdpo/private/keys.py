"""Random numbers from a secret key. Every purpose, step and example has a generator of its own.

    secret       256 bits from the operating system
    generator    numpy's Philox 4x64, which is counter-based, under the 128-bit key
                 BLAKE2b(purpose, step or example), keyed with the secret

Two generators differ in all 128 bits, and none of them tells the secret or another one's key. A draw that belongs to an
example is keyed by the example's identity, never by its place in the file: an example that is added or removed leaves
the draws of all others as they were.

Left out: a cryptographic generator. Philox is a statistical one; only the keys are cryptographic.
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
        """A key that everybody can make again: for made or public data, never for a release."""
        return cls(hashlib.sha256(f"public {seed}".encode()).digest())

    def generator(self, purpose: str, *about: int | str | bytes) -> np.random.Generator:
        """The generator for one purpose, and within it for one step or example. The same arguments give the same
        numbers from the start."""
        digest = hashlib.blake2b(repr((purpose, *about)).encode(), key=self.secret, digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def identities(contents: list) -> list[str]:
    """One name for each example, from its content alone. The n-th copy of the same content gets the number n, so equal
    examples are drawn independently, and removing one of them is removing the last copy."""
    names, copies = [], Counter()
    for content in contents:
        digest = hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()
        names.append(f"{digest}:{copies[digest]}")
        copies[digest] += 1
    return names
