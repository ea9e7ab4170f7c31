"""One step's gradient does not depend on how the step is cut: head micro-batches, forward micro-batches,
the composable route, one number.

The oracle is the composable route with the one-line objective behind it: by Fisher's identity the gradient
of one EM step is the gradient of -log p, and no E-step, chunk or detach is needed to write that down.
In float64, where nothing hides behind rounding, and in float32.
"""

import pytest
import small
import torch
import torch.nn.functional as F

from mixdpo.dpo import dpo_loss, margins
from mixdpo.experts import pair_logp
from mixdpo.mixture import log_marginal
from mixdpo.preferences import collate, groups, rows_of
from mixdpo.variants.label_noise import noisy_margins
from train import EM, step

COUNT = 9
SHARINGS = {"k1": dict(experts=1), "full": dict(experts=2, rank=0), "low-rank": dict(experts=3),
            "models": dict(experts=2, sharing="models"), "frozen": dict(experts=2, train_trunk=False),
            "head": dict(experts=1, train_trunk=False), "lora": dict(experts=2, sharing="lora")}
DOUBLE, SINGLE = torch.float64, torch.float32
LOG_W = {k: torch.log_softmax(torch.arange(k) * 0.7, 0).double() for k in (1, 2, 3)}
HEAD_ROWS = [0, 1, 10, 25, 10_000]


def gradient(experts):
    """All gradients by name, and gone from the experts; None and zero are the same."""
    out = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
           for n, p in experts.named_parameters() if p.requires_grad}
    experts.zero_grad(set_to_none=True)
    return out


def assert_equal(got, want, where):
    """To 1e-6 in float32, to 1e-12 in float64; the gradients are of order 0.1 to 1."""
    assert got.keys() == want.keys()
    assert max(float(g.abs().max()) for g in want.values()) > 0.03, "a gradient of nothing tests nothing"
    for name in want:
        error = float((got[name] - want[name]).abs().max())
        assert error <= (1e-12 if want[name].dtype == DOUBLE else 1e-6), (where, name, error)


def users_of(pairs):
    """(B,) the number of each pair's user, by appearance."""
    names = list(dict.fromkeys(pair.user for pair in pairs))
    return torch.tensor([names.index(pair.user) for pair in pairs])


def log_p(experts, pairs, ref, config, group=None, log_w=None):
    """Composable: log marginal of each pair, or of each user from all of the user's pairs, with gradient."""
    batch = collate(pairs, list(range(len(pairs))))
    h = margins(pair_logp(experts, batch, tile=17), ref, config.beta)                    # (B,K)
    log_w = LOG_W[experts.K] if log_w is None else log_w
    if group is None:
        return log_marginal(log_w, h)
    return torch.stack([torch.logsumexp(log_w + F.logsigmoid(h[group == g]).sum(0), 0)
                        for g in range(int(group.max()) + 1)])


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_head_micro_batches_equal_the_composable_route(family, sharing, dtype):
    """Any head_rows, one type a pair.
    Catches: chunks that overlap or leave out a pair, states' gradients of the last chunk only,
    tokens summed into a neighbour's response, the mean of chunks for the sum over pairs, log_q of another chunk,
    a trunk passed back twice."""
    config = small.config(beta=0.5)
    experts = small.experts(family, dtype=dtype, **SHARINGS[sharing])
    pairs, ref = small.pairs(COUNT), small.reference_logp(COUNT, dtype=dtype)
    (-log_p(experts, pairs, ref, config).sum() / COUNT).backward()
    want = gradient(experts)
    for head_rows in HEAD_ROWS:
        config = small.config(beta=0.5, head_rows=head_rows)
        seen = small.accumulate(experts, small.problem(config, pairs, ref), LOG_W[experts.K])
        assert_equal(gradient(experts), want, head_rows)
        assert torch.cat([h for _, h, _ in seen]).shape == (COUNT, experts.K)
        assert len(seen) == {0: 1, 1: COUNT, 10_000: 1}.get(head_rows, len(seen)), head_rows


@pytest.mark.parametrize("sharing", SHARINGS)
def test_chunks_in_bfloat16(sharing):
    """Gradients are float32, and chunks share one cast of the heads: equal within the rounding of products.
    Catches: a cast that only the first chunk can go back through, chunks' gradients summed in bfloat16."""
    experts, pairs = small.experts(dtype=torch.bfloat16, **SHARINGS[sharing]), small.pairs(COUNT)
    gradients = []
    for head_rows in (0, 1):
        config = small.config(beta=0.5, head_rows=head_rows)
        small.accumulate(experts, small.problem(config, pairs, small.reference_logp(COUNT)), LOG_W[experts.K].float())
        gradients.append(gradient(experts))
    for name, want in gradients[0].items():
        assert want.dtype == torch.float32
        assert (gradients[1][name] - want).norm() <= 0.01 * want.norm() + 1e-6, name


