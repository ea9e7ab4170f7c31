"""Exports for other servers beside the programs that read them, live: adapters of --format vllm in PEFT on
transformers, merged models in transformers, the features of docs/serving.md, GGUF in the gguf package, in transformers
and in llama.cpp. vLLM itself is not run. Each docstring names the faults that the test was seen to fail on.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
from mixdpo.evaluation.heldout import weights
from mixdpo.models.gguf import GGUFTensor, read_gguf
from mixdpo.models.gguf_llama import gguf_of
from mixdpo.models.gguf_write import q8_0, write_gguf
from mixdpo.models.llama import Llama, LlamaConfig, RopeScaling
from mixdpo.models.weights import load_model
from mixdpo.preferences import read_preferences
from mixdpo.runs.load_run import load_run
from mixdpo.runs.parallel import logp_in_parts
from mixdpo.runs.reference import prompt_features
from mixdpo.text.gguf_tokenizer import to_metadata
from mixdpo.text.tokenizer import load_tokenizer
from tests import tinyjob

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `peers`)")
peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
CLIENT, READER = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
RATE = {"head_lr": 0.3, "warmup": 0}
RUNS = {
    "lora": dict(sharing="lora", targets="all", **RATE),
    "shared": dict(sharing="lora", rank=5, shared_rank=9, start="linear", start_steps=1, latent="user", **RATE),
    "heads": dict(train_trunk=False, latent="user", **RATE), "models": dict(sharing="models", lr=0.03),
    "linear": dict(sharing="lora", gate="linear", gate_lr=0.3, max_prompt=3, **RATE),
    "mlp": dict(sharing="lora", gate="mlp", gate_features="mean", gate_lr=0.3, max_prompt=3, **RATE)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of a model with a start token, and of its runs."""
    folder = tmp_path_factory.mktemp("runs")
    tinyjob.make_model(folder / "model", special=("<end>", "<s>"))
    doc = json.loads((folder / "model" / "tokenizer.json").read_text())
    doc["post_processor"] = {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}}
    (folder / "model" / "tokenizer.json").write_text(json.dumps(doc))
    assert load_tokenizer(folder / "model").bos == 257
    for name, options in RUNS.items():
        tinyjob.run(folder, folder / "model", tinyjob.make_records(), name=name, **options)
    return folder


def export(home, name, out, form="vllm"):
    """(the run, its pairs); the export is in `out`."""
    evaluation.export(evaluation.EvalConfig(str(home / name), export=str(out), format=form))
    run = load_run(home / name, "cpu", "")
    return run, read_preferences(str(home / f"{name}.jsonl"), load_tokenizer(home / "model"), 256, 256)


@torch.no_grad()
def theirs(model, pairs):
    """Summed log-probs of both responses of each pair, (P,2), by transformers' logits."""
    out = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            logps = torch.log_softmax(model(torch.tensor([pair.prompt + response])).logits[0].float(), -1)
            places = torch.arange(len(pair.prompt) - 1, len(pair.prompt) + len(response) - 1)
            out.append(logps[places, response].sum())
    return torch.stack(out).view(-1, 2)


