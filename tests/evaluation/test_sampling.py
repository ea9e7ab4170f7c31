"""Drawing from the mixture (M13) and its log-prob (M1, M14), on sequence models small enough to enumerate: 3 tokens,
one of them EOS, at most 3 a sequence."""

import itertools
import math

import numpy as np
import pytest
import torch

from mixdpo.mixture import mixture_logp, prefix_log_weights

V, T, K, EOS = 3, 3, 3, 0
PREFIXES = [p for t in range(T) for p in itertools.product(range(1, V), repeat=t)]  # (), (1,), (2,), (1, 1), ...
WEIGHTS = [0.5, 0.3, 0.2]


def make_experts(seed=0):
    """expert[k][prefix] is a distribution over the next token; sharp, so that a prefix says much about who writes."""
    rng = np.random.default_rng(seed)
    return [{prefix: rng.dirichlet(np.full(V, 0.5)) * 0.97 + 0.01 for prefix in PREFIXES} for _ in range(K)]


EXPERTS = make_experts()


def enumerate_sequences():
    """All 15 complete sequences: they end with EOS or at T tokens."""
    finished = []
    for prefix in PREFIXES:
        finished += [prefix + (token,) for token in range(V) if token == EOS or len(prefix) == T - 1]
    return finished


SEQUENCES = enumerate_sequences()


def probability(k, sequence):
    return math.prod(EXPERTS[k][sequence[:t]][sequence[t]] for t in range(len(sequence)))


def law():
    """M1 by enumeration: the probability of each sequence under the mixture."""
    return np.array([sum(WEIGHTS[k] * probability(k, s) for k in range(K)) for s in SEQUENCES])


def table(sequences=SEQUENCES):
    """logps (N, T, K) of each token under each expert; 0 after the end."""
    logps = np.zeros((len(sequences), T, K))
    for n, sequence in enumerate(sequences):
        for t in range(len(sequence)):
            logps[n, t] = [math.log(EXPERTS[k][sequence[:t]][sequence[t]]) for k in range(K)]
    return torch.tensor(logps)


