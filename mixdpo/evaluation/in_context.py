"""A baseline without training: the reference, with a few of the user's own choices in front of the prompt.

Each prompt is completed once for each type, for a random user of that type. Some of the user's pairs are drawn, and
each is shown as its prompt with the chosen response. KL is from this policy to the reference without examples:
log pi_ref(y | examples, x) - log pi_ref(y | x).
"""

import functools
from dataclasses import replace

import numpy as np
import torch

from mixdpo.evaluation.completions import CompletionTask, sample
from mixdpo.evaluation.own_reward import Served
from mixdpo.evaluation.statistics import mean_se
from mixdpo.preferences import Pair, groups
from mixdpo.runs.reference import compute_reference, divided


def served_in_context(pairs: list[Pair], types: list[str], examples: int, task: CompletionTask, tokenizer, values,
                      base: torch.Tensor, dtype: torch.dtype) -> tuple[Served, float] | None:
    """What users get, and the mean length of completions; None unless each type has a user with `examples` pairs (0: no
    baseline), the longest prompt with them fits into the context, and the temperature is 1. pairs: the training pairs;
    values(completions) -> rewards (N,T); base (N,T): the reference's."""
    if task.sampling.temperature != 1 or examples == 0:
        return None                                     # at another temperature its KL would be that of another policy
    pairs = [pair for pair in pairs if pair.user is not None]
    units = [unit for unit in groups(pairs, "user") if len(unit) >= examples]
    of_type = [[unit for unit in units if pairs[unit[0]].annotator == kind] for kind in types]
    if not all(of_type):
        return None
    gains, kls, lengths = [], [], []
    alone = functools.partial(compute_reference, task.reference, dtype=dtype)
    for t, users in enumerate(of_type):
        prompts = [with_examples(prompt, pairs, users, examples, tokenizer, [task.sampling.seed, 41, t, n])
                   for n, prompt in enumerate(task.prompts)]
        if max(len(p.prompt) for p in prompts) + task.sampling.max_new > task.reference.config.context:
            return None
        policy = task.reference, task.reference.unembedding
        (ids,), with_them = sample([policy], replace(task, prompts=prompts), dtype, f"in context, {types[t]}")
        asked = [Pair(p.prompt, y, [task.sampling.eos]) for p, y in zip(task.prompts, ids)]
        without = divided(asked, alone).logp[:, 0, 0]
        gains.append(values(ids)[:, t] - base[:, t])
        kls.append(with_them[0] - without)
        lengths += [len(y) for y in ids]
    reward = torch.stack(gains)                                             # (T,N)
    se, by_type = mean_se(reward.mean(0))["se"], [mean_se(r) for r in reward]
    return Served(reward, torch.stack(kls).mean(0).double(), reward.new_ones(reward.shape[1], 1), se, by_type), float(
        np.mean(lengths))


def with_examples(prompt: Pair, pairs: list[Pair], users: list[list[int]], examples: int, tokenizer, key: list[int]
                  ) -> Pair:
    """The prompt behind `examples` choices of a random one of the users; key: of the random numbers."""
    rng, ids = np.random.default_rng(key), []
    unit = users[rng.integers(len(users))]
    for i in rng.permutation(unit)[:examples].tolist():
        ids += [t for t in pairs[i].prompt + pairs[i].chosen if t not in (tokenizer.bos, tokenizer.eos)]
        ids += tokenizer.encode("\n\n")
    start = [tokenizer.bos] if tokenizer.bos is not None else []            # once, in front of everything
    return replace(prompt, prompt=start + ids + [t for t in prompt.prompt if t != tokenizer.bos])
