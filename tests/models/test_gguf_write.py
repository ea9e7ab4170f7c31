"""GGUF files that this program writes: byte by byte beside a file made here, numbers quantised one by one, models and
tokenizers read back. tests/peers/test_servers.py opens them with the gguf package and with llama.cpp. Each docstring
names the faults that the test was seen to fail on.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from raising import raises_at
from test_gguf import gguf, string

from mixdpo.config import InputError
from mixdpo.files.fetch import asset
from mixdpo.models.gguf import read_gguf
from mixdpo.models.gguf_llama import gguf_of
from mixdpo.models.gguf_write import write_gguf
from mixdpo.models.llama import Llama, LlamaConfig, RopeScaling
from mixdpo.models.weights import load_model
from mixdpo.text.gguf_tokenizer import to_metadata
from mixdpo.text.tokenizer import load_tokenizer

FAMILIES = json.loads((Path(__file__).parents[1] / "golden" / "families.json").read_text())
TEXTS = ["It was 12 or 345 films, isn't it?\n\n  Yes", "naïve Ġ é 日本", "<|im_start|> is text, <think> is not", ""]


def numbers(shape, seed=0, scale=1.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).normal(size=shape)).float()


def q8_0_block(x):
    """34 bytes of 32 numbers, from the format's definition: d is the largest size / 127, in float32; each number is
    divided by it and rounded, halves away from zero; then d is stored as fp16."""
    d = np.float32(max(map(abs, x))) / np.float32(127)
    inverse = np.float32(1) / d if d else np.float32(0)
    q = [int(math.copysign(math.floor(abs(float(v * inverse)) + 0.5), v)) for v in x]
    return np.float16(d).tobytes() + struct.pack("<32b", *q)


def test_a_file_byte_by_byte(tmp_path):
    """Beside the writer of test_gguf.py. Faults: int64 for uint32; true as a number; axes in PyTorch's order; no
    padding after the head, or after a tensor; offsets from the start of the file; an empty list left out; a matrix in
    F32, or a vector in F16; rows of 40 numbers in blocks of 32; halves rounded to even; d rounded before q."""
    matrix, odd, vector = numbers((3, 64), 1), numbers((2, 40), 2), numbers((5,), 3)
    matrix[0, :4], matrix[1] = torch.tensor([127.0, 0.5, -1.5, 2.5]), 0.0    # d = 1: halves; and a block of zeros
    metadata = {"text": "naïve Ġ", "small": 7, "real": 0.1, "yes": True, "texts": ["a", ""], "none": [],
                "counts": [3, -1]}
    tensors = {name: (tuple(t.shape), lambda t=t: t) for name, t in
               {"vector": vector, "matrix": matrix, "odd": odd}.items()}
    write_gguf(tmp_path / "x.gguf", metadata, tensors, "Q8_0")
    values = {"text": (8, string("naïve Ġ")), "small": (4, struct.pack("<I", 7)), "real": (6, struct.pack("<f", 0.1)),
              "yes": (7, b"\x01"), "texts": (9, struct.pack("<IQ", 8, 2) + string("a") + string("")),
              "none": (9, struct.pack("<IQ", 8, 0)), "counts": (9, struct.pack("<IQ2i", 5, 2, 3, -1))}
    blocks = b"".join(q8_0_block(block) for block in matrix.numpy().reshape(-1, 32))
    want = gguf(values, {"vector": ((5,), 0, vector.numpy().tobytes()), "matrix": ((64, 3), 8, blocks),
                         "odd": ((40, 2), 1, odd.numpy().astype("<f2").tobytes())})
    got = (tmp_path / "x.gguf").read_bytes()
    assert got[:len(want)] == want and not any(got[len(want):]) and len(got) % 32 == 0
    assert read_gguf(tmp_path / "x.gguf")[0] == metadata | {"real": float(np.float32(0.1))}


SIZES = dict(vocab=59, context=96, width=64, layers=2, heads=4, kv_heads=2, eps=1e-6, theta=1e4)
MODELS = {
    "llama": dict(inner=96), "untied": dict(inner=70, tied=False), "mistral": dict(inner=96, family="mistral"),
    "llama3": dict(inner=96, scaling=RopeScaling(32.0)), "head_dim": dict(inner=96, head_dim=24),
    "qwen2": dict(inner=96, family="qwen2", qkv_bias=True),
    "qwen3": dict(inner=96, family="qwen3", qk_norm="head", head_dim=32, tied=False)}


def made(name):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SIZES | MODELS[name]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_is_read_back(name, kind, tmp_path):
    """The configuration, every weight, and logits. F16 is exact; Q8_0 is within half a step of each block. Faults: rows
    of Qwen's q and k permuted, or Llama's not, or by heads of another size; a bias or a norm left out; eps or theta as
    integers; divisors of rope inverted; an untied unembedding left out; a step of 1/63."""
    model = made(name)
    metadata, tensors = gguf_of(model)
    write_gguf(tmp_path / "m.gguf", metadata, tensors, kind)
    again = load_model(tmp_path / "m.gguf")
    family = {"mistral": "llama"}.get(model.config.family, model.config.family)
    assert again.config == dataclasses.replace(model.config, family=family)
    got = dict(again.named_parameters())
    assert got.keys() == dict(model.named_parameters()).keys()
    for own, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(got[own], p), own
        elif kind == "F16" or p.shape[1] % 32:
            assert torch.equal(got[own], p.half().float()), own
        else:
            step = p.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            off = (got[own] - p).unflatten(1, (-1, 32)).abs()
            assert (off <= step * (0.5 + 127 * 2.0 ** -11)).all() and off.max() > 0.3 * step.max(), own
    ids = torch.randint(59, (2, 40), generator=torch.Generator().manual_seed(1))
    far = (again(ids) @ again.unembedding.T - model(ids) @ model.unembedding.T).abs().max().item()
    assert far <= {"F16": 5e-3, "Q8_0": 0.1}[kind], f"logits are off by {far}"


@torch.no_grad()
def test_an_experts_unembedding_is_written_in_place_of_the_models(tmp_path):
    """Faults: the model's own; the embedding replaced too."""
    model, own = made("llama"), numbers((59, 64), 5)
    write_gguf(tmp_path / "m.gguf", *gguf_of(model, own), "F16")
    again = load_model(tmp_path / "m.gguf")
    assert not again.config.tied and torch.equal(again.unembedding, own.half().float())
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight.half().float())
    write_gguf(tmp_path / "m.gguf", *gguf_of(model, model.unembedding), "F16")
    assert load_model(tmp_path / "m.gguf").config.tied


