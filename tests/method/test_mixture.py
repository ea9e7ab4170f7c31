"""mixdpo.mixture against brute force: the E-step (M7, M11), the bound (M6), the losses (M8, M9), the weights (M10), and
the identities that join them."""

import math

import brute
import numpy as np
import pytest
import small
import torch

from mixdpo.dpo import dpo_loss
from mixdpo.linear import random_responsibilities
from mixdpo.mixture import balance, e_step, elbo, entropy, expert_loss, gate_loss, log_marginal, update_weights
from mixdpo.plan import make_plan
from mixdpo.variants.choose import Variants
from mixdpo.variants.e_steps import SAMPLED, vary, visit_noise
from mixdpo.variants.robust import RobustWeights

FP32, FP64 = torch.float32, torch.float64
TOLERANCE = {FP32: 3e-6, FP64: 1e-12}
PRECISIONS = pytest.mark.parametrize("dtype", [FP32, FP64])


def draw(B=7, K=3, seed=0, dtype=FP64):
    """Margins (B, K), a gate's log-weights (B, K) and arbitrary normalised log-responsibilities (B, K)."""
    generator = torch.Generator().manual_seed(seed)
    h, gate, q = (torch.randn(B, K, generator=generator, dtype=dtype) for _ in range(3))
    return 2 * h, torch.log_softmax(gate, -1), torch.log_softmax(2 * q, -1)


def probabilities(log):
    return log.double().exp().tolist()


def assert_close(got, expected, dtype=FP64):
    assert got.dtype == dtype, f"got {got.dtype}, want {dtype}"
    expected = np.array(expected)
    assert tuple(got.shape) == expected.shape, f"got {tuple(got.shape)}, want {expected.shape}"
    assert np.allclose(got.detach().double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype])


@PRECISIONS
@pytest.mark.parametrize("K", [2, 3])
def test_e_step_is_bayes_rule(dtype, K):
    """M5, M7. Catches: the prior log_w dropped, h for log sigma(h), sigma(-h), a max or a mean instead of logsumexp,
    normalising over pairs."""
    h, gate, _ = draw(K=K, dtype=dtype)
    for log_w in (gate, gate[0]):  # a gate (B, K), fixed weights (K,)
        log_p, log_q = e_step(log_w, h)
        assert_close(log_p, np.log(brute.marginal(probabilities(log_w), h.tolist())), dtype)
        assert_close(log_q, np.log(brute.posterior(probabilities(log_w), h.tolist())), dtype)
        assert_close(log_marginal(log_w, h), np.log(brute.marginal(probabilities(log_w), h.tolist())), dtype)


def test_e_step_reads_each_pairs_own_gate():
    """Catches: a gate of which only row 0 is read, also where B = K makes (B, K) and (K,) look alike."""
    h, gate, _ = draw(B=3, K=3, seed=1)
    assert_close(e_step(gate, h)[1], np.log(brute.posterior(probabilities(gate), h.tolist())))
    for b in range(3):
        assert torch.allclose(e_step(gate, h)[1][b], e_step(gate[b], h[b:b + 1])[1][0], atol=1e-14)


def test_e_step_carries_no_gradient():
    """M8 and M9 need q detached. Catches: an E-step under autograd."""
    h, gate, _ = draw()
    for group in (None, torch.zeros(7, dtype=torch.int64)):
        log_p, log_q = e_step(gate[0].clone().requires_grad_(), h.clone().requires_grad_(), group)
        assert not log_p.requires_grad and not log_q.requires_grad
    assert log_marginal(gate, h.clone().requires_grad_()).requires_grad


@PRECISIONS
def test_a_user_has_one_latent(dtype):
    """M11, users interleaved. Catches: evidence averaged over a user's pairs instead of summed, the weight counted once
    a pair instead of once a user, weights of the first G pairs taken for those of the G users, order of users mistaken,
    one posterior per pair."""
    h, gate, _ = draw(B=9, dtype=dtype)
    group = torch.tensor([2, 0, 2, 1, 3, 0, 2, 2, 3])
    by_user = gate[[4, 0, 7, 2]]  # (G, K)
    for log_w in (by_user[group], gate[0]):
        p, q = brute.user_posterior(probabilities(log_w), h.tolist(), group.tolist())
        log_p, log_q = e_step(log_w, h, group)
        assert_close(log_p, np.log(p), dtype)
        assert_close(log_q, np.log(q), dtype)


