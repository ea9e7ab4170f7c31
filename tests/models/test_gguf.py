"""gguf.py against a file written here byte by byte, numbers recomputed one by one, and files cut at every length.
Each docstring names the faults that the test was seen to fail on.
"""

import struct

import numpy as np
import pytest
from raising import raises_at

from mixdpo.models.gguf import read_gguf


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(metadata, tensors, version=3, alignment=32):
    """The file. metadata: name -> (type number, bytes); tensors: name -> (axes, fastest first; type number; bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, (kind, data) in metadata.items():
        head += string(name) + struct.pack("<I", kind) + data
    body = b""
    for name, (axes, kind, data) in tensors.items():
        body += b"\0" * (-len(body) % alignment)
        head += string(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, len(body))
        body += data
    return head + b"\0" * (-len(head) % alignment) + body


METADATA = {
    "u8": (0, b"\xfe"), "i8": (1, b"\xfe"), "u16": (2, struct.pack("<H", 65535)), "i16": (3, struct.pack("<h", -2)),
    "u32": (4, struct.pack("<I", 2**32 - 1)), "i32": (5, struct.pack("<i", -3)), "f32": (6, struct.pack("<f", 0.25)),
    "bool": (7, b"\x01"), "string": (8, string("naïve Ġ")), "u64": (10, struct.pack("<Q", 2**63)),
    "i64": (11, struct.pack("<q", -4)), "f64": (12, struct.pack("<d", 1e-5)),
    "numbers": (9, struct.pack("<IQ3i", 5, 3, 7, -8, 9)),
    "strings": (9, struct.pack("<IQ", 8, 2) + string("a") + string("")),
}
VALUES = {"u8": 254, "i8": -2, "u16": 65535, "i16": -2, "u32": 2**32 - 1, "i32": -3, "f32": 0.25, "bool": True,
          "string": "naïve Ġ", "u64": 2**63, "i64": -4, "f64": 1e-5, "numbers": [7, -8, 9], "strings": ["a", ""]}


def blocks(seed, count, size):
    """Random bytes whose fp16 (at the start: two of them for Q4_1; at the end for Q6_K) are finite numbers."""
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (count, size), dtype=np.uint8)
    scales = draw.normal(size=(count, 2 if size == 20 else 1)).astype("<f2").view(np.uint8)
    data[:, slice(208, 210) if size == 210 else slice(scales.shape[1])] = scales
    return data.tobytes()


def half(data):
    return float(np.frombuffer(data, "<f2")[0])


def q8_0(data):
    """Number by number, from the format's definition."""
    out = []
    for start in range(0, len(data), 34):
        block = data[start:start + 34]
        out += [half(block[:2]) * q for q in struct.unpack("<32b", block[2:])]
    return np.array(out, np.float32)


def q4_1(data):
    out = []
    for start in range(0, len(data), 20):
        block = data[start:start + 20]
        d, m, q = half(block[:2]), half(block[2:4]), block[4:]
        out += [d * (byte & 15) + m for byte in q] + [d * (byte >> 4) + m for byte in q]
    return np.array(out, np.float32)


def q4_0(data):
    out = []
    for start in range(0, len(data), 18):
        d, q = half(data[start:start + 2]), data[start + 2:start + 18]
        out += [d * ((byte & 15) - 8) for byte in q] + [d * ((byte >> 4) - 8) for byte in q]
    return np.array(out, np.float32)


