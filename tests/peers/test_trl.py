"""Our DPO beside other people's: TRL's DPOTrainer, and the gradient's formula put together on transformers' GPT-2.

The policy is not the reference here (at the start every margin is 0 and hides most faults), pairs have unequal lengths
and therefore padding, and what is compared is what train.py itself accumulates, on both of its routes. Skipped by name
where the peer is not installed.
"""

import importlib.util

import pytest
import small
import torch
import torch.nn.functional as F

import train
from mixdpo.experts import make_experts
from mixdpo.gates import first_weights
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.weights import load_model, save_model
from mixdpo.preferences import Pair
from mixdpo.runs.reference import compute_reference

VOCAB, BETA = 4603, 0.3             # more than one tile of the vocabulary
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")     # transformers' Conv1D keeps these as (in, out)
needs_transformers, needs_trl = (
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed (extra `peers`)")
    for name in ("transformers", "trl")
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two directories in Hugging Face layout: the reference, and a policy that has moved away from it."""
    torch.manual_seed(0)
    reference = GPT2(GPT2Config(vocab=VOCAB, context=48, width=24, layers=2, heads=3, eos=VOCAB - 1))
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.15)                          # far from uniform, so that every weight matters
    root = tmp_path_factory.mktemp("models")
    save_model(reference, root / "reference")
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.03 * torch.randn_like(p)
    save_model(reference, root / "policy")
    return root


@pytest.fixture(scope="module")
def pairs():
    """Five pairs of unequal lengths, one response of a single token (EOS)."""
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(VOCAB - 1, (count,), generator=generator).tolist()

    lengths = [(3, 9, 4), (11, 2, 7), (1, 5, 5), (6, 0, 12), (8, 13, 1)]
    return [Pair(ids(x), ids(better) + [VOCAB - 1], ids(worse) + [VOCAB - 1]) for x, better, worse in lengths]


def ours(folders, pairs, head_rows=1024, **options):
    """What train.py accumulates for one step: (loss, margins (B,), gradients by our names)."""
    config = train.TrainConfig(data="", model="", out="", beta=BETA, dtype="float32", head_rows=head_rows, **options)
    reference = compute_reference(load_model(folders / "reference"), pairs, torch.float32).logp
    experts = make_experts([load_model(folders / "policy")], config, torch.float32)
    problem = small.problem(config, pairs, reference)
    seen = small.accumulate(experts, problem, first_weights(config))
    h = torch.cat([h for _, h, _ in seen])                          # (B,K)
    return -F.logsigmoid(h).mean().item(), h[:, 0], {name: p.grad for name, p in experts.trunk.named_parameters()}


def theirs(model):
    """A transformers GPT-2's gradients under our names and in our layout."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("transformer.")
        found[name] = p.grad.T if name.endswith(TRANSPOSED) else p.grad
    return found


def assert_same(got, want, share=5e-6):
    """Every gradient, up to `share` of its own largest entry: an absolute tolerance lets small ones be anything."""
    assert got.keys() == want.keys()
    for name, g in want.items():
        assert g.abs().max() > 0, f"{name}: the peer's gradient is zero, nothing is compared"
        error = (got[name] - g).abs().max() / g.abs().max()
        assert error < share, f"{name}: off by {error:.1e} of its largest entry"


@needs_trl
@pytest.mark.parametrize("head_rows", [1024, 20, 0], ids=["one chunk", "many chunks", "composable"])
def test_loss_margins_and_gradients_are_trls(folders, pairs, tmp_path, head_rows):
    """K = 1 is DPO as TRL computes it.

    Seen to fail with: targets off by one position, EOS or padding counted wrongly, chosen and rejected swapped, the
    reference left out, the loss not divided by the step's pairs (or by a chunk's), the trunk's backward left out, one
    vocabulary tile overwriting another, erf GELU.
    """
    from transformers import GPT2LMHeadModel

    from tests.bench import trl_peer

    reference = GPT2LMHeadModel.from_pretrained(folders / "reference", dtype=torch.float32)
    trainer = trl_peer.dpo_trainer(folders / "policy", pairs, VOCAB, tmp_path, reference, beta=BETA)
    loss, h, gradients = ours(folders, pairs, head_rows, experts=1)
    trainer.model.train()
    want = trainer.compute_loss(trainer.model, trl_peer.one_batch(trainer))
    want.backward()
    assert loss == pytest.approx(want.item(), abs=1e-5)
    assert_same(gradients, theirs(trainer.model))
    for row, margin in zip(trainer.train_dataset, h, strict=True):  # TRL reports means over a batch: one pair a batch
        trainer._metrics["train"].clear()
        trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        assert trainer._metrics["train"]["rewards/margins"] == [pytest.approx(margin.item(), abs=1e-5)]


@needs_transformers
@pytest.mark.parametrize("options", [dict(experts=1), dict(experts=4, rank=2)], ids=["K=1", "K=4 equal experts"])
def test_gradient_is_the_formulas(folders, pairs, options):
    """gradient = mean over pairs of -beta sigma(-h) (grad log pi(y+) - grad log pi(y-)), from unpadded responses.

    Experts that are equal change nothing for the trunk: their responsibilities sum to one. Seen to fail with the same
    faults, and with responsibilities of one each.
    """
    from transformers import GPT2LMHeadModel

    policy, reference = (GPT2LMHeadModel.from_pretrained(folders / name).eval() for name in ("policy", "reference"))

    def logp(model, prompt, response):
        ids = torch.tensor([prompt + response])
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1]              # (R,V)
        return -F.cross_entropy(logits, ids[0, len(prompt):], reduction="sum")

    total, margins = {name: torch.zeros_like(p) for name, p in policy.named_parameters()}, []
    for pair in pairs:
        values, grads = [], []
        for response in (pair.chosen, pair.rejected):
            value = logp(policy, pair.prompt, response)
            grads.append(torch.autograd.grad(value, list(policy.parameters())))
            with torch.no_grad():
                values.append(value - logp(reference, pair.prompt, response))
        h = BETA * (values[0] - values[1]).detach()
        margins.append(h)
        for name, better, worse in zip(total, *grads, strict=True):
            total[name] -= BETA * torch.sigmoid(-h) * (better - worse) / len(pairs)
    for name, p in policy.named_parameters():
        p.grad = total[name]
    loss, got, gradients = ours(folders, pairs, **options)
    assert torch.allclose(got, torch.stack(margins), atol=1e-5)
    assert loss == pytest.approx(-F.logsigmoid(torch.stack(margins)).mean().item(), abs=1e-5)
    assert_same(gradients, theirs(policy))
