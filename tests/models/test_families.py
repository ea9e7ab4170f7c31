"""Qwen2, Qwen3, Mistral, SmolLM3 and OLMo 2: a slow twin of llama.py in fp64, published configurations, refusals,
adapters, and the estimate of memory. tests/golden has transformers' own numbers. Each docstring names the faults that
the test was seen to fail on.
"""

import dataclasses
import json
import math

import pytest
import small
import tinyjob
import torch
from raising import raises_at
from safetensors.torch import load_file

from mixdpo.evaluation.export import export_run
from mixdpo.evaluation.peft import load_adapter, save_adapter
from mixdpo.experts import Adapters, make_experts
from mixdpo.models import llama
from mixdpo.models.hfconfig import config_from_json, config_to_json
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.lora import projections
from mixdpo.models.weights import content_key, load_model, save_model
from mixdpo.runs import memory_estimate

SIZES = dict(vocab=41, context=48, width=24, inner=20, layers=4, heads=4, kv_heads=2, eps=1e-3, theta=300.0)
FIELDS = {
    "qwen2": dict(qkv_bias=True), "qwen3": dict(qk_norm="head", head_dim=10, tied=False), "mistral": dict(tied=False),
    "smollm3": dict(no_rope=(0, 2)), "olmo2": dict(qk_norm="row", post_norm=True, tied=False),
    "all at once": dict(qkv_bias=True, qk_norm="head", no_rope=(1,), post_norm=True),
}
families = pytest.mark.parametrize("family", [name for name in FIELDS if name != "all at once"])


def made(family, seed=0, **fields):
    """A random model; norms and biases are random too."""
    torch.manual_seed(seed)
    known = {"family": family} if family != "all at once" else {}
    model = Llama(LlamaConfig(**SIZES | known | FIELDS[family] | fields))
    for p in model.parameters():
        noise = torch.randn_like(p)
        p.data = noise / p.shape[-1] ** 0.5 if p.dim() == 2 else p.data.round() + 0.3 * noise
    return model.eval()


# --- the model --------------------------------------------------------------------------------------------------------


