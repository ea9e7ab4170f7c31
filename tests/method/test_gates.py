"""mixdpo/gates.py: weights of each row from that row alone, uniform at the start, and what they learn. Each docstring
names the faults that the test was seen to catch."""

import math

import pytest
import tinyjob
import torch
from raising import raises_at

from mixdpo.gates import KINDS, TRAINED, Gate, Inputs
from mixdpo.mixture import entropy, gate_loss
from mixdpo.preferences import Pair
from mixdpo.runs.checkpoint import gate_state, load_gate
from mixdpo.runs.gate_inputs import gate_inputs

N, D, K = 9, 5, 3
FIXED = torch.tensor([0.2, 0.3, 0.5]).log()


def inputs(seed=0, n=N, users=4):
    generator = torch.Generator().manual_seed(seed)
    features = 3 + torch.randn(n, D, generator=generator)
    return Inputs(features, torch.tensor([g % users for g in range(n)]))


def gate_of(kind, moved=True):
    of = inputs()
    if kind == "domain":
        of = Inputs(torch.eye(K)[torch.arange(N) % K], of.user)
    elif kind in ("fixed", "user"):
        of = Inputs(of.features[:, :0], of.user)
    gate = Gate(kind, K, of, FIXED, seed=1)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in gate.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
    return gate, of


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_row_are_of_that_row(kind):
    """(N,K), normalised; a row alone has the weights that it has among others, in any order, and another row other
    weights. Catches: row 0 that decides for all; a batch statistic in the gate; rows sorted by user."""
    gate, of = gate_of(kind)
    log_w = gate(of)
    assert log_w.shape == (N, K) and log_w.dtype == torch.float32
    assert torch.allclose(log_w.exp().sum(1), torch.ones(N), atol=1e-6)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gate(of[order]), log_w[order], atol=1e-6)
    for n in range(N):
        assert torch.allclose(gate(of[[n]]), log_w[[n]], atol=1e-6)
    if kind != "fixed":
        assert not torch.allclose(log_w[1], log_w[2], atol=1e-3) and not torch.allclose(log_w[0], log_w[1], atol=1e-3)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_gate_starts_uniform_and_every_parameter_learns(kind):
    """Catches: random weights at the start, which break the step-0 invariant; a parameter cut off from the loss."""
    gate, of = gate_of(kind, moved=False)
    assert torch.equal(gate(of), torch.full((N, K), -math.log(K)))
    gate, of = gate_of(kind)
    log_q = torch.log_softmax(torch.randn(N, K, generator=torch.Generator().manual_seed(2)), 1)
    loss = gate_loss(log_q, gate(of)).sum() + (gate_loss(log_q, gate.generic(of)).sum() if "user" in kind else 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in gate.parameters())


@pytest.mark.parametrize("kind", ["fixed", "random", "domain"])
def test_a_frozen_gate_has_nothing_to_train(kind):
    """Catches: the random gate's W, or a fixed gate's weights, among what is optimised."""
    gate, of = gate_of(kind)
    assert not any(p.requires_grad for p in gate.parameters()) and not gate(of).requires_grad
    if kind == "random":
        spread = gate_of(kind, moved=False)[0](inputs(seed=5, n=2000)).std(0)
        assert (spread > 0.3).all(), spread                                 # rows differ
    if kind == "domain":
        got = gate(Inputs(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.zeros(2, dtype=torch.int64))).exp()
        assert torch.allclose(got, torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_the_gradient_of_the_gate_loss_is_weights_less_responsibilities():
    """d KL(q || w) / d logits = w - q, by hand. Catches: q not a constant; the KL the other way round."""
    gate, of = gate_of("linear")
    log_q = torch.log_softmax(torch.randn(N, K, generator=torch.Generator().manual_seed(2)), 1)
    gate_loss(log_q, gate(of)).sum().backward()
    f = (of.features - of.features.mean(0)) / (of.features.std(0, correction=0) * math.sqrt(D))
    want = (gate(of).exp() - log_q.exp()).T @ f
    assert torch.allclose(gate.W.grad, want, atol=1e-5)
    assert torch.allclose(gate.b.grad, (gate(of).exp() - log_q.exp()).sum(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["user", "prompt-user"])
def test_unknown_users_are_the_generic_one_who_is_the_mean_of_all(kind):
    """Catches: an index that wraps round to the last user; the generic row trained by nobody, or by unknown users only;
    its gradient in the prompt's share."""
    known = [Pair([1], [2], [3], user=user) for user in "abab"]
    of = gate_inputs(kind, [Pair([1], [2], [3], user=user) for user in ("b", None, "z", "a")], torch.zeros(4, D), known)
    assert of.user.tolist() == [2, 0, 0, 1] and of.features.shape[1] == (D if kind == "prompt-user" else 0)
    gate, of = gate_of(kind)
    log_q = torch.log_softmax(torch.randn(N, K, generator=torch.Generator().manual_seed(2)), 1)
    loss = gate_loss(log_q, gate.generic(of)).sum()
    loss.backward()
    assert gate.E.grad[0].abs().max() > 1e-3 and not gate.E.grad[1:].any()
    assert kind == "user" or gate.W.grad is None
    if kind == "user":                                                      # its optimum is the mean, in closed form
        with torch.no_grad():
            gate.E[0] = log_q.exp().mean(0).log()
        (grad,) = torch.autograd.grad(gate_loss(log_q, gate.generic(of)).sum(), gate.E)
        assert grad.abs().max() < 1e-5


def test_temperature_flattens_and_does_not_reorder():
    """Catches: logits multiplied by the temperature; a temperature that a fixed gate or evaluation would feel."""
    gate, of = gate_of("linear")
    plain = gate(of)
    gate.temperature = 4.0
    assert (entropy(gate(of)) > entropy(plain)).all() and torch.equal(gate(of).argsort(1), plain.argsort(1))
    assert torch.allclose(gate(of), torch.log_softmax(plain / 4, 1), atol=1e-6)
    assert Gate("linear", K, of, FIXED).temperature == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_gate(kind):
    """Catches: the features' mean and scale lost, so that other data standardise anew."""
    gate, of = gate_of(kind)
    other = Gate(kind, K, of[[0, 1, 2]], FIXED.roll(1), seed=7)
    load_gate(other, gate_state(gate)) if kind not in ("user", "prompt-user") else None
    if kind not in ("user", "prompt-user"):
        assert torch.equal(other(of), gate(of))
    assert all(name.startswith("gate.") for name in gate_state(gate))


def test_what_is_refused():
    """Catches: a domain gate of two domains for three experts; a gate of users where nobody is named."""
    with raises_at("domain", "2", "3", option="gate"):
        Gate("domain", 3, Inputs(torch.eye(2), torch.zeros(2, dtype=torch.int64)), FIXED)
    with raises_at("user", option="gate"):
        Gate("user", 3, Inputs(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)), FIXED)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(gate=kind) for kind in KINDS] + [dict(gate="user", latent="user"),
                         dict(gate="linear", gate_features="mean", gate_temperature=4.0, gate_balance=0.5)], ids=str)
