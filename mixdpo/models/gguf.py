"""Reads GGUF, the one-file format of llama.cpp: metadata (with the tokenizer) and quantised tensors.

    file   "GGUF", version, two counts; the key-values; one record for each tensor; padding; the tensors' bytes
    Q8_0   a block of 32 numbers: fp16 d, 32 x int8 q                   x = d q
    Q4_0   a block of 32 numbers: fp16 d, 16 bytes of nibbles q         x = d (q - 8); low nibbles: 0..15, high: 16..31
    Q4_1   a block of 32 numbers: fp16 d, fp16 m, 16 bytes of nibbles   x = d q + m; nibbles as in Q4_0
    Q6_K   a block of 256 numbers: their 4 low bits (128 bytes), their 2 high bits (64 bytes), 16 x int8 s, fp16 d
                                                                        x = d s (q - 32); one s for 16 numbers

Q6_K is here because llama.cpp stores the unembedding of a Q4_0 or Q4_1 file in it. Left out: every other quantisation
(an error that gives its number), big-endian files and nested arrays. A tensor gets PyTorch's shape, (out, in); GGUF
lists the fastest axis first. Names, settings and the order of rows: gguf_llama.py. Writing: gguf_write.py.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from mixdpo.config import InputError

# Type numbers of GGUF's metadata values -> numpy types. 8 is a string and 9 an array; these have code of their own.
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
           10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9

# Tensor types that can be read: number -> (name, numbers a block, bytes a block).
KINDS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34),
         14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2)}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor that is still in its file and uses no memory; float32() reads and dequantises it."""

    shape: tuple        # (out, in), as PyTorch writes it
    kind: str           # its name in KINDS
    raw: np.ndarray     # its bytes, uint8, mapped from the file

    def float32(self):
        """The tensor that llama.cpp computes with, as a new contiguous float32 array of self.shape."""
        return DEQUANTISE[self.kind](self.raw).reshape(self.shape)


def _scales(blocks, count=1):
    """The `count` fp16 numbers at the start of each block: (count, blocks, 1) float32."""
    return blocks[:, :2 * count].copy().view("<f2").astype(np.float32).T[:, :, None]


def _nibbles(packed):
    """(blocks, n) bytes -> (blocks, 2n) numbers from 0 to 15: all low nibbles, then all high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=1)


def _q8_0(raw):
    blocks = raw.reshape(-1, 34)
    return _scales(blocks)[0] * blocks[:, 2:].view(np.int8)


def _q4_0(raw):
    blocks = raw.reshape(-1, 18)
    return _scales(blocks)[0] * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(raw):
    blocks = raw.reshape(-1, 20)
    d, m = _scales(blocks, 2)
    return d * _nibbles(blocks[:, 4:]) + m


def _q6_k(raw):
    """Each half of a block has 128 numbers in four groups of 32. Its 64 bytes of low bits have the groups 0 and 1 in
    the low nibbles, 2 and 3 in the high ones; its 32 bytes of high bits have group g at the bits 2g and 2g + 1."""
    blocks = raw.reshape(-1, 210)
    low, high = blocks[:, :128].reshape(-1, 64), blocks[:, 128:192].reshape(-1, 32)         # (2 blocks, bytes)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)            # (2 blocks, 128)
    q = (_nibbles(low) | high << 4).astype(np.float32) - 32
    s, d = blocks[:, 192:208].view(np.int8).astype(np.float32), _scales(blocks[:, 208:])[0]     # (blocks, 16 or 1)
    return (d * s)[:, :, None] * q.reshape(-1, 16, 16)


# Name of a tensor type -> the function from its bytes to new float32 numbers, in the order of the tensor.
DEQUANTISE = {"F32": lambda raw: raw.view("<f4").astype(np.float32), "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1,
              "F16": lambda raw: raw.view("<f2").astype(np.float32), "Q6_K": _q6_k,
              "BF16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)}


class _Cursor:
    """A position in the file. Each read is checked against the file's end, so a truncated file is an error at once."""

    def __init__(self, path):
        self.path, self.place = path, 0
        if path.stat().st_size == 0:
            raise InputError("the file is empty, wanted a GGUF file; fetch it again", file=path)
        self.data = np.memmap(path, dtype=np.uint8, mode="r")

    def take(self, count):
        """The next `count` bytes, mapped. Raises: InputError at the file's end."""
        if count > len(self.data) - self.place:
            raise InputError(f"truncated: {len(self.data) - self.place} bytes after byte {self.place}, wanted "
                             f"{count}; fetch the file again", file=self.path)
        self.place += count
        return self.data[self.place - count:self.place]

    def number(self, code):
        """The next number; code: its type in the module struct."""
        return struct.unpack("<" + code, self.take(struct.calcsize(code)).tobytes())[0]

    def string(self):
        return self.take(self.number("Q")).tobytes().decode("utf-8", errors="surrogateescape")

    def value(self, kind):
        """The next metadata value; kind: its GGUF type number."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                return [self.string() for _ in range(count)]
            return np.frombuffer(self.take(count * self.dtype(kind).itemsize), self.dtype(kind)).tolist()
        return np.frombuffer(self.take(self.dtype(kind).itemsize), self.dtype(kind))[0].item()

    def dtype(self, kind):
        """The numpy type of a GGUF type number. Raises: InputError."""
        if kind not in SCALARS:
            raise InputError(f"unknown metadata type {kind} near byte {self.place}: the file is damaged, or has nested "
                             "arrays, which are not supported; fetch it again", file=self.path)
        return np.dtype(SCALARS[kind])


def read_gguf(path):
    """-> (metadata, tensors): dict of plain Python values, dict of name -> GGUFTensor. Reads versions 2 and 3.

    The tensors' bytes are mapped, not read: only the header uses memory.
    Raises: InputError for a file that is not GGUF, is truncated, or holds a tensor of a type that is not in KINDS.
    """
    path = Path(path)
    cursor = _Cursor(path)
    magic = cursor.data[:4].tobytes()
    if magic != b"GGUF":
        raise InputError(f"is not a GGUF file: starts with {magic!r}, wanted b'GGUF'; give a GGUF file", file=path)
    cursor.take(4)
    version, tensor_count, value_count = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in (2, 3):
        raise InputError(f"GGUF version {version}, wanted 2 or 3; convert the file with a current llama.cpp", file=path)
    metadata = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    records = []
    for _ in range(tensor_count):
        name, axes = cursor.string(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]            # GGUF lists the fastest axis first
        records.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.place // alignment) * alignment                            # tensor data start at the next multiple
    tensors = {name: _tensor(cursor, name, shape, kind, base + offset) for name, shape, kind, offset in records}
    return metadata, tensors


def _tensor(cursor, name, shape, kind, start):
    if kind not in KINDS:
        raise InputError(f"tensor {name} has GGUF type number {kind}, wanted one of "
                         f"{', '.join(f'{k} ({v[0]})' for k, v in KINDS.items())}; use a file with one of these types",
                         file=cursor.path)
    kind, per_block, block_bytes = KINDS[kind]
    if prod(shape) % per_block:
        raise InputError(f"tensor {name} of shape {shape}: its size must be a multiple of {per_block}, the block size "
                         f"of {kind}; the file is damaged, fetch it again", file=cursor.path)
    cursor.place = min(start, len(cursor.data))
    return GGUFTensor(shape, kind, cursor.take(prod(shape) // per_block * block_bytes))
