"""mixdpo/plan.py: what each test catches stands in its docstring."""

import numpy as np
import pytest
import small
import torch
from letters import PEOPLE, pair
from raising import raises_at

from mixdpo.fast import backward
from mixdpo.plan import batches, make_plan, mark_context, micro_batches
from mixdpo.preferences import groups


def test_context_pairs_are_drawn_per_user():
    """Caught: one count over all users; the file's own word overwritten; always the first pairs; the input changed."""
    marked = mark_context(PEOPLE, 1, seed=0)
    assert [sum(marked[i].context for i in g) for g in groups(marked, "user")] == [1, 1, 1]
    assert marked == mark_context(PEOPLE, 1, seed=0) and PEOPLE[0].context is None
    assert len({tuple(p.context for p in mark_context(PEOPLE, 1, seed)) for seed in range(20)}) > 5
    said = [pair([1], [2], [3], user="a", context=c) for c in (True, None, False)] + PEOPLE
    assert [p.context for p in mark_context(said, 1, seed=0)[:3]] == [True, None, False]


@pytest.mark.parametrize("count, user, line, fits", [
    (0, "b", 1, "1 to 6"), (2, "a", 2, "1 to 1"), (3, "a", 2, "1 to 1"),
])
def test_user_without_both_kinds_of_pair_is_named(count, user, line, fits):
    """Caught: a user left with nothing to train on, or with no context, whose row the pooled E-step would not have."""
    with raises_at(f"user {user!r}", fits, line=line, option="context"):
        mark_context(PEOPLE, count, seed=0)
    for said in (True, False):
        with raises_at("user 'd'", f"{2 * said} for context", line=20, option="context"):
            mark_context([pair([1], [2], [3], user="d", context=said, line=20)] * 2 + PEOPLE, 1, seed=0)
    with raises_at("user 'a'", line=2, option="context"):
        mark_context(PEOPLE[:3], 1, seed=0)


@pytest.mark.parametrize("size", [7, 8, 11, 100])
def test_batches_hold_whole_groups_and_drop_none(size):
    """Caught: the ragged last batch dropped; one overfull; a group in two batches; each group in one of its own."""
    units = groups(PEOPLE * 9, "pair")[:20] + [[0] * n for n in (7, 1, 3, 5)]
    made = batches(units, size, seed=1, epoch=0)
    assert sorted(g for batch in made for g in batch) == list(range(24))
    held = [sum(len(units[g]) for g in batch) for batch in made]
    assert max(held) <= size and all(h + len(units[after[0]]) > size for h, after in zip(held, made[1:]))