@pytest.mark.parametrize("sharing", ["full", "low-rank", "models", "lora"])
def test_users_are_whole_in_every_chunk(sharing):
    """One type a user (M11): the posterior pools all of a user's pairs wherever chunks
    and micro-batches would like to cut.
    Catches: a user cut by a chunk, the prior counted once a pair, groups numbered from
    the micro-batch instead of the chunk."""
    experts = small.experts(dtype=DOUBLE, **SHARINGS[sharing])
    pairs, ref = small.pairs(COUNT, users=4), small.reference_logp(COUNT, dtype=DOUBLE)
    group = users_of(pairs)
    (-log_p(experts, pairs, ref, small.config(beta=0.5), group).sum() / COUNT).backward()
    want = gradient(experts)
    for head_rows in HEAD_ROWS:
        config = small.config(beta=0.5, latent="user", head_rows=head_rows)
        small.accumulate(experts, small.problem(config, pairs, ref), LOG_W[experts.K])
        assert_equal(gradient(experts), want, head_rows)


@pytest.mark.parametrize("head_rows", [0, 25])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_expert_is_dpo_bit_for_bit(family, head_rows):
    """K = 1: the same bits as DPO's loss written behind the same log-probs.
    Catches: a weight or a responsibility that is nearly 1, another order of the sum,
    a second copy of the loss that drifts."""
    experts, pairs, ref = small.experts(family, experts=1), small.pairs(COUNT), small.reference_logp(COUNT)
    config = small.config(beta=0.5, head_rows=head_rows)
    batch = collate(pairs, list(range(COUNT)))
    seen = small.accumulate(experts, small.problem(config, pairs, ref, rows_of=rows_of), LOG_W[1])
    got, h = gradient(experts), torch.cat([h for _, h, _ in seen])
    assert not any(q.any() for q, *_ in seen)                               # log q is 0, not nearly 0
    if head_rows == 0:
        margin = margins(pair_logp(experts, batch), ref, config.beta)[:, 0]
        assert torch.equal(margin, h[:, 0])
        (dpo_loss(margin).sum() / COUNT).backward()
        want = gradient(experts)
        assert all(torch.equal(got[name], want[name]) for name in want)
    else:                                                                   # by hand: d loss / d h is -sigma(-h)
        margin = margins(pair_logp(experts, batch), ref, config.beta)[:, 0]
        (torch.sigmoid(-h[:, 0]) * -margin).sum().div(COUNT).backward()
        assert_equal(got, gradient(experts), head_rows)


class Plain:
    """Gradient descent of rate 1, as `step` uses an optimizer."""

    def __init__(self, params):
        self.param_groups = [{"params": list(params), "lr": 1.0, "peak": 1.0}]

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= 0 if p.grad is None else p.grad

    def zero_grad(self, set_to_none):
        for p in self.param_groups[0]["params"]:
            p.grad = None


