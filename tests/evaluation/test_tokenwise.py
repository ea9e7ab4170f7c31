"""Sampling from the mixture token by token: the sampler's own probability of every text that a tiny model can say,
against full enumeration without a cache, in Python floats; then frequencies, rows, the end cases.

The sampler is driven along every text: `draw` is replaced by one that notes the distribution it was given and returns
the text's next token. All else (caches, re-weighting, the shared trunk, batches) is the sampler's.
"""

import itertools
import math

import numpy as np
import pytest
import small
import torch
from test_generate import assert_frequencies, count, logits_after, sampled

from mixdpo.evaluation import generate as module
from mixdpo.evaluation.generate import Sampling, choose_expert, generate, generate_tokenwise, next_token
from mixdpo.mixture import mixture_logp, prefix_log_weights

V, EOS, LONGEST = 4, 3, 3
TEXTS = [ids for t in range(1, LONGEST + 1) for ids in itertools.product(range(V), repeat=t)
         if EOS not in ids[:-1] and (ids[-1] == EOS or t == LONGEST)]                                # 1 + 3 + 9 * 4
PROMPTS = [[1], [1, 2], [2, 0, 3, 1, 1]]                                    # by length, as the sampler takes them
WEIGHTS = {2: [0.3, 0.7], 3: [0.2, 0.5, 0.3]}
GATES = {2: [[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]], 3: [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.4, 0.35, 0.25]]}


def make_policies(sharing, K, family="gpt2", vocab=V):
    """trunk: K heads on one model; models: K models; mixed: the last expert on the first one's trunk.
    Sharp, so that a token says much about its expert."""
    models = [small.model(family, seed=k, vocab=vocab, scale=8.0) for k in range(K)]
    trunks = {"trunk": [models[0]] * K, "models": models, "mixed": models[:-1] + models[:1]}[sharing]
    return [(trunk, model.unembedding.detach()) for trunk, model in zip(trunks, models)]


@torch.no_grad()
def expert_law(policy, prompt, temperature):
    """The probability of each of TEXTS under one expert, each of its tokens' distributions tempered."""
    (model, head), law = policy, []
    for ids in TEXTS:
        logits = model(torch.tensor([prompt + list(ids)]))[0, len(prompt) - 1 : -1].double() @ head.double().T
        p = torch.softmax(logits / temperature, -1)                         # (T,V)
        law.append(math.prod(p[t, v].item() for t, v in enumerate(ids)))
    return law


def mixture_law(policies, w, prompt, temperature=1.0):
    """M1: the probability of each of TEXTS under the mixture."""
    laws = [expert_law(policy, prompt, temperature) for policy in policies]
    return [sum(w_k * law[i] for w_k, law in zip(w, laws)) for i in range(len(TEXTS))]


def drive(monkeypatch, policies, log_w, prompts, temperature):
    """The sampler's log-prob of each of TEXTS after each prompt (sorted by length): (prompts, TEXTS) float64 nats."""
    texts, read_json_or_empty = [list(ids) + [EOS] * (LONGEST - len(ids)) for ids in TEXTS] * len(prompts), []

    def note(logits, temperature, u):
        read_json_or_empty.append(torch.log_softmax(logits.double() / temperature, -1))  # (N,V)
        return torch.tensor(texts)[:, len(read_json_or_empty) - 1]

    rows = [prompt for prompt in prompts for _ in TEXTS]
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", note)
        log_w = log_w if log_w.ndim == 1 else log_w.repeat_interleave(len(TEXTS), 0)
        got = generate_tokenwise(policies, log_w, rows, Sampling(LONGEST, EOS, temperature, batch=len(rows)))
    assert got == [list(ids) for ids in TEXTS] * len(prompts)
    logps = [sum(read_json_or_empty[t][n, v].item() for t, v in enumerate(ids)) for n, ids in enumerate(got)]
    return torch.tensor(logps, dtype=torch.float64).view(len(prompts), -1)


def variation(law, other):
    """Total variation distance."""
    return 0.5 * sum(abs(a - b) for a, b in zip(law, other))


