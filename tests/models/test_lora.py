"""K adapters in one frozen base: where they start, what they compute, what learns, and the files that they become.

The oracle is K plain models whose weights are put together by hand, and the chain rule through them:
W + 2 B_k A_k, or with an adapter that all experts share W + 2 (B_0 A_0 + B_k A_k - mean_j B_j A_j).
"""

import json
import math
import re

import pytest
import small
import tinyjob
import torch
from raising import raises_at
from safetensors.torch import load_file, save_file
from test_experts import SHARINGS
from test_weights import as_gguf, write_gguf

import eval as evaluation
import train
from mixdpo.evaluation import export as exporting
from mixdpo.evaluation.completions import CompletionTask, policy_rows
from mixdpo.evaluation.export import export_experts
from mixdpo.evaluation.generate import Sampling, generate
from mixdpo.evaluation.peft import factors, load_adapter, save_adapter
from mixdpo.experts import Adapters, Heads, pair_logp
from mixdpo.fast.optimizer import make_optimizer
from mixdpo.files import atomic
from mixdpo.models import weights
from mixdpo.models.lora import LoRALinear, projections
from mixdpo.models.weights import load_model
from mixdpo.preferences import Pair, collate
from mixdpo.runs.checkpoint import load_state, trained_state
from mixdpo.runs.load_run import load_run
from mixdpo.runs.rules import validate
from mixdpo.text.tokenizer import load_tokenizer

COUNT = 8       # 16 rows: no remainder behind the vector units' lanes, where silu rounds otherwise
ALL = {"gpt2": "c_attn,c_proj,c_fc", "llama": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}
ALL["untied"] = ALL["llama"]
TINY = dict(sharing="lora", lr=train.TrainConfig.lr)                        # --lr is refused: nothing learns at it
FACTORS = ("A", "B", "A_0", "B_0")
with_and_without = pytest.mark.parametrize("shared", [0, 2], ids=["no shared part", "shared part"])


def lora(family="gpt2", **options):
    return small.experts(family, **dict(experts=3, sharing="lora") | options)


def batch():
    return collate(small.pairs(COUNT), list(range(COUNT)))


def parts(k, K, shared):
    """How much of each own adapter B_j A_j is in expert k: its own alone; beside a shared one the deviation from the
    mean of all K."""
    return [(j == k) - (1 / K if shared else 0) for j in range(K)]


def by_hand(experts, k, family):
    """Expert k as a model made anew, and its merged weights by path, which ask for gradients."""
    named, made = dict(experts.named_parameters()), small.model(family).to(experts.trunk.unembedding.dtype)
    merged = {}
    with torch.no_grad():
        for path in experts.targets:
            merged[path] = made.get_submodule(path).weight
            A, B, shared = named[f"trunk.{path}.A"], named[f"trunk.{path}.B"], f"trunk.{path}.A_0" in named
            for j, c in enumerate(parts(k, len(A), shared)):
                merged[path] += 2.0 * c * B[j] @ A[j]
            if shared:
                merged[path] += 2.0 * named[f"trunk.{path}.B_0"] @ named[f"trunk.{path}.A_0"]
    return made, merged


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("options", [dict(), dict(experts=1), dict(targets="all"), dict(shared_rank=2)], ids=str)
def test_every_expert_starts_as_the_base(options, family, dtype):
    """Hidden states and log-probs, against a model that the adapters have never touched, to the rounding of products
    over K times as many rows, which depends on how many threads share them.
    To the bit where the base sees as many rows. Faults: B_k or B_0 random too; products of the adapters in float32, to
    which the base's are raised (bf16)."""
    options = options | (dict(targets=ALL[family]) if "targets" in options else {})
    experts, reference = lora(family, moved=False, dtype=dtype, **options), Heads(small.model(family), 1, dtype=dtype)
    one = batch()
    ids = one.ids.flatten(0, 1)
    with torch.no_grad():
        hidden, want = experts.hidden(ids), reference.hidden(ids)
        assert hidden.shape == (experts.K, *want.shape) and hidden.dtype == dtype
        near = dict(rtol=0, atol=2e-6 if dtype == torch.float32 else 0.02)
        assert all(torch.allclose(h, want, **near) for h in hidden)
        assert torch.equal(hidden.flatten(0, 1), reference.hidden(ids.repeat(experts.K, 1)))
        logp = pair_logp(experts, one)
        assert logp.shape == (COUNT, experts.K, 2) and torch.allclose(
            logp, pair_logp(reference, one).expand_as(logp), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
        model, unembedding = experts.policy(experts.K - 1)
        for n, p in small.model(family).named_parameters():
            assert torch.equal(model.get_parameter(n), p), n
        assert unembedding is model.unembedding


@pytest.mark.parametrize("family", small.FAMILIES)
def test_the_model_given_is_still_the_reference(family):
    """Same modules, same numbers, same gradients asked for, before and after training.
    Faults: projections replaced in the model itself; the model frozen; factors merged into its memory."""
    given, fresh = small.model(family), small.model(family)
    experts = Adapters(given, 2, 3)
    moves(experts)
    experts.policy(1)
    assert str(given) == str(fresh)
    for (name, p), (_, q) in zip(given.named_parameters(), fresh.named_parameters()):
        assert torch.equal(p, q) and p.requires_grad, name
    with torch.no_grad():
        assert torch.equal(pair_logp(Heads(given, 1), batch()), pair_logp(Heads(fresh, 1), batch()))


def test_factors_are_random_where_lora_has_them_so():
    """A_k uniform in +-1/sqrt(in), B_k 0, all by one seed.
    Faults: the same A in two layers, or for two experts; the seed not used; a normal distribution for the uniform."""
    experts = lora(moved=False, rank=200)
    A = torch.stack([experts.trunk.get_submodule(path).A for path in experts.targets])      # (layers,K,R,in)
    assert A.shape == (2, 3, 200, 12) and (A.abs() <= 12**-0.5).all()
    assert abs(A.std() * 36**0.5 - 1) < 0.03 and abs(A.mean()) < 0.01
    rows = A.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)
    assert not any(experts.trunk.get_submodule(path).B.any() for path in experts.targets)
    for seed in (0, 1):
        other = lora(moved=False, rank=200, seed=0) if seed == 0 else Adapters(small.model(), 3, 200, seed=1)
        assert torch.equal(other.trunk.get_submodule(other.targets[1]).A, A[1]) == (seed == 0)