def test_users_that_cannot_be_are_refused():
    """Catches: weights that differ within a user (whose would count?), a user without pairs, whose posterior would be a
    number from nowhere."""
    h, gate, _ = draw()
    with pytest.raises(AssertionError):
        e_step(gate, h, torch.tensor([0, 0, 1, 1, 1, 2, 2]))
    with pytest.raises(AssertionError):
        e_step(gate[0], h, torch.tensor([0, 0, 1, 1, 1, 3, 3]))


def test_a_user_of_one_pair_is_a_pair():
    """Catches: a grouped path that disagrees with the plain one where both hold."""
    h, gate, _ = draw()
    plain, grouped = e_step(gate, h), e_step(gate, h, torch.arange(7))
    assert torch.allclose(plain[0], grouped[0], atol=1e-14) and torch.allclose(plain[1], grouped[1], atol=1e-14)
    shuffle = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert torch.allclose(e_step(gate[shuffle], h[shuffle], shuffle)[1], plain[1], atol=1e-14)


@PRECISIONS
def test_bound_and_its_gap(dtype):
    """M6: log p - ELBO(q) = KL(q || posterior) for any q. Catches: entropy dropped or of the wrong sign, the weight or
    q left out."""
    h, gate, log_q = draw(dtype=dtype)
    for log_w in (gate, gate[0]):
        w, q = probabilities(log_w), probabilities(log_q)
        bound = elbo(log_q, log_w, h)
        assert_close(bound, brute.elbo(q, w, h.tolist()), dtype)
        gap = [brute.kl(a, b) for a, b in zip(q, brute.posterior(w, h.tolist()))]
        assert_close(log_marginal(log_w, h) - bound, gap, dtype)
        log_p, exact = e_step(log_w, h)
        assert torch.allclose(elbo(exact, log_w, h), log_p, atol=TOLERANCE[dtype])  # tight at the posterior


@PRECISIONS
def test_losses_are_minus_the_bound(dtype):
    """M8, M9. Catches: unweighted or mean-over-experts expert loss, KL(w || q) for KL(q || w), cross entropy for KL,
    sums over pairs inside."""
    h, gate, log_q = draw(dtype=dtype)
    q = probabilities(log_q)
    expected = [-sum(q[b][k] * math.log(brute.sigma(float(h[b, k]))) for k in range(3)) for b in range(7)]
    assert_close(expert_loss(log_q, h), expected, dtype)
    for log_w in (gate, gate[0]):
        w = probabilities(log_w)
        assert_close(gate_loss(log_q, log_w), [brute.kl(q[b], brute.row(w, b)) for b in range(7)], dtype)
        together = expert_loss(log_q, h) + gate_loss(log_q, log_w)
        assert torch.allclose(together, -elbo(log_q, log_w, h), atol=TOLERANCE[dtype])


def test_losses_of_users_are_minus_their_log_marginal():
    """M11 in the M-step: pairs take their user's q, the gate's term enters once a user. Catches: log_q[group] misused,
    KL counted once a pair."""
    h, gate, _ = draw(B=9)
    group = torch.tensor([0, 2, 1, 1, 2, 0, 2, 1, 2])
    log_p, log_q = e_step(gate[group], h, group)
    loss = expert_loss(log_q[group], h).sum() + gate_loss(log_q, gate[:3]).sum()
    assert torch.allclose(loss, -log_p.sum(), atol=1e-12)
    p, _ = brute.user_posterior(probabilities(gate[group]), h.tolist(), group.tolist())
    assert math.isclose(loss.item(), -math.fsum(math.log(a) for a in p))


def test_losses_detach_q():
    """M8, M9 say "q detached", whoever made q. Catches: a missing detach (q would chase the expert that already
    fits)."""
    h, gate, log_q = draw()
    log_q, h, gate = log_q.requires_grad_(), h.requires_grad_(), gate.requires_grad_()
    (expert_loss(log_q, h) + gate_loss(log_q, gate)).sum().backward()
    assert log_q.grad is None or not log_q.grad.any()
    assert h.grad.abs().min() > 0 and gate.grad.abs().min() > 0  # and what should learn does


