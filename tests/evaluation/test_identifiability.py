"""mixdpo/evaluation/identifiability.py: the count against the rank of the map's derivative, and the printed text.
What each test catches stands in its docstring."""

import json
from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch
from letters import GOOD, Letters, write
from raising import raises_at

from mixdpo.evaluation import identifiability
from mixdpo.evaluation.identifiability import counts_of, describe_counts
from mixdpo.preferences import Pair
from mixdpo.text.records import REST


def pair(a, b, user=None, prompt=1):
    return Pair([prompt], [a], [b], user=user)


def compared(n, each=1):
    """All pairs of n responses to one prompt; by users who judge `each` different ones, all combinations of these."""
    edges = list(combinations(range(2, n + 2), 2))
    return [pair(*edge, user=f"u{u}") for u, own in enumerate(combinations(edges, each)) for edge in own]


def shown(free, K, n, edges, twos):
    """Frequencies of single comparisons and of two with a common judge, from K (n - 1) rewards and K - 1 logits."""
    rewards = torch.cat([torch.zeros(K, 1, dtype=free.dtype), free[: K * (n - 1)].view(K, n - 1)], dim=1)
    w = torch.softmax(torch.cat([torch.zeros(1, dtype=free.dtype), free[K * (n - 1) :]]), 0)
    p = torch.sigmoid(torch.stack([rewards[:, a] - rewards[:, b] for a, b in edges], dim=1))           # (K,E)
    return torch.stack([*(w @ p), *(w @ (p[:, e] * p[:, f]) for e, f in twos)])


def identified(K, n, edges, twos):
    """Whether the map's derivative at random rewards and weights has full column rank."""
    free = torch.randn(K * (n - 1) + K - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    jacobian = torch.autograd.functional.jacobian(lambda x: shown(x, K, n, edges, twos), free)
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-12)) == len(free)


@pytest.mark.parametrize("n, each, most", [(2, 1, 1), (3, 1, 1), (4, 1, 1), (5, 1, 2), (6, 1, 2), (7, 1, 3), (3, 2, 2),
                                           (4, 2, 5)])
def test_the_count_is_the_rank_of_the_derivative(n, each, most):
    """It is full for the K that the count allows, and not for one more. Catches: unknowns or frequencies counted
    wrongly, K too large."""
    assert counts_of(compared(n, each)).supports(users=each > 1) == most
    edges = list(combinations(range(n), 2))
    twos = list(combinations(range(len(edges)), 2)) if each > 1 else []
    assert identified(most, n, edges, twos) and not identified(most + 1, n, edges, twos)


