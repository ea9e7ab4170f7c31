"""Writes GGUF version 3, which gguf.py reads (its docstring has the layout): metadata, and tensors in F32, F16 or Q8_0.

Vectors (norms, biases) are F32, as llama.cpp wants them. Matrices are of the kind that the caller names; a matrix whose
rows do not split into blocks of 32 is F16 instead of Q8_0, as in llama.cpp's own converter. Tensors are made and
written one at a time. Left out: every other quantisation, and files in parts.
"""

import struct
from math import prod

import numpy as np

from mixdpo.config import InputError, replacing
from mixdpo.models.gguf import ARRAY, KINDS, STRING

ALIGNMENT = 32
NUMBER = {name: number for number, (name, _, _) in KINDS.items()}

# Python type of a metadata value -> GGUF's type number, and its code in the module struct. All sizes and ids are uint32
# in llama.cpp, except in arrays, whose numbers are int32.
SCALARS: dict[type, tuple[int, str]] = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}
INT32 = (5, "i")


def write_gguf(path, metadata, tensors, kind) -> None:
    """Writes the file atomically. metadata: key -> bool, int, float, str, or a list of int or of str.
    tensors: name -> (shape, read), with read() -> the float32 torch tensor; kind: "F16" or "Q8_0", of matrices.
    Raises: InputError if a number is too large for `kind`; OSError."""
    kinds = {name: kind_of(shape, kind) for name, (shape, _) in tensors.items()}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(content) for key, content in metadata.items())
    place = 0
    for name, (shape, _) in tensors.items():
        _, per_block, block_bytes = KINDS[NUMBER[kinds[name]]]
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])        # fastest axis first
        head += struct.pack("<IQ", NUMBER[kinds[name]], place)
        place += padded(prod(shape) // per_block * block_bytes)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(head.ljust(padded(len(head)), b"\0"))
        for name, (shape, read) in tensors.items():
            numbers = read().detach().float().cpu().contiguous().numpy()
            assert numbers.shape == tuple(shape), f"{name}: got {numbers.shape}, want {tuple(shape)}"
            data = ENCODE[kinds[name]](numbers, name)
            file.write(data.ljust(padded(len(data)), b"\0"))


def kind_of(shape, kind: str) -> str:
    """The type of a tensor of this shape, if matrices are of `kind`."""
    if len(shape) == 1:
        return "F32"
    return "F16" if shape[-1] % KINDS[NUMBER[kind]][1] else kind


def padded(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")                   # as the reader decodes it
    return struct.pack("<Q", len(data)) + data


def value(content) -> bytes:
    """A metadata value with its type number."""
    if isinstance(content, str):
        return struct.pack("<I", STRING) + string(content)
    if isinstance(content, list):
        if all(isinstance(item, str) for item in content):                  # also an empty list
            return struct.pack("<IIQ", ARRAY, STRING, len(content)) + b"".join(map(string, content))
        return struct.pack(f"<IIQ{len(content)}{INT32[1]}", ARRAY, INT32[0], len(content), *content)
    number, code = SCALARS[type(content)]
    return struct.pack(f"<I{code}", number, content)


def f16(numbers: np.ndarray, name: str) -> bytes:
    with np.errstate(over="ignore"):
        half = numbers.astype("<f2")
    if not np.isfinite(half).all():
        raise InputError(f"the tensor {name} has numbers up to {abs(numbers).max():.3g}, beyond F16's 65504; use "
                         "gguf-q8_0, or hf", option="format")
    return half.tobytes()


def q8_0(numbers: np.ndarray, name: str) -> bytes:
    """x = d q with q = x / d rounded half away from zero, and d = largest |x| of the block / 127: equal to the bit to
    llama.cpp's, which rounds q before it rounds d to fp16."""
    blocks = numbers.reshape(-1, 32)
    d = abs(blocks).max(1, keepdims=True) / np.float32(127)                 # (blocks,1)
    y = blocks * np.divide(1, d, out=np.zeros_like(d), where=d > 0)
    size = abs(y)
    q = np.sign(y) * (np.floor(size) + (size - np.floor(size) >= 0.5))
    scale = np.frombuffer(f16(d, name), np.uint8).reshape(-1, 2)
    return np.concatenate([scale, q.astype(np.int8).view(np.uint8)], axis=1).tobytes()


ENCODE = {"F32": lambda numbers, name: numbers.astype("<f4").tobytes(), "F16": f16, "Q8_0": q8_0}
