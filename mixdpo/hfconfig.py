"""config.json <-> GPT2Config | LlamaConfig, as transformers 4 and 5 write it.

What changes the function that the model computes is either read or, if this code does not compute it, refused by name. What does not
(dropout rates, initialisation, generation settings) is ignored. Written files suit both versions: a rope without scaling is told as 4 and 5
both read it, and so is Llama 3's.
"""

import json
from pathlib import Path

from mixdpo.config import InputError
from mixdpo.gpt2 import GPT2Config
from mixdpo.llama import LlamaConfig, RopeScaling

# Our field -> the key of config.json. A None default means that the key must be there.
GPT2_KEYS = {"vocab": "vocab_size", "context": "n_positions", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
             "eps": "layer_norm_epsilon"}
LLAMA_KEYS = {"vocab": "vocab_size", "context": "max_position_embeddings", "width": "hidden_size", "inner": "intermediate_size",
              "layers": "num_hidden_layers", "heads": "num_attention_heads", "eps": "rms_norm_eps"}

# Settings that would change the function: key -> the values that this code computes. An absent key means the first.
GPT2_ONLY = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,), "quantization_config": (None,)}
LLAMA_ONLY = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "rope_interleaved": (False,),
              "partial_rotary_factor": (1.0, None), "pretraining_tp": (1,), "sliding_window": (None,), "quantization_config": (None,)}

LLAMA3_KEYS = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "original": "original_max_position_embeddings"}


def config_from_json(path):
    """Reads config.json. Raises: InputError naming the file and the setting that is missing or not supported."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: is not there; a model directory holds config.json and *.safetensors")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: is not JSON ({error.msg}); fetch it again") from None
    kind = raw.get("model_type")
    if kind not in ("gpt2", "llama"):
        raise InputError(f'{path}: "model_type" is {kind!r}, wanted "gpt2" or "llama": other architectures are not built here')
    keys, only = (GPT2_KEYS, GPT2_ONLY) if kind == "gpt2" else (LLAMA_KEYS, LLAMA_ONLY)
    for key, accepted in only.items():
        _refuse_unless(raw.get(key, accepted[0]), accepted, key, path)
    missing = [key for key in keys.values() if key not in raw]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; use the config.json that came with the weights")
    fields = {field: raw[key] for field, key in keys.items()}
    eos = raw.get("eos_token_id")
    fields.update(bos=raw.get("bos_token_id"), eos=tuple(eos) if isinstance(eos, list) else eos)
    if kind == "gpt2":
        return GPT2Config(**fields, inner=raw.get("n_inner"), tied=raw.get("tie_word_embeddings", True))
    theta, scaling = _rope(raw, path)
    return LlamaConfig(**fields, kv_heads=raw.get("num_key_value_heads") or fields["heads"], head_dim=raw.get("head_dim"),
                       theta=theta, scaling=scaling, tied=raw.get("tie_word_embeddings", False))


def _refuse_unless(value, accepted, key, path):
    if value not in accepted:
        raise InputError(f'{path}: "{key}" is {value!r}, and only {" or ".join(map(repr, accepted))} is computed here; '
                         "use a model without this setting")


def _rope(raw, path):
    """-> theta, RopeScaling or None. transformers 4: rope_theta beside rope_scaling; 5: one dictionary rope_parameters."""
    old = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    old.update(raw.get("rope_scaling") or {})
    new = raw.get("rope_parameters") or {}
    differ = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if differ:
        raise InputError(f"{path}: rope_parameters and rope_theta / rope_scaling disagree in {', '.join(differ)}; remove the wrong one")
    rope = {**old, **new}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse_unless(kind, ("default", "llama3"), "rope_type", path)
    theta = float(rope.pop("rope_theta", 10000.0))      # transformers' own default, for files older than the key
    _refuse_unless(rope.pop("partial_rotary_factor", 1.0), (1.0,), "partial_rotary_factor", path)
    numbers = {key: value for key, value in rope.items() if key not in ("rope_type", "type")}
    wanted = set(LLAMA3_KEYS.values()) if kind == "llama3" else set()
    if set(numbers) != wanted:
        raise InputError(f"{path}: rope of type {kind!r} has the settings {sorted(numbers)}, wanted {sorted(wanted)}; "
                         "use the config.json that came with the weights")
    return theta, RopeScaling(**{field: numbers[key] for field, key in LLAMA3_KEYS.items()}) if kind == "llama3" else None


def config_to_json(config, dtype):
    """The dictionary to write as config.json. Dropout rates are written as 0: the model was never trained with any."""
    names = {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}     # transformers 5's key, and 4's
    special = {"bos_token_id": config.bos, "eos_token_id": list(config.eos) if isinstance(config.eos, tuple) else config.eos}
    common = {"tie_word_embeddings": config.tied, **special, **names}
    if isinstance(config, GPT2Config):
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **{key: getattr(config, f) for f, key in GPT2_KEYS.items()},
                "n_inner": config.inner, "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **common}
    rope = {"rope_type": "default"}
    if config.scaling is not None:
        rope = {"rope_type": "llama3", **{key: getattr(config.scaling, f) for f, key in LLAMA3_KEYS.items()}}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **{key: getattr(config, f) for f, key in LLAMA_KEYS.items()},
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "attention_dropout": 0.0, "rope_theta": config.theta, "rope_scaling": rope if config.scaling else None,
            "rope_parameters": {"rope_theta": config.theta, **rope}, **common}
