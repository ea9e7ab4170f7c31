"""Rankings and ties (variants/rankings.py): probabilities by enumeration, layouts with more than two responses, and a
step's gradient. The oracles enumerate orders and share no code with the program; each test says what it catches."""

import itertools
import math
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from letters import read
from raising import raises_at

from mixdpo.dpo import log_likelihood, log_odds, margins
from mixdpo.experts import pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.preferences import collate, rows_of
from mixdpo.start import choice_margins, neighbours, pair_features
from mixdpo.text.records import REST, Fault
from mixdpo.variants.choose import choose_margins
from mixdpo.variants.rankings import as_pairs, ranking_log_likelihood, ranking_margins
from train import EM

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def chosen_in_turn(rewards, order):
    """The probability of an order, best first: each next one by a softmax over those that are left."""
    p, left = 1.0, list(order)
    while left:
        p *= math.exp(rewards[left[0]]) / sum(math.exp(rewards[i]) for i in left)
        left = left[1:]
    return p


def orders_of(places):
    """All orders without ties that agree with the places; -1: no response."""
    present = [r for r, place in enumerate(places) if place >= 0]
    return [order for order in itertools.permutations(present)
            if all(places[a] <= places[b] for a, b in itertools.pairwise(order))]


def rankings(count=6, seed=0):
    """Choices among 2, 3 and 4 responses of very different lengths, one of them with a tie; users in turn."""
    pairs = small.pairs(3 * count, seed=seed, users=3)
    made = []
    for n in range(count):
        a, b, c = pairs[3 * n : 3 * n + 3]
        kind = n % 3                                                        # 4 responses, 2, 3 with a tie
        more = ((b.chosen, c.rejected), (), (b.rejected,))[kind]
        order = ((0, 1, 2, 3), (0, 1), (0, 1, 1))[kind]
        made.append(replace(a, more=more, order=order, sides=4, user=str(n % 2), line=n + 1))
    return made


def naive_log_p(experts, pairs, ref, beta):
    """(P,K): each response alone through the model, then the mean over orders of their log-probabilities."""
    out = []
    for pair, own in zip(pairs, ref):
        rewards = torch.stack([
            beta * (pair_logp(experts, collate([replace(pair, chosen=y, rejected=y, more=(), order=(0, 1), sides=2)],
                                               [0]))[0, :, 0] - own[0, r]) for r, y in enumerate(pair.responses)], -1)
        terms = [sum(rewards[:, order[j]] - torch.logsumexp(rewards[:, list(order[j:])], -1) for j in range(len(order)))
                 for order in orders_of(pair.order)]
        out.append(torch.stack(terms).mean(0))
    return torch.stack(out)


# ---- one likelihood


def test_probabilities_of_all_orders():
    """Caught: stages over the wrong responses; a last stage that counts; worse responses in front of better ones."""
    rewards = normal(4)
    total, first, before = 0.0, [0.0] * 4, 0.0
    for order in itertools.permutations(range(4)):
        places = [order.index(r) for r in range(4)]
        p = float(ranking_log_likelihood(rewards, places).exp())
        assert p == pytest.approx(chosen_in_turn(rewards.tolist(), order), abs=1e-12)
        total, before = total + p, before + p * (order.index(2) < order.index(1))
        first[order[0]] += p
    assert total == pytest.approx(1, abs=1e-12)
    assert first == pytest.approx(torch.softmax(rewards, 0).tolist(), abs=1e-12)
    assert before == pytest.approx(float(torch.sigmoid(rewards[2] - rewards[1])), abs=1e-12)        # Bradley-Terry


@pytest.mark.parametrize("places", [[0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 1, 1, 2], [0, 0, 1, 1], [0, 0, 0], [0, 1, -1]])
def test_a_tie_is_the_mean_over_its_orders(places):
    """Caught: a tie as the probability that one of the orders occurs; sets counted by number; absent responses."""
    rewards = normal(len(places), seed=3)
    orders = orders_of(places)
    want = sum(math.log(chosen_in_turn(rewards.tolist(), order)) for order in orders) / len(orders)
    assert float(ranking_log_likelihood(rewards, places)) == pytest.approx(want, abs=1e-12)


def test_the_best_of_several_is_a_softmax():
    """Caught: the rest as equally good ones; the rest left out of the choices; a second one without a choice."""
    rewards = normal(4, seed=4)
    got = ranking_log_likelihood(rewards, [0, REST, REST, REST])
    assert torch.allclose(got, torch.log_softmax(rewards, 0)[0], rtol=0, atol=1e-12)
    both = ranking_log_likelihood(rewards, [0, 1, REST, REST])
    assert torch.allclose(both, got + torch.log_softmax(rewards[1:], 0)[0], rtol=0, atol=1e-12)
    assert neighbours([0, 1, REST, REST, -1]) == [(0, 1), (1, 2), (1, 3)]