@with_and_without
def test_random_numbers_by_hand(shared):
    """One generator, projection by projection: A of all experts, then A_0. Without a shared part there is no number
    more and no parameter more. Faults: A_0 drawn first, or drawn and thrown away if there is none; A_0 not random."""
    experts, generator = Adapters(small.model(), 3, 3, seed=4, shared=shared), torch.Generator().manual_seed(4)
    for path in experts.targets:
        layer = experts.adapted(path)
        want = torch.rand(3, 3, 12, generator=generator) * 2 - 1
        assert torch.equal(layer.A, want / math.sqrt(12)) and layer.B.shape == (3, 36, 3) and not layer.B.any()
        if shared:
            want = torch.rand(2, 12, generator=generator) * 2 - 1
            assert torch.equal(layer.A_0, want / math.sqrt(12)) and layer.B_0.shape == (36, 2) and not layer.B_0.any()
    names = {name.rpartition(".")[2] for name in trained_state(experts)}
    assert names == set(FACTORS if shared else FACTORS[:2])


def test_projections_by_name():
    """Faults: the unembedding taken for a projection; one of GPT-2's two c_proj; an unknown name ignored."""
    gpt2, llama = small.model("gpt2"), small.model("untied")
    assert projections(gpt2, "") == ["h.0.attn.c_attn", "h.1.attn.c_attn"]
    assert projections(llama, "") == [f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    assert projections(gpt2, "c_proj,c_fc") == [f"h.{i}.{p}" for i in range(2)
                                                for p in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert len(projections(llama, ALL["llama"])) == 14
    assert all(projections(small.model(f), "all") == projections(small.model(f), names) for f, names in ALL.items())
    experts = lora("llama", targets="down_proj")
    wrapped = [path for path, module in experts.trunk.named_modules() if isinstance(module, LoRALinear)]
    assert wrapped == experts.targets == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    for model, name, known in ((gpt2, "q_proj", "c_attn, c_fc, c_proj"), (llama, "lm_head", "down_proj"),
                               (llama, "", "down_proj")):
        with raises_at(repr(name), known, option="targets"):
            projections(model, f"{name},c_fc" if model is gpt2 else f"q_proj,{name}")


# --- what they compute, and their gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("targets", ["default", "all"])
@with_and_without
def test_hidden_states_are_those_of_the_merged_models(shared, targets, family, dtype):
    """Expert k's, and policy(k)'s, against weights merged by hand. Beside a shared part, the own parts of all experts
    have the mean 0, so the mean of the merged weights is W + 2 B_0 A_0.
    Faults: rows ordered by text and not by expert; the scale left out, or 1 in the merged weights; expert j's B with
    expert k's A; policy(k) always expert 0; the shared part without its scale, in expert 0 alone, or in merged weights
    alone; own parts that are no deviations from their mean, or that are without a shared part."""
    experts = lora(family, dtype=dtype, targets=ALL[family] if targets == "all" else "", shared_rank=shared)
    slack, ids = 1e-12 if dtype == torch.float64 else 1e-5, batch().ids.flatten(0, 1)
    with torch.no_grad():
        hidden = experts.hidden(ids)
        for k in range(3):
            want = by_hand(experts, k, family)[0](ids)
            assert (hidden[k] - want).abs().max() <= slack
            assert (experts.policy(k)[0](ids) - want).abs().max() <= slack
            assert (hidden[k] - hidden[k - 1]).abs().max() > 0.1, "experts that are alike test nothing"
        for path in experts.targets if shared else ():
            layer = experts.adapted(path)
            mean = torch.stack([layer.merged(k).weight for k in range(3)]).mean(0)
            assert (mean - layer.linear.weight - 2.0 * layer.B_0 @ layer.A_0).abs().max() <= slack, path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@with_and_without
def test_gradients_are_those_of_the_merged_models(shared, checkpointing, family, dtype):
    """dA = 2 B^T dW and dB = 2 dW A^T, with dW_k from each merged model on its own: of expert j's factors dW_j, or
    beside a shared part sum_k (1[j = k] - 1/K) dW_k; of A_0 and B_0 the sum over all experts.
    Faults: the low-rank product of a detached x; of a detached A x; a base product without gradient to x; the
    shared product of a detached x, or its gradient that of one expert, or the mean; the mean of own parts detached."""
    experts, one = lora(family, dtype=dtype, targets=ALL[family], shared_rank=shared), batch()
    experts.trunk.checkpointing = checkpointing
    weight = torch.linspace(-1, 1, COUNT * 3 * 2, dtype=dtype).view(COUNT, 3, 2) / 20
    (pair_logp(experts, one) * weight).sum().backward()
    named, slack, largest = dict(experts.named_parameters()), 1e-12 if dtype == torch.float64 else 1e-6, 0.0
    of_weight = {path: [] for path in experts.targets}                      # path -> dW of each expert
    for k in range(3):
        model, merged = by_hand(experts, k, family)
        (pair_logp(Heads(model, 1, dtype=dtype), one)[:, 0] * weight[:, k]).sum().backward()
        for path, W in merged.items():
            of_weight[path].append(W.grad)
    for path, each in of_weight.items():
        A, B = named[f"trunk.{path}.A"], named[f"trunk.{path}.B"]
        for j in range(3):
            dW = sum(parts(k, 3, shared)[j] * each[k] for k in range(3))
            with torch.no_grad():
                for got, want in ((A.grad[j], 2.0 * B[j].T @ dW), (B.grad[j], 2.0 * dW @ A[j].T)):
                    assert (got - want).abs().max() <= slack * max(1.0, float(want.abs().max())), (path, j)
                    largest = max(largest, float(want.abs().max()))
    assert largest > 0.1, "a gradient of nothing tests nothing"
    for path, each in of_weight.items() if shared else ():
        A, B, dW = named[f"trunk.{path}.A_0"], named[f"trunk.{path}.B_0"], sum(each)
        with torch.no_grad():
            for got, want in ((A.grad, 2.0 * B.T @ dW), (B.grad, 2.0 * dW @ A.T)):
                assert (got - want).abs().max() <= 3 * slack * max(1.0, float(want.abs().max())), path
                assert want.abs().max() > 1e-3, path


# --- what learns ------------------------------------------------------------------------------------------------------


def moves(experts, steps=3):
    """Optimizer steps of train.py on all pairs."""
    config = small.config(experts=experts.K, rank=3, head_rows=10, beta=0.5, warmup=0)
    given = torch.log_softmax(torch.randn(COUNT, experts.K, generator=torch.Generator().manual_seed(0)), -1)
    problem = small.problem(config, small.pairs(COUNT), small.reference_logp(COUNT), given)
    problem.plan.steps[:] = [(0, list(range(COUNT)))] * steps
    state = small.state(experts, problem, optimizer=make_optimizer(experts, lr=0.1, head_lr=0.01)[0])
    for _ in range(steps):
        train.step(state, problem, train.EM())


@pytest.mark.parametrize("family", small.FAMILIES)
@with_and_without
def test_the_base_is_frozen_and_only_adapters_are_saved(shared, family):
    """Bit-identical after optimizer steps; the adapters have all moved, at head_lr; a policy taken before has not.
    Faults: the base's gradients asked for; adapters, or the shared one, at lr; policy(k) merged into the base's own
    memory, or the live modules themselves; the base among what is saved, or the shared part not."""
    experts, ids = lora(family, shared_rank=shared), batch().ids.flatten(0, 1)
    before = {n: p.detach().clone() for n, p in experts.named_parameters()}
    policy = experts.policy(1)[0]
    with torch.no_grad():
        first = policy(ids)
    moves(experts)
    for name, p in experts.named_parameters():
        factor = name.rpartition(".")[2] in FACTORS
        assert p.requires_grad == factor and torch.equal(p, before[name]) != factor, name
        assert not factor or 0 < (p - before[name]).abs().max() < 0.05, name    # Adam's steps are as long as its rate
    assert set(trained_state(experts)) == {f"experts.{n}" for n in before if n.rpartition(".")[2] in FACTORS}
    with torch.no_grad():
        assert torch.equal(policy(ids), first) and not torch.equal(experts.policy(1)[0](ids), first)


@pytest.fixture(scope="module")
def job(tmp_path_factory, model_dir):
    """A tiny run of train.py with two adapters on two kinds of projections."""
    options = TINY | dict(latent="user", epochs=3, beta=0.5, targets="v_proj,down_proj")
    return tinyjob.run(tmp_path_factory.mktemp("job"), model_dir, tinyjob.make_records(), **options)


def test_a_run_trains_and_loads_for_evaluation(job, model_dir):
    """Every row's texts are its own expert's; the checkpoint holds adapters alone.
    Faults: all experts sampled from expert 0's weights; --targets not passed on; moments or base in the checkpoint."""
    got, metrics = tinyjob.tensors(job), tinyjob.lines(job / "metrics.jsonl")
    paths = [f"layers.{i}.{p}" for i in range(2) for p in ("self_attn.v_proj", "mlp.down_proj")]
    own = {f"experts.trunk.{p}.{f}" for p in paths for f in "AB"}
    assert set(got) == {"table", "gate.log_w"} | own
    assert all(got[f"experts.trunk.{p}.B"][k].any() for p in paths for k in range(2))
    assert abs(metrics[0]["loss"] - 0.6931) < 1e-3 and metrics[-1]["loss"] < metrics[0]["loss"] - 0.01
    run, reference, tokenizer = load_run(job, "cpu", ""), load_model(model_dir), load_tokenizer(model_dir)
    prompts, sampling = [tokenizer.encode(p) for p in ("mn", "o", "pmno", "nn")], Sampling(6, tokenizer.eos, seed=1)
    rows = policy_rows([run], CompletionTask(reference, [Pair(p, [], []) for p in prompts], sampling))
    for k in range(2):
        model, unembedding = run.experts.policy(k)
        want = generate(model, prompts, sampling, unembedding)
        assert rows[f"run head {k}"]["ids"] == want
    assert rows["run head 0"]["ids"] != rows["run head 1"]["ids"] != rows["reference"]["ids"]


def test_state_of_other_projections_is_refused(tmp_path):
    """Fault: names compared without their paths."""
    with raises_at("q_proj", file=tmp_path):
        load_state(lora("llama"), trained_state(lora("llama", targets="k_proj,v_proj")), tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", small.FAMILIES)
def test_an_adapter_there_and_back(family, tmp_path):
    """Exact to the bit, into one expert of several, under PEFT's names.
    Faults: expert 0 written whatever k is; the prefix of the other family; fan_in_fan_out left out; alpha = r."""
    moved, fresh = lora(family, targets=ALL[family]), lora(family, targets=ALL[family], moved=False)
    before = {n: t.clone() for n, t in trained_state(fresh).items()}
    save_adapter(moved, 1, tmp_path, "some/base")
    tensors, settings = (load_file(tmp_path / "adapter_model.safetensors"),
                         json.loads((tmp_path / "adapter_config.json").read_text()))
    first = {"gpt2": "transformer.h.0.attn.c_attn"}.get(family, "model.layers.0.self_attn.q_proj")
    assert tensors[f"base_model.model.{first}.lora_A.weight"].shape == (3, 12)
    assert tensors[f"base_model.model.{first}.lora_B.weight"].shape == ({"gpt2": 36}.get(family, 16), 3)
    assert len(tensors) == 2 * len(moved.targets)
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base", "r": 3,
              "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": family == "gpt2"}
    assert settings.items() >= wanted.items() and set(settings["target_modules"]) == set(ALL[family].split(","))
    load_adapter(fresh, 2, tmp_path)
    for (name, got), want in zip(trained_state(fresh).items(), trained_state(moved).values()):
        assert torch.equal(got[2], want[1]) and torch.equal(got[:2], before[name][:2]), name


@pytest.mark.parametrize("family", small.FAMILIES)
def test_an_adapter_with_the_shared_part_is_one_of_a_larger_rank(family, tmp_path):
    """Expert 1 as a PEFT adapter of rank S + K R, loaded into plain adapters of that rank: the same weights, which are
    W + 2 (B_0 A_0 + B_1 A_1 - mean_j B_j A_j). Faults: the shared part, or the mean, left out; rank R in the settings;
    alpha 2 R; A_0 beside B_k; an adapter loaded into experts with a shared part, which would add it twice."""
    moved, ids = lora(family, targets=ALL[family], shared_rank=2), batch().ids.flatten(0, 1)
    save_adapter(moved, 1, tmp_path, "some/base")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (11, 22)
    plain = Adapters(small.model(family), 2, 11, ALL[family])
    load_adapter(plain, 1, tmp_path)
    made, merged = by_hand(moved, 1, family)
    with torch.no_grad():
        for path, W in merged.items():
            assert torch.equal(plain.adapted(path).merged(1).weight, moved.adapted(path).merged(1).weight), path
            assert torch.allclose(moved.adapted(path).merged(1).weight, W, rtol=0, atol=1e-6), path
        assert (plain.policy(1)[0](ids) - made(ids)).abs().max() <= 1e-5
        layer = moved.adapted(moved.targets[0])
        (A, B), own = layer.of_expert(2), layer.B @ layer.A                 # own (K,out,in)
        assert torch.allclose(B @ A, layer.B_0 @ layer.A_0 + own[2] - own.mean(0), rtol=0, atol=1e-6)
    before = {name: t.clone() for name, t in trained_state(moved).items()}
    with pytest.raises(AssertionError, match="shared adapter"):
        load_adapter(moved, 0, tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in trained_state(moved).items())


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_copied(tmp_path):
    """The file, what was got and wanted. Faults: each check taken out; names compared and not shapes; copied before
    the check."""
    experts, name = lora(), "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
    save_adapter(lora(moved=False), 0, tmp_path, "base")
    before = {n: t.clone() for n, t in trained_state(experts).items()}
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, text = load_file(file), settings.read_text()

    def refused(at, *named):
        with raises_at(*named, file=at):
            load_adapter(experts, 1, tmp_path)
        assert all(torch.equal(t, before[n]) for n, t in trained_state(experts).items())

    save_file(tensors | {name: torch.zeros(2, 12)}, file)
    refused(file, name, "(2, 12)", "(3, 12)", "rank 3", "['c_attn']")
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    refused(file, name, "none", "(3, 12)")
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 12)}, file)
    refused(file, "base_model.model.lm_head.lora_A.weight", "(3, 12)", "none")
    file.write_bytes(file.read_bytes()[:-100])
    refused(file)
    save_file(tensors, file)
    for key, value in {"peft_type": "IA3", "use_dora": True, "use_rslora": True, "bias": "all", "r": 0,
                       "lora_alpha": None, "alpha_pattern": {"c_attn": 1}}.items():
        settings.write_text(json.dumps(json.loads(text) | {key: value}))
        refused(settings, key, repr(value))
    settings.unlink()
    refused(settings)


