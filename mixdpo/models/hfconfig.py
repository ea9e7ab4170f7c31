"""config.json <-> GPT2Config | LlamaConfig, as transformers 4 and 5 write it: gpt2, llama, mistral, qwen2, qwen3,
smollm3, olmo2.

A setting that changes the function that a model computes is read; if this code does not support its value, that is an
error that names it. Other settings (dropout rates, initialisation, generation) are ignored. The config.json that is
written suits both versions: it has rope's base and scaling as version 4 reads them (rope_theta, rope_scaling) and as
version 5 does (rope_parameters).
"""

import json
import math
from dataclasses import dataclass

from mixdpo.config import InputError
from mixdpo.models.gpt2 import GPT2Config
from mixdpo.models.llama import LlamaConfig, RopeScaling

# Our field -> the key of config.json. All of these keys are required.
GPT2_KEYS = {"vocab": "vocab_size", "context": "n_positions", "width": "n_embd", "layers": "n_layer",
             "heads": "n_head", "eps": "layer_norm_epsilon"}
LLAMA_KEYS = {"vocab": "vocab_size", "context": "max_position_embeddings", "width": "hidden_size",
              "inner": "intermediate_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
              "eps": "rms_norm_eps"}
SCALING_KEYS = {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor",
                "original": "original_max_position_embeddings"}

# Upper limits on sizes: a damaged config.json must not exhaust the memory.
LIMITS = {"vocab": 2**22, "context": 2**24, "width": 2**16, "inner": 2**18, "layers": 2**10, "heads": 2**10,
          "kv_heads": 2**10, "head_dim": 2**12}

# Settings that change the function: key -> the supported values. If the key is absent, its value is the first.
GPT2_ONLY = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "quantization_config": (None,)}
LLAMA_ONLY = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
              "rope_interleaved": (False,), "partial_rotary_factor": (1.0, None),
              "use_sliding_window": (False, None), "use_mrope": (False, None), "dual_chunk_attention_config": (None,),
              "quantization_config": (None,)}


@dataclass(frozen=True)
class Family:
    """A relative of Llama by its model_type."""

    architecture: str   # transformers' class
    fields: dict        # the fields of LlamaConfig that differ from Llama's
    defaults: dict      # what transformers assumes for keys that config.json lacks, where it differs from Llama


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}, {}),
    "mistral": Family("MistralForCausalLM", {}, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, {"num_key_value_heads": 32}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": "head"}, {"num_key_value_heads": 32, "head_dim": 128}),
    "smollm3": Family("SmolLM3ForCausalLM", {}, {"num_key_value_heads": 4, "no_rope_layer_interval": 4,
                                                 "rope_theta": 2e6, "tie_word_embeddings": True}),
    "olmo2": Family("Olmo2ForCausalLM", {"qk_norm": "row", "post_norm": True}, {}),
}

# How a model_type that is not supported begins -> its name, and what it would need.
OTHERS = {
    "gemma": "Gemma: a scaled embedding, another MLP, and (from Gemma 2 on) sliding windows and more norms",
    "qwen3_5": "Qwen3.5: linear attention (gated delta rule) in most layers",
    "qwen3_next": "Qwen3-Next: linear attention (gated delta rule) in most layers, and a mixture of experts",
    "lfm2": "LFM2: short convolutions in place of attention in most layers",
    "olmo3": "OLMo 3: sliding windows in most layers",
    "phi": "Phi: fused projections",
    "gpt_oss": "gpt-oss: a mixture of experts, attention sinks and sliding windows",
    "mixtral": "Mixtral: a mixture of experts",
    "deepseek": "DeepSeek: a mixture of experts and latent attention",
}


