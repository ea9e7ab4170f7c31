"""K experts: what they share, how they start, what is saved of them. Tiny models of both families, tied and untied."""

import copy
import re
from functools import partial

import pytest
import small
import torch
from raising import raises_at

from mixdpo.dpo import margins
from mixdpo.experts import Adapters, Heads, Models, make_experts, pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.preferences import collate
from mixdpo.runs.checkpoint import load_state, trained_state

COUNT = 6
SHARINGS = {"k1": dict(experts=1), "head": dict(experts=1, train_trunk=False), "full": dict(experts=3, rank=0),
            "low-rank": dict(experts=3), "models": dict(experts=2, sharing="models"),
            "lora": dict(experts=3, sharing="lora"), "lora k1": dict(experts=1, sharing="lora")}


def batch(context=()):
    return collate(small.pairs(COUNT, context=context), list(range(COUNT)))


def plain_logp(model, unembedding, one):
    """log pi(y|x) of both responses of each pair, text by text, without padding, from full logits: (B,2)."""
    out = torch.zeros(COUNT, 2)
    for b in range(COUNT):
        for side in range(2):
            start, length = int(one.start[b]), int(one.length[b, side])
            ids = one.ids[b, side, :length]
            logps = torch.log_softmax(model(ids[None])[0] @ unembedding.T, -1)              # (T,V)
            out[b, side] = sum(logps[t - 1, ids[t]] for t in range(start, length))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_expert_starts_as_the_reference_exactly(family, sharing, dtype):
    """h is 0, not small, in either precision, against a model that the experts have never touched; of adapters, whose
    products have K times the rows, 0 to rounding.
    Catches: random A_k, heads that start apart, a second cast or another order of operations for K > 1,
    a reference that shares parameters with what is trained, adapters whose B_k is random too."""
    reference = small.model(family)
    experts = small.experts(family, moved=False, dtype=dtype, **SHARINGS[sharing])
    with torch.no_grad():
        ref = pair_logp(Heads(reference, 1, dtype=dtype), batch())                          # (B,1,2)
        for tile in (4096, 7, None):
            base = ref if tile == 4096 else pair_logp(Heads(reference, 1, dtype=dtype), batch(), tile=tile)
            h = margins(pair_logp(experts, batch(), tile=tile), base, 0.5)
            slack = 0.0 if sharing != "lora" else 1e-5 if dtype == torch.float32 else 0.1
            assert h.shape == (COUNT, experts.K) and h.abs().max() <= slack, (tile, h.abs().max())
    loss = pair_logp(experts, batch()).sum()
    loss.backward()
    with torch.no_grad():
        for p in experts.parameters():
            p.add_(p.grad if p.grad is not None else 0, alpha=-0.1)
    assert torch.equal(pair_logp(Heads(reference, 1, dtype=dtype), batch()), ref)


@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_pair_logp_is_the_sum_over_the_response(family, sharing, shared, packed):
    """Against each text alone, unpadded, with full logits of policy(k): what is trained is what is sampled from.
    Catches: off by one in the predicted positions, the prompt's or the padding's tokens counted, the end token left
    out, expert k's factors with expert j's, policy(k) without its head, the trunk's head in place of W + W A_k B_k; a
    response that sees the other one, or stands behind it; a packed text that sees the one before."""
    experts, one = small.experts(family, **SHARINGS[sharing]), batch()
    with torch.no_grad():
        logp = pair_logp(experts, one, partial(compact_rows, shared=shared, packed=packed))
        for k in range(experts.K):
            model, unembedding = experts.policy(k)
            assert torch.allclose(logp[:, k], plain_logp(model, unembedding, one), atol=1e-4), k
        if experts.K > 1:
            assert (logp[:, 0] - logp[:, 1]).abs().max() > 0.1     # else nothing above tells the experts apart


