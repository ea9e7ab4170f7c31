"""weights.py and hfconfig.py: what transformers wrote is read, what we write is read back, and everything else is
refused with its name. The docstring of each test names faults that it was seen to fail on.
"""

import json
import shutil
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from raising import raises_at
from safetensors.torch import load_file, save_file

from mixdpo.files import atomic, fetch
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.hfconfig import config_from_json, config_to_json
from mixdpo.models.llama import LlamaConfig, RopeScaling
from mixdpo.models.weights import content_key, load_model, save_model

GOLDEN = Path(__file__).parents[1] / "golden"
RELATIVES = ["qwen2", "qwen3", "mistral", "smollm3", "olmo2"]     # of Llama
CASES = ["gpt2", "gpt2-inner", "llama-tied", "llama-untied", "llama3-scaling", *RELATIVES]


@pytest.fixture
def copy(tmp_path):
    """copy(case, change=None, **settings) -> a directory of its own with that model. `change` edits the dictionary of
    tensors, `settings` are written into config.json (None removes one)."""

    def make(case, change=None, **settings):
        folder = tmp_path / case
        shutil.copytree(GOLDEN / case, folder)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
        return folder

    return make


def assert_not_loaded(name, *named, file=None, line=None, **kwargs):
    """load_model(name) is refused, because of that file, or of what has the name; the error names the values."""
    with raises_at(*named, file=file or name, line=line):
        load_model(name, **kwargs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case,name", [("gpt2", "transformer.h.1.mlp.c_fc.weight"), ("gpt2", "transformer.wte.weight"),
                                       ("llama-untied", "lm_head.weight"), ("llama-tied", "model.norm.weight")])
def test_a_tensor_that_holds_no_numbers_is_refused_by_name(case, name, bad, copy):
    """One value of one tensor. Catches: a model that loads, and whose numbers are NaN from the first step on; a fault
    that is blamed on the policy; an error that names the directory alone."""
    folder = copy(case)
    file, = [file for file in folder.glob("*.safetensors") if name in load_file(file)]     # of several shards, its own
    tensors = load_file(file)
    tensors[name].view(-1)[3] = bad
    save_file(tensors, file)
    with raises_at(name, 1, file=file):
        load_model(folder, dtype=torch.bfloat16)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_loaded(case, tmp_path):
    """Faults: a transpose on one way only; the unembedding saved as the embedding; a field of the config lost."""
    model = load_model(GOLDEN / case)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.config == model.config
    assert not again.training and all(p.requires_grad for p in again.parameters())
    assert content_key(again) == content_key(model)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("case", ["gpt2", "llama-tied", "llama-untied"])
def test_saved_tensors_have_the_published_names_and_layouts(case, tmp_path):
    """What we write holds exactly transformers' own tensors. Faults: transposes left out on both ways; no prefix."""
    save_model(load_model(GOLDEN / case), tmp_path)
    got, want = load_file(tmp_path / "model.safetensors"), {}
    for shard in GOLDEN.joinpath(case).glob("model*.safetensors"):
        want |= load_file(shard)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    """Fault: writing straight to the final name."""
    model = load_model(GOLDEN / "gpt2")
    save_model(model, tmp_path)
    key = content_key(model)

    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic, "save_file", broken)
    with pytest.raises(OSError), torch.no_grad():
        model.wte.weight.zero_()
        save_model(model, tmp_path)
    assert content_key(load_model(tmp_path)) == key and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("case", ["gpt2", "llama-tied", "llama-untied"])
@torch.no_grad()
def test_an_expert_is_saved_with_its_own_unembedding(case, tmp_path):
    """Faults: the argument not looked at; tie_word_embeddings still true; the embedding overwritten with it."""
    model = load_model(GOLDEN / case)
    own = torch.randn(model.unembedding.shape)
    save_model(model, tmp_path, unembedding=own)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    expert, ids = load_model(tmp_path), torch.arange(10)[None]
    assert not expert.config.tied and torch.equal(expert.unembedding, own)
    assert torch.equal(expert(ids), model(ids))