def updated(experts, pairs, config, ref, given=None, order=None):
    """How far one step on all units moves the parameters, its figures, and the responsibilities (U,K) that it used; the
    experts are put back."""
    optimizer = Plain(p for p in experts.parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in experts.named_parameters() if p.requires_grad}
    problem = small.problem(config, pairs, ref, given)
    ids = list(range(len(problem.plan.units))) if order is None else order
    problem.plan.steps[:] = [(0, ids)]
    state = small.state(experts, problem, LOG_W[experts.K], optimizer)
    figures, _ = step(state, problem, EM(clip=config.clip))
    change = {n: before[n] - p.detach() for n, p in experts.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in experts.named_parameters():
            if n in before:
                p.copy_(before[n])
    return change, figures, state.log_q


CASES = {
    "pair": dict(latent="pair"),
    "user": dict(latent="user"),
    "user, context": dict(latent="user", estep="context", context=1),
    "user, given": dict(latent="user"),
    "pair, given in part": dict(latent="pair"),
}


@pytest.mark.parametrize("sharing", ["k1", "full", "low-rank", "models", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_the_micro_batch_does_not_matter(sharing, case):
    """A whole optimizer step, any `micro`, any head_rows, any order of the groups:
    the same update, figures and responsibilities.
    Catches: a division by the micro-batch's number of pairs (or by all pairs where context pairs are set aside),
    a gradient that a later micro-batch overwrites, context pairs trained on, responsibilities of group g given
    to group g - first, responsibilities taken from the table for some micro-batches of a step and computed for others,
    clipping once a micro-batch."""
    options = CASES[case]
    pairs = small.pairs(COUNT, users=4, context=(0, 3, 6, 8) if "context" in case else ())
    experts, ref = small.experts(dtype=DOUBLE, **SHARINGS[sharing]), small.reference_logp(COUNT, dtype=DOUBLE)
    units, given = groups(pairs, options["latent"]), None
    if "given" in case:
        noise = torch.randn(len(units), experts.K, generator=torch.Generator().manual_seed(2))
        given = torch.log_softmax(noise, -1).double()
        if "part" in case:
            given[[1, 4]] = torch.nan
    results = []
    turned = [2, 0, 3, 1, *range(4, len(units))]
    cuts = [(100, 10_000, None), (1, 10_000, None), (3, 10, None), (4, 0, None), (3, 1, turned)]
    for micro, head_rows, order in cuts:
        config = small.config(beta=0.5, micro=micro, head_rows=head_rows, clip=1e9, **options)
        change, figures, used = updated(experts, pairs, config, ref, given, order)
        assert used.shape == (len(units), experts.K) and (used.exp().sum(-1) - 1).abs().max() < 1e-6
        results.append((change, figures, used))
    for change, figures, used in results[1:]:
        assert_equal(change, results[0][0], case)
        assert torch.allclose(used, results[0][2], atol=1e-12)
        assert abs(figures["loss"] - results[0][1]["loss"]) < 1e-6 and figures["pairs"] == results[0][1]["pairs"]
    if case == "user, given":
        assert torch.equal(results[0][2], given)


def test_context_pairs_decide_and_are_not_trained_on():
    """estep context: a user's posterior comes from the context pairs alone,
    and the gradient from the others alone, divided by their number.
    Catches: the two exchanged, context pairs in either sum,
    the posterior of users in another order than the groups'."""
    context = (0, 3, 6, 8)
    pairs, ref = small.pairs(COUNT, users=4, context=context), small.reference_logp(COUNT, dtype=DOUBLE)
    experts = small.experts(experts=2, rank=0, dtype=DOUBLE)
    group = users_of(pairs)
    is_context = torch.zeros(COUNT, dtype=torch.bool).index_fill(0, torch.tensor(context), True)
    h = margins(pair_logp(experts, collate(pairs, list(range(COUNT)))), ref, 0.5)
    log_q = torch.stack([torch.log_softmax(LOG_W[2] + F.logsigmoid(h[(group == g) & is_context]).sum(0), 0)
                         for g in range(4)]).detach()
    (-(log_q[group].exp() * F.logsigmoid(h))[~is_context].sum() / (COUNT - len(context))).backward()
    want = gradient(experts)
    config = small.config(beta=0.5, latent="user", estep="context", context=1, micro=3, head_rows=10, clip=1e9)
    change, figures, used = updated(experts, pairs, config, ref)
    assert_equal(change, want, "context")
    assert torch.allclose(used, log_q, atol=1e-12) and figures["pairs"] == COUNT - len(context)


@pytest.mark.parametrize("users", [None, 4])
@pytest.mark.parametrize("sharing", ["k1", "low-rank"])
def test_flipped_labels_are_a_likelihood_of_their_own(sharing, users):
    """--label-noise e: the gradient is that of log sum_k w_k prod_i [e + (1 - 2e) sigma(h_ik)], for one type
    a pair and one a user. Catches: an E-step that takes choices for right, noise in it alone, 1 - e for 1 - 2e."""
    share, options = 0.15, SHARINGS[sharing]
    latent = "user" if users else "pair"
    config = small.config(**options, beta=0.5, head_rows=10, label_noise=share, latent=latent)
    experts, pairs = small.experts(dtype=DOUBLE, **options), small.pairs(COUNT, users=users)
    ref = small.reference_logp(COUNT, dtype=DOUBLE)
    group = users_of(pairs) if users else torch.arange(COUNT)
    G = int(group.max()) + 1
    h = margins(pair_logp(experts, collate(pairs, list(range(COUNT))), tile=17), ref, config.beta)
    log_lik = torch.log(share + (1 - 2 * share) * torch.sigmoid(h)).to(DOUBLE)                  # (B,K)
    pooled = torch.zeros(G, experts.K, dtype=DOUBLE).index_add(0, group, log_lik)
    (-torch.logsumexp(LOG_W[experts.K] + pooled, dim=1).sum() / COUNT).backward()
    want = gradient(experts)
    em = EM(noisy_margins(share))
    small.accumulate(experts, small.problem(config, pairs, ref), LOG_W[experts.K], em)
    assert_equal(gradient(experts), want, (sharing, users))