def gradients(loss, *parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


@pytest.mark.parametrize("users", [False, True])
def test_fisher_identity(users):
    """grad(M8 + M9) at the exact detached posterior = grad(-log p), the latter by finite differences of a plain loop.
    Catches: a gate loss with q on the wrong side, tempered q passed for exact, log_w detached, any scale between M8 and
    M9."""
    B, K, D, G = 6, 3, 4, 3
    rng = np.random.default_rng(2)
    x, features = rng.normal(size=(B, D)), rng.normal(size=(G if users else B, D))
    group = [0, 2, 1, 1, 2, 0] if users else list(range(B))
    theta, gate = (torch.tensor(rng.normal(size=(K, D)), requires_grad=True) for _ in range(2))

    def loops(both):
        h = [[math.fsum(both[0][k] * x[b]) for k in range(K)] for b in range(B)]
        scores = [[math.exp(math.fsum(both[1][k] * features[g])) for k in range(K)] for g in group]
        w = [[s / sum(scores[b]) for s in scores[b]] for b in range(B)]
        return -sum(math.log(p) for p in brute.user_posterior(w, h, group)[0])

    expected = brute.numeric_gradient(loops, np.stack([theta.detach().numpy(), gate.detach().numpy()])).ravel()
    h, log_w = torch.tensor(x) @ theta.T, torch.log_softmax(torch.tensor(features) @ gate.T, -1)
    index = torch.tensor(group)
    log_q = e_step(log_w[index], h, index)[1] if users else e_step(log_w, h)[1]
    loss = expert_loss(log_q[index], h).sum() + gate_loss(log_q, log_w).sum()
    assert np.allclose(gradients(loss, theta, gate).numpy(), expected, atol=1e-8)
    if not users:
        em = gradients(-log_marginal(log_w, torch.tensor(x) @ theta.T).sum(), theta, gate)
        assert np.allclose(em.numpy(), expected, atol=1e-8)


def test_fisher_identity_needs_the_entropy_when_q_is_live():
    """With q live the bound still has the right gradient; with its entropy dropped it has not, by far. Catches: a bound
    used as a loss whose entropy is treated as a constant while q is not detached; elbo() detaching a weight or a
    margin."""
    h, gate, _ = draw(seed=3)
    h, gate = h.requires_grad_(), gate.requires_grad_()
    expected = gradients(log_marginal(gate, h).sum(), h, gate)
    joint = gate + torch.log(torch.sigmoid(h))
    live = joint - torch.log(joint.exp().sum(-1, keepdim=True))
    for log_q in (live, live.detach(), e_step(gate, h)[1]):
        assert torch.allclose(gradients(elbo(log_q, gate, h).sum(), h, gate), expected, atol=1e-12)
    entropy = -(live.exp() * live).sum(-1)
    dropped = gradients((elbo(live, gate, h) - entropy).sum(), h, gate)
    assert (dropped - expected).abs().max() > 0.05


@PRECISIONS
def test_one_expert_is_dpo_bit_for_bit(dtype):
    """K = 1. Catches: a softmax that leaves q at 1 - 1e-8, another formula for log sigma than dpo_loss, a loss scaled
    by a weight."""
    h = (torch.randn(1000, generator=torch.Generator().manual_seed(4), dtype=dtype) * 20).requires_grad_()
    column, log_w = h[:, None], torch.zeros(1, dtype=dtype)
    log_p, log_q = e_step(log_w, column)
    assert torch.equal(log_q, torch.zeros(1000, 1, dtype=dtype)) and torch.equal(log_p, -dpo_loss(h))
    assert torch.equal(expert_loss(log_q, column), dpo_loss(h))
    assert torch.equal(log_marginal(log_w, column), -dpo_loss(h))
    assert torch.equal(elbo(log_q, log_w, column), -dpo_loss(h))
    assert torch.equal(gradients(expert_loss(log_q, column).sum(), h), gradients(dpo_loss(h).sum(), h))
    assert not gate_loss(log_q, log_w).any() and not update_weights(log_q).any()
    by_user = e_step(log_w, column, torch.arange(1000) // 7)[1]
    assert torch.equal(by_user, torch.zeros(143, 1, dtype=dtype))


@PRECISIONS
def test_fixed_weights_close_the_form(dtype):
    """M10. Catches: the mean of log q, a sum not normalised, a prior ignored, or one that adds alpha instead of alpha -
    1 (MAP)."""
    _, _, log_q = draw(B=11, K=4, dtype=dtype)
    q = probabilities(log_q)
    for prior in (1.0, 1.5, 20.0):
        expected = [(sum(q[n][k] for n in range(11)) + prior - 1) / (11 + 4 * (prior - 1)) for k in range(4)]
        log_w = update_weights(log_q, prior=prior)
        assert_close(log_w, np.log(expected), dtype)
        assert math.isclose(sum(probabilities(log_w)), 1.0, abs_tol=1e-6)
    assert torch.equal(update_weights(log_q), update_weights(log_q, prior=1.0))


def test_a_starved_expert_keeps_a_weight():
    """Catches: the mean taken in probability space, where exp(-200) is 0 in fp32 and the expert is dead for ever."""
    log_q = torch.tensor([[-200.0, 0.0], [-200.0, 0.0]])
    assert update_weights(log_q).tolist() == [pytest.approx(-200.0), pytest.approx(0.0)]
    assert update_weights(log_q, prior=2.0)[0].item() == pytest.approx(math.log(1 / 4))
    dead = torch.tensor([[-math.inf, 0.0], [-math.inf, 0.0]])
    assert update_weights(dead).tolist() == [-math.inf, 0.0]
    assert update_weights(dead, prior=2.0).exp().tolist() == [pytest.approx(1 / 4), pytest.approx(3 / 4)]


def test_random_responsibilities_are_dirichlet():
    """Catches: a softmax of normals or uniforms (other variance), concentration ignored or inverted, rows not
    normalised."""
    for K, concentration in ((2, 1.0), (3, 0.2), (4, 8.0)):
        log_q = random_responsibilities(20000, K, torch.Generator().manual_seed(5), concentration=concentration)
        assert log_q.shape == (20000, K) and not log_q.requires_grad and not log_q.isnan().any()
        q = log_q.double().exp()
        assert torch.allclose(q.sum(-1), torch.ones(20000, dtype=FP64), atol=1e-5)
        variance = (1 / K) * (1 - 1 / K) / (K * concentration + 1)
        assert torch.allclose(q.mean(0), torch.full((K,), 1 / K, dtype=FP64), atol=4 * math.sqrt(variance / 20000))
        assert torch.allclose(q.var(0), torch.full((K,), variance, dtype=FP64), rtol=0.06)
    quarter = (random_responsibilities(20000, 2, torch.Generator().manual_seed(6)).exp()[:, 0] < 0.25).double().mean()
    assert abs(quarter.item() - 0.25) < 0.015  # concentration 1, K = 2: uniform on [0, 1]


def test_random_responsibilities_use_their_generator_only():
    """Catches: a draw from the global generator, a generator ignored or re-seeded inside."""
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first, second = random_responsibilities(50, 3, generator), random_responsibilities(50, 3, generator)
    assert torch.equal(first, random_responsibilities(50, 3, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second) and torch.equal(before, torch.get_rng_state())


# --- E-step variants (M12) --------------------------------------------------------------------------------------------


def test_exact_tempered_and_hard_responsibilities():
    """Catches: q^T for q^(1/T); a row left unnormalised; the least likely expert taken; a tie between experts counted
    twice."""
    _, _, log_q = draw()
    q = log_q.exp()
    assert vary(log_q, "exact") is log_q
    for T in (0.5, 1.0, 3.0):
        power = q ** (1 / T)
        assert_close(vary(log_q, "tempered", temperature=T).exp(), (power / power.sum(-1, keepdim=True)).tolist())
    hard = vary(log_q, "hard").exp()
    assert hard.sum(-1).tolist() == [1.0] * 7 and torch.equal(hard.argmax(-1), q.argmax(-1))


def test_a_tie_of_hard_responsibilities_is_shared():
    """Catches: all of a tie to expert 0, so that equal experts under --start none are DPO and nothing says so; a tie
    counted once for each expert; the expert below a tie given a share."""
    rows = torch.tensor([[0.2, 0.4, 0.4], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=FP64).log()
    assert_close(vary(rows, "hard").exp(), [[0, 0.5, 0.5], [1 / 3] * 3, [0.5, 0.5, 0], [0, 0, 1]])


@pytest.mark.parametrize("kind, options", [("monte-carlo", {}), ("monte-carlo", {"draws": 5}),
                                           ("gumbel", {"temperature": 1e-3})])
def test_random_responsibilities_have_the_mean_q(kind, options):
    """A thousand calls, within five standard errors. Catches: noise -log u or log(-log u) for Gumbel's; sums of draws
    for shares; one noise for all experts; noise that depends on the other rows."""
    _, _, log_q = draw(B=4)
    generator, q, n, S = torch.Generator().manual_seed(0), log_q.exp(), 1000, options.get("draws", 1)
    options = {name: value for name, value in options.items() if name != "draws"}
    noise = torch.rand(n, S, 4, 3, generator=generator, dtype=FP64)
    found = torch.stack([vary(log_q, kind, uniform, **options) for uniform in noise]).exp()         # (n,B,K)
    assert_close(found.sum(-1), torch.ones(n, 4).tolist())
    assert torch.allclose(found * S, (found * S).round(), atol=0.02) or kind == "gumbel", "shares of whole draws"
    error = (q * (1 - q) / (n * S)).sqrt()
    assert ((found.mean(0) - q).abs() < 5 * error + 1e-3).all(), f"{found.mean(0)}, wanted {q}"
    first = vary(log_q[:2], kind, noise[0][:, :2], **options).exp()         # a row's noise is its own
    assert torch.equal(first, found[0, :2])


@pytest.mark.parametrize("variant", SAMPLED)
def test_sampled_responsibilities_are_drawn_by_seed_and_step(variant):
    """Catches: a seed, or a step, that changes nothing; noise of a visit that depends on the others of its batch."""
    def noise(seed, t, visits=(0, 1, 2, 3, 4)):
        return visit_noise(seed, t, torch.tensor(visits), 3, 2)

    first = noise(0, 0)
    assert first.shape == (3, 5, 2) and torch.equal(first, noise(0, 0))
    assert torch.equal(noise(0, 0, (3, 1)), first[:, [3, 1]])
    others = [noise(seed, t) for seed, t in ((0, 1), (1, 0), (2**31, 0), (2**32 - 1, 0))]
    assert not any((a == b).any() for n, a in enumerate([first, *others]) for b in others[n:])
    plan, log_q = make_plan(small.pairs(5), small.config()), torch.full((5, 2), math.log(0.5))
    given, user = [], torch.zeros(5, dtype=torch.int64)
    for seed, t in ((0, 0), (0, 1), (1, 0)):
        variants = Variants(small.config(experts=2, variant=variant, seed=seed), plan, user, None, [])
        given.append(variants.functions(t, None)["vary"](log_q, log_q, torch.arange(5)))
    assert not any(torch.equal(a, b) for n, a in enumerate(given) for b in given[:n])


def test_gumbel_softmax_between_its_limits():
    """Catches: the temperature multiplied; noise left out. Cold it is a draw, hot it is uniform."""
    _, _, log_q = draw(B=50)
    noise = torch.rand(3, 50, 3, generator=torch.Generator().manual_seed(1), dtype=FP64)
    cold, warm, hot = (vary(log_q, "gumbel", noise, T).exp() for T in (1e-4, 1.0, 1e4))
    assert torch.equal(vary(log_q, "monte-carlo", noise[:1]).exp().argmax(-1), cold.argmax(-1))
    assert cold.max(-1).values.min() > 0.99 and (hot - 1 / 3).abs().max() < 1e-2
    assert torch.equal(cold.argmax(-1), warm.argmax(-1)), "the same noise ranks the experts alike at any temperature"
    assert not torch.equal(cold.argmax(-1), log_q.argmax(-1)) and warm.max(-1).values.median() < 0.99


def test_entropy_of_rows_and_balance_of_a_batch_pull_apart():
    """Sharp weights that differ: no entropy, full balance. Sharp weights that agree: neither. Their difference is
    I(z; x). Catches: one taken for the other; the mean of logs for the log of means; NaN at weight 0."""
    sharp = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=FP64).log()
    for log_w, rows, batch in ((sharp, 0.0, math.log(2)), (sharp[:1].expand(2, 2), 0.0, 0.0),
                               (torch.full((2, 2), -math.log(2), dtype=FP64), math.log(2), math.log(2))):
        assert entropy(log_w).mean().item() == pytest.approx(rows) and balance(log_w).item() == pytest.approx(batch)
    logits = torch.tensor([[2.0, -2.0], [-2.0, 2.0]], dtype=FP64, requires_grad=True)       # confident, and balanced
    flatter, = torch.autograd.grad(entropy(torch.log_softmax(logits, -1)).sum(), logits)
    assert (flatter * logits).sum() < 0                                     # each row's entropy asks for smaller logits
    skewed = torch.tensor([[2.0, -2.0], [1.0, -1.0]], dtype=FP64, requires_grad=True)       # confident, one expert
    asks, = torch.autograd.grad(balance(torch.log_softmax(skewed, -1)), skewed)
    assert (asks[:, 1] > 0).all() and (asks[:, 0] < 0).all()                # more of the other expert
    even, = torch.autograd.grad(balance(torch.log_softmax(logits, -1)), logits)
    assert even.abs().max() < 1e-12 < flatter.abs().max()                   # nothing to ask where the first still does


def test_an_unknown_variant_is_refused():
    with pytest.raises(AssertionError, match="'soft', want one of exact, tempered, hard, monte-carlo, gumbel"):
        vary(torch.zeros(1, 2), "soft")


def test_reweigh_is_exponentiated_ascent():
    """By hand. Catches: the mean not kept, the loss of an absent group forgotten, a group that is none counted in the
    mean."""
    robust = RobustWeights(torch.tensor([1, 2, 2, 3]), 2.0, "")             # visits of users 1 to 3; none is of user 0
    assert robust.log_v.exp().tolist() == [0, 1, 1, 1]
    robust.loss = torch.tensor([0.7, 5.0, 5.0, 0.3])                        # as last seen
    weighed = robust.weigh(torch.tensor([0.1, 0.3, 0.8, 1.0]), torch.tensor([0, 0, 1, 2]))      # pairs of visits 0 to 2
    assert weighed.tolist() == pytest.approx([0.1, 0.3, 0.8, 1.0])          # all weights are 1 so far
    robust.end_step()
    wanted = torch.tensor([0.0, math.exp(0.4), math.exp(1.8), math.exp(0.6)])
    assert torch.allclose(robust.log_v.exp(), 3 * wanted / wanted.sum()) and robust.log_v[0] == -torch.inf
    assert robust.loss.tolist() == pytest.approx([0.7, 0.2, 0.9, 0.3])
    again = RobustWeights(torch.tensor([1, 2, 2, 3]), 2.0, "")
    again.load(robust.tensors())
    assert torch.equal(again.log_v, robust.log_v) and torch.equal(again.loss, robust.loss)
    weight = 3 * math.exp(0.6) / float(wanted.sum())
    assert again.weigh(torch.ones(1), torch.tensor([3])).tolist() == pytest.approx([weight])


def test_robust_weights_go_by_losses_and_not_by_appearances():
    """Three users over 100 steps: one in every step and one in every tenth with equal losses, one in every tenth with
    twice that loss. Catches: an update for those who appear only, which gave the second 0.004 of the first's weight and
    the worst served less than the first."""
    robust = RobustWeights(torch.tensor([1, 2, 3]), 0.1, "")
    for t in range(100):
        visits = torch.tensor([0, *[1] * (t % 10 == 9), *[2] * (t % 10 == 4)])
        robust.weigh(math.log(2) * torch.tensor([1.0, 1.0, 2.0])[visits], visits)
        robust.end_step()
    v, log_v = robust.log_v.exp()[1:], robust.log_v[1:]
    assert v[0] == pytest.approx(v[1].item()) and v.sum() == pytest.approx(3)
    assert (log_v[2] - log_v[0]).item() == pytest.approx(0.1 * math.log(2) * 96)            # from the fifth step on


def test_the_bound_of_groups_by_hand():
    """One q for all pairs of a group (M11): at the exact posterior the group's log-marginal, for any other q less by
    KL(q || posterior); with a group for each pair, the bound of the pairs. Faults: the prior or the entropy counted
    once a pair; the mean over pairs for the sum."""
    generator = torch.Generator().manual_seed(8)
    h, group = torch.randn(7, 3, generator=generator, dtype=FP64) * 2, torch.tensor([0, 0, 0, 1, 2, 2, 2])
    log_w = torch.log_softmax(torch.randn(3, 3, generator=generator, dtype=FP64), -1)       # (G,K)
    log_p, log_q = e_step(log_w[group], h, group)
    assert torch.allclose(elbo(log_q, log_w, h, group), log_p, atol=1e-12)
    other = torch.log_softmax(torch.randn(3, 3, generator=generator, dtype=FP64), -1)
    by_hand = [sum(float(q) * (float(w) + float(torch.log(torch.sigmoid(h[group == g, k])).sum()) - math.log(float(q)))
                   for k, (q, w) in enumerate(zip(other[g].exp(), log_w[g]))) for g in range(3)]
    assert torch.allclose(elbo(other, log_w, h, group), torch.tensor(by_hand, dtype=FP64), atol=1e-12)
    gap = (other.exp() * (other - log_q)).sum(-1)
    assert torch.allclose(log_p - elbo(other, log_w, h, group), gap, atol=1e-12)
    alone = torch.log_softmax(torch.randn(7, 3, generator=generator, dtype=FP64), -1)
    assert torch.allclose(elbo(alone, log_w[0], h, torch.arange(7)), elbo(alone, log_w[0], h), atol=1e-12)