def slow(model, ids):
    """The hidden states (T, C) of one row in fp64: head by head, position by position, rope as complex numbers."""
    c, W = model.config, {name: p.double() for name, p in model.state_dict().items()}
    D, T = c.head_dim, len(ids)

    def rms(x, name):
        return W[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + c.eps).sqrt()

    def project(x, name):
        return x @ W[f"{name}.weight"].T + W.get(f"{name}.bias", 0.0)

    def heads(x, at, which, layer):
        """(T, C) -> (T, D) for each head of q or k, with norm and rope."""
        y = project(x, f"{at}.{which}_proj")
        y = rms(y, f"{at}.{which}_norm") if c.qk_norm == "row" else y
        for head in y.split(D, dim=-1):
            head = rms(head, f"{at}.{which}_norm") if c.qk_norm == "head" else head
            if layer not in c.no_rope:
                angle = torch.tensor([[t * c.theta ** (-2 * i / D) for i in range(D // 2)] for t in range(T)]).double()
                turned = torch.complex(head[:, :D // 2], head[:, D // 2:]) * torch.polar(torch.ones_like(angle), angle)
                head = torch.cat((turned.real, turned.imag), dim=-1)
            yield head

    x = W["embed_tokens.weight"][ids]
    for layer in range(c.layers):
        at = f"layers.{layer}"
        n = x if c.post_norm else rms(x, f"{at}.input_layernorm")
        q, k = (list(heads(n, f"{at}.self_attn", which, layer)) for which in "qk")
        v, out = project(n, f"{at}.self_attn.v_proj").split(D, dim=-1), []
        for h in range(c.heads):
            g = h // (c.heads // c.kv_heads)
            out.append(torch.stack([torch.softmax(k[g][:t + 1] @ q[h][t] / math.sqrt(D), 0) @ v[g][:t + 1]
                                    for t in range(T)]))
        y = torch.cat(out, dim=-1) @ W[f"{at}.self_attn.o_proj.weight"].T
        x = x + (rms(y, f"{at}.post_attention_layernorm") if c.post_norm else y)
        n = x if c.post_norm else rms(x, f"{at}.post_attention_layernorm")
        gate = project(n, f"{at}.mlp.gate_proj")
        y = project(gate * torch.sigmoid(gate) * project(n, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        x = x + (rms(y, f"{at}.post_feedforward_layernorm") if c.post_norm else y)
    return rms(x, "norm")


@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_hidden_states_equal_the_slow_twin(family):
    """Faults: no bias on v; q's norm on k; the norm after rope; one norm for all heads in Qwen3; layers without rope
    exchanged for those with it; a norm before attention in OLMo 2."""
    model, ids = made(family), torch.randint(41, (2, 15), generator=torch.Generator().manual_seed(1))
    want = torch.stack([slow(model, row) for row in ids])
    assert (model(ids).double() - want).abs().max() < 1e-5


@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_under_autocast_queries_keys_and_values_have_one_dtype(family, monkeypatch):
    """As a kernel for packed rows demands. Fault: the norm of q and k returns float32."""
    seen, attend = set(), llama.attend
    monkeypatch.setattr(llama, "attend", lambda *inputs: seen.update(x.dtype for x in inputs[:3]) or attend(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        made(family)(torch.arange(9)[None])
    assert seen == {torch.bfloat16}


# --- published configurations -----------------------------------------------------------------------------------------

QWEN25 = {      # Qwen2.5-0.5B, written by transformers 4.40
    "model_type": "qwen2", "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936}
QWEN3 = {       # Qwen3-0.6B
    "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}
MISTRAL = {     # Mistral-7B-v0.3
    "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768}
SMOLLM3 = {     # SmolLM3-3B; the list of layers, and ties, are transformers' defaults
    "model_type": "smollm3", "attention_bias": False, "bos_token_id": None, "eos_token_id": 128012,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
    "mlp_bias": False, "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
    "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256}
OLMO2 = {       # OLMo-2-0425-1B
    "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352}


def read(tmp_path, config, **settings):
    """settings: None removes one."""
    config = {key: value for key, value in (config | settings).items() if value is not None or key not in settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return config_from_json(tmp_path / "config.json")


@pytest.mark.parametrize("config, count, fields", [
    (QWEN25, 494_032_768, dict(qkv_bias=True, head_dim=64, theta=1e6, tied=True)),
    (QWEN3, 596_049_920, dict(qk_norm="head", head_dim=128, theta=1e6, tied=True)),
    (MISTRAL, 7_248_023_552, dict(head_dim=128, tied=False)),
    (SMOLLM3, 3_075_098_624, dict(no_rope=(3, 7, 11, 15, 19, 23, 27, 31, 35), theta=5e6, tied=True)),
    (OLMO2, 1_484_916_736, dict(qk_norm="row", post_norm=True, theta=5e5, tied=False))],
    ids=lambda value: value["model_type"] if "model_type" in (value if isinstance(value, dict) else ()) else "")
def test_published_configurations(config, count, fields, tmp_path):
    """And the published numbers of parameters. Faults: a bias on o too; one norm for q and k; head_dim = C / H in
    Qwen3; 1 for "no rope"; SmolLM3 untied."""
    found = read(tmp_path, config)
    assert {key: getattr(found, key) for key in fields} == fields and found.family == config["model_type"]
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(found).parameters()) == count
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(found, torch.float32)))
    assert config_from_json(tmp_path / "config.json") == found


def test_keys_that_a_configuration_lacks_have_transformers_defaults(tmp_path):
    """Faults: Llama's defaults for all; a default of rope_theta that contradicts rope_parameters."""
    assert read(tmp_path, QWEN3, head_dim=None, num_key_value_heads=None, num_attention_heads=32).kv_heads == 32
    assert read(tmp_path, QWEN3, head_dim=None).head_dim == 128
    assert read(tmp_path, MISTRAL, num_key_value_heads=None).kv_heads == 8
    assert read(tmp_path, SMOLLM3, rope_theta=None).theta == 2e6
    five = {"rope_theta": 7.0, "rope_type": "default"}
    assert read(tmp_path, SMOLLM3, rope_theta=None, rope_parameters=five).theta == 7.0


def test_windows_that_are_not_smaller_than_the_context_are_accepted(tmp_path):
    """Faults: any window refused; transformers' default window of Mistral, 4096, not known."""
    assert read(tmp_path, MISTRAL, sliding_window=32768) == read(tmp_path, MISTRAL)
    assert read(tmp_path, MISTRAL | {"sliding_window": None}) == read(tmp_path, MISTRAL)
    assert read(tmp_path, MISTRAL, sliding_window=None, max_position_embeddings=4096).context == 4096
    with raises_at("sliding_window", 4096, 32768, file=tmp_path / "config.json"):
        read(tmp_path, MISTRAL, sliding_window=None)                        # None: the key is absent


@pytest.mark.parametrize("config, settings, named", [
    (MISTRAL, dict(sliding_window=4096), ["sliding_window", 4096, 32768]),
    (QWEN25, dict(use_sliding_window=True), ["use_sliding_window"]),
    (QWEN3, dict(use_sliding_window=True), ["use_sliding_window"]),
    (QWEN3, dict(layer_types=["full_attention"] * 27 + ["sliding_attention"]), ["layer_types", "sliding_attention"]),
    (SMOLLM3, dict(layer_types=["chunked_attention"]), ["layer_types", "chunked_attention"]),
    (OLMO2, dict(sliding_window=4096), ["sliding_window"]),
    (QWEN25, dict(rope_scaling={"type": "yarn", "factor": 4.0}), ["yarn"]),
    (QWEN3, dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["yarn"]),
    (QWEN25, dict(dual_chunk_attention_config={"chunk_size": 8}), ["dual_chunk_attention_config"]),
    (QWEN25, dict(use_mrope=True), ["use_mrope"]),
    (QWEN3, dict(attention_bias=True), ["attention_bias"]), (SMOLLM3, dict(mlp_bias=True), ["mlp_bias"]),
    (OLMO2, dict(attention_bias=True), ["attention_bias"]),
    (SMOLLM3, dict(no_rope_layers=[1, 0]), ["no_rope_layers", "36 layers"]),
    (SMOLLM3, dict(no_rope_layers=[2] * 36), ["no_rope_layers"])])
def test_settings_that_change_the_function_are_refused_by_name(config, settings, named, tmp_path):
    """Fault: each of them read over."""
    with raises_at(*named, file=tmp_path / "config.json"):
        read(tmp_path, config, **settings)


@pytest.mark.parametrize("model_type, needs", [
    ("gemma3_text", "sliding windows"), ("gemma3", "sliding windows"), ("qwen3_5", "linear attention"),
    ("qwen3_5_text", "linear attention"), ("lfm2", "convolutions"), ("qwen3_moe", "mixture of experts"),
    ("qwen2_moe", "mixture of experts"), ("mixtral", "mixture of experts"), ("olmo3", "sliding windows"),
    ("bloom", "olmo2"), (None, "qwen3")])
def test_other_models_are_refused_with_what_they_would_need(model_type, needs, tmp_path):
    """Faults: a KeyError; a type taken for the one that its name begins with."""
    with raises_at(repr(str(model_type)), needs, "smollm3", file=tmp_path / "config.json"):
        read(tmp_path, LLAMA_LIKE | {"model_type": model_type})


LLAMA_LIKE = QWEN3 | {"num_experts": 128}


def test_content_keys_of_earlier_runs_stay():
    """The key of a Llama of before there were other families. Faults: new fields in it; the same key for models that
    differ in a new field."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab=7, context=8, width=8, inner=8, layers=1, heads=2, kv_heads=1))
    for p in model.parameters():
        p.data = torch.arange(p.numel()).view(p.shape).float()
    key = content_key(model)
    assert key == "1736864eff13f41e73c74ffd80a5c40a88ebe551d0fb1eb23914e5bce7121fba"
    for change in (dict(no_rope=(0,)), dict(qkv_bias=True), dict(qk_norm="head"), dict(post_norm=True)):
        model.config = dataclasses.replace(model.config, **change)
        assert content_key(model) != key
        key = content_key(model)


# --- adapters, memory, a run ------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("targets", ["", "all"])
def test_adapters(targets, family, tmp_path):
    """Experts are the merged models, and their files say the same. Faults: the bias added twice, or lost in a merge;
    norms taken for projections."""
    model, ids = made(family), torch.randint(41, (2, 20))
    names = {path.rpartition(".")[2] for path in projections(model, targets)}
    assert names == ({"q_proj", "v_proj"} if targets == "" else {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    experts = Adapters(model, 2, 3, targets)
    with torch.no_grad():
        for p in experts.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    hidden = experts.hidden(ids)
    hidden.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in experts.parameters())
    again = Adapters(model, 2, 3, targets)
    for k in range(2):
        merged, _ = experts.policy(k)
        assert (merged(ids) - hidden[k]).abs().max() < 1e-5 and (model(ids) - hidden[k]).abs().max() > 0.1
        save_adapter(experts, k, tmp_path / str(k), "base")
        load_adapter(again, k, tmp_path / str(k))
    assert torch.equal(again.hidden(ids), hidden)


@families
def test_memory_counts_the_new_parts(family, tmp_path):
    """Biases and norms among the parameters, and what layers without rope keep. Faults: parameters of a plain Llama;
    the configuration of one block refused because no_rope names a later one."""
    model = made(family, no_rope=(3,)) if family == "smollm3" else made(family)
    save_model(model, tmp_path)
    config = dataclasses.replace(small.config(micro=3, max_prompt=7, max_response=9), model=str(tmp_path))
    found = memory_estimate.estimate(config, torch.float32)
    experts = make_experts([load_model(tmp_path)], config, torch.float32)
    assert found["weights"] == sum(p.nbytes for p in experts.parameters())
    whole = memory_estimate.kept(model.config, config, torch.float32, 16, 3)
    assert memory_estimate.activations(model.config, config, torch.float32, 16, 3) == pytest.approx(whole, rel=0.03)


@families
def test_a_run_trains_and_exports(family, tmp_path):
    """Two LoRA experts, trained on a few pairs, written for PEFT. Fault: the model saved as a Llama."""
    folder = tinyjob.make_model(tmp_path / "model")
    save_model(made(family, vocab=257, context=64, eos=256), folder)
    records = tinyjob.make_records()
    run = tinyjob.run(tmp_path, folder, records, sharing="lora", experts=2)
    first, second = (load_file(place / "adapter_model.safetensors")
                     for place in export_run(run, str(tmp_path / "out"), ""))
    assert first.keys() == second.keys() and any(not torch.equal(first[n], second[n]) for n in first)
    assert all(p.isfinite().all() for p in first.values())
