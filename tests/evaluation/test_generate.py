"""Sampling: against loops without a cache, and against the full enumeration of everything a tiny model can say.

Frequencies are tested by chi-square at fixed seeds; `assert_frequencies` fails for a true
law once in ten thousand seeds.
"""

import itertools
import math

import numpy as np
import pytest
import small
import torch

from mixdpo.evaluation.generate import (
    CACHE,
    Sampling,
    choose_expert,
    draw,
    first_above,
    generate,
    generate_heads,
    rows_at_once,
)

EOS = 3
PROMPTS = [[5], [7, 2, 9, 11, 4, 6, 1], [8, 8], [1, 2, 4, 12], [5], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]]


def assert_frequencies(counts, probabilities):
    """Pearson's chi-square; outcomes expected less than 5 times are pooled.
    The bound is Wilson and Hilferty's 1 - 1e-4 quantile."""
    n = sum(counts)
    expected = [n * p for p in probabilities]
    assert abs(sum(probabilities) - 1) < 1e-6
    rare = [i for i, e in enumerate(expected) if e < 5]
    cells = [(counts[i], e) for i, e in enumerate(expected) if e >= 5]
    cells += [(sum(counts[i] for i in rare), sum(expected[i] for i in rare))]
    statistic = sum((c - e) ** 2 / e for c, e in cells if e > 0) + sum(math.inf for c, e in cells if e == 0 and c)
    free = len([e for _, e in cells if e > 0]) - 1
    bound = free * (1 - 2 / (9 * free) + 3.719 * math.sqrt(2 / (9 * free))) ** 3
    assert statistic < bound, (statistic, bound, counts, expected)


@torch.no_grad()
def logits_after(model, ids, unembedding=None):
    """Of the next token, from the whole text and without a cache: (V,)."""
    return model(torch.tensor([ids]))[0, -1] @ (model.unembedding if unembedding is None else unembedding).T


def greedy(model, prompt, max_new, eos, unembedding=None):
    out = []
    while len(out) < max_new and eos not in out:
        out.append(int(logits_after(model, prompt + out, unembedding).argmax()))
    return out


def sampled(model, prompt, max_new, eos, temperature, uniforms, unembedding=None):
    """The first token whose cumulative probability exceeds the uniform, one token a pass."""
    out = []
    for u in uniforms[:max_new]:
        if eos in out:
            break
        p = torch.softmax(logits_after(model, prompt + out, unembedding).double() / temperature, -1).tolist()
        out.append(next((v for v in range(len(p)) if sum(p[: v + 1]) > u), len(p) - 1))
    return out


@pytest.mark.parametrize("family", small.FAMILIES)
def test_greedy_equals_the_loop_without_a_cache(family):
    """Prompts of any lengths in one batch, in small batches, with and without an end.
    Catches: the prefill's last slot in place of the last true token, padding seen by later tokens,
    positions off by the padding, results returned in the sorted order."""
    model = small.model(family)
    want = [greedy(model, p, 12, EOS) for p in PROMPTS]
    eos = next(v for w in want for v in w[1:] if any(v not in other for other in want))     # ends some rows early
    for end in (EOS, eos):
        want = [greedy(model, p, 12, end) for p in PROMPTS]
        for batch in (64, 4, 1):
            assert generate(model, PROMPTS, Sampling(12, end, temperature=0, batch=batch)) == want, (end, batch)
    assert any(w[-1] == eos and len(w) < 12 for w in want) and any(len(w) == 12 for w in want)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_sampling_equals_the_loop_without_a_cache(family):
    """The same uniforms through a loop over Python floats.
    Catches: a temperature that multiplies, a uniform used for two tokens, the cumulative sum read from the wrong side,
    uniforms that go with the place in the sorted batch."""
    model = small.model(family)
    for seed, temperature in ((0, 1.0), (1, 0.7), (2, 1.6)):
        want = [sampled(model, p, 10, EOS, temperature, np.random.default_rng([seed, n]).random(10))
                for n, p in enumerate(PROMPTS)]
        assert generate(model, PROMPTS, Sampling(10, EOS, temperature=temperature, seed=seed)) == want
    assert len({tuple(w) for w in want}) == len(want), "row 0 and row 4 have one prompt and must have their own noise"


@pytest.mark.parametrize("family", small.FAMILIES)
def test_a_text_is_the_same_alone_and_in_any_batch(family):
    """Given its row number.
    Catches: noise that depends on batch size, order, other rows or max_new's place in the stream."""
    model = small.model(family)
    together = generate(model, PROMPTS, Sampling(10, EOS, seed=4))
    for batch in (1, 2, 5):
        assert generate(model, PROMPTS, Sampling(10, EOS, seed=4, batch=batch)) == together
    for n, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], Sampling(10, EOS, seed=4), rows=[n]) == [together[n]]
    turned = generate(model, PROMPTS[::-1], Sampling(10, EOS, seed=4), rows=list(range(len(PROMPTS)))[::-1])
    assert turned == together[::-1]
    assert [ids[:4] for ids in together] == generate(model, PROMPTS, Sampling(4, EOS, seed=4))
    assert generate(model, PROMPTS, Sampling(10, EOS, seed=5)) != together