@pytest.mark.parametrize("name", ["lora", "shared"])
def test_adapters_in_peft_are_the_experts(home, name, tmp_path):
    """Log-probs of every response under every expert within 1e-4, on OUT/base, switched by name as a server does.
    Faults: expert 0 for all; the shared part left out; lora_alpha = r; the base merged with an expert."""
    run, pairs = export(home, name, tmp_path / "out")
    want = logp_in_parts(run.experts, pairs, "ours")                          # (P,2,2)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32).eval()
    away = (theirs(base, pairs) - want[:, 0]).abs().max()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "expert-0", adapter_name="expert-0").eval()
    model.load_adapter(tmp_path / "out" / "expert-1", adapter_name="expert-1")
    for k in range(2):
        model.set_adapter(f"expert-{k}")
        far = (theirs(model, pairs) - want[:, k]).abs().max()
        assert far <= 1e-4 and away > 0.1, f"expert {k}: off by {far:.1e}; the base by {away:.2f}"
    assert (want[:, 0] - want[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["heads", "models"])
def test_merged_models_in_transformers_are_the_experts(home, name, tmp_path):
    """The same for heads and whole models. Faults: the trunk's unembedding; every expert the first."""
    run, pairs = export(home, name, tmp_path / "out")
    want = logp_in_parts(run.experts, pairs, "ours")
    for k in range(2):
        place = tmp_path / "out" / f"expert-{k}"
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        far = (theirs(model, pairs) - want[:, k]).abs().max()
        assert far <= 1e-4, f"expert {k}: off by {far:.1e}"
        assert transformers.AutoTokenizer.from_pretrained(place)("mno").input_ids == [257, *b"mno"]
    assert (want[:, 0] - want[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_features_of_the_page_give_the_gates_weights(home, name, tmp_path):
    """Both blocks of docs/serving.md, executed: prompts of up to 5 letters of which 3 tokens are read, the first the
    start token. Faults: last for mean; the first tokens kept; the start token cut off; the layer before the last."""
    run, pairs = export(home, name, tmp_path / "out")
    names = {"__name__": "client"}
    for block in (CLIENT, READER):
        exec(compile(block, "docs/serving.md", "exec"), names)
    router = names["Router"](tmp_path / "out")
    features = names["reader"](tmp_path / "out", router.facts)
    texts = [row["prompt"] for row in tinyjob.lines(home / f"{name}.jsonl")]
    tokenizer = load_tokenizer(home / "model")
    prompts = [[257, *tokenizer.encode(text)[-2:]] for text in texts]
    want = weights(run, pairs, prompt_features(load_model(home / "model"), prompts, torch.float32)).exp()
    got = np.stack([router.weights(features=features(text)) for text in texts])
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert got.std(0).max() > 0.02 and max(map(len, texts)) > 2


# --- GGUF -------------------------------------------------------------------------------------------------------------


RELATIVE = dict(vocab=258, context=64, width=64, inner=96, layers=2, heads=4, kv_heads=2, theta=700.0, eos=256, bos=257)
MODELS = {"llama": {}, "untied": dict(tied=False), "llama3": dict(scaling=RopeScaling(32.0), theta=5e3),
          "qwen2": dict(family="qwen2", qkv_bias=True),
          "qwen3": dict(family="qwen3", qk_norm="head", head_dim=32, tied=False)}


def made(name, folder, home, kind):
    """(our model, its GGUF file)"""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**RELATIVE | MODELS[name])).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() == 2 else p.data + 0.3 * torch.randn_like(p)
    metadata, tensors = gguf_of(model)
    metadata |= to_metadata(load_tokenizer(home / "model"), 258) | {
        "general.file_type": {"F16": 1, "Q8_0": 7}[kind], "general.quantization_version": 2}
    write_gguf(folder / "m.gguf", metadata, tensors, kind)
    return model, folder / "m.gguf"


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gguf_package_reads_what_we_read(name, kind, home, tmp_path):
    """Every value of the metadata and every tensor. Faults: a wrong type number of a value; axes in the other order;
    offsets that are not padded."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `peers`)")
    _, path = made(name, tmp_path, home, kind)
    metadata, tensors = read_gguf(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == metadata
    arch = metadata["general.architecture"]
    types = {key: reader.fields[key].types[0].name for key in (f"{arch}.block_count", f"{arch}.rope.freq_base")}
    assert [*types.values()] == ["UINT32", "FLOAT32"]                       # llama.cpp wants these types
    assert {t.name for t in reader.tensors} == tensors.keys()
    for t in reader.tensors:
        got = gguf.quants.dequantize(t.data, t.tensor_type).reshape(tensors[t.name].shape)
        assert tuple(t.shape[::-1]) == tensors[t.name].shape and t.tensor_type.name == tensors[t.name].kind
        np.testing.assert_array_equal(got, tensors[t.name].float32())


def test_q8_0_is_the_gguf_packages_to_the_bit():
    """Faults: halves rounded to even; d rounded before it divides; 128 for 127."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra `peers`)")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(500, 64)), np.zeros((1, 64)), rng.integers(-254, 255, (99, 64)) / 2,
                        1e-6 * rng.normal(size=(50, 64))]).astype(np.float32)
    x[600:, 0] = 127.0                                                      # d = 1: halves among the others
    assert q8_0(x, "x") == gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0).tobytes()


