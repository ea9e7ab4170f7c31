"""attention.py, gpt2.py and llama.py against transformers' own numbers (tests/golden), and against themselves: with and
without a cache, padded and not, checkpointed and not, in bf16 and in fp32.

The docstring of each test names faults that it was seen to fail on.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mixdpo.models import attention
from mixdpo.models.attention import attend, attend_by_products
from mixdpo.models.gpt2 import GPT2, SIZES, GPT2Config
from mixdpo.models.llama import Llama, LlamaConfig, RMSNorm, RopeScaling, rope_frequencies
from mixdpo.models.weights import load_model

GOLDEN = Path(__file__).parents[1] / "golden"
RELATIVES = ["qwen2", "qwen3", "mistral", "smollm3", "olmo2"]     # of Llama
CASES = ["gpt2", "gpt2-inner", "llama-tied", "llama-untied", "llama3-scaling", *RELATIVES]
FAMILIES = ["gpt2", "llama-tied"]                       # where one case of each family is enough
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=no_cuda)]


def golden(case, **kwargs):
    """-> (model, what transformers computed with it)"""
    return load_model(GOLDEN / case, **kwargs), load_file(GOLDEN / case / "golden.safetensors")


def difference(a, b):
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return (a.cpu().double() - b.cpu().double()).abs().max().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_transformers(case, device):
    """Faults: erf GELU; eps of another size; no final norm; neighbours instead of halves turned; frequencies not
    scaled, or not blended; key heads dealt out in turn instead of in groups; a transpose left out; the MLP's silu on
    the other half; the embedding used where there is an unembedding."""
    model, want = golden(case, device=device)
    logits = model(want["ids"].to(device)) @ model.unembedding.T
    assert difference(logits, want["logits"]) <= (1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy_generation_equals_transformers(case, cached):
    """Faults: positions start again at 0 in each call; a slot beyond the own position seen; lengths not advanced."""
    model, want = golden(case)
    ids, steps = want["prompt"], want["greedy"].shape[1]
    cache = model.new_cache(len(ids), ids.shape[1] + steps) if cached else None
    new = ids
    for _ in range(steps):
        hidden = model(new if cached else ids, cache)
        new = (hidden[:, -1] @ model.unembedding.T).argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), dim=1)
    assert ids[:, -steps:].tolist() == want["greedy"].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_ragged_rows_through_the_cache_equal_each_row_alone(case, device):
    """Prompts of 1, 4 and 7 tokens padded to 7, then calls with 1, 2 and 1 tokens, against each row in one call.

    Faults: the mask made from the extent instead of each row's position; new tokens written behind the padding; query
    heads grouped the other way in the one-token path; only the first row's length used.
    """
    model, want = golden(case, device=device)
    prompts, calls = [1, 4, 7], [1, 2, 1]
    rows = want["ids"].flatten()[: 3 * 11].view(3, 11).to(device)
    cache = model.new_cache(rows=3, tokens=13)
    padded = rows[:, :7].clone()
    for n, length in enumerate(prompts):
        padded[n, length:] = 0
    got = [[row[:length]] for row, length in zip(model(padded, cache), prompts)]
    assert cache.length.tolist() == [7, 7, 7]
    cache.length = torch.tensor(prompts, device=device)
    for tokens in calls:
        new = torch.stack([row[at : at + tokens] for row, at in zip(rows, cache.length.tolist())])
        for row, hidden in zip(got, model(new, cache)):
            row.append(hidden)
    assert cache.length.tolist() == [length + sum(calls) for length in prompts]
    for n, length in enumerate(prompts):
        alone = model(rows[n : n + 1, : length + sum(calls)])[0]
        assert difference(torch.cat(got[n]), alone) <= (1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize(("H", "H_kv"), [(4, 4), (6, 3), (4, 1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_attention_by_products_is_attention(H, H_kv, T, S):
    """Values and gradients beside torch's, causal and under a mask of each row's own. Faults: query heads dealt out to
    key heads in turn; the mask of another row; a scale left out; what is masked counted in the sum."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8, generator=g, dtype=torch.float64).requires_grad_()
               for heads, length in ((H, T), (H_kv, S), (H_kv, S)))
    mask = torch.rand(2, 1, T, S, generator=g) < 0.6
    mask[..., 0] = True                                                     # everybody sees something
    for seen in (mask, None) if T == S else (mask,):
        both = []
        for function in (lambda: attend_by_products(q, k, v, seen),
                         lambda: F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None,
                                                                enable_gqa=H != H_kv)):
            y = function()
            both.append([y.detach(), *torch.autograd.grad(y.sin().sum(), (q, k, v))])
        assert all(difference(a, b) < 1e-6 for a, b in zip(*both, strict=True))


