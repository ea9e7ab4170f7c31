"""AdamW with rounded moments, beside torch's own."""

import copy

import torch

from mixdpo.fast.optimizer import RoundedAdamW, load_optimizer_state, make_optimizer, mixed, optimizer_state, rounded
from tests import small
from train import EM, step

COUNT = 7


def steps(optimizer_options, count=3, first=0, sharing="models", experts=None, state=None):
    """Parameters, optimizer and names after some steps of train.step on the same pairs."""
    config = small.config(experts=2, sharing=sharing, rank=0, clip=float("inf"), micro=32, warmup=0,
                          **optimizer_options)
    experts = experts or small.experts(experts=2, sharing=sharing, rank=0)
    optimizer, names = make_optimizer(experts, 1e-2, moments=config.moments, seed=3)
    if state:
        load_optimizer_state(optimizer, names, state)
    problem = small.problem(config, small.pairs(COUNT), small.reference_logp(COUNT))
    problem.plan.steps[:] = [(0, list(range(COUNT)))] * 3
    em_state = small.state(experts, problem, torch.tensor([0.4, 0.6]).log(), optimizer)
    em_state.t = first
    for _ in range(count):
        step(em_state, problem, EM(clip=config.clip))
    return experts, optimizer, names


def test_rounding_is_to_a_neighbour_and_right_on_average():
    """Catches: truncation, rounding to nearest, noise of another range, a sign that turns the direction."""
    noise = torch.Generator().manual_seed(0)
    for value in (1.0 + 2**-10, -3.3, 1e-20, 7e30, 0.0):
        x = torch.full((20_000,), value)
        got = rounded(x, noise).float()
        low, high = sorted((x[0].view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).item(),
                            (x[0].view(torch.int32).bitwise_and(-(2**16)) + 2**16).view(torch.float32).item()))
        assert set(got.tolist()) <= {low, high}
        share, want = (got == high).double().mean().item(), (value - low) / (high - low) if value else 0.0
        assert abs(share - want) < 0.02
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(rounded(exact, noise).float(), exact)


def test_rounded_moments_follow_adamw():
    """The second moment of a gradient that is constant: rounded to the nearest it would stand still far from its end.
    Catches: that; moments that are not used; one bias correction for the other; a rate left out."""
    g, p = torch.full((4000,), 0.1), torch.nn.Parameter(torch.zeros(4000))
    plain = torch.nn.Parameter(torch.zeros(4000))
    ours, theirs = RoundedAdamW([{"params": [p], "lr": 1e-3}], 0), torch.optim.AdamW(
        [plain], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for t in range(300):
        scale = 1.0 if t < 100 else 0.2
        for q, optimizer in ((p, ours), (plain, theirs)):
            q.grad = g * scale
            optimizer.step()
        if t in (0, 50):
            assert torch.allclose(p, plain, rtol=0.02)
    v, want = ours.state[p]["exp_avg_sq"].float().mean(), theirs.state[plain]["exp_avg_sq"].mean()
    assert ours.state[p]["exp_avg"].dtype == ours.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    assert abs(v / want - 1) < 0.02 and abs(p.mean() / plain.mean() - 1) < 0.02


def moments_after(seed):
    """Moments in bfloat16 after one step on gradients that bfloat16 cannot hold, of two equal parameters."""
    ps = [torch.nn.Parameter(torch.zeros(4000)) for _ in range(2)]
    optimizer = RoundedAdamW([{"params": ps, "lr": 1e-3}], seed)
    for p in ps:
        p.grad = torch.full((4000,), 0.1001)
    optimizer.step()
    one = [optimizer.state[p]["exp_avg"].clone() for p in ps]
    optimizer.step()
    return *one, *(optimizer.state[p]["exp_avg"] for p in ps)


def test_rounding_noise_belongs_to_seed_step_and_parameter():
    """Any two seeds of the whole range, which differ in high or in low bits, and any two parameters round differently.
    Catches: a seed that is shifted above the 32 bits that a generator on a CPU reads, so that it changes nothing; one
    noise for all parameters."""
    seeds = (0, 1, 2**8, 2**24, 2**31, 2**32 - 1)
    found = [x for seed in seeds for x in moments_after(seed)[:2]]
    assert not any(torch.equal(a, b) for n, a in enumerate(found) for b in found[:n])
    assert all(torch.equal(a, b) for a, b in zip(moments_after(3), moments_after(3)))
    first, second, *_ = moments_after(3)
    assert not torch.equal(first, second)                                   # a parameter's place is its own
    seeds = {mixed(seed, t, place) for seed in range(8) for t in range(8) for place in range(8)}
    assert len(seeds) == 8**3 and max(seeds) < 2**32


def test_rounded_moments_resume_to_the_bit():
    """Three steps, and one and two with the state carried over. Catches: noise that starts anew, moments in float32."""
    whole, _, _ = steps({"moments": "bfloat16"})
    half, optimizer, names = steps({"moments": "bfloat16"}, count=1)
    state = copy.deepcopy(optimizer_state(optimizer, names))
    again, _, _ = steps({"moments": "bfloat16"}, count=2, first=1, experts=half, state=state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
