"""Exported experts beside Hugging Face's own readers, live: adapters in PEFT on a transformers base, heads and models
in transformers. The docstring of each test names faults that it was seen to fail on.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from mixdpo.evaluation.export import export_experts
from mixdpo.evaluation.peft import load_adapter, save_adapter
from mixdpo.experts import Adapters, make_experts
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.weights import load_model, save_model
from mixdpo.text.tokenizer import load_tokenizer
from tests import tinyjob
from train import TrainConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")

VOCAB = 257
RELATIVE = dict(vocab=VOCAB, context=96, width=48, inner=70, layers=2, heads=6, kv_heads=2, theta=700.0)
OURS = {
    "gpt2": lambda: GPT2(GPT2Config(vocab=VOCAB, context=64, width=60, layers=3, heads=5, eos=256)),
    "llama": lambda: Llama(LlamaConfig(vocab=VOCAB, context=96, width=48, inner=101, layers=3, heads=6, kv_heads=2)),
    "untied": lambda: Llama(LlamaConfig(vocab=VOCAB, context=96, width=40, inner=70, layers=2, heads=4, kv_heads=4,
                                        tied=False)),
    "qwen2": lambda: Llama(LlamaConfig(**RELATIVE, family="qwen2", qkv_bias=True)),
    "qwen3": lambda: Llama(LlamaConfig(**RELATIVE, family="qwen3", qk_norm="head", head_dim=14, tied=False)),
    "mistral": lambda: Llama(LlamaConfig(**RELATIVE, family="mistral", tied=False)),
    "smollm3": lambda: Llama(LlamaConfig(**RELATIVE, family="smollm3", no_rope=(1,))),
    "olmo2": lambda: Llama(LlamaConfig(**RELATIVE, family="olmo2", qk_norm="row", post_norm=True, tied=False)),
}
LLAMA = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
TARGETS = {name: ["", "c_attn,c_proj,c_fc" if name == "gpt2" else LLAMA] for name in OURS}
CASES = [(name, targets) for name in OURS for targets in TARGETS[name]]


def moved(module, scale=0.1):
    """All that it trains, pushed off the start, each expert another way."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator)
    return module


def base(name, folder, seed=0):
    """(model, its directory)"""
    torch.manual_seed(seed)
    model = moved(OURS[name]().eval(), 0.05)
    save_model(model, folder)
    return model, folder


def logits(policy, ids):
    model, unembedding = policy
    return model(ids) @ unembedding.T


def far(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name,targets", CASES)
@torch.no_grad()
def test_peft_opens_an_adapter_on_the_base(name, targets, tmp_path):
    """Our logits, by the base that the adapter names. Faults: lora_alpha = r; A and B exchanged; PEFT's prefix left
    out, or of the other family; expert 0 for expert 1; target_modules of one layer."""
    model, folder = base(name, tmp_path / "base")
    experts, ids = moved(Adapters(model, 2, 4, targets)), torch.randint(VOCAB, (3, 40))
    for k in range(2):
        save_adapter(experts, k, tmp_path / str(k), str(folder))
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        away = far(plain(ids).logits, logits(experts.policy(k), ids))
        peer = peft.PeftModel.from_pretrained(plain, tmp_path / str(k)).eval()
        assert far(peer(ids).logits, logits(experts.policy(k), ids)) <= 1e-4 and away > 0.1
        named = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / str(k)).eval()
        assert far(named(ids).logits, peer(ids).logits) <= 1e-6
        peer.save_pretrained(tmp_path / "again")
        ours, theirs = (load_file(tmp_path / place / "adapter_model.safetensors") for place in (str(k), "again"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("name,targets", CASES)
@torch.no_grad()
def test_we_open_an_adapter_that_peft_made(name, targets, tmp_path):
    """Of another alpha. Faults: lora_alpha not read; settings that PEFT writes and that change nothing refused."""
    model, folder = base(name, tmp_path / "base")
    experts, ids = Adapters(model, 2, 4, targets), torch.randint(VOCAB, (3, 40))
    names = sorted({path.rpartition(".")[2] for path in experts.targets})
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7, target_modules=names,
                             fan_in_fan_out=name == "gpt2")
    peer = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), config).eval()
    moved(peer)
    peer.save_pretrained(tmp_path / "adapter")
    load_adapter(experts, 1, tmp_path / "adapter")
    assert far(logits(experts.policy(1), ids), peer(ids).logits) <= 1e-4
    assert far(logits(experts.policy(0), ids), peer(ids).logits) > 0.1


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("sharing", ["full", "low-rank", "models", "own models", "lora"])
@torch.no_grad()
def test_an_export_opens_expert_by_expert(sharing, name, tmp_path):
    """Logits and the tokenizer, of experts that begin as one model or each as its own. Faults: the model's unembedding
    for the expert's; every expert the first; the tokenizer left out."""
    options = {"full": dict(rank=0), "low-rank": dict(rank=4)}.get(sharing, dict(sharing=sharing.split()[-1], rank=4))
    bases = [base(name, tinyjob.make_model(tmp_path / f"base-{seed}"), seed)               # whose tokenizer stays there
             for seed in range(2 if sharing == "own models" else 1)]
    models, folders = [model for model, _ in bases], [str(folder) for _, folder in bases]
    config = TrainConfig(data="", model=",".join(folders), out="", experts=2, **options)
    experts, ids = moved(make_experts(models, config, torch.float32)), torch.randint(VOCAB, (3, 40))
    places = export_experts(experts, tmp_path / "out", folders)
    assert [place.name for place in places] == ["expert-0", "expert-1"]
    for k, place in enumerate(places):
        kind = peft.AutoPeftModelForCausalLM if sharing == "lora" else transformers.AutoModelForCausalLM
        assert far(kind.from_pretrained(place).eval()(ids).logits, logits(experts.policy(k), ids)) <= 1e-4
        assert json.loads((place / "tokenizer_config.json").read_text())["eos_token"] == "<end>"
        assert load_tokenizer(place).key == load_tokenizer(folders[0]).key
    if sharing != "lora":
        assert far(*(logits((m, m.unembedding), ids) for m in map(load_model, places))) > 0.1