@pytest.mark.parametrize("name", ["llama", "untied", "qwen2"])
@torch.no_grad()
def test_gguf_in_transformers(name, home, tmp_path):
    """Logits of transformers' own reader. Faults: q and k of Llama not permuted, or Qwen's permuted."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed, which transformers reads GGUF with")
    model, path = made(name, tmp_path, home, "F16")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.randint(258, (2, 30), generator=torch.Generator().manual_seed(0))
    model.load_state_dict({n: p.half().float() if p.ndim == 2 else p for n, p in model.state_dict().items()})
    far = (peer(ids).logits - model(ids) @ model.unembedding.T).abs().max().item()
    assert far <= 1e-4, f"logits are off by {far:.1e}"


def rounded(x, kind):
    """Weights (..., C) as the file has them, or activations as llama.cpp multiplies them with weights of this type."""
    if kind == "F16":
        return x.half().float()
    numbers = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).numpy())
    raw = np.frombuffer(q8_0(numbers, "activations"), np.uint8)
    return torch.from_numpy(GGUFTensor(numbers.shape, "Q8_0", raw).float32()).view(x.shape)


def llama_cpps_logits(model, ids, kind):
    """Logits (T,V) of our model with the activations before each product rounded as in llama.cpp."""
    hooks = [m.register_forward_pre_hook(lambda _, args: (rounded(args[0], kind),)) for m in model.modules()
             if isinstance(m, torch.nn.Linear)]
    logits = rounded(model(torch.tensor([ids]))[0], kind) @ model.unembedding.T
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_llama_cpp_computes_our_model(name, kind, home, tmp_path):
    """llama.cpp opens the file, cuts text into our ids, and computes our logits and greedy text from the same weights.
    It rounds activations to the weights' type; so does the model that it is compared with, and what is left is relative
    to the spread of the logits. Faults: q and k not permuted, or Qwen's permuted; divisors of rope left out; half
    of rope's size."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip compiles it from "
                                    "source, up to an hour on one core, so it is not in tests/peers/requirements.txt")
    model, path = made(name, tmp_path, home, kind)
    for p in model.parameters():
        p.data = rounded(p.data, kind) if p.ndim == 2 else p.data
    peer = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    assert peer.tokenize("Yes, é 12".encode(), add_bos=True) == [257, *"Yes, é 12".encode()]
    assert peer.token_eos() == 256
    ids = torch.randint(256, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    peer.eval(ids)
    want, plain = llama_cpps_logits(model, ids, kind), model(torch.tensor([ids]))[0] @ model.unembedding.T
    got = torch.from_numpy(np.array(peer.scores[:60]))
    far = ((got - want).abs().max() / want.std()).item()
    print(f"{name} {kind}: logits off by {far:.1e} of their spread; of ours without rounding by "
          f"{(got - plain).abs().max() / plain.std():.1e}, rms {(got - plain).pow(2).mean().sqrt() / plain.std():.1e}")
    assert far <= {"F16": 5e-3, "Q8_0": 1e-4}[kind]
    peer.reset()
    text, sure = ids[:8], 0
    for _ in range(20):
        peer.eval(text[peer.n_tokens:])
        top = llama_cpps_logits(model, text, kind)[-1].topk(2)
        if top.values[0] - top.values[1] > 2 * far * want.std():            # else rounding decides
            assert int(np.argmax(peer.scores[peer.n_tokens - 1])) == int(top.indices[0])
            sure += 1
        text.append(int(top.indices[0]))
    assert sure >= 18