# --- exactly, by enumeration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sharing, K", [("trunk", 2), ("models", 2), ("trunk", 3), ("models", 3), ("mixed", 3)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_tokens_probabilities_multiply_to_the_mixtures(monkeypatch, family, sharing, K, temperature):
    """M14: the product of the sampler's next-token probabilities is the mixture's probability of the text, for every
    text, with one w for all prompts and with one of each, prompts of different lengths in one batch.
    Catches: weights that stay w(x), weights of the untempered probabilities, token t's weights with its own evidence,
    a product of experts, w left out, the experts' caches or heads exchanged, prompt 0's gate for all."""
    policies = make_policies(sharing, K, family)
    laws = [[expert_law(policy, prompt, temperature) for policy in policies] for prompt in PROMPTS]
    assert min(variation(a, b) for law in laws for a, b in itertools.combinations(law, 2)) > 0.1, "one expert, K times"
    logp = torch.tensor(laws, dtype=torch.float64).log().movedim(1, -1)     # (prompts,TEXTS,K)
    for w in (WEIGHTS[K], GATES[K]):
        log_w = torch.tensor(w, dtype=torch.float64).log()
        got = drive(monkeypatch, policies, log_w.float(), PROMPTS, temperature)
        gates = w if log_w.ndim == 2 else [w] * len(PROMPTS)
        want = [[math.log(sum(gate[k] * law[k][i] for k in range(K))) for i in range(len(TEXTS))]
                for gate, law in zip(gates, laws)]
        assert np.allclose(got.numpy(), want, rtol=0, atol=1e-5)
        assert np.allclose(mixture_logp(log_w.expand(3, K)[:, None], logp).numpy(), want, atol=1e-12)
        assert (got.exp().sum(-1) - 1).abs().max() < 1e-5


def test_weights_after_each_token_are_those_of_the_whole_text():
    """next_token, a token at a time, against mixture.prefix_log_weights of the finished text.
    Catches: weights not normalised (log-probs above 0), a sum that starts anew, temperature left out of the weights,
    -inf - -inf: an expert that gives the token no probability is ruled out, and stays out."""
    N, T, K = 5, 40, 3
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(T, K, N, 7, generator=generator)
    logits[10, 1, :, 1:] = -torch.inf                                       # expert 1 says 0, or nothing that can be
    uniforms = torch.rand(T, N, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        log_w = torch.log_softmax(torch.randn(N, K, generator=generator, dtype=torch.float64), -1)
        prior, before, taken = log_w, [], []
        for t in range(T):
            before.append(log_w)
            token, log_w = next_token(list(logits[t]), log_w, temperature, uniforms[t])
            logps = torch.log_softmax(logits[t].double() / temperature, -1)                 # (K,N,V)
            taken.append(logps[:, torch.arange(N), token].T)                                # (N,K)
            assert not log_w.isnan().any() and log_w.logsumexp(-1).abs().max() < 1e-12
        want = prefix_log_weights(prior, torch.stack(taken, 1))             # (N,T,K)
        assert torch.allclose(torch.stack(before, 1), want, atol=1e-4)
        assert (log_w[taken[10][:, 1] == -torch.inf, 1] == -torch.inf).all() and (log_w[:, 1] == -torch.inf).any()


@pytest.mark.parametrize("sharing, K", [("trunk", 2), ("models", 3)])
def test_other_weights_have_another_law(monkeypatch, sharing, K):
    """What the exact test sees: with w(x) at every token the law is more than 0.04 away in total variation, and at
    temperature 0.7 with weights of the untempered probabilities more than 0.01; the right sampler's is within 1e-6.
    Catches: experts, or a drive along the texts, that would not tell a sampler without M14 from a right one."""
    policies, log_w = make_policies(sharing, K), torch.tensor(WEIGHTS[K]).log()

    def constant(logits, log_w, temperature, u):
        return next_token(logits, log_w, temperature, u)[0], log_w

    def untempered(logits, log_w, temperature, u):
        token, _ = next_token(logits, log_w, temperature, u)
        logps = torch.stack(logits).log_softmax(-1)[:, torch.arange(len(token)), token].T           # (N,K)
        return token, torch.log_softmax(log_w + logps, -1)

    for temperature, wrong, distance in ((1.0, constant, 0.04), (0.7, constant, 0.04), (0.7, untempered, 0.01)):
        law = mixture_law(policies, WEIGHTS[K], [1, 2], temperature)
        right = drive(monkeypatch, policies, log_w, [[1, 2]], temperature)[0].exp().tolist()
        with monkeypatch.context() as patch:
            patch.setattr(module, "next_token", wrong)
            other = drive(monkeypatch, policies, log_w, [[1, 2]], temperature)[0].exp().tolist()
        assert abs(sum(other) - 1) < 1e-6 and variation(other, law) > distance
        assert variation(right, law) < 1e-6


# --- frequencies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sharing, K", [("trunk", 2), ("models", 3)])
def test_both_samplers_have_the_mixtures_law(monkeypatch, sharing, K, temperature):
    """4,000 texts token by token, and 4,000 with an expert drawn for each, against the same enumeration (M1, M13, M14).
    Tested against the law of w(x) at every token, the same 4,000 fail.
    Catches: tokens of a row that share a uniform, weights that stay w(x), the likeliest expert's token for the
    mixture's, an end that is ignored. Weights of the untempered probabilities need the exact test."""
    policies, log_w = make_policies(sharing, K), torch.tensor(WEIGHTS[K]).log()
    law = dict(zip(TEXTS, mixture_law(policies, WEIGHTS[K], [1, 2], temperature)))
    prompts, sampling = [[1, 2]] * 4000, Sampling(LONGEST, EOS, temperature, seed=1, batch=4000)
    tokenwise = generate_tokenwise(policies, log_w, prompts, sampling)
    assert_frequencies(count(tokenwise, law), law.values())
    z = choose_expert(log_w, 4000, "mixture", 1)
    texts = [generate(model, prompts, sampling, head) for model, head in policies]
    assert_frequencies(count([texts[k][n] for n, k in enumerate(z.tolist())], law), law.values())
    with monkeypatch.context() as patch:
        patch.setattr(module, "next_token", lambda logits, log_w, *rest: (next_token(logits, log_w, *rest)[0], log_w))
        constant = drive(monkeypatch, policies, log_w, [[1, 2]], temperature)[0].exp().tolist()
    with pytest.raises(AssertionError):
        assert_frequencies(count(tokenwise, law), [p / sum(constant) for p in constant])


# --- rows, ends and special cases -------------------------------------------------------------------------------------


RAGGED = [[5], [7, 2, 9, 11, 4, 6, 1], [8, 8], [1, 2, 4, 12], [5], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]]


