"""Saves and loads adapters in the layout of Hugging Face's PEFT library, which applies them to transformers' models.

    adapter_config.json         rank R, lora_alpha = SCALE R, the names of the projections, the base model
    adapter_model.safetensors   base_model.model.PATH.lora_A.weight (R,in) and .lora_B.weight (out,R) of each projection

PATH is the projection's name in transformers' model: transformer.h.0.attn.c_attn, model.layers.0.self_attn.q_proj.
There GPT-2's projections are a Conv1D with W (in,out); fan_in_fan_out marks this, and the factors need no change. PEFT
itself is not imported. Left out: everything but plain LoRA (DoRA, rank-stabilised scaling, ranks or alphas that differ
between layers).
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mixdpo.config import InputError
from mixdpo.experts import Adapters
from mixdpo.models.gpt2 import GPT2
from mixdpo.models.hfconfig import read_json
from mixdpo.models.lora import SCALE
from mixdpo.models.weights import PREFIX, write_pair

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings that change the function: key -> the only value that is supported. An absent key means this value too.
ONLY = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "alpha_pattern": {}}


def factors(experts: Adapters, k: int) -> dict[str, torch.Tensor]:
    """PEFT's names -> expert k's A (R,in) and B (out,R): views of its factors, or, if there is a shared adapter, copies
    that hold all of them (S+K*R ranks)."""
    out: dict[str, torch.Tensor] = {}
    for path in experts.targets:
        name, (A, B) = f"base_model.model.{PREFIX[type(experts.trunk)]}{path}", experts.adapted(path).of_expert(k)
        out |= {f"{name}.lora_A.weight": A.detach(), f"{name}.lora_B.weight": B.detach()}
    return out


def full_rank(experts: Adapters) -> int:
    """The rank of an expert's adapter: that of its own factors or, if there is a shared adapter, of all of them."""
    return experts.shared + experts.rank * experts.K if experts.shared else experts.rank


def save_adapter(experts: Adapters, k: int, directory, base: str) -> None:
    """Writes expert k as a PEFT adapter; an interruption leaves no partial file. base: the base model, a directory or a
    name on the hub, as transformers' from_pretrained takes it."""
    rank = full_rank(experts)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": int(SCALE * rank), "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in experts.targets}),
        "fan_in_fan_out": isinstance(experts.trunk, GPT2),
    }
    write_pair(directory, WEIGHTS, factors(experts, k), SETTINGS, settings)


@torch.no_grad()
def load_adapter(experts: Adapters, k: int, directory) -> None:
    """Copies a PEFT adapter into expert k: the inverse of save_adapter, exact to the bit. If its alpha is not SCALE R,
    B is scaled to compensate. Raises: InputError naming the file and what does not fit; nothing is copied then.
    The experts must have no shared adapter: an adapter's file does not say which part of it is shared."""
    assert not experts.shared, f"got experts with a shared adapter of rank {experts.shared}, want none"
    settings, weights = Path(directory) / SETTINGS, Path(directory) / WEIGHTS
    for path in (settings, weights):
        if not path.is_file():
            raise InputError(f"no such file; an adapter's directory holds {SETTINGS} and {WEIGHTS}", file=path)
    raw = read_json(settings)
    for key, value in ONLY.items():
        if raw.get(key, value) != value:
            raise InputError(f"{key} is {raw[key]!r}, wanted {value!r}; use a plain LoRA adapter", file=settings)
    if not raw.get("r") or not raw.get("lora_alpha"):
        raise InputError(f"r is {raw.get('r')!r} and lora_alpha {raw.get('lora_alpha')!r}, wanted two numbers; get "
                         "the file again", file=settings)
    try:
        found = load_file(weights)
    except SafetensorError as error:
        raise InputError(f"is not a complete safetensors file ({error}); get it again", file=weights) from None
    own = factors(experts, k)
    want, got = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, found))
    wrong = [f"{name}: got {got.get(name, 'none')}, wanted {want.get(name, 'none')}"
             for name in sorted(want | got) if got.get(name) != want.get(name)]
    if wrong:
        more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{'; '.join(wrong[:8])}{more}. Load it into experts with the adapter's base, rank {raw['r']} "
                         f"and targets {raw.get('target_modules')}", file=weights)
    gain = raw["lora_alpha"] / raw["r"] / SCALE
    for name, tensor in own.items():
        tensor.copy_(found[name] * gain if name.endswith("lora_B.weight") else found[name])
