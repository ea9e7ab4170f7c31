"""train.py --epsilon: experts and gate by DP-SGD, against a slow twin that knows nothing of micro-batches. Docstrings
name the faults that each test is there for; the four of `FAULTS` are put in here, each time."""

import dataclasses
import json
import math

import pytest
import torch

import tinyjob
import train
from mixdpo import plan as plans
from mixdpo import privacy
from mixdpo.accountant import Mechanism, epsilon_of, noise_multiplier
from mixdpo.config import InputError
from mixdpo.dpo import margins
from mixdpo.experts import pair_logp, trained_state
from mixdpo.gates import TRAINED, gate_state, make_gate
from mixdpo.mixture import e_step, expert_loss, gate_loss
from mixdpo.optimizer import make_optimizer, set_rate
from mixdpo.options import TrainConfig, validate
from mixdpo.plan import gathered, sampled
from mixdpo.start import make_start

PRIVATE = dict(epsilon=4.0, noise_seed=11, clip=0.7, batch=6, micro=4)
CASES = {
    "dpo": {"experts": 1},
    "pairs": {"rank": 0},
    "gate": {"gate": "linear", "gate_entropy": 0.1},
    "users": {"latent": "user", "privacy_unit": "user"},
    "users, one type a pair": {"privacy_unit": "user", "gate": "mlp", "train_trunk": False},
    "models": {"sharing": "models", "privacy_unit": "user", "latent": "user"},
    "lora": {"sharing": "lora", "lr": TrainConfig.lr, "targets": "q_proj,up_proj"},
    "context": {"latent": "user", "privacy_unit": "user", "estep": "context", "context": 1, "epochs": 2},
    "empty steps": {"batch": 1, "micro": 1},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tinyjob.make_model(tmp_path_factory.mktemp("model"))


def job(folder, model, **options):
    records = tinyjob.make_records(users=6, each=4)
    return tinyjob.run(folder, model, records, **PRIVATE | options)


def slow(config) -> dict[str, torch.Tensor]:
    """The parameters after a run: every example's loss in one go, from whole logits, its gradient clipped, noise."""
    experts, plan, reference, _, device = train.prepare(config)
    plan = sampled(plan, config, config.noise_seed)
    examples = len(set(plan.owner.tolist()))
    sigma = noise_multiplier(config.epsilon, config.delta, plan.rate, len(plan.steps))
    gate, inputs = make_gate(plan, reference, config, device)
    optimizer, _ = make_optimizer(experts, config.lr, config.head_lr, gate, config.gate_lr)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    start = make_start(gate, inputs, plan, reference.features, config)
    for t, (_, ids) in enumerate(plan.steps):
        set_rate(optimizer, t, len(plan.steps), config.warmup)
        total = [torch.zeros_like(p) for p in params]
        for owner in sorted({int(plan.owner[v]) for v in ids}):
            loss = 0.0
            for visit in (plan.visits[v] for v in ids if plan.owner[v] == owner):
                log_w = gate(inputs[[visit.unit]])                          # (1,K)
                h = [margins(pair_logp(experts, gathered(plan.pairs, [part])), reference.logp[part], config.beta)
                     for part in (visit.trained, visit.context or visit.trained)]
                log_q = start[[visit.unit]] if start is not None and t < config.start_steps else e_step(
                    log_w.detach().expand_as(h[1]), h[1].detach(), torch.zeros(len(h[1]), dtype=torch.int64))[1]
                loss = loss + expert_loss(log_q.expand_as(h[0]), h[0]).sum()
                if gate.kind in TRAINED:
                    loss = loss + gate_loss(log_q, log_w).sum()
                    loss = loss + config.gate_entropy * (log_w.exp() * log_w).sum()
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            for s, g in zip(total, grads):
                s += g * min(1.0, config.clip / (norm + 1e-6))
        generator = torch.Generator().manual_seed((config.noise_seed * 1_000_003 + t) % 2**63)
        for p, s in zip(params, total):
            p.grad = (s + sigma * config.clip * torch.randn(s.shape, generator=generator)) / (plan.rate * examples)
        optimizer.step()
    return trained_state(experts) | (gate_state(gate) if gate.kind in TRAINED else {})


def off(folder, wanted) -> float:
    found = tinyjob.tensors(folder)
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def config_of(folder, model, **options):
    paths = dict(data=str(folder / "run.jsonl"), model=str(model), out=str(folder / "slow"))
    return TrainConfig(**paths | tinyjob.small(**PRIVATE | options))


@pytest.mark.parametrize("case", CASES)
def test_a_private_run_is_the_slow_loop(tmp_path, model_dir, case):
    """To 2e-5. Faults: a user's pairs clipped apart; experts and gate clipped apart; the gate's gradient outside of the
    clipped sum; the mean over pairs that came; --clip applied again to what is released; a user cut by micro-batches
    counted twice; context pairs of a user counted as an example."""
    out = job(tmp_path, model_dir, **CASES[case])
    pairs = [line["pairs"] for line in tinyjob.lines(out / "metrics.jsonl")]
    assert case != "empty steps" or 0 in pairs
    assert off(out, slow(config_of(tmp_path, model_dir, **CASES[case]))) < 2e-5


def no_clipping(monkeypatch):
    monkeypatch.setattr(privacy, "clip_factors", lambda norm, clip: torch.ones_like(norm))


def no_noise(monkeypatch):
    monkeypatch.setattr(privacy.Noise, "release", lambda self, total, t: [g / self.expected for g in total])


def no_chance(monkeypatch):
    monkeypatch.setattr(plans, "poisson", lambda N, rate, seed, t: range(t % 2, N, max(1, round(1 / rate))))


def no_empty_step(monkeypatch):
    whole = train.step

    def step(experts, gate, optimizer, micros, ref_logp, latent, config, clipped=None):
        if not micros:
            optimizer.step = lambda: None
            result = whole(experts, gate, optimizer, micros, ref_logp, latent, config, clipped)
            del optimizer.step
            return result
        return whole(experts, gate, optimizer, micros, ref_logp, latent, config, clipped)

    monkeypatch.setattr(train, "step", step)


FAULTS = {"clipping": no_clipping, "noise": no_noise, "Poisson sampling": no_chance, "an empty step": no_empty_step}


@pytest.mark.parametrize("what", FAULTS)
def test_what_is_taken_away_is_missed(tmp_path, model_dir, monkeypatch, what):
    """A run without one part of the mechanism is far from the twin, which has it."""
    options = CASES["empty steps"]
    tinyjob.write(tmp_path / "run.jsonl", tinyjob.make_records(users=6, each=4))
    wanted = slow(config_of(tmp_path, model_dir, **options))
    FAULTS[what](monkeypatch)
    assert off(job(tmp_path, model_dir, **options), wanted) > 1e-3


def test_noise_of_the_right_size_reaches_every_parameter(tmp_path, model_dir, monkeypatch):
    """What is stepped with on an empty step is noise of deviation sigma C / expected, in experts and gate. Faults: the
    gate without noise; factors that have no gradient yet without noise."""
    seen, release = [], privacy.ClippedSum.release

    def kept(self):
        release(self)
        seen.append((len(self.norms), torch.cat([p.grad.flatten() for p in self.parameters]),
                     [float(p.grad.abs().max()) for p in self.parameters]))

    monkeypatch.setattr(privacy.ClippedSum, "release", kept)
    out = job(tmp_path, model_dir, batch=1, micro=1, gate="linear", epochs=2)
    told = json.loads((out / "privacy.json").read_text())
    wanted = told["noise_multiplier"] * told["clip"] / (told["rate"] * told["examples"])
    empty = [(flat, each) for count, flat, each in seen if count == 0]
    assert len(empty) > 5 and all(min(each) > 0 for _, each in empty)
    assert float(torch.cat([flat for flat, _ in empty]).std()) == pytest.approx(wanted, rel=0.02)


def test_the_budget_is_what_was_asked_for(tmp_path, model_dir):
    """Faults: passes counted as steps; the rate of pairs used for users."""
    for unit, examples in (("pair", 24), ("user", 6)):
        out = job(tmp_path, model_dir, name=unit, privacy_unit=unit, epochs=3)
        told = json.loads((out / "privacy.json").read_text())
        assert (told["unit"], told["examples"], told["rate"], told["steps"]) == (unit, examples, 0.25, 12)
        assert 3.99 < told["epsilon"] <= 4 and told["not_covered"] and "metrics.jsonl" in told["not_covered"][-1]
        assert told["epsilon"] == epsilon_of([Mechanism(told["noise_multiplier"], 0.25, 12)], 1e-5)
        assert not (out / "noise-seed").exists()


def test_a_private_run_that_was_stopped_ends_as_another(tmp_path, model_dir, monkeypatch):
    """To the bit, with a secret seed too, which lies in the directory until then, its owner's alone. Faults: the seed
    drawn again; sampling from --seed, which is published."""
    whole = job(tmp_path, model_dir)
    advance = train.advance

    def stopping(*arguments):
        result = advance(*arguments)
        if arguments[7].t == 2:
            raise KeyboardInterrupt
        return result

    for name, seed in (("cut", 11), ("secret", 0)):
        monkeypatch.setattr(train, "advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            job(tmp_path, model_dir, name=name, data=str(tmp_path / "run.jsonl"), noise_seed=seed, save_minutes=0.0)
        kept = tmp_path / name / "noise-seed"
        assert kept.stat().st_mode & 0o777 == 0o600 and (int(kept.read_text()) == 11) == (seed == 11)
        monkeypatch.setattr(train, "advance", advance)
        out = job(tmp_path, model_dir, name=name, data=str(tmp_path / "run.jsonl"), noise_seed=seed, save_minutes=0.0)
        assert tinyjob.equal(out, whole) == (seed == 11)


@pytest.mark.parametrize("options, wanted", [
    ({"clip": math.inf}, "--clip"), ({"start": "linear"}, "--start linear"), ({"gate": "user"}, "--gate user"),
    ({"gate": "domain"}, "--gate domain"), ({"weights": "update"}, "--weights update"), ({"robust": 0.1}, "--robust"),
    ({"em": "full"}, "--em full"), ({"variant": "gumbel"}, "--variant gumbel"), ({"delta": 2.0}, "--delta"),
    ({"gate": "linear", "gate_balance": 0.1}, "--gate-balance"), ({"latent": "user"}, "--privacy-unit pair"),
    ({"estep": "first", "start": "none"}, "--estep first"), ({"epsilon": 0.0}, "--epsilon"),
])
def test_what_would_leak_is_refused(options, wanted):
    """Each is learnt from the data outside of the clipped sums, or lets one example change what is done with others."""
    with pytest.raises(InputError, match=wanted):
        validate(TrainConfig(**dict(data="", model="", out="", epsilon=1.0) | options))


def test_privacy_options_without_epsilon_have_no_effect_and_are_refused():
    for options in ({"delta": 1e-6}, {"privacy_unit": "user"}, {"noise_seed": 3}):
        with pytest.raises(InputError, match="without --epsilon"):
            validate(TrainConfig(data="", model="", out="", **options))


def test_too_large_a_delta_and_nameless_users_are_told(tmp_path, model_dir):
    with pytest.raises(InputError, match="24 examples"):
        job(tmp_path, model_dir, delta=0.05)
    nameless = [{k: v for k, v in r.items() if k != "user"} for r in tinyjob.make_records(users=6, each=4)]
    with pytest.raises(InputError, match="line 1: no user"):
        tinyjob.run(tmp_path, model_dir, nameless, name="nameless", **PRIVATE, privacy_unit="user")


def test_a_private_gate_keeps_nothing_of_the_data(tmp_path, model_dir):
    """Its weights for a prompt do not change with the other rows it was made with. Faults: mean and scale of
    the data, in the weights or in the checkpoint, which is published."""
    config = dataclasses.replace(config_of(tmp_path, model_dir, gate="linear"))
    tinyjob.write(tmp_path / "run.jsonl", tinyjob.make_records(users=6, each=4))
    _, plan, reference, _, _ = train.prepare(config)
    gate, inputs = make_gate(plan, reference, config, "cpu")
    few = dataclasses.replace(plan, units=plan.units[:5])
    other, _ = make_gate(few, reference, config, "cpu")
    with torch.no_grad():
        for g in (gate, other):
            g.W.copy_(torch.arange(g.W.numel()).view_as(g.W) * 0.1)
    assert torch.equal(gate(inputs), other(inputs))
    assert all(torch.equal(a, b) for a, b in zip(gate_state(gate).values(), gate_state(other).values()))