def test_a_run_with_each_gate(options, tmp_path, model_dir):
    """Trained gates move, frozen ones do not move by a bit; weights of metrics are those of the gate.
    Catches: a gate left out of the optimizer or of the checkpoint; rows of other groups; a frozen gate trained."""
    records = [r | {"domain": "ab"[n % 2]} for n, r in enumerate(tinyjob.make_records())]
    out = tinyjob.run(tmp_path, model_dir, records, epochs=2, beta=0.5, **options)
    state = {name: value for name, value in tinyjob.tensors(out).items() if name.startswith("gate.")}
    metrics = tinyjob.lines(out / "metrics.jsonl")
    moved = any(state[f"gate.{name}"].abs().max() > 0 for name in ("W", "E") if f"gate.{name}" in state)
    assert moved == (options["gate"] in (*TRAINED, "random"))
    assert metrics[0]["w"] == pytest.approx([0.5, 0.5], abs=0.3)
    assert all(0 <= m["gate_information"] + 1e-6 and m["gate_entropy"] <= math.log(2) + 1e-6 for m in metrics)
    if options["gate"] in TRAINED:
        assert metrics[0]["w"] == pytest.approx([0.5, 0.5])
        assert metrics[-1]["w"] != pytest.approx([0.5, 0.5], abs=1e-4)
    if options["gate"] == "random":
        again = tinyjob.run(tmp_path, model_dir, records, name="one", epochs=1, beta=0.5, **options)
        assert torch.equal(tinyjob.tensors(again)["gate.W"], state["gate.W"])


@pytest.mark.parametrize("options, says", [
    (dict(gate="linear", latent="user"), "gate --latent"), (dict(gate="linear", weights="update"), "weights gate"),
    (dict(gate_lr=0.1), "gate_lr gate"), (dict(gate_features="mean"), "gate_features gate"),
    (dict(gate="random", gate_entropy=0.1), "gate_entropy gate"), (dict(experts=1, gate="linear"), "gate --experts"),
    (dict(draws=2), "draws --variant"),
    (dict(weights="update", variant="hard"), "weights --variant --prior"), (dict(em="incremental"), "em --latent"),
    (dict(em="incremental", latent="user", estep="first", start="none"), "em --estep"),
    (dict(gate="domain"), "gate domain 0 --experts"),
])
def test_contradictory_options_are_refused(options, says, tmp_path, model_dir):
    """Catches: each check taken out."""
    option, *named = says.split()
    with raises_at(*named, option=option):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), **options)


def test_a_domain_gate_starts_where_it_has_weight(tmp_path):
    """No responsibility for an expert without weight, from the first step on. Fault: random first responsibilities
    beside weights of 0, for which the bound is minus infinity."""
    import tinyjob

    records = [r | {"domain": ("films", "books")[n % 2]} for n, r in enumerate(tinyjob.make_records())]
    out = tinyjob.run(tmp_path, tinyjob.make_model(tmp_path / "model"), records, gate="domain", start_steps=2)
    first = tinyjob.lines(out / "responsibilities.jsonl")[0]
    assert {tuple(q) for q in first["q"]} == {(1.0, 0.0), (0.0, 1.0)}
    assert all(isinstance(line["elbo"], float) for line in tinyjob.lines(out / "metrics.jsonl"))


def test_a_gate_that_is_nan_is_an_error_and_no_weights():
    """Fault: NaN passed on, which fails later as priors that differ within a unit."""
    inputs = Inputs(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))
    gate = Gate("linear", 2, inputs, torch.zeros(2))
    gate.W.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        gate(inputs)