def q6_k(data):
    """For number 128 n + 32 g + l of a block: four low bits in byte 64 n + 32 (g mod 2) + l, in the high half of it if
    g is 2 or 3; two high bits in byte 32 n + l of the next part, from bit 2 g on; a scale for each 16 numbers."""
    out = []
    for start in range(0, len(data), 210):
        low, high, rest = data[start:start + 128], data[start + 128:start + 192], data[start + 192:start + 210]
        scales, d = struct.unpack("<16b", rest[:16]), half(rest[16:])
        for place in range(256):
            n, g, l = place // 128, place % 128 // 32, place % 32
            bits = low[64 * n + 32 * (g % 2) + l] >> (4 if g > 1 else 0) & 15
            bits |= (high[32 * n + l] >> 2 * g & 3) << 4
            out.append(d * scales[place // 16] * (bits - 32))
    return np.array(out, np.float32)


def f16(data):
    return np.frombuffer(data, "<f2").astype(np.float32)


def bf16(data):
    """The upper half of a float32's bytes."""
    return np.array([struct.unpack("<f", b"\0\0" + data[n:n + 2])[0] for n in range(0, len(data), 2)], np.float32)


Q4, Q8 = blocks(0, 6, 20), blocks(1, 4, 34)
TENSORS = {
    "q4": ((64, 3), 3, Q4), "f32": ((5, 2), 0, np.arange(10, dtype="<f4").tobytes()), "q8": ((32, 4), 8, Q8),
    "f16": ((3,), 1, np.array([0.5, -2, 65504], "<f2").tobytes()), "q40": ((32, 3), 2, blocks(2, 3, 18)),
    "q6": ((256, 2), 14, blocks(3, 2, 210)), "bf16": ((2, 2), 30, bytes(range(56, 64))),
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 256])
def test_metadata_and_tensors(version, alignment, tmp_path):
    """Faults: nibbles interleaved, or high before low; m or Q4_0's 8 left out; int8 read as uint8; Q6_K's high bits in
    another order, its scales for 32 numbers; axes not reversed; alignment taken as 32; a number type of the wrong width
    or sign."""
    metadata = METADATA | {"general.alignment": (4, struct.pack("<I", alignment))}
    (tmp_path / "m.gguf").write_bytes(gguf(metadata, TENSORS, version, alignment))
    values, tensors = read_gguf(tmp_path / "m.gguf")
    assert values == VALUES | {"general.alignment": alignment}
    assert all(type(values[key]) is type(VALUES[key]) for key in VALUES)
    assert {name: (tensor.shape, tensor.kind) for name, tensor in tensors.items()} == {
        "q4": ((3, 64), "Q4_1"), "f32": ((2, 5), "F32"), "q8": ((4, 32), "Q8_0"), "f16": ((3,), "F16"),
        "q40": ((3, 32), "Q4_0"), "q6": ((2, 256), "Q6_K"), "bf16": ((2, 2), "BF16")}
    wanted = {"q4": q4_1(Q4).reshape(3, 64), "q8": q8_0(Q8).reshape(4, 32), "f32": np.arange(10).reshape(2, 5),
              "f16": [0.5, -2, 65504], "q40": q4_0(TENSORS["q40"][2]).reshape(3, 32),
              "q6": q6_k(TENSORS["q6"][2]).reshape(2, 256), "bf16": bf16(TENSORS["bf16"][2]).reshape(2, 2)}
    for name, numbers in wanted.items():
        got = tensors[name].float32()
        assert got.dtype == np.float32 and got.flags["C_CONTIGUOUS"] and got.flags["WRITEABLE"]
        np.testing.assert_allclose(got, numbers, rtol=1e-6, atol=1e-6)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """The file cut at each length. Faults: numpy's or struct's own error; a tensor short of bytes at its end; a
    count in a damaged header allocated before it is believed."""
    few = {name: TENSORS[name] for name in ("q4", "f32", "q8", "f16")}
    complete, path = gguf(METADATA, few), tmp_path / "cut.gguf"
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        with raises_at(file=path):
            read_gguf(path)
    path.write_bytes(complete)
    read_gguf(path)
    huge = gguf({"huge": (9, struct.pack("<IQ", 10, 2**60))}, {})
    path.write_bytes(huge)
    with raises_at(file=path):
        read_gguf(path)


OTHERS = {      # what -> (the file, the value that the error names)
    "not GGUF": (b"PK\x03\x04" + b"\0" * 100, r"b'PK\x03\x04'"),
    "version 1": (gguf({}, {}, version=1), "1"),
    "big-endian": (gguf({}, {}, version=0x03000000), str(0x03000000)),
    "unknown value": (gguf({"x": (13, b"\0" * 8)}, {}), "13"),
    "nested array": (gguf({"x": (9, struct.pack("<IQ", 9, 1) + b"\0" * 20)}, {}), "9"),
    "unknown tensor": (gguf({}, {"w": ((32,), 12, b"\0" * 200)}), "w has GGUF type number 12"),
    "part of a block": (gguf({}, {"w": ((33,), 8, b"\0" * 68)}), "w of shape"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_refused(what, tmp_path):
    """Fault: the check taken out."""
    data, value = OTHERS[what]
    (tmp_path / "m.gguf").write_bytes(data)
    with raises_at(value, file=tmp_path / "m.gguf"):
        read_gguf(tmp_path / "m.gguf")
