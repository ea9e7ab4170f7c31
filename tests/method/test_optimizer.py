"""AdamW with rounded moments, and AdamW inside backward, beside torch's own."""

import copy

import pytest
import torch
from raising import raises_at

import train
from mixdpo.experts import once_a_step
from mixdpo.fast.optimizer import RoundedAdamW, load_optimizer_state, make_optimizer, mixed, optimizer_state, rounded
from mixdpo.gates import Gate, Inputs
from mixdpo.plan import make_plan, micro_batches
from mixdpo.variants.latent import latent_of
from tests import small

COUNT = 7


def steps(optimizer_options, count=3, sharing="models", experts=None, state=None):
    """Parameters, optimizer and names after some steps of train.step on the same pairs."""
    config = small.config(experts=2, sharing=sharing, rank=0, clip=float("inf"), micro=32, **optimizer_options)
    experts = experts or small.experts(experts=2, sharing=sharing, rank=0)
    early = once_a_step(experts) if config.in_backward else []
    optimizer, names = make_optimizer(experts, 1e-2, moments=config.moments, seed=3, in_backward=early)
    if state:
        load_optimizer_state(optimizer, names, state)
    pairs, ref = small.pairs(COUNT), small.reference_logp(COUNT)
    plan = make_plan(pairs, config)
    inputs = Inputs(torch.zeros(COUNT, 0), torch.zeros(COUNT, dtype=torch.int64))
    gate = Gate("fixed", 2, inputs, torch.tensor([0.4, 0.6]).log())
    for _ in range(count):
        latent = latent_of(gate, inputs, plan, list(range(COUNT)), None, None, 0, config)
        train.step(experts, gate, optimizer, micro_batches(plan, list(range(COUNT)), config), ref, latent, config)
    return experts, optimizer, names


@pytest.mark.parametrize("sharing", ["models", "heads"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_steps_in_backward_are_the_same_steps(sharing, moments):
    """To the bit, after several steps, moments too. Catches: a parameter that steps twice or never, one that steps on
    half of its gradient (a tied embedding), a rate or a noise of another parameter."""
    plain, optimizer, names = steps({"moments": moments}, sharing=sharing)
    early, other, _ = steps({"moments": moments, "in_backward": True}, sharing=sharing)
    for (name, a), (_, b) in zip(plain.named_parameters(), early.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = optimizer_state(optimizer, names), optimizer_state(other, names)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_gradients_in_backward_are_never_all_there():
    """Catches: gradients that stay until the step's end."""
    experts, there = small.experts(experts=2, sharing="models"), []
    for p in experts.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: there.append(sum(q.grad is not None for q in experts.parameters())))
    steps({"in_backward": True}, count=1, experts=experts)
    assert 1 <= max(there) <= 2 + 2                                         # two heads, and those of one product


def test_in_backward_wants_what_it_needs():
    for options, other in (({"clip": 1.0}, "--clip"), ({"clip": float("inf"), "micro": 8}, "--micro"),
                           ({"clip": float("inf"), "micro": 32, "sharing": "lora"}, "--sharing")):
        with raises_at(other, option="in_backward"):
            train.validate(small.config(in_backward=True, **options))


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


def moments_after(seed, first=0):
    """Moments in bfloat16 after one step on gradients that bfloat16 cannot hold, of two equal parameters."""
    ps = [torch.nn.Parameter(torch.zeros(4000)) for _ in range(2)]
    optimizer = RoundedAdamW([{"params": ps, "lr": 1e-3}], seed, first)
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
    assert torch.equal(moments_after(3, first=1)[0], moments_after(3)[1])   # a parameter's place is its own
    seeds = {mixed(seed, t, place) for seed in range(8) for t in range(8) for place in range(8)}
    assert len(seeds) == 8**3 and max(seeds) < 2**32


def test_rounded_moments_resume_to_the_bit():
    """Three steps, and one and two with the state carried over. Catches: noise that starts anew, moments in float32."""
    whole, _, _ = steps({"moments": "bfloat16"})
    half, optimizer, names = steps({"moments": "bfloat16"}, count=1)
    state = copy.deepcopy(optimizer_state(optimizer, names))
    again, _, _ = steps({"moments": "bfloat16"}, count=2, experts=half, state=state)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