def test_another_alpha_goes_into_b(tmp_path):
    """Fault: lora_alpha not read."""
    moved, experts = lora(), lora(moved=False)
    save_adapter(moved, 0, tmp_path, "base")
    settings = tmp_path / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"lora_alpha": 6', '"lora_alpha": 15'))
    load_adapter(experts, 0, tmp_path)
    for (name, got), want in zip(factors(experts, 0).items(), factors(moved, 0).values()):
        assert torch.equal(got, want * 2.5 if "lora_B" in name else want), name


def test_an_adapter_is_written_atomically(tmp_path, monkeypatch):
    """Fault: written under its own name."""
    save_adapter(lora(moved=False), 0, tmp_path, "base")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic, "save_file", broken)
    with pytest.raises(OSError):
        save_adapter(lora(), 0, tmp_path, "other")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_expert_of_every_sharing_is_saved_as_a_model(sharing, family, tmp_path):
    """policy(k), saved and loaded: the same logits; ties stay where the expert has no unembedding of its own.
    Faults: the model's own unembedding in place of the expert's; a tied model untied by its own embedding."""
    experts, ids = small.experts(family, **SHARINGS[sharing]), batch().ids.flatten(0, 1)
    for k in range(experts.K):
        model, unembedding = experts.policy(k)
        weights.save_model(model, tmp_path / str(k), unembedding)
        got = load_model(tmp_path / str(k))
        with torch.no_grad():
            assert torch.equal(got(ids) @ got.unembedding.T, model(ids) @ unembedding.T)
        assert got.config.tied == (family != "untied" and sharing not in ("full", "low-rank", "head"))