def test_dtype(tmp_path):
    """fp32 unless asked, whatever the file holds. Faults: the file's dtype kept; the argument not looked at."""
    model = load_model(GOLDEN / "llama-tied", dtype=torch.bfloat16)
    save_model(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_a_loaded_model_does_not_depend_on_its_file(copy):
    """Fault: parameters that point into the mapped file."""
    folder = copy("llama-tied")
    model = load_model(folder)
    key = content_key(model)
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\0" * (size // 2))
    assert content_key(model) == key


def test_content_key_sees_every_change(tmp_path):
    """Faults: only shapes in it, or only the first tensor, or not the configuration, or not the dtype."""
    model = load_model(GOLDEN / "llama3-scaling")
    keys = [content_key(model)]
    with torch.no_grad():
        for p in model.parameters():                    # the smallest change there is, in the last number of each
            p.view(-1)[-1] = torch.nextafter(p.view(-1)[-1], torch.tensor(9.0))
            keys.append(content_key(model))
    model.config = replace(model.config, scaling=replace(model.config.scaling, factor=4.0))
    keys.append(content_key(model))
    for p in model.parameters():
        p.data.zero_()
    keys += [content_key(model.bfloat16()), content_key(model.half())]      # the same bytes
    assert len(set(keys)) == len(keys) and all(len(key) == 64 for key in keys)


# --- forms of the published files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_config_json_of_transformers_4_and_5_and_our_own(case, tmp_path):
    """Faults: rope_theta looked for in one place only; rope_parameters not looked at; tie_word_embeddings' default,
    which GPT-2 files leave out; n_inner lost; eos as a list lost."""
    five, four = (config_from_json(GOLDEN / case / name) for name in ("config.json", "config-4.json"))
    assert five == four
    for config in (five, replace(five, eos=(1, 2, 3)), replace(five, tied=not five.tied)):
        (tmp_path / "config.json").write_text(json.dumps(config_to_json(config, torch.float32)))
        assert config_from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["config.json", "config-4.json"])
def test_we_write_the_settings_that_transformers_writes(case, form):
    """Key by key. Faults: rope_parameters left out (5 reads it), rope_theta or rope_scaling left out (4 reads them)."""
    ours = config_to_json(config_from_json(GOLDEN / case / "config.json"), torch.float32)
    for key, value in json.loads((GOLDEN / case / form).read_text()).items():
        if key.startswith("rope") and value is not None:
            assert ours[key] == value, key
        elif key in ours and not key.endswith("pdrop") and key not in ("n_inner", "pad_token_id"):
            # no dropout; n_inner is written out; models here know no padding
            assert ours[key] == value, key


def test_llama_without_a_setting_for_ties_is_untied(copy):
    """As transformers' own default, and GPT-2's is the opposite. Fault: one default for both."""
    folder = copy("llama-untied", tie_word_embeddings=None)
    assert content_key(load_model(folder)) == content_key(load_model(GOLDEN / "llama-untied"))


def test_config_values():
    """The figures themselves. Fault: two fields of the scaling exchanged."""
    config = config_from_json(GOLDEN / "llama3-scaling" / "config-4.json")
    assert config.scaling == RopeScaling(factor=8.0, low=1.0, high=4.0, original=32) and config.theta == 300.0
    assert (config.heads, config.kv_heads, config.head_dim, config.width, config.inner) == (2, 1, 16, 24, 23)
    config = config_from_json(GOLDEN / "gpt2-inner" / "config.json")
    assert config == GPT2Config(vocab=37, context=30, width=15, layers=3, heads=3, inner=29, eps=1e-3, bos=36, eos=36)


def test_published_llama_3_2_config(tmp_path):
    """What meta-llama/Llama-3.2-1B's config.json says (written by transformers 4.45)."""
    published = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 8192}, "use_cache": True, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert config_from_json(tmp_path / "config.json") == LlamaConfig(
        vocab=128256, context=131072, width=2048, inner=8192, layers=16, heads=32, kv_heads=8, head_dim=64, eps=1e-5,
        theta=500000.0, scaling=RopeScaling(32.0), tied=True, bos=128000, eos=128001)