def test_short_rows_in_bf16_go_by_products(monkeypatch):
    """On a CPU alone, and within bf16's rounding of the same. Faults: a route never taken; taken for float32."""
    calls = []
    monkeypatch.setattr(attention, "attend_by_products", lambda *inputs: calls.append(1) or attend_by_products(*inputs))
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    exact = attend(x, x, x)
    assert not calls
    assert difference(attend(*[x.bfloat16()] * 3), exact) < 0.03 and len(calls) == 1


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_a_position_sees_nothing_behind_it(case):
    """What stands behind a position, padding or text, changes nothing. Fault: attention that is not causal."""
    model, want = golden(case)
    ids = want["ids"].clone()
    before = model(ids)
    ids[:, 9:] = 0
    assert difference(model(ids)[:, :9], before[:, :9]) <= 1e-6
    assert difference(model(ids)[:, 9:], before[:, 9:]) > 0.1


@pytest.mark.parametrize("case", FAMILIES)
def test_checkpointing_gives_the_same_gradients_and_keeps_less(case):
    """Faults: the switch not looked at; a block that computes something else the second time."""
    model, want = golden(case)
    gradients, kept = [], []
    for model.checkpointing in (False, True):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model(want["ids"])
        model.zero_grad()
        (hidden @ model.unembedding.T).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        kept.append(size)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient"
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < kept[0] / 3, f"checkpointing keeps {kept[1]} of {kept[0]} numbers"


@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_training_mode_changes_nothing(case):
    """Fault: a dropout."""
    model, want = golden(case)
    assert torch.equal(model.train()(want["ids"]), model.eval()(want["ids"]))


@pytest.mark.parametrize("name, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
    ("smollm2", 134_515_008)])
