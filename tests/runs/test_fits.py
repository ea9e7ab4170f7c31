"""mixdpo/runs/memory_estimate.py: parts of the estimate beside what is really there. What each test catches
stands in its docstring."""

import dataclasses

import pytest
import small
import tinyjob
import torch

from mixdpo.experts import make_experts
from mixdpo.fast.optimizer import make_optimizer
from mixdpo.models.weights import config_of, load_model
from mixdpo.runs import memory_estimate as fits

CASES = {"heads": {}, "full heads": {"rank": 0}, "frozen trunk": {"train_trunk": False}, "lora": {"sharing": "lora"},
         "one head": {"experts": 1, "train_trunk": False},
         "models": {"sharing": "models", "experts": 3}, "bf16 moments": {"moments": "bfloat16"}}


def asked(model_dir, **options):
    return dataclasses.replace(small.config(micro=3, max_prompt=7, max_response=9, **options), model=str(model_dir))


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_moments_are_those_of_the_run(case, model_dir):
    """After a step of the real optimizer on the real experts. Catches: the tied embedding counted twice, frozen
    parameters with moments, moments of another size."""
    config = asked(model_dir, **CASES[case])
    experts = make_experts([load_model(model_dir)], config, torch.float32)
    optimizer, _ = make_optimizer(experts, 1e-3, 1e-3, moments=config.moments)
    for p in experts.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    found = fits.estimate(config, torch.float32)
    assert found["weights"] == sum(p.nbytes for p in experts.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.ndim]
    assert found["moments"] == sum(x.nbytes for x in moments)
    assert found["gradients"] == sum(p.grad.nbytes for p in experts.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sharing": "lora"}, {"sharing": "models"}, {"checkpointing": True}],
                         ids=["heads", "lora", "models", "checkpointing"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_are_those_that_autograd_keeps(family, options, dtype):
    """Two blocks and three rows tell of four. Catches: parameters counted, a storage counted twice, the last block's
    or the embedding's share taken for a block's, experts that pass their rows on their own, weights in bfloat16, which
    are kept once, counted for each row."""
    shape = dataclasses.replace(small.model(family).config, layers=4)
    config = small.config(**options)
    whole = fits.kept(shape, config, dtype, 16, 4)
    assert fits.activations(shape, config, dtype, 16, 4) == pytest.approx(whole, rel=0.002)
    assert fits.kept(shape, config, dtype, 64, 4) > 1.5 * whole


def test_what_does_not_fit_is_told_with_what_would(model_dir):
    """Catches: no word before memory runs out, remedies that are in use already, a total that is not the parts'."""
    config = asked(model_dir)
    line, = fits.describe_memory(config, torch.float32, 1e12)
    assert "in total 0.0 of 1000.0 that are free" in line
    line, why, *ways = fits.describe_memory(config, torch.float32, 1e3)
    assert why.startswith("warning: this may not fit") and len(ways) == len(fits.REMEDIES)
    assert len(fits.describe_memory(asked(model_dir, sharing="lora", checkpointing=True), torch.float32, 1e3)) == 2 + 3
    assert fits.available("cpu") > 1e8


def test_a_run_says_it_before_it_loads_a_weight(tmp_path, model_dir, monkeypatch, capsys):
    """Catches: an estimate after the models are there."""
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mixdpo.runs.setup.load_references", stop)
    with pytest.raises(KeyboardInterrupt):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    said = "memory of a step (GB, estimate): weights 0.0, gradients 0.0, moments 0.0, activations"
    assert said in capsys.readouterr().out
    assert config_of(model_dir) == load_model(model_dir).config
