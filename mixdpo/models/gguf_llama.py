"""GGUF files of Llama, Qwen2 and Qwen3: llama.cpp's metadata <-> LlamaConfig, and its tensors under our names.

For the architecture llama, llama.cpp permutes the rows of q and k: its rope rotates adjacent rows, while the published
checkpoints and llama.py rotate the rows i and i + D/2 of a head. This is undone here, and done for writing. For qwen2
and qwen3 it keeps the published order. A Mistral without a sliding window is a llama there. Llama 3's scaling of rope
is stored as a tensor, rope_freqs: the divisor of each frequency.
"""

import dataclasses
import re

import torch

from mixdpo.config import InputError
from mixdpo.models.gguf import read_gguf
from mixdpo.models.hfconfig import FAMILIES, checked
from mixdpo.models.llama import Llama, LlamaConfig, RopeScaling, rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
WRITTEN = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}        # family -> architecture

# Settings that change the function, after the name of the architecture: key -> the only supported value, which is the
# value of an absent key too.
ONLY = {"rope.scaling.type": "none", "expert_count": 0}

# GGUF's names of tensors -> ours: outside of blocks, and within block N ("blk.N." -> "layers.N.").
TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}
ROPE = "rope_freqs.weight"


def open_llama(path):
    """-> LlamaConfig, {our name: (the file's name, shape, function that reads it as a float32 tensor)}.
    Raises: InputError."""
    meta, raw = read_gguf(path)
    kind = meta.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise InputError(f"its architecture is {kind!r}, wanted {', '.join(ARCHITECTURES)}; give the model's Hugging "
                         "Face directory instead", file=path)
    for key, only in ONLY.items():
        if meta.get(f"{kind}.{key}", only) != only:
            raise InputError(f"{kind}.{key} is {meta[f'{kind}.{key}']!r}, which is not supported, wanted {only!r}; use "
                             "another model", file=path)
    size = {key.removeprefix(f"{kind}."): value for key, value in meta.items()}
    heads = size["attention.head_count"]
    config = LlamaConfig(
        vocab=raw["token_embd.weight"].shape[0], context=size["context_length"], width=size["embedding_length"],
        inner=size["feed_forward_length"], layers=size["block_count"], heads=heads,
        kv_heads=size.get("attention.head_count_kv", heads), head_dim=size.get("attention.key_length"),
        # In fp32, 1e-5 is 9.99999975e-06; rounding to six digits restores the intended number.
        eps=float(f"{size['attention.layer_norm_rms_epsilon']:.6g}"), theta=size.get("rope.freq_base", 10000.0),
        tied="output.weight" not in raw, bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=meta.get("tokenizer.ggml.eos_token_id"), family=kind, **FAMILIES[kind].fields)
    checked(config, path)
    if ROPE in raw and kind == "llama":
        config = with_scaling(config, torch.from_numpy(raw.pop(ROPE).float32()), path)
    permuted = config.head_dim if kind == "llama" else 0
    return config, {our_name(name): (name, tensor.shape, reader(tensor, permuted if is_q_or_k(name) else 0))
                    for name, tensor in raw.items()}


def our_name(name):
    """"blk.3.attn_q.weight" -> "layers.3.self_attn.q_proj.weight". Unknown parts stay as they are."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block:
        return f"layers.{block[1]}.{BLOCK.get(block[2], block[2])}.{block[3]}"
    return TOP.get(name.removesuffix(".weight"), name.removesuffix(".weight")) + ".weight"


def is_q_or_k(name):
    return name.endswith(("attn_q.weight", "attn_k.weight"))


def reader(tensor, head_dim):
    """The function that reads a GGUFTensor. head_dim: that of q or k with permuted rows, otherwise 0."""
    def read():
        weight = torch.from_numpy(tensor.float32())
        return unpermute(weight, head_dim) if head_dim else weight
    return read


def unpermute(weight, head_dim):
    """The rows of q or k, (H * D, C), from llama.cpp's order to the checkpoints'. Without this step the perplexity is
    many times as high."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def with_scaling(config, divisors, path):
    """The configuration with the RopeScaling that gives these divisors of the frequencies, (D/2,). Of its four numbers
    only the factor differs between published models, and it is the largest divisor. Raises: InputError if another rule
    made the divisors."""
    scaled = dataclasses.replace(config, scaling=RopeScaling(round(divisors.max().item(), 3)))
    want = rope_frequencies(config) / rope_frequencies(scaled)
    if divisors.shape != want.shape or not torch.allclose(divisors, want, rtol=1e-4):
        raise InputError(f"{ROPE} does not follow Llama 3's rule, and other scalings of rope are not supported; use "
                         "another model", file=path)
    return scaled


# --- writing ----------------------------------------------------------------------------------------------------------


def architecture_of(model) -> str:
    """llama.cpp's architecture for a model. Raises: InputError if its family cannot be written."""
    family = model.config.family if isinstance(model, Llama) else "gpt2"
    scaled = family != "llama" and getattr(model.config, "scaling", None) is not None
    if family not in WRITTEN or scaled:
        raise InputError(f"got gguf for a model of the family {family}{' with a scaled rope' * scaled}, wanted one of "
                         f"{', '.join(WRITTEN)} (scaled: llama only); use hf, and convert each expert with llama.cpp's "
                         "convert_hf_to_gguf.py", option="format")
    return WRITTEN[family]


def gguf_of(model, unembedding=None):
    """-> metadata, {llama.cpp's name: (shape, function that reads it as a float32 tensor)}, for write_gguf.
    unembedding: None, or an expert's (V, C) in place of the model's; the file is then untied. Raises: InputError."""
    kind, c = architecture_of(model), model.config
    sizes = {"vocab_size": c.vocab, "context_length": c.context, "embedding_length": c.width, "block_count": c.layers,
             "feed_forward_length": c.inner, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
             "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
             "rope.dimension_count": c.head_dim, "rope.freq_base": float(c.theta),
             "attention.layer_norm_rms_epsilon": float(c.eps)}
    metadata = {"general.architecture": kind} | {f"{kind}.{name}": number for name, number in sizes.items()}
    parameters = dict(model.named_parameters())
    if unembedding is not None and unembedding is not model.unembedding:
        parameters["lm_head.weight"] = unembedding
    tensors = {}
    for name, p in parameters.items():
        theirs = llama_cpp_name(name)
        permuted = c.head_dim if kind == "llama" and is_q_or_k(theirs) else 0
        tensors[theirs] = tuple(p.shape), lambda p=p, permuted=permuted: permute(p, permuted) if permuted else p
    if c.scaling is not None:
        divisors = rope_frequencies(dataclasses.replace(c, scaling=None)) / rope_frequencies(c)         # (D/2,)
        tensors[ROPE] = tuple(divisors.shape), lambda: divisors
    return metadata, tensors


def llama_cpp_name(name):
    """The inverse of our_name."""
    top, block = ({ours: theirs for theirs, ours in names.items()} for names in (TOP, BLOCK))
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{block[layer[2]]}.{layer[3]}"
    return top[name.removesuffix(".weight")] + ".weight"


def permute(weight, head_dim):
    """The inverse of unpermute."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)