@pytest.mark.parametrize("m, most", [(3, 2), (4, 6)])
def test_rankings_count_as_their_orders(m, most):
    """One ranking of m responses has the probabilities of m! orders, written down here as products of choices; the
    derivative's rank is full for as many types as the count allows. Catches: a ranking counted as one pair, or as its
    pairs; one that carries no information about types."""
    def probabilities(free, K):
        odds = torch.cat([torch.zeros(K, 1, dtype=free.dtype), free[: K * (m - 1)].view(K, m - 1)], dim=1).exp()
        w = torch.softmax(torch.cat([torch.zeros(1, dtype=free.dtype), free[K * (m - 1) :]]), 0)
        return torch.stack([w @ torch.stack([odds[:, order[j]] / odds[:, order[j:]].sum(1) for j in range(m)]).prod(0)
                            for order in permutations(range(m))])

    responses = [[n] for n in range(2, m + 2)]
    one = Pair([1], *responses[:2], more=tuple(responses[2:]), order=tuple(range(m)), sides=m)
    c = counts_of([one])
    assert c.supports(users=False) == most and c.informative == 1 and c.unknowns == m - 1
    for K in (most, most + 1):
        free = torch.randn(K * m - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        jacobian = torch.autograd.functional.jacobian(lambda x: probabilities(x, K), free)
        assert (int(torch.linalg.matrix_rank(jacobian, rtol=1e-12)) == len(free)) == (K == most)


@pytest.mark.parametrize("order, free", [((0, REST, REST, REST), 3), ((0, 0, 1), 2), ((0, 0), 0), ((0, 1, REST), 5)])
def test_orders_that_a_choice_does_not_show_are_not_counted(order, free):
    """The best of four has the four probabilities of a softmax, so it identifies one type (the derivative's rank is 3
    of 7 for two), and a tie shows nothing. Catches: m! - 1 frequencies for every choice of m, so that --experts 6 got
    no warning on a file of the best of four."""
    one = Pair([1], [2], [3], more=tuple([n] for n in range(4, len(order) + 2)), order=order, sides=len(order))
    c = counts_of([replace(one, user="u"), replace(one, user="v")])
    assert c.frequencies == free and c.supports(users=False) == max(1, (free + 1) // len(order))
    assert c.informative == 2 * (free >= len(order)) and c.judged_together == 0
    again = counts_of([replace(one, user="u")] * 2)
    assert again.judged_together == (free > 0)


def test_just_as_many_frequencies_as_unknowns():
    """Three responses, all compared, and two of the three pairs of these by a common judge: five numbers for the five
    unknowns of K = 2. Catches: K too small by the weights' one."""
    pairs = [pair(2, 3, "a"), pair(2, 4, "a"), pair(2, 3, "b"), pair(3, 4, "b")]
    assert counts_of(pairs).supports(users=True) == 2
    edges = [(0, 1), (0, 2), (1, 2)]
    assert identified(2, 3, edges, [(0, 1), (0, 2)]) and not identified(2, 3, edges, [(0, 1)])


def test_what_is_counted():
    """Catches: a response of another prompt taken for the same, both orders of a pair as two, users mixed, a comparison
    of a user who judges alone counted as telling, an edge with itself counted though it was judged once."""
    pairs = [pair(2, 3, "a"), pair(3, 2, "b"), pair(3, 4, "a"), pair(2, 3, "c", prompt=9), pair(5, 6, "d", prompt=9),
             pair(7, 8, "e"), pair(7, 8, "e")]
    c = counts_of(pairs)
    assert (c.comparisons, c.edges, c.prompts, c.shared, c.both_ways) == (7, 5, 2, 1, 1)
    assert c.unknowns == 2 + 1 + 1 + 1 and c.users == [1, 1, 1, 2, 2]
    assert c.judged_together == 2, "a's two, and e's one that was judged twice"
    assert c.informative == 5, "all but c's and d's"
    c = counts_of([pair(2, 3), pair(4, 5)])
    assert c.users == [] and c.informative == c.judged_together == 0 and c.supports(True) == 1


def test_the_verdict_in_words():
    """Catches: a verdict for the other latent, no word of what would help, more types than users."""
    alone = describe_counts(counts_of([pair(2, 3, prompt=p) for p in range(1, 30)]), 2, "pair")
    assert alone[0].startswith("29 comparisons of 29 different pairs of responses to 29 prompts; 0 responses")
    assert alone[1].endswith("judged both ways: 0") and alone[2].startswith("0 of 29 comparisons carry information")
    assert "with one type per pair, at most K = 1 types" in alone[3] and "add users to the data" in alone[4]
    assert alone[4].startswith("warning: --experts 2 is more than these data support")
    of_users = counts_of([pair(2, 3, f"u{p % 4}", prompt=p) for p in range(1, 41)])
    got = describe_counts(of_users, 2, "user")
    assert got[1] == "4 users, comparisons of each: 10 to 10, median 10; users with only one: 0"
    assert "with one type per user at most K = 4 (180 more frequencies" in got[-1]
    assert "at most one type per user" in got[-1]
    assert "warning" not in got[-1] and "or --latent user" in describe_counts(of_users, 2, "pair")[-1]
    assert "--experts 5 is more than" in describe_counts(of_users, 5, "user")[-1]


def test_the_command(tmp_path, monkeypatch, capsys):
    """Catches: options that it does not look at."""
    path = tmp_path / "prefs.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b", "user": f"u{n % 2}"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("mixdpo.text.tokenizer.load_tokenizer", lambda name, data: Letters())
    identifiability.main([str(path), "--experts", "3"])
    out = capsys.readouterr().out
    assert "with one type per user at most K = 2" in out and "--experts 3 is more than" in out


@pytest.mark.parametrize("option, value", [("experts", "0"), ("experts", "-2"), ("latent", "foo"), ("max_prompt", "0"),
                                           ("max_response", "-1")])
def test_options_out_of_range_are_refused(tmp_path, monkeypatch, option, value):
    """Catches: --experts 0 and --latent foo answered as if they were sensible."""
    monkeypatch.setattr("mixdpo.text.tokenizer.load_tokenizer", lambda name, data: Letters())
    with raises_at(value, option=option):
        identifiability.main([str(write(tmp_path, GOOD)), "--" + option.replace("_", "-"), value])