def test_the_end_token():
    """Kept once, and last; nothing after it; what ends late is not cut by what ends early;
    an id of the prompt is not an end.
    Catches: EOS dropped or doubled, a batch that stops at the first end, rows padded with EOS to one length."""
    model = small.model("gpt2", vocab=7)
    texts = generate(model, [[EOS], [1, EOS, 2]] * 100, Sampling(12, EOS, seed=0))
    assert all(EOS not in ids[:-1] and 1 <= len(ids) <= 12 for ids in texts)
    assert all(ids[-1] == EOS for ids in texts if len(ids) < 12)
    lengths = {len(ids) for ids in texts}
    assert {1, 2, 3, 12} <= lengths and any(ids[-1] != EOS for ids in texts if len(ids) == 12)


def test_contracts():
    """Catches: an empty prompt that reads the last slot, a text longer than the context that fails
    deep inside or in silence."""
    model, calls = small.model(context=16), []
    with pytest.raises(AssertionError, match="empty prompt"):
        generate(model, [[1], []], Sampling(4, EOS))
    with pytest.raises(AssertionError, match="17 tokens.* 16"):
        generate(model, [[1], [1] * 12], Sampling(5, EOS))
    assert all(1 <= len(ids) <= 4 for ids in generate(model, [[1] * 12], Sampling(4, EOS)))
    assert generate(model, [], Sampling(4, EOS)) == []
    generate(model, [[1]] * 5, Sampling(4, EOS, batch=2), progress=lambda *call: calls.append(call))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_another_head_on_the_same_trunk():
    """Catches: an unembedding argument that is ignored, or used for the first token alone."""
    model = small.model("llama")
    head = torch.randn(small.VOCAB, 12, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(8, EOS, temperature=0)
    got = generate(model, PROMPTS, sampling, unembedding=head)
    assert got == [greedy(model, p, 8, EOS, head) for p in PROMPTS] != generate(model, PROMPTS, sampling)


def test_heads_of_one_trunk_decode_together():
    """Rows of different heads in one batch: each text equals that of its own head alone, with the random numbers of its
    own prompt; its log-prob is what a pass over the finished text gives, at the temperature of sampling. Catches:
    another row's head, heads in another order after sorting by length, a prompt that is asked for twice decoded once;
    log-probs of temperature 1, of the prompts in sorted order, and of steps after a text's end."""
    model, generator = small.model("gpt2"), torch.Generator().manual_seed(3)
    heads = [torch.randn(model.unembedding.shape, generator=generator) for _ in range(3)]
    for temperature in (0, 1.0, 0.5):
        got, logps = generate_heads(model, heads, PROMPTS, Sampling(8, EOS, temperature, seed=4, batch=5))
        want = [[text_logp(model, head, prompt, ids, temperature or 1.0) for prompt, ids in zip(PROMPTS, texts)]
                for head, texts in zip(heads, got)]
        torch.testing.assert_close(logps, torch.tensor(want), atol=1e-4, rtol=0)
        assert min(len(ids) for texts in got for ids in texts) < 8 or not temperature
        alone = [[generate(model, [p], Sampling(8, EOS, temperature, seed=4), head, rows=[n])[0]
                  for n, p in enumerate(PROMPTS)] for head in heads]
        assert got == alone and len({tuple(ids) for texts in got for ids in texts}) > len(PROMPTS)


@torch.no_grad()
def text_logp(model, head, prompt: list[int], ids: list[int], temperature: float) -> float:
    """The log-prob of a completion, from one pass over the finished text."""
    states = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
    return (states @ head.T / temperature).log_softmax(-1)[range(len(ids)), ids].sum().item()


def test_rows_at_once():
    """By hand: keys and values of each layer, of as many numbers as the model is wide. Catches: keys alone, numbers for
    bytes, no row at all."""
    model = small.model("gpt2")
    config = model.config
    assert rows_at_once(model, 10) == 2**30 // (2 * config.layers * 10 * config.width * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CACHE, "cpu", 100)
        assert rows_at_once(model, 10) == 1


# --- one draw ---------------------------------------------------------------------------------------------------------


def test_draw_inverts_the_cumulative_distribution():
    """At and next to every step of it.
    Catches: >= for >, a token of probability 0 drawn, a uniform near 1 beyond the last token,
    a cumulative sum in float32 over a large vocabulary."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-16], dtype=torch.float64)
    assert draw(p.log().expand(6, -1), 1.0, u).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw(torch.tensor([[1.0, 3.0, 2.0]]), 0, None).tolist() == [1]
    V = 200_000
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    assert (draw(torch.zeros(64, V), 1.0, u) - (u * V).long()).abs().max() <= 1


def test_a_point_at_the_end_of_all_is_in_the_last_place_that_adds():
    """Where rounding put it. Catches: a place behind the last, or one that adds nothing."""
    total = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.5, 1.0]], dtype=torch.float64)
    place, rest = first_above(total, total[:, -1])
    assert place.tolist() == [1, 2] and ((rest > 0.49) & (rest < 0.5 + 1e-12)).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draw_has_the_right_frequencies(temperature):
    """Catches: a temperature inverted, Gumbel noise twice, argmax."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    u = torch.from_numpy(np.random.default_rng(0).random(5000))
    counts = torch.bincount(draw(logits.expand(5000, -1), temperature, u), minlength=5).tolist()
    assert_frequencies(counts, torch.softmax(logits.double() / temperature, -1).tolist())


# --- whole texts against full enumeration -----------------------------------------------------------------------------


def enumerate_texts(model, prompt, max_new, eos, vocab, unembedding=None):
    """Every continuation that can come out, with its probability, from full forward passes: {ids: p}."""
    texts = {}
    for ids in itertools.chain.from_iterable(itertools.product(range(vocab), repeat=t) for t in range(1, max_new + 1)):
        if eos in ids[:-1] or (len(ids) < max_new and ids[-1] != eos):
            continue
        logps = [torch.log_softmax(logits_after(model, prompt + list(ids[:t]), unembedding).double(), -1)[v]
                 for t, v in enumerate(ids)]
        texts[ids] = math.exp(sum(logps))
    return texts


def count(texts, law):
    index = {ids: i for i, ids in enumerate(law)}
    return np.bincount([index[tuple(ids)] for ids in texts], minlength=len(law)).tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_have_the_policys_law(family):
    """3,000 texts of up to 3 tokens of 4.
    Catches: tokens of one row that share a uniform (the first token's law is then still right),
    a cache that is one token behind, an end that is ignored."""
    model = small.model(family, vocab=4)
    law = enumerate_texts(model, [1, 2], 3, EOS, 4)
    assert len(law) == 1 + 3 + 9 * 4 and max(law.values()) < 0.5
    assert_frequencies(count(generate(model, [[1, 2]] * 3000, Sampling(3, EOS, seed=0, batch=3000)), law), law.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mixture_has_the_law_of_m1(seed):
    """M13: z ~ w, then the whole text from expert z, is pi = sum_k w_k pi_k (M1), enumerated.
    Catches: z drawn from the noise that draws the first token, z drawn anew for each token
    (the law's joint differs, its first token does not), weights of the experts exchanged."""
    experts = small.experts("gpt2", experts=2, rank=0, seed=1)
    with torch.no_grad():
        experts.W_k.mul_(2)
    log_w = torch.tensor([0.3, 0.7]).log()
    heads = [experts.policy(k)[1][:4] for k in range(2)]                    # the experts' first four tokens
    trunk = experts.trunk
    law = [enumerate_texts(trunk, [1, 2], 3, EOS, 4, head) for head in heads]
    mixture = {ids: 0.3 * law[0][ids] + 0.7 * law[1][ids] for ids in law[0]}
    assert sum(abs(law[0][ids] - law[1][ids]) for ids in mixture) > 0.5, "experts that say the same test nothing"
    z = choose_expert(log_w, 3000, "mixture", seed)
    texts = [generate(trunk, [[1, 2]] * 3000, Sampling(3, EOS, seed=seed, batch=3000), head) for head in heads]
    assert_frequencies(count([texts[k][n] for n, k in enumerate(z.tolist())], mixture), mixture.values())


def test_choose_expert():
    """M13.
    Catches: sparse that samples, a gate (B,K) whose row 0 decides for all, log weights taken for weights,
    the same z for every prompt, unseeded noise."""
    w = torch.tensor([0.2, 0.5, 0.3])
    z = choose_expert(w.log(), 4000, "mixture", 0)
    assert z.shape == (4000,) and z.dtype == torch.int64
    assert_frequencies(torch.bincount(z, minlength=3).tolist(), w.double().tolist())
    assert torch.equal(z, choose_expert(w.log(), 4000, "mixture", 0))
    assert not torch.equal(z, choose_expert(w.log(), 4000, "mixture", 1))
    assert choose_expert(w.log(), 4, "sparse", 0).tolist() == [1] * 4
    assert choose_expert(w.log(), 4, "2", 0).tolist() == [2] * 4
    assert choose_expert(torch.zeros(3), 2, "sparse", 0).tolist() == [0, 0]
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]).log().repeat(1000, 1)
    z = choose_expert(gate, 3000, "mixture", 0).view(1000, 3)
    assert not z[:, 0].any() and z[:, 1].all()
    assert_frequencies(torch.bincount(z[:, 2], minlength=2).tolist(), [0.5, 0.5])
    assert choose_expert(gate, 3000, "sparse", 0).view(1000, 3)[0].tolist() == [0, 1, 0]
