"""mixdpo/evaluation/strength.py: policies between the reference and each expert, for every way of sharing.
What each test catches stands in its docstring."""

import copy
import dataclasses

import pytest
import small
import torch

from mixdpo.evaluation.strength import at_strength, strength_for
from mixdpo.runs.checkpoint import untie
from mixdpo.runs.load_run import Run

SHARINGS = {
    "full heads": dict(rank=0),
    "full heads alone": dict(rank=0, train_trunk=False),
    "low-rank heads": dict(rank=3),
    "low-rank heads alone": dict(rank=3, train_trunk=False),
    "one head alone": dict(rank=3, train_trunk=False, experts=1),
    "dpo": dict(experts=1),
    "lora": dict(sharing="lora", experts=3),
    "lora, shared part": dict(sharing="lora", shared_rank=2),
    "lora, one expert": dict(sharing="lora", experts=1, shared_rank=2),
    "models": dict(sharing="models", experts=3),
}
IDS = torch.arange(1, 9)[None]


def weights(experts, k):
    """All weights of expert k's policy by name, its unembedding too, in new memory."""
    model, unembedding = experts.policy(k)
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    return named | {"unembedding": unembedding.detach().clone()}


def logits(experts, k):
    model, unembedding = experts.policy(k)
    with torch.no_grad():
        return model(IDS)[0] @ unembedding.T


def of_reference(model):
    return {name: p.detach() for name, p in model.named_parameters()} | {"unembedding": model.unembedding.detach()}


@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_at_half_strength_every_change_is_halved(sharing, family):
    """Of each weight of each expert. For low-rank heads W_s (I + s A_k B_k), with W_s half-way if the trunk is trained:
    the factor B_k, which is random from the start, is not scaled. Caught: both factors scaled, so that the product
    changes with s^2; the shared adapter left as it is, or the trunk, or one expert; a direction from 0 in the place of
    the reference; strength and 1 - strength exchanged; the embedding and the unembedding exchanged."""
    experts, reference = small.experts(family, **SHARINGS[sharing]), small.model(family)
    want, low = of_reference(reference), "rank" in SHARINGS[sharing] and SHARINGS[sharing]["rank"] > 0
    tied = {"gpt2": "wte.weight", "llama": "embed_tokens.weight", "untied": "lm_head.weight"}[family]
    full = [weights(experts, k) for k in range(experts.K)]
    assert all((full[k]["unembedding"] - want["unembedding"]).abs().max() > 0.01 for k in range(experts.K)
               if "lora" not in sharing)
    A, B = (getattr(experts, name).detach().clone() if low else None for name in "AB")
    for strength in (0.5, 0.2):
        with at_strength(experts, [reference], strength):
            for k in range(experts.K):
                for name, value in weights(experts, k).items():
                    half = want[name] + strength * (full[k][name] - want[name])
                    if low and name == "unembedding":
                        W = want[name] + strength * (full[k][tied] - want[name])
                        half = W + strength * W @ A[k] @ B[k]
                    assert torch.allclose(value, half, rtol=0, atol=1e-4), (k, name)


@pytest.mark.parametrize("sharing", ["low-rank heads", "low-rank heads alone", "one head alone"])
def test_low_rank_heads_keep_the_factor_that_is_random_from_the_start(sharing):
    """A_k at strength s is s A_k, B_k is B_k. Caught: B scaled too, or in the place of A."""
    experts = small.experts(**SHARINGS[sharing])
    A, B = experts.A.detach().clone(), experts.B.detach().clone()
    with at_strength(experts, [small.model()], 0.25):
        assert torch.allclose(experts.A, 0.25 * A, rtol=0, atol=1e-7) and torch.equal(experts.B, B)


@pytest.mark.parametrize("family", small.FAMILIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_strengths_end_at_the_reference_and_at_the_expert(sharing, family):
    """At 1e-7 the policies are the reference's, at 1 the experts', and afterwards every bit is as before, after an
    error too. Caught: parameters that are not put back, or put back by the inverse step; a parameter of the run that is
    not listed; the reference changed."""
    experts, reference = small.experts(family, **SHARINGS[sharing]), small.model(family)
    before, kept = copy.deepcopy(experts.state_dict()), copy.deepcopy(reference.state_dict())
    own = [logits(experts, k) for k in range(experts.K)]
    with torch.no_grad():
        base = reference(IDS)[0] @ reference.unembedding.T
    assert min((x - base).abs().max() for x in own) > 0.1
    with at_strength(experts, [reference], 1e-7):
        for k in range(experts.K):
            assert torch.allclose(logits(experts, k), base, rtol=0, atol=1e-3), k
    with at_strength(experts, [reference], 1.0):
        assert all(torch.equal(logits(experts, k), own[k]) for k in range(experts.K))
    with pytest.raises(ZeroDivisionError), at_strength(experts, [reference], 0.3):
        assert (logits(experts, 0) - own[0]).abs().max() > 1e-3
        1 / 0  # noqa: B018
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in reference.state_dict().items())


def test_models_go_back_to_references_of_their_own():
    """Three models, of which one is untied, with three references, and with one. Caught: the first reference for all;
    an unembedding without a value in the reference."""
    for references in ([small.model(seed=seed) for seed in range(3)], [small.model()]):
        experts = small.experts(sharing="models", experts=3)
        with torch.no_grad():
            model = untie(experts, 1)
            model.lm_head.weight += 1.0
        with at_strength(experts, references, 1e-7):
            for k in range(3):
                reference = references[k % len(references)]
                with torch.no_grad():
                    want = reference(IDS)[0] @ reference.unembedding.T
                assert torch.allclose(logits(experts, k), want, rtol=0, atol=1e-3), k


# --- strengths for a KL -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.5, 2.0])
def test_strengths_approach_the_kl_that_is_asked_for(power):
    """KL = 10 strength^power. Caught: a line in KL, not in its logarithm; the farthest points, not the nearest; a
    strength for a KL that the expert does not reach, or nearly its own."""
    reached = {1.0: 10.0}
    for kl in (6.0, 3.0, 1.0, 0.2):
        strength = strength_for(kl, reached)
        reached[strength] = 10 * strength**power
        assert reached[strength] == pytest.approx(kl, rel=0.25 if len(reached) == 2 else 1e-6), (kl, power)
    assert strength_for(8.1, reached) is None is strength_for(10.0, reached) and strength_for(12.0, {1.0: -0.3}) is None


def test_a_noisy_kl_gives_a_strength_between_the_reference_and_the_expert():
    """Caught: the logarithm of a KL that noise made negative; a power that noise made negative or 0; the expert."""
    for reached in ({1.0: 0.5, 0.4: -0.01}, {1.0: 0.5, 0.4: 0.6}, {1.0: 0.5, 0.9: 0.5}):
        assert 0 < strength_for(0.3, reached) < 1
    assert strength_for(0.38, {1.0: 0.5, 0.95: 0.3}) == 0.99


def test_log_probs_are_kept_for_these_weights_only():
    """Caught: log-probs of the expert taken for those of a strength, or those of one strength for another's."""
    others = {f.name: None for f in dataclasses.fields(Run) if f.name not in ("experts", "known")}
    run = Run(experts=small.experts(), **others)
    full = run.known_logp()
    assert run.known_logp() is full
    seen = [full]
    for strength in (0.5, 0.2):
        with at_strength(run.experts, [small.model()], strength):
            assert all(run.known_logp() is not other for other in seen)
            seen.append(run.known_logp())