def test_batches_are_shuffled_by_seed_and_epoch():
    """Caught: no shuffle; the epoch or the seed left out of it; seed + epoch; the global generator used."""
    units = groups(PEOPLE * 4, "pair")
    orders = {(s, e): batches(units, 5, s, e) for s in (0, 1) for e in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert batches(units, 5, 1, 1) == orders[1, 1] and torch.equal(state, torch.get_rng_state())


def test_group_larger_than_a_batch_is_named():
    """Caught: a user too large for a batch that is split or left out; a message without the size that fits."""
    with raises_at("user 'b'", "--batch 7", line=1, option="batch"):
        batches(groups(PEOPLE, "user"), 6, 0, 0, PEOPLE)


# ---- the whole plan


@pytest.mark.parametrize("estep, aside", [("context", 1), ("all", 0)])
def test_a_plan_leaves_context_pairs_to_the_e_step_and_to_the_last_part(estep, aside):
    """Caught: context pairs trained on before the last part, in none, or in fewer passes; the last part among the first
    steps; pairs set aside where the E-step looks at all; an epoch left out; a group cut by a micro-batch, a micro-batch
    for each group, or context pairs counted as trained ones."""
    config = small.config(latent="user", estep=estep, context=aside, epochs=3, batch=10, micro=3)
    plan = make_plan(PEOPLE, config)
    assert plan.units == groups(PEOPLE, "user")
    first, last = plan.visits[: plan.inferred], plan.visits[plan.inferred :]
    assert [visit.unit for visit in first] == [0, 1, 2] and plan.unit_of.tolist() == [0, 1, 2] * (1 + aside)
    assert [len(visit.trained) for visit in first] == [len(unit) - aside for unit in plan.units]
    assert [(visit.unit, visit.trained, visit.context) for visit in last] == [
        (visit.unit, visit.context, []) for visit in first if aside]
    parts = plan.steps[: plan.last_part], plan.steps[plan.last_part :]
    for steps, ids in zip(parts, ([0, 1, 2], [3, 4, 5])[: 1 + aside]):
        assert [sorted(g for epoch, visits in steps if epoch == e for g in visits) for e in range(3)] == [ids] * 3
    assert plan.closing == len(last) == 3 * aside and bool(parts[1]) == bool(aside)
    seen = []
    for micro in micro_batches(plan, [0, 1, 2], config):
        trained, held = micro.train.pair.tolist(), micro.context.pair.tolist() if micro.context else []
        assert sorted(trained + held) == sorted(i for g in micro.visits.tolist() for i in plan.units[g])
        assert trained == [i for g in micro.visits.tolist() for i in plan.visits[g].trained]
        assert len(held) == aside * len(micro.visits) and (not held or bool(micro.context.context.all()))
        seen.append(micro.visits.tolist())
    assert seen == ([[0], [1, 2]] if aside else [[0], [1], [2]])             # 1 + 2 trained pairs fit, 2 + 3 do not


@pytest.mark.parametrize("em", ["minibatch", "incremental"])
@pytest.mark.parametrize("estep", ["all", "first"])
@pytest.mark.parametrize("latent", ["pair", "user"])
def test_without_estep_context_what_the_file_marks_is_a_pair_like_all_others(latent, estep, em):
    """Caught: marked pairs left out, or trained on in a last part, or in the E-step alone; a file of marked pairs
    refused."""
    marked = [pair([1], [2], [3], user=u, context=c) for u, c in zip("aabbcc", (True, True, False, True, None, False))]
    for some in (marked, marked[:2]):
        plan = make_plan(some, small.config(latent=latent, estep=estep, em=em, batch=10))
        assert sorted(i for visit in plan.visits for i in visit.trained) == list(range(len(some)))
        assert not any(visit.context for visit in plan.visits)
        assert plan.units == groups(some, latent) and plan.closing == 0 and plan.last_part == len(plan.steps)


def test_the_last_part_begins_after_all_passes_over_the_others():
    """One step of four users, then two of context pairs, in each of two epochs. There a visit is a pair. A private
    schedule has no last part. Caught: a pass over context pairs in each epoch; a user's pairs together, so that a step
    has few users; shapes of the first part used for the last; texts of the last part in any order; a schedule whose
    visits are counted as context pairs."""
    people = [pair([1], [2] * (1 + (7 * n) % 5), [3], user="abcd"[n % 4], context=n >= 8) for n in range(32)]
    config = small.config(latent="user", estep="context", batch=12, epochs=2)
    plan = make_plan(people, config)
    of_step = [[(visit.unit, len(visit.trained)) for visit in map(plan.visits.__getitem__, ids)]
               for _, ids in plan.steps]
    assert [epoch for epoch, _ in plan.steps] == [0, 1, 0, 0, 1, 1] and plan.last_part == 2 and plan.inferred == 4
    assert [sorted(step) for step in of_step[:2]] == [[(u, 2) for u in range(4)]] * 2
    assert [sorted(of_step[t] + of_step[t + 1]) for t in (2, 4)] == [[(u, 1) for u in range(4) for _ in range(6)]] * 2
    assert of_step[2] != sorted(of_step[2], key=lambda visit: visit[0]), "pairs of a user together"
    for _, ids in plan.steps:
        longest = [max(people[i].longest() for i in plan.visits[v].trained) for v in ids]
        assert longest == sorted(longest)
    private = make_plan(people, config, schedule=lambda visits, *_: [(0, []), (0, [len(visits) - 1])])
    assert (private.closing, private.inferred, private.last_part, len(private.visits)) == (0, 4, 2, 4)
    assert all(visit.context and visit.trained for visit in private.visits)


@pytest.mark.parametrize("em", ["minibatch", "incremental"])
def test_visits_share_out_their_unit_in_each_part(em):
    """Caught: visits of the last part counted among the slices of the others, so that a gate's loss is halved."""
    people = [pair([1], [2], [3], user="ab"[n % 3 == 0]) for n in range(30)]
    plan = make_plan(people, small.config(latent="user", estep="context", context=4, em=em, batch=30))
    for part in (slice(0, plan.inferred), slice(plan.inferred, None)):
        for u in (0, 1):
            of_unit = plan.share[part][plan.unit_of[part] == u]
            slices = 4 if em == "incremental" or part.start else 1          # four context pairs
            assert of_unit.tolist() == [1 / slices] * slices


def test_log_likelihoods_are_pooled_over_the_visits_of_a_unit():
    """Caught: rows of the last part asked for; NaN that spreads; another unit's rows."""
    people = [pair([1], [2], [3], user="ab"[n % 3 == 0]) for n in range(30)]
    plan = make_plan(people, small.config(latent="user", estep="context", context=2, em="incremental", batch=30))
    assert plan.unit_of.tolist() == [0, 0, 1, 1] * 2 and plan.inferred == 4
    loglik = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [torch.nan, torch.nan]])
    assert plan.pooled(loglik).tolist() == [[5.0, 10.0], [16.0, 32.0]]


