"""Models, pairs and experts small enough for a test, and trained far enough from their reference
that a margin says something."""

import dataclasses

import numpy as np
import torch

from mixdpo.experts import make_experts
from mixdpo.fast.backward import backward
from mixdpo.fast.packing import compact_rows
from mixdpo.gates import Gate, Inputs
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.plan import make_plan, micro_batches
from mixdpo.preferences import Pair
from train import EM, EMState, Problem, TrainConfig, em_loss

VOCAB = 53
FAMILIES = ["gpt2", "llama", "untied"]


def model(family="gpt2", seed=0, vocab=VOCAB, scale=4.0, context=64):
    """A random model of either family, its weights `scale` times the usual ones: far from the uniform distribution."""
    torch.manual_seed(seed)
    if family == "gpt2":
        made = GPT2(GPT2Config(vocab=vocab, context=context, width=12, layers=2, heads=2))
    else:
        sizes = dict(width=12, inner=20, layers=2, heads=4, kv_heads=2, head_dim=4)
        made = Llama(LlamaConfig(vocab=vocab, context=context, tied=family != "untied", **sizes))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(scale if p.ndim == 2 else 1)
    return made.eval()


def config(**options):
    return TrainConfig(data="", model="", out="", dtype="float32", **options)


def experts(family="gpt2", seed=0, moved=True, dtype=torch.float32, **options):
    """Experts as the options of train.py ask for them; moved: every trained parameter is pushed off the start,
    each expert another way. In float64 the parameters are too: what should be equal is then equal to 1e-12."""
    start = model(family, seed).to(torch.promote_types(dtype, torch.float32))
    made = make_experts([start], config(**dict(rank=3) | options), dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in made.parameters():
            if moved and p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 * float(p.std().nan_to_num(0)) + 0.1)
    return made


def pairs(count=7, seed=0, users=None, context=()):
    """Pairs of random ids, of very different lengths; the last id of each response stands for the end.
    users: how many judge, in turns of growing length; context: indices of pairs that are set aside."""
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.permutation(count) % users) if users else [None] * count

    def ids(low, high):
        return rng.integers(1, VOCAB, rng.integers(low, high)).tolist()

    return [Pair(ids(1, 6), ids(0, 9) + [0], ids(0, 9) + [0, 0][: 1 + n % 2],
                 user=None if users is None else str(owner[n]), context=n in context, line=n + 1)
            for n in range(count)]


def reference_logp(count, seed=5, dtype=torch.float32):
    """Made-up reference log-probs: margins then differ from pair to pair. (P,1,2)"""
    return -20 + 5 * torch.randn(count, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nothing(units):
    """Inputs of a gate that reads nothing."""
    return Inputs(torch.zeros(units, 0), torch.zeros(units, dtype=torch.int64))


def problem(config, pairs, ref_logp, start=None, rows_of=compact_rows):
    """What a step reads, of a gate that reads nothing."""
    plan = make_plan(pairs, config)
    evidence, linear = torch.zeros(len(plan.units), 1), torch.zeros(len(pairs), 1)          # of any number of experts
    return Problem(config, plan, ref_logp, nothing(len(plan.units)), start, evidence, linear, rows_of)


def state(experts, problem, log_w=None, optimizer=None):
    """What a step changes, under fixed weights (K,), as at the start."""
    log_w = torch.zeros(experts.K) if log_w is None else log_w
    gate, units = Gate("fixed", experts.K, nothing(1), log_w), len(problem.plan.units)
    return EMState(experts, gate, optimizer, torch.full((units, experts.K), torch.nan, dtype=log_w.dtype))


def accumulate(experts, problem, log_w, em=None, log_q=None, pairs=None):
    """Adds the gradient of M8 over all visits of a problem's plan, in one micro-batch; returns what em_loss shows of
    each part: log_q, h and logp of its pairs. log_w (K,) of all units."""
    ids, config = list(range(problem.plan.inferred)), problem.config
    micro, = micro_batches(problem.plan, ids, dataclasses.replace(config, micro=10_000))
    log_w = log_w.expand(len(ids), -1)
    loss_of = em_loss(micro, log_w, log_q, problem, em or EM(), pairs or len(micro.train.ids))
    return backward(experts, micro.train, loss_of, problem.rows_of, config.head_rows, log_q is None)