@pytest.mark.parametrize("sharing", ["trunk", "models"])
def test_a_text_is_the_same_alone_and_in_any_batch(sharing):
    """Given its row number and its own weights; the result keeps the order of the prompts.
    Catches: gates that stay in place when prompts are sorted by length, noise of the batch's order, results
    in the sorted order, an end that stops other rows."""
    policies = make_policies(sharing, 3, vocab=small.VOCAB)
    gate = torch.log_softmax(3 * torch.randn(len(RAGGED), 3, generator=torch.Generator().manual_seed(0)), -1)
    together = generate_tokenwise(policies, gate, RAGGED, Sampling(12, EOS, seed=4))
    for batch in (1, 2, 5):
        assert generate_tokenwise(policies, gate, RAGGED, Sampling(12, EOS, seed=4, batch=batch)) == together
    for n, prompt in enumerate(RAGGED):
        alone = generate_tokenwise(policies, gate[n : n + 1], [prompt], Sampling(12, EOS, seed=4), rows=[n])
        assert alone == [together[n]]
    assert generate_tokenwise(policies, gate.flip(0), RAGGED, Sampling(12, EOS, seed=4)) != together
    assert any(len(ids) < 12 for ids in together) and any(len(ids) == 12 for ids in together)


@torch.no_grad()
def mixed(policies, w, prompt, max_new, pick):
    """The sampler as a loop over Python floats, without a cache: pick(p) -> the next token, from the mixture's p."""
    w, out = list(w), []
    while len(out) < max_new and EOS not in out:
        p = [torch.softmax(logits_after(model, prompt + out, head).double(), -1).tolist() for model, head in policies]
        out.append(pick([sum(w_k * p_k[v] for w_k, p_k in zip(w, p)) / sum(w) for v in range(len(p[0]))]))
        w = [w_k * p_k[out[-1]] for w_k, p_k in zip(w, p)]
    return out


@pytest.mark.parametrize("sharing", ["trunk", "mixed"])
def test_greedy_takes_the_likeliest_token_of_the_mixture(sharing):
    """Against the loop.
    Catches: the likeliest token of the likeliest expert, of the product of experts, weights that stay w(x),
    an expert's argmax as its whole distribution (the limit of temperature 0)."""
    policies = make_policies(sharing, 3, vocab=small.VOCAB)
    want = [mixed(policies, WEIGHTS[3], prompt, 12, lambda p: p.index(max(p))) for prompt in RAGGED]
    log_w = torch.tensor(WEIGHTS[3]).log()
    assert generate_tokenwise(policies, log_w, RAGGED, Sampling(12, EOS, temperature=0)) == want


