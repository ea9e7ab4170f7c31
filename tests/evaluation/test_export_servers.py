"""Runs exported for other servers: what is written, what it computes, what its README says, what is refused. The
router: test_router.py; other programs as readers: tests/peers/test_servers.py. Each docstring names the faults that the
test was seen to fail on.
"""

import json
import re
import shutil

import pytest
import tinyjob
import torch
from raising import raises_at
from safetensors.torch import load_file

import eval as evaluation
from mixdpo.evaluation.adapter_sum import compare, summed
from mixdpo.models.gguf import read_gguf
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.weights import content_key, load_model, save_model
from mixdpo.runs.load_run import load_run
from mixdpo.text.tokenizer import load_tokenizer

IDS = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))
SHARINGS = {
    "lora": dict(sharing="lora"),
    "shared": dict(sharing="lora", rank=5, shared_rank=9, start="linear", start_steps=1, latent="user"),
    "heads": dict(train_trunk=False, latent="user"), "models": dict(sharing="models"), "dpo": dict(experts=1)}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder of the model and of a run of each sharing, trained far enough that experts differ."""
    folder = tmp_path_factory.mktemp("runs")
    tinyjob.make_model(folder / "model")                                    # its tokenizer; and rows of whole blocks:
    torch.manual_seed(0)
    wide = Llama(LlamaConfig(vocab=257, context=64, width=32, inner=64, layers=2, heads=2, kv_heads=1, eos=256))
    for p in wide.parameters():
        p.data.mul_(5 if p.ndim > 1 else 1)
    save_model(wide, folder / "model")
    for name, options in SHARINGS.items():
        rates = {"head_lr": 0.3} if name not in ("models", "dpo") else {"lr": 0.03}
        tinyjob.run(folder, folder / "model", tinyjob.make_records(), name=name, **options | rates)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(evaluation, "tune_process", lambda: None)


def export(home, name, out, form):
    evaluation.main([str(home / name), "--export", str(out), "--format", form])
    return json.loads((out / "router.json").read_text()), (out / "README.md").read_text()


@torch.no_grad()
def logits(model, unembedding):
    return model(IDS) @ unembedding.T


def commands(readme):
    return [line.strip() for line in readme.replace("\\\n", " ").splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("name, rank, most", [("lora", 2, 8), ("shared", 19, 32)])
def test_adapters_for_vllm(home, name, rank, most, tmp_path):
    """The base is the run's model, each adapter added to it is the expert, and the commands have the flags. Faults: the
    base a merged expert; its tokenizer left out; an adapter without its shared part; the rank of one part; the largest
    rank the adapters' own, which vLLM refuses, or that of the next expert; requests of two experts in turns."""
    facts, readme = export(home, name, tmp_path / "out", "vllm")
    run, base = load_run(home / name, "cpu", ""), load_model(tmp_path / "out" / "base")
    assert content_key(base) == content_key(load_model(home / "model"))
    for place in ("base", "expert-0", "expert-1"):
        assert load_tokenizer(tmp_path / "out" / place).key == load_tokenizer(home / "model").key
    for k in range(2):
        place = tmp_path / "out" / f"expert-{k}"
        settings = json.loads((place / "adapter_config.json").read_text())
        assert settings["r"] == rank and settings["base_model_name_or_path"] == str(tmp_path / "out" / "base")
        model, tensors = load_model(tmp_path / "out" / "base"), load_file(place / "adapter_model.safetensors")
        for key in (key for key in tensors if key.endswith("lora_A.weight")):
            path, B = key.removeprefix("base_model.model.model."), tensors[key.replace("lora_A", "lora_B")]
            weight = model.get_submodule(path.removesuffix(".lora_A.weight")).weight
            weight.data += settings["lora_alpha"] / rank * B @ tensors[key]
        want = logits(*run.experts.policy(k))
        assert (logits(model, model.unembedding) - want).abs().max() <= 1e-4
        assert (logits(base, base.unembedding) - want).abs().max() > 0.1
    serve, ask = commands(readme)
    assert re.split(r"\s+", serve) == [
        "vllm", "serve", "base", "--served-model-name", "reference", "--generation-config", "vllm", "--enable-lora",
        "--max-loras", "2", "--max-lora-rank", str(most), "--lora-modules", "expert-0=expert-0", "expert-1=expert-1"]
    assert facts["ports"] == [8000, 8000] and "localhost:8000/" in ask and '"model": "expert-0"' in ask
    assert (f"rank {rank}: more than" in readme) == (rank > 16)
    assert ("publish" in readme) == bool(facts["users"]) == (name == "shared")