def test_gpt2_with_and_without_prefix_and_with_old_buffers(copy):
    """As the hub's gpt2 is: no prefix, causal masks among the weights. Faults: the prefix demanded; c_attn.bias, which
    ends like a buffer, skipped; a bool mask refused."""

    def old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 40, 40).tril().bool()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    assert content_key(load_model(copy("gpt2", old))) == content_key(load_model(GOLDEN / "gpt2"))


def test_a_repeated_embedding_is_accepted_and_another_matrix_is_not(copy, tmp_path):
    """Faults: lm_head.weight of a tied model an unknown tensor; a differing one dropped in silence."""
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert content_key(load_model(copy("llama-tied", repeat))) == content_key(load_model(GOLDEN / "llama-tied"))
    shutil.rmtree(tmp_path / "llama-tied")
    folder = copy("llama-tied", lambda tensors: tensors.update({"lm_head.weight": torch.randn(53, 18)}))
    assert_not_loaded(folder, "lm_head.weight", "tie_word_embeddings")


# --- what is wrong is named -------------------------------------------------------------------------------------------


def test_missing_extra_and_wrongly_shaped_tensors_are_named(copy):
    """All of them in one message. Faults: missing, unknown or wrongly shaped ones not looked for."""

    def damage(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.2.ln_2.bias"] = torch.zeros(20)
        tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].t()

    folder = copy("gpt2", damage)
    assert_not_loaded(folder, "missing: h.1.ln_2.bias", "unknown: h.2.ln_2.bias",
                      "wrong shape: h.0.mlp.c_fc.weight is (20, 80), wanted (80, 20)")


def test_an_untied_model_without_its_unembedding(copy):
    """Fault: the embedding taken instead."""
    folder = copy("llama-tied", tie_word_embeddings=False)
    assert_not_loaded(folder, "missing: lm_head.weight")


def test_a_tensor_given_twice(copy):
    """Fault: the last one wins."""
    folder = copy("gpt2", lambda tensors: tensors.update({"wte.weight": torch.zeros(51, 20)}))
    assert_not_loaded(folder, "wte.weight")


@pytest.mark.parametrize("case, setting, value", [
    ("gpt2", "model_type", "mixtral"), ("gpt2", "activation_function", "relu"), ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True), ("gpt2", "add_cross_attention", True),
    ("llama-tied", "hidden_act", "gelu"), ("llama-tied", "attention_bias", True), ("llama-tied", "mlp_bias", True),
    ("llama-tied", "rope_interleaved", True), ("llama-tied", "pretraining_tp", 2),
    ("llama-tied", "partial_rotary_factor", 0.5), ("llama-tied", "sliding_window", 128),
    ("llama-tied", "quantization_config", {"quant_method": "awq"}),
    ("llama-tied", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("llama-tied", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("llama-tied", "rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ("llama-tied", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}),
    ("llama-tied", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "mscale": 2.0}),
    ("llama-tied", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e4}),
    ("llama-tied", "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ("llama-tied", "rope_theta", 5.0),
])
def test_settings_that_are_not_computed_are_refused_by_name(case, setting, value, copy):
    """Fault: any of them read over, which would give another function than the one that was trained."""
    folder = copy(case, **{setting: value})
    named = {"rope_scaling": "rope", "rope_parameters": "rope"}.get(setting, setting)
    assert_not_loaded(folder, named, file=folder / "config.json")


def test_config_json_missing_broken_or_incomplete(copy):
    """Faults: a KeyError or a JSONDecodeError instead of an error that says where."""
    folder = copy("llama-tied", hidden_size=None, rms_norm_eps=None)
    assert_not_loaded(folder, "hidden_size, rms_norm_eps", file=folder / "config.json")
    (folder / "config.json").write_text('{\n"model_type": \n}')
    assert_not_loaded(folder, file=folder / "config.json", line=3)
    (folder / "config.json").unlink()
    assert_not_loaded(folder, file=folder / "config.json")


@pytest.mark.parametrize("case, setting, value, values", [
    ("gpt2", "n_head", 3, ["width 20", "heads 3"]),
    ("llama-tied", "num_key_value_heads", 5, ["kv_heads 5"]),
    ("llama-tied", "head_dim", 3, ["head_dim 3"]),
    ("llama-tied", "tie_word_embeddings", "false", ["tie_word_embeddings", "'false'"]),
])
def test_values_that_cannot_be(case, setting, value, values, copy):
    """Faults: an AssertionError that names no file; the text "false" taken for true."""
    folder = copy(case, **{setting: value})
    assert_not_loaded(folder, *values, file=folder / "config.json")


def test_shards(copy, tmp_path):
    """Faults: a shard that is not there skipped; a file outside of the directory read; no word where no index is."""
    folder = copy("llama-untied")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    moved = folder / "model-00002-of-00004.safetensors"
    moved.rename(tmp_path / moved.name)
    assert_not_loaded(folder, moved.name, file=index)
    index.write_text(json.dumps(table).replace(moved.name, f"../{moved.name}"))
    assert_not_loaded(folder, f"../{moved.name}", file=index)
    index.unlink()
    assert_not_loaded(folder, "model.safetensors.index.json")


def test_a_tensor_in_two_shards(copy):
    """Fault: the last shard wins."""
    folder = copy("llama-untied")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | {"model.norm.weight": torch.zeros(21)}, first)
    save_file(load_file(second) | {"model.norm.weight": torch.zeros(21)}, second)
    assert_not_loaded(folder, "model.norm.weight", file=second)