def test_one_expert_is_generate(monkeypatch):
    """K = 1: the same texts as `generate` and as the loop without a cache; the logits reach `draw` as they are, bit for
    bit. Catches: a temperature applied twice or not at all, log-softmax before the draw, whose rounding moves a
    text now and then."""
    model, calls = small.model("gpt2"), []
    for seed, temperature in ((0, 1.0), (1, 0.7), (2, 1.6)):
        sampling = Sampling(10, EOS, temperature, seed)
        got = generate_tokenwise([(model, model.unembedding)], torch.zeros(1), RAGGED, sampling)
        assert got == generate(model, RAGGED, sampling)
        assert got == [sampled(model, p, 10, EOS, temperature, np.random.default_rng([seed, n]).random(10))
                       for n, p in enumerate(RAGGED)]
    with torch.no_grad():
        want = model(torch.tensor(RAGGED[1:2]), model.new_cache(1, 8))[:, -1] @ model.unembedding.T
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", lambda *args: calls.append(args) or torch.zeros(1, dtype=torch.int64))
        generate_tokenwise([(model, model.unembedding)], torch.zeros(1), RAGGED[1:2], Sampling(1, EOS, 0.7))
    assert torch.equal(calls[0][0], want) and calls[0][1] == 0.7


def test_an_expert_without_weight_is_never_used(monkeypatch):
    """log_w = -inf, for all prompts or for some: the texts and the law of the others alone.
    Catches: NaN from the sampler's probabilities, an expert that comes back once its prefix is likely,
    a floor under the weights."""
    policies = make_policies("mixed", 3)
    w = [0.4, 0.0, 0.6]
    got = drive(monkeypatch, policies, torch.tensor(w).log(), PROMPTS, 1.0)
    want = [mixture_law(policies, w, prompt) for prompt in PROMPTS]
    assert np.allclose(got.exp().numpy(), want, rtol=0, atol=1e-6) and not got.isnan().any()
    policies = make_policies("models", 3, vocab=small.VOCAB)
    own = [generate(model, RAGGED, Sampling(12, EOS, seed=3), unembedding=head) for model, head in policies]
    only = torch.eye(3)[[0, 1, 2, 2, 1, 0]].log()                           # each prompt has one expert
    want = [own[k][n] for n, k in enumerate([0, 1, 2, 2, 1, 0])]
    assert generate_tokenwise(policies, only, RAGGED, Sampling(12, EOS, seed=3)) == want


@pytest.mark.parametrize("options", [dict(rank=3), dict(rank=0), dict(sharing="models")])
def test_a_shared_trunk_runs_once_a_token(options):
    """Forward passes of every model, counted, with the policies that experts.policy gives.
    Catches: a pass and a cache of the trunk for each head."""
    experts, passes = small.experts("llama", experts=3, **options), []
    policies = [experts.policy(k) for k in range(3)]
    models = {id(model): model for model, _ in policies}.values()
    for model in models:
        model.register_forward_hook(lambda model, args, out: passes.append((id(model), args[0].shape[1])))
    texts = generate_tokenwise(policies, torch.zeros(3), RAGGED[:2], Sampling(6, -1))
    assert [len(ids) for ids in texts] == [6, 6] and len(models) == (3 if "sharing" in options else 1)
    assert sorted(passes) == sorted((id(model), tokens) for model in models for tokens in [7] + [1] * 5)


def test_contracts():
    """Catches: the first model's context for all, weights of another K or of another number of prompts that broadcast,
    bfloat16 weights, NaN weights."""
    policies, log_w = [(m, m.unembedding) for m in (small.model(), small.model("llama", context=16))], torch.zeros(2)
    with pytest.raises(AssertionError, match="take 17 tokens, the model's context is 16"):
        generate_tokenwise(policies, log_w, [[1], [1] * 12], Sampling(5, EOS))
    with pytest.raises(AssertionError, match="empty prompt"):
        generate_tokenwise(policies, log_w, [[]], Sampling(4, EOS))
    for wrong in (torch.zeros(1), torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, 1)):
        with pytest.raises(AssertionError, match="got log_w"):
            generate_tokenwise(policies, wrong, [[1], [2]], Sampling(4, EOS))
    for wrong in (torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]), torch.tensor([0.0, torch.nan])):
        with pytest.raises(AssertionError, match="weight 0"):
            generate_tokenwise(policies, wrong, [[1], [2]], Sampling(4, EOS))
    with pytest.raises(AssertionError, match="bfloat16"):
        generate_tokenwise(policies, log_w.bfloat16(), [[1]], Sampling(4, EOS))
    assert generate_tokenwise(policies, log_w, [], Sampling(4, EOS)) == []