@pytest.mark.parametrize("name, word", [("heads", "unembedding"), ("models", "whole model"), ("dpo", "whole model")])
def test_merged_models_for_vllm(home, name, word, tmp_path):
    """One model and one server an expert. Faults: every expert the first; the trunk's unembedding for a head's; one
    port for all; a README that does not say why."""
    facts, readme = export(home, name, tmp_path / "out", "vllm")
    run, K = load_run(home / name, "cpu", ""), SHARINGS[name].get("experts", 2)
    assert facts["ports"] == [8000 + k for k in range(K)] and word in readme
    for k in range(K):
        model = load_model(tmp_path / "out" / f"expert-{k}")
        assert torch.equal(logits(model, model.unembedding), logits(*run.experts.policy(k)))
        assert f"vllm serve expert-{k} --served-model-name expert-{k} --generation-config vllm --port {8000 + k}" in (
            commands(readme))
    base = load_model(tmp_path / "out" / "base")
    assert content_key(base) == content_key(load_model(home / "model"))
    assert (logits(base, base.unembedding) - logits(*run.experts.policy(0))).abs().max() > 0.1


@pytest.mark.parametrize("form, kind, far", [("gguf", "F16", 0.05), ("gguf-q8_0", "Q8_0", 1.0)])
@pytest.mark.parametrize("name", ["shared", "heads"])
def test_gguf(home, name, form, kind, far, tmp_path):
    """A file an expert, each expert's own, in the type that was asked for, with the tokenizer. Faults: every expert the
    first; the unembedding of the trunk; F16 for both; no tokenizer; one port for all."""
    facts, readme = export(home, name, tmp_path / "out", form)
    run = load_run(home / name, "cpu", "")
    assert facts["ports"] == [8080, 8081]
    for k in range(2):
        path = tmp_path / "out" / f"expert-{k}.gguf"
        metadata, tensors = read_gguf(path)
        assert metadata["general.file_type"] == {"F16": 1, "Q8_0": 7}[kind]
        assert {t.kind for n, t in tensors.items() if len(t.shape) == 2} == {kind}
        model = load_model(path)
        assert (logits(model, model.unembedding) - logits(*run.experts.policy(k))).abs().max() <= far
        assert (logits(model, model.unembedding) - logits(*run.experts.policy(1 - k))).abs().max() > 2 * far
        assert load_tokenizer(path).encode("Yes é") == load_tokenizer(home / "model").encode("Yes é")
        assert f"llama-server -m expert-{k}.gguf --alias expert-{k} --port {8080 + k}" in commands(readme)
    for cut in ('"top_k": 0', '"top_p": 1', '"min_p": 0', '"temperature": 1'):
        assert cut in commands(readme)[-1]


