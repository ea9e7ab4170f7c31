"""Loads and saves weights: Hugging Face directories and GGUF files <-> GPT2 | Llama.

    load_model("smollm2" | "gpt2" | "llama-3.2-1b" | hub name | directory | file.gguf)      -> model, in eval mode
    save_model(model, directory)          writes config.json, model.safetensors; transformers' from_pretrained opens it
    content_key(model)                    -> sha256 of configuration and weights

The special cases of the published formats are handled here, and those of config.json in hfconfig.py. Loading is strict:
a missing or unknown tensor, or a wrong shape, is an error that names the tensor. Only safetensors and GGUF are read:
they hold numbers and cannot run code, as pickled files (.bin, .pt, .pth) can. Files are mapped and tensors read one at
a time, so loading needs the model's own memory plus one tensor.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open

from mixdpo.config import InputError, reading
from mixdpo.files import fetch, hub
from mixdpo.files.atomic import replacing, save_tensors
from mixdpo.models.gguf_llama import open_llama
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.hfconfig import config_from_json, config_to_json, read_json
from mixdpo.models.llama import Llama, LlamaConfig

MODELS: dict[type, type[GPT2 | Llama]] = {GPT2Config: GPT2, LlamaConfig: Llama}

# GPT-2's checkpoints hold these as (in, out), the layout of its "Conv1D"; nn.Linear is (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# The prefix of names in transformers' models with an unembedding. The hub's own gpt2 file has no prefix.
PREFIX = {GPT2: "transformer.", Llama: "model."}

# Constants that old versions of transformers saved with the weights: causal masks and rope frequencies. Skipped.
BUFFERS = {GPT2: (".attn.bias", ".attn.masked_bias"), Llama: (".rotary_emb.inv_freq",)}

# Fields of LlamaConfig that content_key reads only where they are in use, because keys of earlier runs lack them.
LATER = ("qkv_bias", "qk_norm", "post_norm", "no_rope")

PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file: its shape, and the function that reads it."""

    shape: tuple
    read: Callable[[], torch.Tensor]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_model(name, dtype=None, device=None, data=None):
    """-> GPT2 | Llama in eval mode; its parameters require gradients. dtype None: fp32, for every dtype of the file.

    name: "smollm2" or "gpt2" (both fetched), "llama-3.2-1b", a model on the hub (OWNER/NAME, see files/hub.py), a
    Hugging Face directory or one of its cache, or a .gguf file.
    data: a local folder that is searched before anything is fetched; it may hold a model directory `name`.
    Raises: InputError with the file and its fault, for example a tensor that contains NaN or an infinity.
    """
    return _build(*_open(name, data), dtype, device)


def config_of(name, data=None):
    """-> GPT2Config | LlamaConfig of the model that load_model(name, data=data) loads. No weights are read."""
    return _open(name, data)[0]


def _open(name, data):
    """-> configuration, {name: Stored}, Path of the model."""
    path = locate(name, data)
    with reading(path):
        return _open_path(name, path)


def _open_path(name, path):
    if name == "gpt2" and path.is_file():               # the hub's file of weights; its configuration is known
        return GPT2Config(bos=50256, eos=50256), _open_safetensors([path]), path
    if path.is_dir():
        return config_from_json(path / "config.json"), _open_safetensors(weight_files(path)), path
    if path.is_file() and path.suffix == ".gguf":
        return *_open_gguf(path), path
    if path.suffix in PICKLED:
        raise _pickle_error(path)
    raise InputError("no such model; wanted smollm2, gpt2, llama-3.2-1b, a name on the hub (OWNER/NAME), a directory "
                     "with config.json and *.safetensors, or a .gguf file", file=name)


def locate(name, data=None):
    """-> Path of the Hugging Face directory or file that load_model(name, data=data) reads. The file may be fetched."""
    if data is not None and (Path(data) / name / "config.json").is_file():
        return Path(data) / name
    if name == "llama-3.2-1b":
        return fetch.directory(name, data)
    return fetch.asset(name, data) if name in ("smollm2", "gpt2") else hub.resolve(name, data)


def _build(config, tensors, where, dtype, device):
    """The model of `config`, with parameters read from `tensors` (the file's names -> Stored). where: the file or
    directory, for errors."""
    with torch.device("meta"):                          # shapes only: nothing is allocated or initialised
        model = MODELS[type(config)](config)
    tensors = _our_names(type(model), tensors, where)
    parameters = dict(model.named_parameters())
    if config.tied and "lm_head.weight" in tensors:     # many files repeat the embedding under this name
        head = tensors.pop("lm_head.weight").read()
        embedding = next(name for name, p in parameters.items() if p is model.unembedding)
        if embedding in tensors and not torch.equal(head, tensors[embedding].read()):
            raise InputError("config.json ties the unembedding to the embedding, but lm_head.weight differs from it; "
                             'set "tie_word_embeddings": false in config.json to use lm_head.weight', file=where)
    _check_tensors({n: tuple(p.shape) for n, p in parameters.items()}, {n: t.shape for n, t in tensors.items()}, where)
    dtype = dtype or torch.float32
    state = {name: tensors[name].read().to(device=device, dtype=dtype).contiguous() for name in parameters}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _our_names(family, tensors, where):
    """The file's names and layouts -> ours: no prefix, no constant buffers, GPT-2's four weights transposed."""
    ours = {}
    for name, stored in tensors.items():
        name = name.removeprefix(PREFIX[family])
        if name.endswith(BUFFERS[family]):
            continue
        if name in ours:
            raise InputError(f"has {name} twice, with and without the prefix {PREFIX[family]!r}; remove one",
                             file=where)
        if family is GPT2 and name.endswith(TRANSPOSED):
            stored = Stored(stored.shape[::-1], lambda read=stored.read: read().t())
        ours[name] = stored
    return ours