def test_the_command_writes_every_expert_of_a_run(job, model_dir, tmp_path, capsys):
    """Adapters name the model's directory and carry its tokenizer; heads become models.
    Faults: one run's experts beside another's; all experts expert 0; the tokenizer left out; a folder of runs taken;
    options of the evaluation ignored."""
    evaluation.main([str(job), "--export", str(tmp_path / "lora")])
    run, experts = load_run(job, "cpu", ""), Adapters(load_model(model_dir), 1, 2, "v_proj,down_proj")
    assert re.search(rf"{tmp_path}/lora/expert-1: mixture weight 0\.5000", capsys.readouterr().out)
    for k in range(2):
        place = tmp_path / "lora" / f"expert-{k}"
        assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model_dir)
        assert load_tokenizer(place).key == load_tokenizer(model_dir).key
        load_adapter(experts, 0, place)
        for got, want in zip(trained_state(experts).values(), trained_state(run.experts).values()):
            assert torch.equal(got[0], want[k])
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="heads")
    evaluation.main([str(out), "--export", str(tmp_path / "models")])
    run, ids = load_run(out, "cpu", ""), torch.arange(30)[None]
    for k in range(2):
        model, (trunk, W) = load_model(tmp_path / "models" / f"expert-{k}"), run.experts.policy(k)
        assert load_tokenizer(tmp_path / "models" / f"expert-{k}").key == load_tokenizer(model_dir).key
        assert torch.equal(model(ids) @ model.unembedding.T, trunk(ids) @ W.T)
    for words, where in (([str(job), "--export", str(tmp_path / "models")], {"file": tmp_path / "models"}),
                         ([str(tmp_path), "--export", str(tmp_path / "x")], {"file": tmp_path}),
                         ([str(job), "--export", str(tmp_path / "x"), "--limit", "3"], {"option": "limit"})):
        with raises_at(**where):
            evaluation.main(words)
    assert not (tmp_path / "x").exists()


