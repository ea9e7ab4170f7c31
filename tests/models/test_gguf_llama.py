"""GGUF files of Llama, Qwen2 and Qwen3 in every type of tensor, written here byte by byte from random blocks; the
numbers that a model must hold are recomputed one by one. Each docstring names the faults that the test was seen to fail
on.
"""

import struct

import numpy as np
import pytest
import torch
from raising import raises_at
from test_gguf import bf16, blocks, f16, gguf, q4_0, q4_1, q6_k, q8_0, string

from mixdpo.models.llama import LlamaConfig, RopeScaling, rope_frequencies
from mixdpo.models.weights import load_model

# Name -> GGUF's number, numbers a block, bytes a block, a block's numbers.
TYPES = {"Q4_0": (2, 32, 18, q4_0), "Q4_1": (3, 32, 20, q4_1), "Q8_0": (8, 32, 34, q8_0), "F16": (1, 1, 2, f16),
         "BF16": (30, 1, 2, bf16), "Q6_K": (14, 256, 210, q6_k)}
C, INNER, H, H_KV, D, V = 256, 32, 4, 2, 8, 3                               # C: a block of Q6_K


def f32(*numbers):
    return np.array(numbers, "<f4").tobytes()


def make(path, arch, kind, extra=(), **settings):
    """Writes a model of one block; -> {our name: the numbers of the file, rows in the file's order}."""
    number, per_block, size, dequantise = TYPES[kind]
    tensors, want = {}, {}

    def matrix(name, ours, rows, columns):
        data = blocks(len(tensors), rows * columns // per_block, size)
        tensors[name], want[ours] = ((columns, rows), number, data), dequantise(data).reshape(rows, columns)

    def vector(name, ours, length):
        values = np.random.default_rng(len(tensors)).normal(size=length).astype("<f4")
        tensors[name], want[ours] = ((length,), 0, values.tobytes()), values

    matrix("token_embd.weight", "embed_tokens.weight", V, C)
    vector("output_norm.weight", "norm.weight", C)
    block, layer = "blk.0.", "layers.0."
    vector(f"{block}attn_norm.weight", f"{layer}input_layernorm.weight", C)
    vector(f"{block}ffn_norm.weight", f"{layer}post_attention_layernorm.weight", C)
    for which, heads in (("q", H), ("k", H_KV), ("v", H_KV)):
        matrix(f"{block}attn_{which}.weight", f"{layer}self_attn.{which}_proj.weight", heads * D, C)
        if arch == "qwen2":
            vector(f"{block}attn_{which}.bias", f"{layer}self_attn.{which}_proj.bias", heads * D)
        if arch == "qwen3" and which != "v":
            vector(f"{block}attn_{which}_norm.weight", f"{layer}self_attn.{which}_norm.weight", D)
    matrix(f"{block}attn_output.weight", f"{layer}self_attn.o_proj.weight", C, H * D)
    matrix(f"{block}ffn_gate.weight", f"{layer}mlp.gate_proj.weight", INNER, C)
    matrix(f"{block}ffn_up.weight", f"{layer}mlp.up_proj.weight", INNER, C)
    matrix(f"{block}ffn_down.weight", f"{layer}mlp.down_proj.weight", C, INNER)
    numbers = {"context_length": 64, "embedding_length": C, "feed_forward_length": INNER, "block_count": 1,
               "attention.head_count": H, "attention.head_count_kv": H_KV, "attention.key_length": D} | settings
    metadata = {f"{arch}.{key}": (4, struct.pack("<I", value)) for key, value in numbers.items()}
    metadata |= {f"{arch}.{key}": (6, f32(value)) for key, value in
                 {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6}.items()}
    metadata["general.architecture"] = (8, string(arch))
    path.write_bytes(gguf(metadata, tensors | dict(extra)))
    return want


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_weights_and_configuration(arch, kind, tmp_path):
    """Faults: q and k of Qwen unpermuted, or Llama's not; a bias or a norm lost; head_dim = C / H; settings of Llama
    looked for in Qwen's file; a type dequantised as another."""
    want, model = make(tmp_path / "m.gguf", arch, kind), load_model(tmp_path / "m.gguf")
    assert model.config == LlamaConfig(
        vocab=V, context=64, width=C, inner=INNER, layers=1, heads=H, kv_heads=H_KV, head_dim=D, eps=1e-6, theta=1e6,
        qkv_bias=arch == "qwen2", qk_norm="head" if arch == "qwen3" else None, family=arch)
    got = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert got.keys() == want.keys()
    for name, numbers in want.items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            ours = np.empty_like(numbers)               # in the file the rows i and i + D/2 of a head are 2i and 2i + 1
            for row in range(len(numbers)):
                head, place = divmod(row, D)
                ours[head * D + place // 2 + place % 2 * D // 2] = numbers[row]
            numbers = ours
        np.testing.assert_allclose(got[name], numbers, rtol=1e-6, atol=1e-6, err_msg=name)


def test_llama_3s_scaling_of_rope(tmp_path):
    """llama.cpp stores a divisor for each frequency. Faults: an unknown tensor; multiplied for divided; divisors of
    another rule accepted; those of no rule, all 1, taken for a scaling."""
    want, path = RopeScaling(factor=32.0), tmp_path / "m.gguf"
    plain, scaled = (rope_frequencies(LlamaConfig(heads=H, kv_heads=H_KV, head_dim=D, theta=1e6, scaling=scaling))
                     for scaling in (None, want))
    divisors = plain / scaled
    assert len(set(divisors.tolist())) > 2              # kept, divided, and between
    make(path, "llama", "F16", {"rope_freqs.weight": ((D // 2,), 0, f32(*divisors))})
    config = load_model(path).config
    assert config.scaling == want
    torch.testing.assert_close(rope_frequencies(config), scaled)
    divisors[1] *= 1.01
    make(path, "llama", "F16", {"rope_freqs.weight": ((D // 2,), 0, f32(*divisors))})
    with raises_at("rope_freqs.weight", file=path):
        load_model(path)


@pytest.mark.parametrize("arch, settings, extra, named", [
    ("qwen2moe", {}, {}, ["qwen2moe", "qwen3"]), ("gemma3", {}, {}, ["gemma3"]),
    ("llama", {"expert_count": 8}, {}, ["llama.expert_count", 8]),
    ("qwen2", {}, {"rope_freqs.weight": ((4,), 0, f32(1, 1, 1, 1))}, ["unknown: rope_freqs.weight"]),
    ("qwen3", {}, {"blk.0.attn_q.bias": ((32,), 0, f32(*range(32)))}, ["unknown: layers.0.self_attn.q_proj.bias"]),
    ("llama", {}, {"blk.0.attn_q.bias": ((32,), 0, f32(*range(32)))}, ["unknown: layers.0.self_attn.q_proj.bias"])])
def test_other_files_are_refused(arch, settings, extra, named, tmp_path):
    """Faults: each of them read over."""
    make(tmp_path / "m.gguf", arch, "F16", extra, **settings)
    with raises_at(*named, file=tmp_path / "m.gguf"):
        load_model(tmp_path / "m.gguf")