def test_margin_is_the_log_odds_and_of_a_pair_the_same_to_the_bit():
    """Caught: a pair by another formula; its margin changed by the other rows of its batch, or by what stands in the
    place of responses that it has not; rows exchanged."""
    order = torch.tensor([[0, 1, -1, -1], [0, 1, 2, 3], [0, 0, -1, -1], [0, 1, -1, -1], [0, 1, 1, -1]])
    logp, ref = normal(5, 3, 4, seed=1).float(), normal(5, 1, 4, seed=2).float()
    h = ranking_margins(logp, ref, 0.3, order)
    for b in (0, 3):
        assert torch.equal(h[b], margins(logp[b, :, :2], ref[b, :, :2], 0.3))
    for b in (1, 2, 4):
        want = ranking_log_likelihood(0.3 * (logp - ref)[b], order[b].tolist())
        assert torch.allclose(log_likelihood(h[b]), want, rtol=0, atol=1e-6)
    other = logp.masked_fill((order < 0)[:, None], 1e4)
    assert torch.equal(ranking_margins(other, ref, 0.3, order), h)
    assert torch.allclose(log_odds(log_likelihood(h[1].double())), h[1].double(), rtol=0, atol=1e-9)


def test_gradient_is_that_of_log_p_also_where_p_is_nearly_1():
    """Caught: a detached log-odds; NaN or infinite gradients of a certain ranking."""
    order = torch.tensor([[0, 1, 2], [0, 1, 1]])
    zero = torch.zeros(1, 1, 3, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda x: log_likelihood(ranking_margins(x, zero, 1.0, order)),
                                    normal(2, 2, 3).requires_grad_())
    for scale in (1.0, 30.0, 300.0, 3e4):
        logp = (scale * torch.tensor([[[2.0, 1.0, 0.0]]])).requires_grad_()
        h = ranking_margins(logp, torch.zeros(1, 1, 3), 1.0, order[:1])
        (-log_likelihood(h)).sum().backward()
        assert h.isfinite().all() and logp.grad.isfinite().all()
        s = logp.detach().double().requires_grad_()
        (-ranking_log_likelihood(s, [0, 1, 2])).sum().backward()
        assert torch.allclose(logp.grad.double(), s.grad, rtol=1e-4, atol=1e-12)


# ---- layouts, and a step


@pytest.mark.parametrize("sharing", ["heads", "lora", "models"])
def test_layouts_give_each_response_its_own_log_prob(sharing):
    """Caught: responses of a ranking that see each other; their tokens counted for another response; a response of
    length 0 with log-probs."""
    experts, pairs = small.experts(dtype=DOUBLE, experts=2, sharing=sharing), rankings()
    batch = collate(pairs, range(len(pairs)))
    for layout in (rows_of, lambda b: compact_rows(b, shared=True), lambda b: compact_rows(b, shared=False)):
        got = pair_logp(experts, batch, layout)                             # (B,K,4)
        assert got.shape[2] == 4
        for b, pair in enumerate(pairs):
            for r, y in enumerate(pair.responses):
                alone = replace(pair, chosen=y, rejected=y, more=(), order=(0, 1), sides=2)
                want = pair_logp(experts, collate([alone], [0]))[0, :, 0]
                assert torch.allclose(got[b, :, r], want, rtol=0, atol=1e-10), (b, r)
            assert torch.equal(got[b, :, len(pair.responses):], torch.zeros_like(got[b, :, len(pair.responses):]))


@pytest.mark.parametrize("latent", ["pair", "user"])
@pytest.mark.parametrize("head_rows", [0, 12, 10_000])
def test_gradient_of_a_step_is_that_of_log_p(latent, head_rows):
    """By Fisher's identity: -log sum_k w_k prod_i p_ik, i over a unit's rankings, with p by enumeration of orders.
    Caught: chunks that end inside a ranking; a part with the orders of another; a ranking counted as its pairs."""
    pairs, beta = rankings(), 0.5
    ref = -20 + 5 * normal(len(pairs), 1, 4, seed=5)
    config = small.config(experts=2, rank=0, beta=beta, latent=latent, head_rows=head_rows)
    experts = small.experts(dtype=DOUBLE, experts=2, rank=0)
    log_w = torch.tensor([0.3, 0.7], dtype=DOUBLE).log()
    group = torch.arange(len(pairs)) if latent == "pair" else torch.tensor([n % 2 for n in range(len(pairs))])
    log_p = naive_log_p(experts, pairs, ref, beta)                          # (P,K)
    pooled = torch.zeros(int(group.max()) + 1, 2, dtype=DOUBLE).index_add(0, group, log_p)
    (-torch.logsumexp(log_w + pooled, 1).sum() / len(pairs)).backward()
    want = {n: p.grad.clone() for n, p in experts.named_parameters() if p.grad is not None}
    experts.zero_grad(set_to_none=True)
    seen = small.accumulate(experts, small.problem(config, pairs, ref), log_w, EM(choose_margins(config, pairs)))
    for name, p in experts.named_parameters():
        if name in want:
            assert torch.allclose(p.grad, want[name], rtol=0, atol=1e-11), name
    h = torch.cat([part[1] for part in seen])
    assert len(h) == len(pairs)


# ---- the start, and evaluation