@pytest.mark.parametrize("model", [
    lambda: small.model("gpt2"), lambda: Llama(LlamaConfig(**SIZES, inner=96, family="smollm3", no_rope=(1,))),
    lambda: Llama(LlamaConfig(**SIZES, inner=96, family="olmo2", qk_norm="row", post_norm=True)),
    lambda: Llama(LlamaConfig(**SIZES, inner=96, family="qwen2", qkv_bias=True, scaling=RopeScaling(8.0)))])
def test_what_llama_cpp_would_compute_otherwise_is_refused(model):
    """Catches: a file that opens and computes another function."""
    with raises_at("qwen3", option="format"):
        gguf_of(model())


@pytest.mark.parametrize("kind, size", [("F16", 7e4), ("Q8_0", 9e6)])
def test_numbers_beyond_f16_are_refused(kind, size, tmp_path):
    """Catches: an infinity in the file; the old file lost."""
    (tmp_path / "x.gguf").write_bytes(b"old")
    tensors = {"w": ((2, 32), lambda: torch.full((2, 32), size))}
    with raises_at("w", option="format"):
        write_gguf(tmp_path / "x.gguf", {}, tensors, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"] and (tmp_path / "x.gguf").read_bytes() == b"old"


# --- tokenizers -------------------------------------------------------------------------------------------------------


def golden(family, folder):
    (folder / "tokenizer.json").write_text(json.dumps(FAMILIES[family]["tokenizer"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(FAMILIES[family]["config"]))
    return load_tokenizer(folder)


def read_back(tokenizer, rows, path):
    write_gguf(path, {"general.architecture": "llama"} | to_metadata(tokenizer, rows), {}, "F16")
    return load_tokenizer(path)


def same(got, want):
    for text in TEXTS:
        assert got.encode(text) == want.encode(text), text
        assert got.decode(want.encode(text)) == want.decode(want.encode(text))
    assert (got.eos, got.bos, got.vocab, got.chat_template) == (want.eos, want.bos, want.vocab, want.chat_template)
    assert got.special == want.special and got.vocabulary.literal == want.vocabulary.literal


@pytest.mark.parametrize("family", ["Qwen2", "Qwen2.5", "Qwen3"])
def test_a_tokenizer_is_read_back(family, tmp_path):
    """From a file whose model has 5 rows more. Faults: added tokens that are not special written as special, or as
    ordinary; rows without a token read as tokens; merges as pairs; the chat template left out."""
    tokenizer = golden(family, tmp_path)
    same(read_back(tokenizer, tokenizer.vocab + 5, tmp_path / "t.gguf"), tokenizer)


def test_a_start_token_is_read_back(tmp_path):
    """GPT-2's pre-tokenizer with a start token, which Llama 3's alone had. Faults: add_bos_token left out, or read for
    Llama 3's alone."""
    tokenizer = tiny(tmp_path, special=("<end>", "<s>"))
    tokenizer.doc["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    tokenizer.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos == 257
    same(read_back(tokenizer, 258, tmp_path / "t.gguf"), tokenizer)
    tokenizer = tiny(tmp_path, special=("<end>",))
    assert tokenizer.bos is None and read_back(tokenizer, 257, tmp_path / "t.gguf").bos is None


def tiny(folder, special):
    import tinyjob

    tinyjob.make_model(folder, special=special)
    return load_tokenizer(folder)


@pytest.mark.parametrize("family", ["OLMo 2", "Mistral NeMo"])
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(family, tmp_path):
    """Catches: another pre-tokenizer's name, and so other ids."""
    with raises_at("qwen2", file=tmp_path):
        to_metadata(golden(family, tmp_path), 10 ** 6)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """Catches: a traceback, or tokens without a row."""
    with raises_at(257, 200, file=tmp_path):
        to_metadata(tiny(tmp_path, special=("<end>",)), 200)


def test_other_settings_than_llama_cpps_are_refused(tmp_path):
    """Qwen's pattern without NFC, which llama.cpp's reader here has. Catches: ids that differ for composed letters."""
    doc = FAMILIES["Qwen2"]["tokenizer"] | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(doc))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FAMILIES["Qwen2"]["config"]))
    with raises_at("qwen2", file=tmp_path):
        to_metadata(load_tokenizer(tmp_path), 10 ** 6)


def test_smollm2s_metadata_is_that_of_its_published_file():
    """Faults: types of the special tokens; the name of the pre-tokenizer; merges in another order."""
    try:
        published = read_gguf(asset("smollm2"))[0]
    except InputError as error:
        pytest.skip(f"SmolLM2 is not at hand: {str(error).splitlines()[0]}")
    found = to_metadata(load_tokenizer("smollm2"), 49152)
    assert len(found) == 8 and not {key for key in found if found[key] != published[key]}
