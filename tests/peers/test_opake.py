"""Our accountant and our private DPO beside opake-alignment's (tests/bench/opake_peer.py), which shares no code with
ours: Rust for privacy losses, vmap for gradients. Docstrings name faults that each test was seen to fail on."""

import pytest
import torch
import torch.nn.functional as F

for package in ("opake.alignment", "opake.dpsgd", "optree"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra `peers`)")

from mixdpo.private.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import Noise, clipped_sum, ghost_clipped_sum
from mixdpo.private.keys import Key
from tests.bench import opake_peer as peer

EPSILONS = [case for case in peer.SETTINGS if case[2] < 20000 and case[3] > 1e-8]       # see docs/privacy.md on others
EXACT = [(torch.float64, 1e-13), (torch.float32, 5e-6)]
NORM = 3.0                          # of nine gradients, four are longer


def assert_same(got, want, share):
    """Up to `share` of each gradient's largest entry."""
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert (got[name] - g).abs().max() <= share * g.abs().max() > 0, name


@pytest.mark.parametrize("sigma, rate, steps, delta", EPSILONS)
def test_epsilon(sigma, rate, steps, delta):
    """Theirs is above ours by the rounding of their grid, 1e-3 at most. Faults: one step fewer; addition only; noise in
    units of twice the sensitivity; losses moved to the lower end of their cell, or to the upper; half the rate."""
    ours, theirs = epsilon_of([Mechanism(sigma, rate, steps)], delta), peer.their_process(sigma, rate, steps)
    assert ours * (1 - 1e-6) <= theirs.epsilon_at(delta) <= ours * 1.001


@pytest.mark.parametrize("epsilon, rate, steps, delta", [b for b in peer.BUDGETS if b[0] < 8])
def test_noise(epsilon, rate, steps, delta):
    """Each accountant grants the other's noise the same budget. Faults: a search that stops at 1 %; noise for twice the
    epsilon; for one step."""
    ours, theirs = noise_multiplier(epsilon, delta, rate, steps), peer.their_noise(epsilon, delta, rate, steps)
    assert ours * (1 - 1e-5) <= theirs <= ours * 1.002
    assert peer.their_process(ours, rate, steps).epsilon_at(delta) == pytest.approx(epsilon, rel=2e-3)
    assert epsilon_of([Mechanism(theirs, rate, steps)], delta) <= epsilon


@pytest.mark.parametrize("dtype, share", EXACT, ids=str)
@pytest.mark.parametrize("clip", [NORM, 1e6])
def test_losses_and_clipped_sum_of_pairs(dtype, share, clip):
    """train.py's private step without noise, and the vmap form. The clip factor of ours is C / (norm + 1e-6), of theirs
    C / norm. Faults: the reference left out; beta twice; EOS not counted; gradients not cleared between pairs;
    every tensor clipped on its own; the clip norm of the sum."""
    job = peer.Job(peer.planted(9, seed=0), dtype, moved=0.05)
    loss, rows, parameters = peer.their_loss(job.model), peer.their_batch(job.pairs, job.reference), job.parameters
    theirs, seen = peer.their_sum(loss, parameters, clip, rows)
    share += 1e-6 * (clip == NORM)
    assert 0 < (seen.grad_norms > NORM).sum() < 9
    assert_same(clipped_sum(loss, parameters, clip, *rows), theirs.pytree, share)
    clipped, h = job.our_steps([range(9)], Noise(0.0, clip, 9.0, Key.public(0)))
    assert_same(dict(zip(job.named, clipped.total)), theirs.pytree, share)
    assert torch.allclose(-F.logsigmoid(h), seen.loss_values, rtol=share, atol=0)
    assert clipped.norms == pytest.approx(seen.grad_norms.tolist(), rel=share)


@pytest.mark.parametrize("dtype, share", EXACT, ids=str)
def test_ghost_clipping(dtype, share):
    """Sums of clipped gradients of texts, without per-example gradients on our side. Faults: the cross term of the tied
    embedding left out; a bias left out of the norm."""
    job = peer.Job(peer.planted(9, seed=0), dtype)
    (ids, mask, _), logp = peer.their_batch(job.pairs, job.reference), peer.their_logp(job.model)
    ids, mask, clip = ids[:, 0], mask[:, 0], 30.0

    def losses():
        logps = module(ids)[:, :-1].log_softmax(2).gather(2, ids[:, 1:, None]).squeeze(2)
        return -(logps * mask[:, 1:]).sum(1)

    module, parameters = peer.Logits(job.model), job.parameters
    ghost, ours = ghost_clipped_sum(module, losses, clip)
    theirs, seen = peer.their_sum(lambda p, i, m: -logp(p, i[None], m[None])[0], parameters, clip, (ids, mask))
    assert 0 < (seen.grad_norms > clip).sum() < 9
    assert_same({name.removeprefix("model."): g for name, g in ghost.items()}, theirs.pytree, share + 1e-6)
    assert torch.allclose(ours, seen.loss_values, rtol=share, atol=0)