def test_an_exported_file_is_the_model_of_another_run(home, tmp_path):
    """A GGUF file as --model, which vLLM cannot open as a base beside adapters: OUT/base is a directory made from it.
    Faults: the base not written; another model as the base; its tokenizer left out."""
    export(home, "heads", tmp_path / "files", "gguf")
    file = tmp_path / "files" / "expert-1.gguf"
    tinyjob.run(tmp_path, file, tinyjob.make_records(), name="next", sharing="lora")
    export(tmp_path, "next", tmp_path / "out", "vllm")
    assert content_key(load_model(tmp_path / "out" / "base")) == content_key(load_model(file))
    assert load_tokenizer(tmp_path / "out" / "base").encode("Yes é") == load_tokenizer(file).encode("Yes é")
    settings = json.loads((tmp_path / "out" / "expert-0" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "out" / "base")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(home, tmp_path, monkeypatch):
    """Catches: files of two exports together; a format for an evaluation; one that does not exist; options that have no
    effect; adapters of a rank that vLLM refuses when it starts; a model that llama.cpp does not have."""
    run, out = str(home / "lora"), tmp_path / "out"
    for words, option in ((["--format", "vllm"], "format"), (["--export", str(out), "--format", "onnx"], "format"),
                          (["--export", str(out), "--format", "vllm", "--limit", "3"], "limit")):
        with raises_at(option=option):
            evaluation.main([run, *words])
    with raises_at(file=home):
        evaluation.main([str(home), "--export", str(out), "--format", "vllm"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for form in ("vllm", "gguf"):
        with raises_at(file=tmp_path / "full"):
            evaluation.main([run, "--export", str(tmp_path / "full"), "--format", form])
    monkeypatch.setattr("mixdpo.evaluation.export_servers.RANKS", (1,))
    with raises_at(2, 1, option="format"):
        evaluation.main([run, "--export", str(out), "--format", "vllm"])
    monkeypatch.setattr("mixdpo.models.gguf_llama.WRITTEN", {"qwen2": "qwen2"})
    with raises_at("qwen2", option="format"):
        evaluation.main([run, "--export", str(out), "--format", "gguf"])
    assert not out.exists()


def test_a_sum_of_adapters_is_one_model_and_not_the_mixture(home, tmp_path):
    """Its weights are the base's and the weighted changes; the mixture's log-prob is logsumexp_k, by hand. Faults: the
    mean for other weights; the last expert; the shared part counted K times; the sum's log-prob as the mixture's."""
    run = load_run(home / "shared", "cpu", "")
    w = torch.tensor([0.8, 0.2])
    got, base = (dict(m.named_parameters()) for m in (summed(run.experts, w).trunk, load_model(home / "model")))
    experts = [dict(run.experts.policy(k)[0].named_parameters()) for k in range(2)]
    for name, p in base.items():
        want = p + sum(w[k] * (experts[k][name] - p) for k in range(2))
        assert torch.allclose(got[name], want, atol=1e-5), name
    shutil.copyfile(home / "shared.jsonl", tmp_path / "held.jsonl")
    found = compare(home / "shared", str(tmp_path / "held.jsonl"))
    pairs = tinyjob.lines(tmp_path / "held.jsonl")
    tokenizer, want, alone, mean = load_tokenizer(home / "model"), 0.0, 0.0, summed(run.experts, torch.full((2,), 0.5))
    for row in pairs:
        for side in ("chosen", "rejected"):
            prompt, answer = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row[side]), tokenizer.eos]
            logp = [by_hand(*policy, prompt, answer) for policy in (*map(run.experts.policy, range(2)), mean.policy(0))]
            want += torch.logsumexp(torch.stack(logp[:2]), 0).item() - torch.tensor(2.0).log().item()
            alone += logp[2].item()
    assert found["responses"] == 2 * len(pairs)
    assert found["mixture"] == pytest.approx(want / found["responses"], abs=1e-4)
    assert found["sum"] == pytest.approx(alone / found["responses"], abs=1e-4)
    assert found["difference"]["mean"] == pytest.approx(found["sum"] - found["mixture"], abs=1e-4)
    assert abs(found["difference"]["mean"]) > 0.01
    with raises_at(file=home / "heads"):
        compare(home / "heads", str(tmp_path / "held.jsonl"))


@torch.no_grad()
def by_hand(model, unembedding, prompt, answer):
    """Summed log-probs of the answer."""
    ids = torch.tensor([prompt + answer])
    logps = torch.log_softmax(model(ids)[0] @ unembedding.T, -1)
    return sum(logps[len(prompt) + n - 1, token] for n, token in enumerate(answer))