def test_linear_start_reads_rankings_as_pairs_of_neighbours():
    """Caught: features of responses that are not there; a tie as a difference; a context ranking by one pair."""
    features, order = normal(3, 4, 5).float(), torch.tensor([[0, 1, 1, 2], [0, 1, -1, -1], [0, 0, 0, -1]])
    x, group, index = pair_features([[0, 2], [1]], features, order)
    assert index.tolist() == [0, 0, 0, 0, 2, 1] and group.tolist() == [0, 0, 0, 0, 0, 1]
    want = [features[0, a] - features[0, b] for a, b in ((0, 1), (0, 2), (1, 3), (2, 3))]
    want += [features[2, 0] - features[2, 0], features[1, 0] - features[1, 1]]
    want = torch.stack(want)
    assert torch.allclose(x, want / want.square().mean(0).sqrt(), atol=1e-6)
    h = torch.tensor([[0.5, -1.0], [0.2, 0.3], [2.0, -3.0]], dtype=DOUBLE)
    got = choice_margins(h, torch.tensor([1, 1, 3]), 4)
    assert torch.equal(got[3], h[2]) and got[[0, 2]].abs().max() == 0
    p, chance = torch.sigmoid(h[:2]).prod(0), 0.25
    assert torch.allclose(got[1], (p / (1 - p)).log() - math.log(chance / (1 - chance)))


def test_evaluation_reads_rankings_as_their_pairs():
    """Caught: pairs of equally good responses; a pair the wrong way round; fields of the line that are lost."""
    one = replace(rankings()[0], order=(0, 1, 1, 2), user="anna", domain="film", line=7)
    a, b, c, d = one.responses
    said = []
    made = as_pairs([one], said.append)
    assert [(p.chosen, p.rejected) for p in made] == [(a, b), (a, c), (a, d), (b, d), (c, d)]
    assert {(p.user, p.domain, p.line, p.sides, p.more, p.order) for p in made} == {("anna", "film", 7, 2, (), (0, 1))}
    assert said == ["1 rankings and pairs are evaluated as the 5 pairs that they contain"]


# ---- files


def test_reading_rankings(tmp_path):
    """Caught: groups in the wrong order; pairs of the same file without room for the longest ranking."""
    first, second = read(tmp_path, {"prompt": "a", "ranking": [["x"], ["yy", "z"], ["w"]], "user": "u"},
                         {"prompt": "a", "chosen": "x", "rejected": "y"})
    assert first.responses == ([120, 256], [121, 121, 256], [122, 256], [119, 256])
    assert first.order == (0, 1, 1, 2) and first.sides == second.sides == 4 and first.user == "u"
    best, = read(tmp_path, {"prompt": "a", "ranking": [["x"]], "rest": ["y", "z"]})
    assert best.order == (0, REST, REST) and best.responses[2] == [122, 256]
    same, = read(tmp_path, {"prompt": "a", "ranking": [["x"], ["y"]]})
    pair, = read(tmp_path, {"prompt": "a", "chosen": "x", "rejected": "y"})
    assert same == pair


@pytest.mark.parametrize("fields, kind", [
    ({"ranking": [["x"]]}, "too few responses"), ({"ranking": ["x", "y"]}, "wrong type"),
    ({"ranking": [["x"], []]}, "wrong type"), ({"ranking": [["x"], ["y", "x"]]}, "identical responses"),
    ({"ranking": [["x"], [3]]}, "wrong type"), ({"ranking": [["x"], [""]]}, "empty response 2"),
    ({"ranking": []}, "wrong type"),
    ({"ranking": [["x"]], "rest": "y"}, "wrong type"), ({"ranking": [["x"]], "rest": [3]}, "wrong type"),
    ({"chosen": "x", "rejected": "y", "rest": ["z"]}, "rest without a ranking"),
    ({"ranking": [["x"], ["y"]], "chosen": "x"}, "two forms of a choice"),
    ({"ranking": [["x"], list("abcdefghi")]}, "too many equal responses"),
    ({"ranking": [["x"], [[{"role": "assistant", "content": "y"}]]]}, "wrong type")])
def test_faulty_rankings(tmp_path, fields, kind):
    """Caught: a ranking that is read as something else, or as an error without its line."""
    with raises_at(file=tmp_path / "prefs.jsonl", line=1, kind=Fault) as caught:
        read(tmp_path, {"prompt": "a"} | fields)
    assert caught.value.kind == kind


def test_options_that_rankings_do_not_support():
    """Caught: a ranking whose noise or privacy is that of a pair; an error that does not name the option, or that names
    all of several files."""
    pairs = [replace(pair, file="b.jsonl", line=7) for pair in rankings()]
    for option, value in (("label_noise", 0.1), ("epsilon", 8.0)):
        with raises_at(f"is a ranking or a tie, which --{option.replace('_', '-')} does not support", file="b.jsonl",
                       line=7, option=option):
            choose_margins(replace(small.config(**{option: value}), data="a.jsonl,b.jsonl"), pairs)
    assert F.logsigmoid(choose_margins(small.config(), small.pairs())(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), 1.0,
                                                                      None)).item() == pytest.approx(-math.log(2))
