"""Weights in and out: Hugging Face directories (config.json and *.safetensors, sharded or not) and GGUF files <-> GPT2 | Llama.

    load_model("smollm2" | "gpt2" | "llama-3.2-1b" | directory | file.gguf)        -> model, eval mode
    save_model(model, directory)                  -> config.json, model.safetensors: transformers' from_pretrained opens it
    content_key(model)                            -> a name for exactly these weights

The quirks of the published formats live here and nowhere else. Loading is strict: a tensor that is missing, unknown or misshapen, and a setting of
config.json that this code does not compute, is an error that names it. Only safetensors and GGUF are read: they hold numbers and cannot run code,
as pickled files (.bin, .pt, .pth) can. Tensors are read one at a time, so loading needs the model's own memory and one tensor more.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mixdpo.config import InputError
from mixdpo.gguf import read_gguf
from mixdpo.gpt2 import GPT2, GPT2Config
from mixdpo.hfconfig import config_from_json, config_to_json
from mixdpo.llama import Llama, LlamaConfig

MODELS = {GPT2Config: GPT2, LlamaConfig: Llama}

# GPT-2's checkpoints hold these as (in, out), the layout of its "Conv1D"; nn.Linear is (out, in). No other tensor is transposed.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# What transformers puts before the names of a model with an unembedding; the hub's own gpt2 file has none.
PREFIX = {GPT2: "transformer.", Llama: "model."}

# Constants that old versions of transformers saved among the weights: causal masks and rope frequencies. They are skipped.
BUFFERS = {GPT2: (".attn.bias", ".attn.masked_bias"), Llama: (".rotary_emb.inv_freq",)}

# GGUF's names -> ours, for Llama.
GGUF_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
GGUF_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

LLAMA_REMEDY = ("its weights are given out by Meta after a registration: `huggingface-cli download meta-llama/Llama-3.2-1B --local-dir "
                "FOLDER/llama-3.2-1b`, then DATA=FOLDER, or give that directory as the model")


@dataclass(frozen=True)
class Stored:
    """A tensor that still lies in its file: its shape, and the function that reads it."""

    shape: tuple
    read: Callable[[], torch.Tensor]


def load_model(name, dtype=None, device=None, data=None):
    """-> GPT2 | Llama in eval mode, its parameters requiring gradients. dtype None: fp32, whatever the file holds.

    name: "smollm2" (fetched), "gpt2" (fetched), "llama-3.2-1b", a Hugging Face directory, or a .gguf file.
    data: a local folder that is looked into before anything is fetched; a directory `name` with a config.json in it counts.
    Raises: InputError naming the file and what is wrong with it.
    """

    path = Path(name)
    if data is not None and (Path(data) / name / "config.json").is_file():
        path = Path(data) / name
    elif name == "smollm2":
        from mixdpo.fetch import asset
        path = asset("smollm2", data)
    elif name == "gpt2":
        from mixdpo.fetch import asset
        path = asset("gpt2", data)
        return _build(GPT2Config(bos=50256, eos=50256), _open_safetensors([path]), path, dtype, device)
    elif name == "llama-3.2-1b":
        raise InputError(f"llama-3.2-1b: {LLAMA_REMEDY}")
    if path.suffix == ".gguf" and path.is_file():
        config, tensors = _open_gguf(path)
    elif path.is_dir():
        config, tensors = config_from_json(path / "config.json"), _open_safetensors(_weight_files(path))
    else:
        raise InputError(f"{name}: is no directory, no .gguf file and none of the known models gpt2, smollm2, llama-3.2-1b")
    return _build(config, tensors, path, dtype, device)


def _build(config, tensors, where, dtype, device):
    """The model of `config`, each parameter read from `tensors` (file's names -> Stored)."""
    with torch.device("meta"):                          # shapes only: nothing is allocated or initialised
        model = MODELS[type(config)](config)
    tensors = _our_names(type(model), tensors, where)
    if config.tied and "lm_head.weight" in tensors:     # older files repeat the embedding under this name
        embedding = next(tensors[n] for n in ("wte.weight", "embed_tokens.weight") if n in tensors)
        if not torch.equal(tensors.pop("lm_head.weight").read(), embedding.read()):
            raise InputError(f"{where}: config.json ties the unembedding to the embedding, but lm_head.weight is another matrix; "
                             'set "tie_word_embeddings": false to use it, or remove it')
    parameters = dict(model.named_parameters())
    _check_tensors({n: tuple(p.shape) for n, p in parameters.items()}, {n: tuple(t.shape) for n, t in tensors.items()}, where)
    # copy=True: a parameter never points into the mapped file, which may be replaced or lie unaligned.
    state = {n: tensors[n].read().to(device=device, dtype=dtype or torch.float32, copy=True,
                                     memory_format=torch.contiguous_format) for n in parameters}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _our_names(family, tensors, where):
    """The file's names and layouts -> ours: prefix off, constant buffers out, GPT-2's four weights transposed."""
    ours = {}
    for name, stored in tensors.items():
        name = name.removeprefix(PREFIX[family])
        if name.endswith(BUFFERS[family]):
            continue
        if name in ours:
            raise InputError(f"{where}: holds {name} twice, with and without {PREFIX[family]!r} before it or in two shards; remove one")
        if family is GPT2 and name.endswith(TRANSPOSED):
            stored = Stored(tuple(stored.shape)[::-1], lambda read=stored.read: read().t())
        ours[name] = stored
    return ours


def _check_tensors(want, got, where):
    """want, got: name -> shape. Raises InputError that names every difference (the first eight of a kind)."""
    faults = {
        "missing": sorted(want.keys() - got.keys()),
        "unknown": sorted(got.keys() - want.keys()),
        "misshapen": [f"{n} is {got[n]}, wanted {want[n]}" for n in sorted(want.keys() & got.keys()) if got[n] != want[n]],
    }
    if any(faults.values()):
        parts = [f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
                 for kind, names in faults.items() if names]
        raise InputError(f"{where}: its tensors are not those of its configuration; {'; '.join(parts)}. "
                         "Use the config.json that came with these weights")


def _weight_files(directory):
    """The safetensors files of a Hugging Face directory: the single one, or the shards that the index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for shard in names:
            if Path(shard).name != shard or not (directory / shard).is_file():
                raise InputError(f"{index}: names the shard {shard!r}, which is not in {directory}; fetch the directory again, whole")
        return [directory / shard for shard in names]
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise InputError(f"{directory}: its weights are pickled ({', '.join(pickled)}), and opening a pickle can run any code. Convert where you "
                         "trust it: transformers' AutoModelForCausalLM.from_pretrained(A).save_pretrained(B) writes safetensors")
    raise InputError(f"{directory}: holds neither model.safetensors nor model.safetensors.index.json; fetch the directory again, whole")


def _open_safetensors(files):
    """-> name -> Stored over all files. Each is mapped, and its header checked against its size: a pickle or a truncated file is refused."""
    tensors = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except SafetensorError as error:
            raise InputError(f"{file}: is not a whole safetensors file ({error}); fetch or convert it again") from None
        for name in handle.keys():
            part = handle.get_slice(name)
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                if name.endswith(BUFFERS[GPT2]):        # some were saved as bool or uint8
                    continue
                raise InputError(f"{file}: {name} is stored as {part.get_dtype()}, wanted plain floating point; quantised weights are not read")
            if name in tensors:
                raise InputError(f"{file}: holds {name}, which another shard holds as well; remove the files that the index does not name")
            tensors[name] = Stored(tuple(part.get_shape()), lambda handle=handle, name=name: handle.get_tensor(name))
    return tensors


def _open_gguf(path):
    """-> LlamaConfig, name -> Stored, from the file's own metadata."""
    meta, raw = read_gguf(path)
    if meta.get("general.architecture") != "llama" or meta.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"{path}: architecture {meta.get('general.architecture')!r}, rope scaling {meta.get('llama.rope.scaling.type')!r}; "
                         "of GGUF files only plain 'llama' ones are read. Give the model's Hugging Face directory instead")
    head_dim = meta.get("llama.attention.key_length", meta["llama.embedding_length"] // meta["llama.attention.head_count"])
    config = LlamaConfig(
        vocab=len(meta["tokenizer.ggml.tokens"]), context=meta["llama.context_length"], width=meta["llama.embedding_length"],
        inner=meta["llama.feed_forward_length"], layers=meta["llama.block_count"], heads=meta["llama.attention.head_count"],
        kv_heads=meta.get("llama.attention.head_count_kv", meta["llama.attention.head_count"]), head_dim=head_dim,
        # The file's fp32 of 1e-5 is 9.99999974e-06: the decimal number that was meant is the one that config.json has.
        eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"), theta=meta.get("llama.rope.freq_base", 10000.0),
        tied="output.weight" not in raw, bos=meta.get("tokenizer.ggml.bos_token_id"), eos=meta.get("tokenizer.ggml.eos_token_id"))
    tensors = {}
    for name, tensor in raw.items():
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if block and block[2] in GGUF_BLOCK:
            ours = f"layers.{block[1]}.{GGUF_BLOCK[block[2]]}.weight"
        else:
            ours = GGUF_TOP[name.removesuffix(".weight")] + ".weight" if name.removesuffix(".weight") in GGUF_TOP else name
        permuted = ours.endswith(("q_proj.weight", "k_proj.weight"))
        tensors[ours] = Stored(tensor.shape, lambda t=tensor, p=permuted: _unpermute(torch.from_numpy(t.float32()), head_dim, p))
    return config, tensors


def _unpermute(weight, head_dim, permuted):
    """GGUF puts the two numbers that rope turns together side by side; ours, as the checkpoints', are D/2 apart. Rows of each head go back."""
    if not permuted:
        return weight
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def save_model(model, directory, unembedding=None):
    """Writes config.json and model.safetensors. Each is written under another name and renamed, so neither is ever half there.

    unembedding: an expert's own (V, C), saved in the place of the model's; the saved model is then an untied one.
    """
    config, tensors = model.config, {n: p.detach() for n, p in model.named_parameters()}
    if unembedding is not None:
        assert unembedding.shape == model.unembedding.shape, f"got {tuple(unembedding.shape)}, want {tuple(model.unembedding.shape)}"
        config, tensors["lm_head.weight"] = dataclasses.replace(config, tied=False), unembedding.detach()
    family = type(model)
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.t() if family is GPT2 and name.endswith(TRANSPOSED) else tensor
        out[name if name.startswith("lm_head") else PREFIX[family] + name] = tensor.contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights, text = directory / "model.safetensors.part", directory / "config.json.part"
    save_file(out, weights, metadata={"format": "pt"})
    text.write_text(json.dumps(config_to_json(config, model.unembedding.dtype), indent=2) + "\n")
    os.replace(weights, directory / "model.safetensors")
    os.replace(text, directory / "config.json")


def content_key(model):
    """sha256 (hex) over the configuration and every parameter's name, dtype, shape and bytes: equal if and only if the models are."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, dataclasses.asdict(model.config)], sort_keys=True).encode())
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