def _check_tensors(want, got, where):
    """want, got: name -> shape. Raises: InputError that names the first eight differences of each kind."""
    both = sorted(want.keys() & got.keys())
    faults = {
        "missing": sorted(want.keys() - got.keys()),
        "unknown": sorted(got.keys() - want.keys()),
        "wrong shape": [f"{n} is {got[n]}, wanted {want[n]}" for n in both if got[n] != want[n]],
    }
    parts = [f"{kind}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
             for kind, names in faults.items() if names]
    if parts:
        raise InputError(f"its tensors do not match its configuration; {'; '.join(parts)}. Use weights and "
                         "config.json of the same model", file=where)


# --- safetensors ------------------------------------------------------------------------------------------------------


def weight_files(directory):
    """The safetensors files of a Hugging Face directory: the single file, or the shards in the index."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard or not (directory / shard).is_file():
                raise InputError(f"lists the shard {shard!r}, which is not in {directory}; fetch it again", file=index)
        return [directory / shard for shard in shards]
    pickled = sorted(p for p in directory.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise _pickle_error(pickled[0])
    raise InputError("has neither model.safetensors nor model.safetensors.index.json; fetch it again", file=directory)


def _pickle_error(path):
    return InputError("is a pickled file; it is not read, because opening it can run any code. If you trust it, "
                      "convert it: transformers' AutoModelForCausalLM.from_pretrained(A).save_pretrained(B)", file=path)


def _open_safetensors(files):
    """-> {name: Stored} of all files. Raises: InputError if a file is truncated, pickled or quantised."""
    tensors = {}
    for file in files:
        try:
            handle = safe_open(file, "pt")
        except SafetensorError as error:
            raise InputError(f"is not a complete safetensors file ({error}); fetch or convert it again",
                             file=file) from None
        for name in handle.keys():
            part = handle.get_slice(name)
            if part.get_dtype() not in ("F64", "F32", "F16", "BF16") and not name.endswith(BUFFERS[GPT2]):
                raise InputError(f"{name} is stored as {part.get_dtype()}, wanted floating point; use weights that are "
                                 "not quantised", file=file)
            if name in tensors:
                raise InputError(f"has {name}, which another shard has too; fetch the directory again", file=file)
            # clone: get_tensor points into the mapped file, which may be rewritten and may be unaligned.
            read = lambda file=file, handle=handle, name=name: finite(handle.get_tensor(name), file, name).clone()
            tensors[name] = Stored(tuple(part.get_shape()), read)
    return tensors


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _open_gguf(path):
    """-> LlamaConfig, {our name: Stored}. Raises: InputError."""
    config, tensors = open_llama(path)
    return config, {name: Stored(shape, lambda read=read, own=own: finite(read(), path, own))
                    for name, (own, shape, read) in tensors.items()}


def finite(tensor, file, name):
    """The tensor itself. Raises: InputError if it contains NaN or an infinity, which would spread to all later numbers.
    One pass without a copy: aminmax returns NaN if there is any."""
    ends = torch.aminmax(tensor) if tensor.numel() else ()
    if not all(end.isfinite() for end in ends):
        bad = int((~tensor.isfinite()).sum())
        raise InputError(f"the tensor {name} holds {bad} values that are NaN or infinite, wanted finite numbers; fetch "
                         "the file again, or choose another model", file=file)
    return tensor


# --- saving, identity -------------------------------------------------------------------------------------------------


def save_model(model, directory, unembedding=None):
    """Writes config.json and model.safetensors, both atomically. Raises: OSError.

    unembedding: None, or an expert's (V, C), which is saved in place of the model's; the saved model is then untied.
    """
    family, config = type(model), model.config
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if unembedding is not None and unembedding is not model.unembedding:
        want = tuple(model.unembedding.shape)
        assert tuple(unembedding.shape) == want, f"got an unembedding {tuple(unembedding.shape)}, want {want}"
        config, tensors["lm_head.weight"] = dataclasses.replace(config, tied=False), unembedding.detach()
    out = {}
    for name, tensor in tensors.items():
        prefix = "" if name == "lm_head.weight" else PREFIX[family]
        transposed = family is GPT2 and name.endswith(TRANSPOSED)
        out[prefix + name] = (tensor.t() if transposed else tensor).contiguous()
    write_pair(directory, "model.safetensors", out, "config.json", config_to_json(config, model.unembedding.dtype))


def write_pair(directory, weights, tensors, settings, document):
    """Writes the files directory/weights (safetensors) and directory/settings (JSON), both atomically.

    Both are complete before the first gets its name: a failed write changes neither. Raises: OSError."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / settings) as settings_part, replacing(directory / weights) as weights_part:
        save_tensors(weights_part, tensors, {"format": "pt"})
        settings_part.write_text(json.dumps(document, indent=2) + "\n")


def content_key(model):
    """sha256 (hex) of the configuration and of every parameter's name, dtype, shape and bytes, sorted by name."""
    settings = {key: value for key, value in dataclasses.asdict(model.config).items() if key not in LATER or value}
    config = [type(model).__name__, {key: value for key, value in settings.items() if key != "family"}]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