LOG_W = torch.tensor(WEIGHTS, dtype=torch.float64).log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_of_the_mixture(dtype):
    """M1, M14. Catches: a mean of log-probs (a product of experts), the weights dropped, experts and rows confused."""
    assert abs(law().sum() - 1) < 1e-12  # the enumeration misses nothing
    logp = mixture_logp(LOG_W.to(dtype), table().sum(1).to(dtype))
    assert logp.shape == (15,) and logp.dtype == dtype
    assert np.allclose(logp.double().numpy(), np.log(law()), atol=1e-6 if dtype == torch.float32 else 1e-13)
    own = torch.log_softmax(torch.randn(15, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)
    w = own.exp().tolist()
    expected = [math.log(sum(w[n][k] * probability(k, s) for k in range(K))) for n, s in enumerate(SEQUENCES)]
    assert np.allclose(mixture_logp(own, table().sum(1)).numpy(), expected, atol=1e-13)  # a gate: weights of each row


def test_log_prob_of_impossible_and_long_sequences():
    """Catches: exp without logsumexp at -2000 nats, and NaN where an expert has no weight or gives the sequence
    none."""
    far = mixture_logp(torch.tensor([0.5, 0.5]).log(), torch.tensor([[-2000.0, -2001.0]]))
    assert far.item() == pytest.approx(-2000.0 + math.log(0.5 + 0.5 * math.exp(-1)), abs=1e-3)
    absent = mixture_logp(torch.tensor([0.0, -math.inf]), torch.tensor([[-3.0, -1.0], [-math.inf, -1.0]]))
    assert absent.tolist() == [-3.0, -math.inf]


def test_log_prob_carries_the_posterior_as_gradient():
    """d log pi / d log pi_k = P(k | y). Catches: a mixture log-prob that cannot be trained through, or only through the
    best expert."""
    logp = table().sum(1).requires_grad_()
    mixture_logp(LOG_W, logp).sum().backward()
    for n, sequence in enumerate(SEQUENCES):
        joint = [WEIGHTS[k] * probability(k, sequence) for k in range(K)]
        assert np.allclose(logp.grad[n].numpy(), np.array(joint) / sum(joint), atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_before_each_token_are_the_posterior_of_the_prefix(dtype):
    """M14. Catches: token t's own evidence counted (inclusive sums), weights not normalised, w itself at every t, sums
    over the wrong axis."""
    log_weights = prefix_log_weights(LOG_W.to(dtype), table().to(dtype))
    atol = 1e-6 if dtype == torch.float32 else 1e-13
    assert log_weights.shape == (15, T, K) and log_weights.dtype == dtype
    for n, sequence in enumerate(SEQUENCES):
        for t in range(len(sequence)):
            joint = [WEIGHTS[k] * math.prod(EXPERTS[k][sequence[:i]][sequence[i]] for i in range(t)) for k in range(K)]
            expected = [j / sum(joint) for j in joint]
            assert np.allclose(log_weights[n, t].double().exp().numpy(), expected, atol=atol)
    single = prefix_log_weights(LOG_W.to(dtype), table()[4].to(dtype))  # (T, K): no row axis
    assert torch.allclose(single, log_weights[4], atol=1e-6)


def test_a_gate_weights_each_row():
    """Catches: (N, K) weights broadcast against (N, T, K) along T instead of N; N = T = 3 makes the two look alike."""
    gate = torch.log_softmax(torch.randn(3, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    together = prefix_log_weights(gate, table()[:3])
    for n in range(3):
        assert torch.allclose(together[n], prefix_log_weights(gate[n], table()[n]), atol=1e-14)


def test_weights_do_not_look_ahead():
    """Catches: a cumulative sum from the wrong end, or one that includes the token to be drawn."""
    logps = table()
    for t in range(T):
        changed = logps.clone()
        changed[:, t:] -= 5 * torch.rand(15, T - t, K, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        before, after = prefix_log_weights(LOG_W, logps), prefix_log_weights(LOG_W, changed)
        assert torch.equal(before[:, :t + 1], after[:, :t + 1])
        assert t == T - 1 or not torch.allclose(before[:, t + 1:], after[:, t + 1:])


def test_token_by_token_is_exact_only_with_reweighting():
    """M14: sum_t logsumexp_k(weights before t + logps) is the mixture's log-prob; with w at every token it is another
    number. Catches: re-weighting left out."""
    exact = (prefix_log_weights(LOG_W, table()) + table()).logsumexp(-1).sum(-1)
    assert torch.allclose(exact, mixture_logp(LOG_W, table().sum(1)), atol=1e-13)
    assert np.allclose(exact.numpy(), np.log(law()), atol=1e-13)
    naive = (LOG_W + table()).logsumexp(-1).sum(-1)
    assert (naive - exact).abs().max() > 0.3


def test_an_expert_that_is_ruled_out_stays_out():
    """An expert that gives a token no probability has weight 0 from the next token on. Catches: NaN from (-inf) -
    (-inf), as cumsum - logps makes it; an expert of weight zero (log_w = -inf) turning into NaN."""
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -math.inf], [-0.5, -0.25], [-0.5, -0.25]])
    weights = prefix_log_weights(torch.tensor([0.5, 0.5]).log(), logps).exp()
    assert not weights.isnan().any()
    first = 1 / (1 + math.exp(-1.0))
    expected = [0.5, 0.5, first, 1 - first, 1.0, 0.0, 1.0, 0.0]
    assert weights.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    absent = prefix_log_weights(torch.tensor([0.0, -math.inf]), logps[:, :1].expand(4, 2))
    assert absent.exp().tolist() == [[1.0, 0.0]] * 4


def exact_law(weights_before):
    """The law of a sampler that draws each token from sum_k weight_k p_k(. | prefix), weights_before(prefix) -> (K,): a
    product along each sequence."""
    def next_token(prefix, token):
        return sum(weights_before(prefix)[k] * EXPERTS[k][prefix][token] for k in range(K))

    return np.array([math.prod(next_token(s[:t], s[t]) for t in range(len(s))) for s in SEQUENCES])


def package_weights(prefix):
    """What prefix_log_weights says after a prefix; the logps of the token to come are not known yet, any number will
    do."""
    logps = table([prefix + (EOS,)])[0]
    logps[len(prefix):] = -7.0
    return prefix_log_weights(LOG_W, logps)[len(prefix)].exp().numpy()


def sample(count, next_token, seed):
    """Frequencies of the 15 sequences in `count` draws; next_token(rng, prefix, z) -> token, z drawn once a sequence
    from w."""
    rng, counts = np.random.default_rng(seed), dict.fromkeys(SEQUENCES, 0)
    for _ in range(count):
        z, prefix = rng.choice(K, p=WEIGHTS), ()
        while prefix not in counts:
            prefix += (next_token(rng, prefix, z),)
        counts[prefix] += 1
    return np.array([counts[s] for s in SEQUENCES])


def chi_square(counts):
    expected = law() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_three_samplers_draw_from_the_mixture():
    """M13: expert once, then its tokens; token by token from the re-weighted mixture; an expert anew for every token,
    drawn from the re-weighted weights. All three have the law of the enumeration, exactly and in 4,000 draws
    (chi-square with 14 degrees of freedom: 36 is p = 0.001). An expert anew for every token from w itself does not.
    Catches: sampling without re-weighting."""
    before = {prefix: package_weights(prefix) for prefix in PREFIXES}
    assert np.allclose(exact_law(before.get), law(), atol=1e-13)
    assert np.abs(exact_law(lambda prefix: WEIGHTS) - law()).max() > 0.02

    def pick(rng, probabilities):
        return int(np.searchsorted(np.cumsum(probabilities), rng.random() * sum(probabilities)))

    mixed = {p: sum(before[p][k] * EXPERTS[k][p] for k in range(K)) for p in PREFIXES}
    samplers = {
        "expert once": lambda rng, prefix, z: pick(rng, EXPERTS[z][prefix]),
        "mixed token": lambda rng, prefix, z: pick(rng, mixed[prefix]),
        "expert anew": lambda rng, prefix, z: pick(rng, EXPERTS[pick(rng, before[prefix])][prefix]),
    }
    for seed, (name, next_token) in enumerate(samplers.items()):
        assert chi_square(sample(4000, next_token, seed)) < 36, name
    naive = sample(4000, lambda rng, prefix, z: pick(rng, EXPERTS[pick(rng, WEIGHTS)][prefix]), 3)
    assert chi_square(naive) > 100