@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_shared_prompt_and_a_packed_row_have_the_same_gradient(family, sharing):
    """Catches: a prompt that learns from one response alone; states of the window cut from the graph."""
    grads = []
    for shared, packed in ((False, False), (True, False), (False, True), (True, True)):
        experts = small.experts(family, dtype=torch.float64, **SHARINGS[sharing])
        weight = torch.randn(COUNT, experts.K, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (pair_logp(experts, batch(), partial(compact_rows, shared=shared, packed=packed)) * weight).sum().backward()
        grads.append({name: p.grad for name, p in experts.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert grads[0].keys() == other.keys() and other
        for name in other:
            assert torch.allclose(grads[0][name], other[name], rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padding_order_and_neighbours(sharing):
    """A pair's log-probs are its own, alone or in any company, whatever ids pad the rows.
    Catches: an attention that sees padding, positions that shift with it, sequence numbers mixed up."""
    experts, one = small.experts(**SHARINGS[sharing]), batch()
    with torch.no_grad():
        whole = pair_logp(experts, one)
        order = [4, 1, 5, 0, 3, 2]
        assert torch.allclose(pair_logp(experts, collate(small.pairs(COUNT), order)), whole[order], atol=1e-5)
        for b in range(COUNT):
            assert torch.allclose(pair_logp(experts, collate(small.pairs(COUNT), [b]))[0], whole[b], atol=1e-5)
        beyond = torch.arange(one.ids.shape[-1]) >= one.length[..., None]
        assert beyond.any()
        one.ids[beyond] = 17
        assert torch.allclose(pair_logp(experts, one), whole, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "untied"])
@pytest.mark.parametrize("count,rank", [(2, 0), (2, 3), (1, 3)])
def test_a_frozen_trunk_stays_bit_identical(family, count, rank):
    """train_trunk false: one large step moves the heads alone, and only they are saved.
    Catches: a tied unembedding that learns through the embedding, a trunk in the optimizer,
    a base W trained beside its factors."""
    experts = small.experts(family, experts=count, rank=rank, train_trunk=False)
    before = {n: p.detach().clone() for n, p in experts.named_parameters()}
    trained = [n for n, p in experts.named_parameters() if p.requires_grad]
    assert trained == (["W_k"] if rank == 0 else ["A", "B"])
    assert set(trained_state(experts)) == {f"experts.{n}" for n in trained}
    pair_logp(experts, batch()).sum().backward()
    with torch.no_grad():
        for p in experts.parameters():
            p -= 0 if p.grad is None else 0.1 * p.grad
    for name, p in experts.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("family", ["gpt2", "untied"])
def test_gradient_reaches_all_that_is_trained(family, sharing):
    """And what shares no loss gets none: experts that are not in the loss.
    Catches: a detach too many, K experts on one B, models that are one model, heads that are views of one tensor,
    rows that go through all experts' adapters, a base that learns beside them."""
    experts = small.experts(family, **SHARINGS[sharing])
    trained = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    idle = set(dict(experts.named_parameters())) - set(trained)
    if "lora" in sharing:
        assert {n[-2:] for n in trained} == {".A", ".B"} and not any(n[-2:] in (".A", ".B") for n in idle)
    elif sharing == "head":
        assert set(trained) == {"A", "B"}
    else:
        assert idle == ({"trunk.lm_head.weight"} if family == "untied" and sharing == "full" else set())
    loss = pair_logp(experts, batch())[:, 0].square().sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for name, g in zip(trained, gradients):
        if name.startswith("models.1."):
            assert g is None or not g.any(), name
        elif name.rpartition(".")[2] in ("W_k", "A", "B"):
            assert g[0].any() and not g[1:].any(), name
        else:
            assert g.any(), name


def test_make_experts_follows_the_configuration():
    """Catches: an option that is ignored (rank, seed, sharing, targets, train_trunk), models that share parameters;
    K = 1 with a low-rank head while the trunk learns, or without one on a frozen trunk; a head that starts away from
    the trunk's unembedding."""
    def make(**options):
        return make_experts([small.model()], small.config(**options), torch.float32)

    def names(**options):
        return {n for n, _ in make(**options).named_parameters()}

    assert isinstance(make(experts=1, sharing="models"), Heads)
    assert isinstance(make(experts=2, sharing="models"), Models)
    assert names(experts=1) == names(experts=1, rank=0) == {f"trunk.{n}" for n, _ in small.model().named_parameters()}
    head = make(experts=1, rank=4, train_trunk=False)
    assert head.A.shape == (1, 12, 4) and head.B.shape == (1, 4, 12)
    assert torch.equal(head.policy(0)[1], head.trunk.unembedding)
    assert torch.equal(head.B[0], make(experts=2, rank=4).B[0]), "the baseline starts as a mixture's first expert"
    low = make(experts=2, rank=4)
    assert low.A.shape == (2, 12, 4) and low.B.shape == (2, 4, 12) and not low.A.any()
    assert (low.B[0] != low.B[1]).all(), "equal factors would learn alike"
    assert torch.equal(low.B, make(experts=2, rank=4).B) and not torch.equal(low.B, make(experts=2, rank=4, seed=1).B)
    full = make(experts=2, rank=0)
    assert torch.equal(full.W_k[1], full.trunk.unembedding) and full.W_k.data_ptr() != full.trunk.unembedding.data_ptr()
    two = make(experts=3, sharing="models")
    assert len({p.data_ptr() for p in two.parameters()}) == 3 * len(list(small.model().parameters()))
    assert not any(p.requires_grad for p in make(experts=2, train_trunk=False).trunk.parameters())
    adapted = [make(experts=k, sharing="lora", rank=4, targets="c_fc", seed=s) for k, s in ((1, 0), (2, 0), (2, 1))]
    A = [experts.trunk.h[1].mlp.c_fc.A for experts in adapted]
    assert [a.shape for a in A] == [(1, 4, 12), (2, 4, 12), (2, 4, 12)] and not (A[1] == A[2]).any()
    assert all(isinstance(e, Adapters) and e.targets == ["h.0.mlp.c_fc", "h.1.mlp.c_fc"] for e in adapted)


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [*SHARINGS, "frozen"])
def test_state_there_and_back(sharing, tmp_path):
    """Bit for bit, into experts from the same start.
    Catches: a parameter that is trained and not saved, copies that alias the live ones."""
    options = SHARINGS.get(sharing) or dict(experts=2, train_trunk=False)
    moved, fresh = small.experts(**options), small.experts(moved=False, **options)
    state = {n: t.clone() for n, t in trained_state(moved).items()}
    load_state(fresh, state, tmp_path)
    with torch.no_grad():
        assert torch.equal(pair_logp(fresh, batch()), pair_logp(moved, batch()))
        for p in fresh.parameters():
            p.zero_()
    assert all(t.any() for t in state.values())


def test_a_state_that_does_not_fit_is_refused_whole(tmp_path):
    """Missing, extra and misshapen tensors are each named with the file, and nothing is copied.
    Catches: strict=False, an early return after half of the tensors, a broadcast that makes (1,V,R) fit."""
    experts = small.experts(experts=2, train_trunk=False)
    before = copy.deepcopy(trained_state(experts))
    good = {n: t + 1 for n, t in before.items()}
    A, B, extra = "experts.A", "experts.B", "experts.extra"
    faults = {"A": {B: good[B]}, "extra": good | {extra: good[A]}, "B": good | {B: good[B][:1]}}
    for name, state in faults.items():
        with raises_at(file=tmp_path) as error:
            load_state(experts, state, tmp_path)
        assert re.search(rf"\b{name}\b", error.value.message)
        assert all(torch.equal(t, before[n]) for n, t in trained_state(experts).items())
    with raises_at("experts.A, experts.B, experts.extra", file=tmp_path):
        load_state(experts, {extra: good[A]}, tmp_path)