def read_json(path):
    """The object in a JSON file. Raises: InputError, with the line, if the file is not JSON or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"is not JSON ({error.msg}); fetch it again", file=path, line=error.lineno) from None
    if not isinstance(value, dict):
        raise InputError(f"holds a {type(value).__name__}, wanted an object; fetch it again", file=path)
    return value


def checked(config, path):
    """The configuration itself. Raises: InputError on a size above LIMITS, and on a value that is not a number."""
    for field, most in LIMITS.items():
        value = getattr(config, field, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{field} is {value!r:.80}, wanted an integer from 1 to {most}; fetch it again",
                             file=path)
    scaling = vars(config.scaling) if getattr(config, "scaling", None) else {}
    for field, value in ({"eps": config.eps, "theta": getattr(config, "theta", 1.0)} | scaling).items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{field} is {value!r:.80}, wanted a number above 0; fetch it again", file=path)
    for value in (config.bos, *(config.eos if isinstance(config.eos, tuple) else (config.eos,))):
        if value is not None and type(value) is not int:
            raise InputError(f"bos_token_id or eos_token_id is {value!r:.80}, wanted an integer; fetch it again",
                             file=path)
    if config.tied is not None and type(config.tied) is not bool:           # "false" would count as true
        raise InputError(f"tie_word_embeddings is {config.tied!r:.80}, wanted true or false; fetch it again", file=path)
    return config


def config_from_json(path):
    """-> GPT2Config | LlamaConfig. Raises: InputError that names the file and the missing or unsupported setting."""
    if not path.is_file():
        raise InputError("no such file; wanted a model directory with config.json and *.safetensors", file=path)
    raw = read_json(path)
    family = raw.get("model_type")
    if family != "gpt2" and family not in FAMILIES:
        raise _other_family(str(family), path)
    keys, only = (GPT2_KEYS, GPT2_ONLY) if family == "gpt2" else (LLAMA_KEYS, LLAMA_ONLY)
    for key, accepted in only.items():
        _refuse_unless(raw.get(key, accepted[0]), accepted, key, path)
    missing = [key for key in keys.values() if key not in raw]
    if missing:
        raise InputError(f"lacks {', '.join(missing)}; use the config.json that came with the weights", file=path)
    eos = raw.get("eos_token_id")                       # an integer, a list of integers, or null
    common = {field: raw[key] for field, key in keys.items()}
    common.update(bos=raw.get("bos_token_id"), eos=tuple(eos) if isinstance(eos, list) else eos)
    try:
        if family == "gpt2":
            config = GPT2Config(inner=raw.get("n_inner"), tied=raw.get("tie_word_embeddings", True), **common)
        else:
            config = LlamaConfig(**common, **_llama_fields(raw, path))
        return checked(config, path)
    except AssertionError as error:                     # inconsistent sizes
        raise InputError(f"{error}; use the config.json that came with the weights", file=path) from None


def _llama_fields(raw, path):
    """The fields of LlamaConfig that are not in LLAMA_KEYS."""
    family = FAMILIES[raw["model_type"]]
    theta, scaling = _rope(raw, path, family.defaults.get("rope_theta", 10000.0))
    raw = family.defaults | raw
    kind, window, layers = raw["model_type"], raw.get("sliding_window"), raw["num_hidden_layers"]
    if kind == "mistral" and window is not None and window < raw["max_position_embeddings"]:
        raise InputError(f'"sliding_window" is {window}, less than the context of {raw["max_position_embeddings"]} '
                         "tokens, and sliding windows are not supported; use another model, for example a later "
                         "Mistral without a window", file=path)
    if kind == "llama":                                 # in the others it has no effect; SmolLM3-3B has it
        _refuse_unless(raw.get("pretraining_tp", 1), (1,), "pretraining_tp", path)
    if kind in ("llama", "olmo2"):                      # in the others it has no effect without use_sliding_window
        _refuse_unless(window, (None,), "sliding_window", path)
    for attention in raw.get("layer_types") or ():
        _refuse_unless(attention, ("full_attention",), "layer_types", path)
    no_rope = ()
    if kind == "smollm3":                               # 1: rope, 0: none
        every = raw["no_rope_layer_interval"]
        has_rope = raw.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(layers)]
        if len(has_rope) != layers or not set(has_rope) <= {0, 1}:
            raise InputError(f'"no_rope_layers" is {has_rope!r:.80}, wanted 0 or 1 for each of the {layers} layers; '
                             "use the config.json that came with the weights", file=path)
        no_rope = tuple(layer for layer, rope in enumerate(has_rope) if not rope)
    return dict(kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"], head_dim=raw.get("head_dim"),
                theta=theta, scaling=scaling, tied=raw.get("tie_word_embeddings", False), no_rope=no_rope,
                family=kind, **family.fields)


def _other_family(family, path):
    """The error for a model_type that is not supported."""
    name, _, needs = next((what for start, what in OTHERS.items() if family.startswith(start)), "").partition(": ")
    needs = needs or ("a mixture of experts" if "moe" in family else "")
    why = f"{f' ({name})' if name else ''}: it would need {needs}" if needs else ""
    return InputError(f'"model_type" is {family!r}, which is not supported{why}. Supported are gpt2, '
                      f"{', '.join(FAMILIES)}; use a model of one of these types", file=path)


def _refuse_unless(value, accepted, key, path):
    if value not in accepted:
        raise InputError(f'"{key}" is {value!r}, wanted {" or ".join(map(repr, accepted))}: other values are not '
                         "supported; use another model", file=path)


def _rope(raw, path, default):
    """-> theta, RopeScaling or None. transformers 4 has the keys rope_theta and rope_scaling, 5 rope_parameters.
    default: theta if no key has it."""
    old = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    old.update(raw.get("rope_scaling") or {})
    new = raw.get("rope_parameters") or {}
    differ = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if differ:
        raise InputError(f"rope_parameters differs from rope_theta or rope_scaling in {', '.join(differ)}; use the "
                         "config.json that came with the weights", file=path)
    rope = {**old, **new}
    kind = rope.pop("rope_type", rope.pop("type", "default"))       # "type" is the older name
    _refuse_unless(kind, ("default", "llama3"), "rope_type", path)
    _refuse_unless(rope.pop("partial_rotary_factor", 1.0), (1.0,), "partial_rotary_factor", path)
    theta = float(rope.pop("rope_theta", default))
    wanted = set(SCALING_KEYS.values()) if kind == "llama3" else set()
    if set(rope) != wanted:
        raise InputError(f"rope of type {kind!r} has the settings {sorted(rope)}, wanted {sorted(wanted)}; use the "
                         "config.json that came with the weights", file=path)
    return theta, RopeScaling(**{field: rope[key] for field, key in SCALING_KEYS.items()}) if kind == "llama3" else None


def config_to_json(config, dtype):
    """The dictionary to write as config.json. Dropout rates are 0, as in training."""
    name = str(dtype).removeprefix("torch.")
    common = {"tie_word_embeddings": config.tied, "bos_token_id": config.bos,
              "eos_token_id": list(config.eos) if isinstance(config.eos, tuple) else config.eos,
              "dtype": name, "torch_dtype": name}       # transformers 5's key, and 4's
    if isinstance(config, GPT2Config):
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                **{key: getattr(config, field) for field, key in GPT2_KEYS.items()}, "n_inner": config.inner,
                "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **common}
    scaling = None
    if config.scaling is not None:
        scaling = {"rope_type": "llama3", **{key: getattr(config.scaling, f) for f, key in SCALING_KEYS.items()}}
    more = {"llama": {"attention_bias": False, "mlp_bias": False}, "mistral": {"sliding_window": None},
            "qwen2": {"use_sliding_window": False, "sliding_window": None},
            "qwen3": {"use_sliding_window": False, "sliding_window": None, "attention_bias": False},
            "smollm3": {"use_sliding_window": False, "sliding_window": None, "attention_bias": False, "mlp_bias": False,
                        "no_rope_layers": [int(layer not in config.no_rope) for layer in range(config.layers)],
                        "pad_token_id": None},          # its default is 128004, an error in a smaller vocabulary
            "olmo2": {"attention_bias": False}}[config.family]
    return {"model_type": config.family, "architectures": [FAMILIES[config.family].architecture],
            **{key: getattr(config, field) for field, key in LLAMA_KEYS.items()},
            "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "hidden_act": "silu", **more,
            "attention_dropout": 0.0, "rope_theta": config.theta, "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": config.theta, **(scaling or {"rope_type": "default"})}, **common}