def test_adapters_of_a_model_that_is_no_directory_bring_their_base(tmp_path, model_dir, monkeypatch):
    """A GGUF file cannot be opened as a PEFT adapter's base: it is written beside them.
    Faults: the file named as the base; the base written without its tokenizer."""
    monkeypatch.setattr(exporting, "load_tokenizer", lambda name, data: load_tokenizer(model_dir))
    metadata, tensors = as_gguf(small.model("llama"))
    write_gguf(tmp_path / "m.gguf", {name: value for name, value in metadata.items() if value is not None}, tensors)
    export_experts(lora("llama", experts=2), tmp_path / "out", [str(tmp_path / "m.gguf")])
    base = tmp_path / "out" / "base"
    assert weights.content_key(load_model(base)) == weights.content_key(load_model(tmp_path / "m.gguf"))
    for place in (base, tmp_path / "out" / "expert-0", tmp_path / "out" / "expert-1"):
        assert (place / "tokenizer.json").is_file()
        assert place == base or str(base) in (place / "adapter_config.json").read_text()


def test_a_shared_adapter_needs_a_start():
    """Equal experts give deviations no gradient but rounding. Fault: the option accepted, and a run that depends on how
    its batches are cut."""
    options = dict(data="", model="", out="", sharing="lora", shared_rank=2)
    validate(train.TrainConfig(**options))
    with raises_at("--start linear", option="start"):
        validate(train.TrainConfig(**options, start="none"))
    with raises_at("--experts 2", option="shared_rank"):
        validate(train.TrainConfig(**options, experts=1))