def test_users_in_slices_that_share_out_their_context():
    """Caught: a pair lost or visited twice; a slice without context; users that fit a batch cut otherwise than those
    that do not; a visit larger than a batch."""
    people = [pair([1], [2], [3 + n], user="ab"[n % 3 == 0]) for n in range(30)]            # 20 of a, 10 of b
    for estep, aside, parts in (("all", 0, [20, 10]), ("context", 4, [4, 4]), ("context", 8, [8, 2])):
        plan = make_plan(people, small.config(latent="user", em="incremental", estep=estep, context=aside, batch=5))
        first, last = plan.visits[: plan.inferred], plan.visits[plan.inferred :]
        assert [(v.unit, v.trained, v.context) for v in last] == [(v.unit, [i], []) for v in first for i in v.context]
        of = {u: [visit for visit in first if visit.unit == u] for u in (0, 1)}
        units = sorted(plan.units, key=len, reverse=True)
        for u, unit in enumerate(plan.units):
            assert sorted(i for v in of[u] for i in v.trained + v.context) == sorted(unit)
            assert all(people[i].user == people[unit[0]].user for v in of[u] for i in v.trained)
            assert len(of[u]) == parts[units.index(unit)]
            assert all(bool(v.context) == bool(aside) and all(plan.pairs[i].context for i in v.context) for v in of[u])
        for micro in micro_batches(plan, list(range(plan.inferred)), small.config(micro=4)):
            assert micro.train.group.unique().tolist() == list(range(len(micro.visits)))
            assert len(micro.train.ids) <= 5
            assert not aside or micro.context.group.unique().tolist() == list(range(len(micro.visits)))
        for micro in micro_batches(plan, list(range(plan.inferred, len(plan.visits))), small.config(micro=4)):
            assert micro.context is None and bool(micro.train.context.all()) and len(micro.train.ids) <= 5
    with raises_at("user 'a'", "--em incremental", line=people[1].line, option="batch"):
        make_plan(people, small.config(latent="user", batch=5))


def test_groups_of_like_length_stand_together_in_a_step():
    """Caught: short and long texts by turns, where padding costs as much as text; a step's groups exchanged with
    another's."""
    pairs = [pair([1] * n, [2], [3]) for n in np.random.default_rng(0).permutation(40) + 1]
    plan = make_plan(pairs, small.config(batch=16, micro=4, epochs=2))
    drawn = [ids for epoch in range(2) for ids in batches(plan.units, 16, 0, epoch)]
    assert [sorted(ids) for _, ids in plan.steps] == [sorted(ids) for ids in drawn]
    for _, ids in plan.steps:
        lengths = [pairs[plan.units[g][0]].longest() for g in ids]
        assert lengths == sorted(lengths)


def test_chunks_cover_every_pair_once_and_cut_no_user():
    """Faults: a chunk that ends inside a user; the last chunk forgotten; one chunk whatever head_rows is."""
    from mixdpo.preferences import Pair, collate, rows_of

    pairs = [Pair([1], [2] * n, [3] * (n + 1), user=u) for n, u in zip((1, 4, 2, 7, 1, 1, 3), "aabbbcd")]
    batch = collate(pairs, range(7), [0, 0, 1, 1, 1, 2, 3])
    sequence = rows_of(batch).sequence
    for rows, whole in ((1, True), (1, False), (12, True), (12, False), (0, True)):
        cuts = list(backward.chunks(batch, rows, whole))
        assert [c[0] for c in cuts] == [0, *(c[1] for c in cuts[:-1])] and cuts[-1][1] == 7
        assert all((sequence[m:end] // 2 >= p).all() and (sequence[m:end] // 2 < q).all() for p, q, m, end in cuts)
        assert sum(end - m for *_, m, end in cuts) == len(sequence)
        assert not whole or all(q == 7 or batch.group[q - 1] != batch.group[q] for _, q, *_ in cuts)
        assert len(cuts) == {(1, True): 4, (1, False): 7, (0, True): 1}.get((rows, whole), len(cuts))
        assert rows != 12 or 1 < len(cuts) < 7


def test_a_head_micro_batch_keeps_as_much_as_fits(monkeypatch):
    """Fault: heads, or experts with states of their own, not counted; a bound of less than one row."""
    monkeypatch.setattr(backward, "KEPT", 4 * 53 * 12)
    rows, head = torch.zeros(30, 8), torch.zeros(53, 8)
    assert backward.fitting_rows(rows, head, torch.float32) == 12
    assert backward.fitting_rows(rows, head, torch.bfloat16) == 24
    assert backward.fitting_rows(rows, head.expand(4, 53, 8), torch.float32) == 3
    assert backward.fitting_rows(rows.expand(3, 30, 8), head, torch.float32) == 4
    assert backward.fitting_rows(rows.expand(20, 30, 8), head, torch.float32) == 1