def test_pickles_are_never_opened(copy, monkeypatch):
    """A directory of .bin, a .bin file, a pickle under the name of a safetensors file. Fault: torch.load anywhere."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    folder = copy("gpt2")
    torch.save({"wte.weight": torch.zeros(51, 20)}, folder / "pytorch_model.bin")
    load_model(folder)                                  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    assert_not_loaded(folder, "save_pretrained", file=folder / "pytorch_model.bin")
    assert_not_loaded(folder / "pytorch_model.bin", "save_pretrained")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    assert_not_loaded(folder, file=folder / "model.safetensors")


@pytest.mark.parametrize("size", [0, 7, 900, -1])
def test_a_truncated_weight_file_is_refused(size, copy):
    """Cut to nothing, in its length, in its header and one byte short."""
    file = copy("llama-tied") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert_not_loaded(file.parent, file=file)


def test_quantised_tensors_are_refused(copy):
    """Fault: int8 codes taken for weights."""
    codes = torch.ones(40, 20, dtype=torch.int8)
    folder = copy("gpt2", lambda tensors: tensors.update({"transformer.wpe.weight": codes}))
    assert_not_loaded(folder, "wpe.weight", "I8", file=folder / "model.safetensors")


# --- names ------------------------------------------------------------------------------------------------------------


def test_names(copy, tmp_path, monkeypatch):
    """Faults: the data folder not looked into first; "gpt2" taken for whatever sizes the file has; a bare KeyError."""
    assert_not_loaded("gpt3", "smollm2", "gpt2", "llama-3.2-1b")
    assert_not_loaded(GOLDEN / "gpt2" / "model.safetensors")
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    assert_not_loaded("llama-3.2-1b", "DATA=FOLDER", data=tmp_path)
    monkeypatch.setattr(fetch, "asset", lambda name, data=None: GOLDEN / name / "model.safetensors")
    assert_not_loaded("gpt2", "missing: h.10.", "wrong shape: h.0.attn.c_attn.bias is (60,), wanted (2304,)",
                      file=GOLDEN / "gpt2" / "model.safetensors")
    copy("llama-tied").rename(tmp_path / "llama-3.2-1b")
    copy("gpt2").rename(tmp_path / "smollm2")
    assert load_model("llama-3.2-1b", data=tmp_path).config.vocab == 53
    assert isinstance(load_model("smollm2", data=tmp_path), GPT2)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path, metadata, tensors):
    """A GGUF file of fp32 tensors, from the format's description. Sizes are written fastest axis first."""
    def string(text):
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(v):
        codes = {str: lambda: struct.pack("<I", 8) + string(v), int: lambda: struct.pack("<II", 4, v),
                 float: lambda: struct.pack("<If", 6, v)}
        return codes[type(v)]()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(v) for key, v in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        axes = tensor.dim()
        head += string(name) + struct.pack(f"<I{axes}QIQ", axes, *reversed(tensor.shape), 0, len(body))
        data = tensor.contiguous().numpy().tobytes()
        body += data + b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def as_gguf(model):
    """-> metadata and tensors, as llama.cpp's convert_hf_to_gguf.py makes them, its permutation of q and k included."""
    c = model.config
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    tensors = {}
    for name, p in model.state_dict().items():
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj"):
            heads = c.heads if parts[-2] == "q_proj" else c.kv_heads
            p = p.reshape(heads, 2, c.head_dim // 2, c.width).swapaxes(1, 2).reshape(p.shape)
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        tensors[f"{block}{names[parts[-2]]}.weight"] = p
    metadata = {"general.architecture": "llama", "llama.context_length": c.context, "llama.embedding_length": c.width,
                "llama.feed_forward_length": c.inner, "llama.block_count": c.layers, "llama.rope.freq_base": c.theta,
                "llama.attention.head_count": c.heads, "llama.attention.head_count_kv": c.kv_heads,
                "llama.attention.key_length": c.head_dim, "llama.attention.layer_norm_rms_epsilon": c.eps,
                "tokenizer.ggml.bos_token_id": c.bos, "tokenizer.ggml.eos_token_id": c.eos}
    return metadata, tensors


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_gguf(case, tmp_path):
    """Faults: q and k left permuted (heads of 2 cannot show it, heads of 10 do); heads for D in the permutation; eps
    left as its fp32 value; output.weight not read."""
    model = load_model(GOLDEN / case)
    write_gguf(tmp_path / "model.gguf", *as_gguf(model))
    got = load_model(tmp_path / "model.gguf")
    assert asdict(got.config) == asdict(model.config)
    assert content_key(got) == content_key(model)


def test_a_gguf_tensor_that_holds_no_numbers_is_refused_by_name(tmp_path):
    """Catches: the check for safetensors alone; our name of the tensor for the file's."""
    metadata, tensors = as_gguf(load_model(GOLDEN / "llama-untied"))
    tensors["blk.1.attn_q.weight"] = tensors["blk.1.attn_q.weight"].clone()
    tensors["blk.1.attn_q.weight"][0, 0] = torch.nan
    write_gguf(tmp_path / "m.gguf", metadata, tensors)
    with raises_at("blk.1.attn_q.weight", 1, file=tmp_path / "m.gguf"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("change, word", [
    (dict(metadata={"general.architecture": "gemma2"}), "gemma2"),
    (dict(metadata={"llama.expert_count": 8}), "llama.expert_count is 8"),
    (dict(metadata={"llama.rope.scaling.type": "yarn"}), "yarn"),
    (dict(tensors={"rope_freqs.weight": torch.arange(1., 6.)}), "rope_freqs.weight"),
    (dict(tensors={"blk.0.attn_q.bias": torch.ones(18)}), "unknown: layers.0.self_attn.q_proj.bias"),
    (dict(tensors={"blk.0.attn_norm.weight": torch.ones(3)}), "wrong shape: layers.0.input_layernorm.weight"),
])
def test_gguf_that_is_not_plain_llama_is_refused(change, word, tmp_path):
    """Faults: another architecture, a rope scaling, or a bias read over."""
    metadata, tensors = as_gguf(load_model(GOLDEN / "llama-untied"))
    write_gguf(tmp_path / "m.gguf", metadata | change.get("metadata", {}), tensors | change.get("tensors", {}))
    assert_not_loaded(tmp_path / "m.gguf", word)