def test_published_sizes(name, count):
    """The published numbers of parameters. Faults: a width, a number of layers, a bias, an untied unembedding."""
    with torch.device("meta"):
        model = Llama(LlamaConfig()) if name == "smollm2" else GPT2(GPT2Config(**SIZES[name]))
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_unembedding_is_the_embedding_when_tied():
    """Fault: a copy of the embedding, which would be trained apart from it."""
    for case, embedding in (("gpt2", "wte"), ("llama-tied", "embed_tokens")):
        model, _ = golden(case)
        assert model.unembedding is getattr(model, embedding).weight
    model, _ = golden("llama-untied")
    assert model.unembedding is model.lm_head.weight and model.unembedding is not model.embed_tokens.weight


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_bf16_far_into_a_row(case, how):
    """bf16 stays within its rounding of fp32 at positions where a bf16 angle would be off by whole radians (1,000 has a
    spacing of 4 there). Faults: positions or angles in bf16."""
    torch.manual_seed(0)
    if case == "gpt2":
        model = GPT2(GPT2Config(vocab=61, context=1200, width=32, layers=2, heads=2))
    else:
        model = Llama(LlamaConfig(vocab=61, context=1200, width=32, inner=48, layers=2, heads=4, kv_heads=2))
    for p in model.parameters():
        p.data = (torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() == 2 else p).bfloat16().float()
    ids = torch.randint(61, (1, 1200))
    exact = model(ids)                                  # fp32, with weights that bf16 holds exactly
    if how == "weights":
        rough = model.bfloat16()(ids)
        assert rough.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(ids)
    error = (rough.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert error < 0.02, f"relative error {error:.3f}"


@torch.no_grad()
def test_rms_norm_in_bf16_rounds_twice_at_most():
    """Once for x / rms and once for the gain, 2^-9 each; the mean of squares is fp32's. Fault: all of it in bf16."""
    torch.manual_seed(0)
    norm, x = RMSNorm(576, 1e-5), 30 * torch.randn(50, 576).bfloat16()
    norm.weight.data = torch.randn(576)
    norm.bfloat16()
    exact = norm.weight.double() * x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert ((norm(x).double() - exact) / exact).abs().max() < 1.02 * 2**-8


@torch.no_grad()
def test_bf16_through_the_cache():
    """Decoding in bf16, and under autocast with an fp32 cache, is the uncached call within bf16's rounding. Fault: new
    keys of another dtype than the cache's."""
    model, want = golden("llama-tied")
    exact = model(want["ids"])
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, 29)
        stepped = torch.cat([model(part, cache) for part in want["ids"].split([20, 1, 8], dim=1)], dim=1)
    assert (stepped.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt() < 0.03
    model.bfloat16()
    cache = model.new_cache(2, 29)
    assert cache.keys.dtype == torch.bfloat16
    stepped = torch.cat([model(part, cache) for part in want["ids"].split([20, 1, 8], dim=1)], dim=1)
    assert (stepped.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt() < 0.03


def test_llama3_frequencies_by_hand():
    """Each of the three cases of Llama 3's rule, from its definition. Faults: low and high exchanged; no blend."""
    config = LlamaConfig(width=8, heads=1, kv_heads=1, head_dim=8, theta=1e4, scaling=RopeScaling(8.0, 1.0, 4.0, 1000))
    got = rope_frequencies(config).tolist()
    for i, f in enumerate(got):
        plain = 1e4 ** (-2 * i / 8)                     # 1, 0.1, 0.01, 0.001
        turns = 1000 * plain / 6.283185307179586        # 159, 15.9, 1.59, 0.16
        smooth = (turns - 1.0) / (4.0 - 1.0)
        want = plain if turns > 4 else plain / 8 if turns < 1 else (1 - smooth) * plain / 8 + smooth * plain
        assert abs(f / want - 1) < 1e-6
    assert got[1] == pytest.approx(0.1) and got[3] == pytest.approx(0.001 / 8) and 0.01 / 8 < got[2] < 0.01


@pytest.mark.parametrize("case", FAMILIES)
def test_what_does_not_fit_is_refused(case):
    """Fault: a check left out (a row longer than the context, a full cache, another number of rows, gradients)."""
    model, want = golden(case)
    context = model.config.context
    with pytest.raises(AssertionError, match="context"):
        model(torch.zeros(1, context + 1, dtype=torch.int64))
    with pytest.raises(AssertionError, match="context"):
        model.new_cache(1, context + 1)
    with pytest.raises(AssertionError, match="no_grad"):
        model(want["ids"][:, :3], model.new_cache(2, 8))
    with torch.no_grad():
        cache = model.new_cache(2, 8)
        model(want["ids"][:, :6], cache)
        with pytest.raises(AssertionError, match="8 slots"):
            model(want["ids"][:, 6:9], cache)
        with pytest.raises(AssertionError, match="rows"):
            model(want["ids"][:1, :1], cache)


def test_a_seed_makes_the_same_model():
    """Fault: initialisation that does not come from torch's seed."""
    for make in (lambda: GPT2(GPT2Config(vocab=11, context=8, width=8, layers=1, heads=2)),
                 lambda: Llama(LlamaConfig(vocab=11, context=8, width=8, inner=12, layers=1, heads=2, kv_heads=1))):
        models = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            models.append(torch.nn.utils.parameters_to_vector(make().parameters()))
        assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])
