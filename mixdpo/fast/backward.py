"""The backward pass of a micro-batch whose logits do not all fit into memory.

    text -> trunk -> states that predict response tokens                                once
    for each part, a slice of the pairs:  states, heads -> log-probs -> loss_of -> backward into states and heads
    states -> trunk, factors -> heads                                                   one backward pass for all parts

The caller gives the loss: loss_of(logp, part) takes the log-probs (b,K,2) of the pairs `part`, a slice, and returns
their loss and anything that the caller wants to keep.
Left out: losses of a micro-batch that are not a sum over its pairs or groups.
"""

from collections.abc import Callable

import torch

from mixdpo.experts import predicting_states
from mixdpo.fast.casts import cast_once
from mixdpo.fast.optimizer import clip_and_step, is_sharded
from mixdpo.fast.packing import compact_rows
from mixdpo.logprob import sum_responses
from mixdpo.preferences import Batch

KEPT = 2**30  # bytes of logits that a part keeps for its backward pass


def backward(experts, batch: Batch, loss_of, rows_of=compact_rows, head_rows: int = -1,
             whole_groups: bool = True) -> list:
    """Adds the gradient of the sum of loss_of over all parts to .grad; returns loss_of's second value for each part.

    Equals `loss, seen = loss_of(pair_logp(experts, batch), slice(0, B)); loss.backward()` without keeping all logits.
    rows_of: the batch's layout. head_rows: response tokens of a part, about; -1: as many as KEPT allows; 0: all at
    once, in vocabulary tiles. whole_groups: no part ends inside a group.
    """
    device = next(experts.parameters()).device
    text = rows_of(batch).to(device)                                        # made on the CPU, without waiting for a GPU
    rows, seen = predicting_states(experts, batch, text), []                # (M,C), or (K,M,C)
    made = [rows, *experts.heads()]
    head_rows = head_rows if head_rows >= 0 else fitting_rows(rows, made[1], experts.dtype)
    split = head_rows > 0
    cut = [x.detach().requires_grad_() if split and x.grad_fn else x for x in made]         # those with a history
    states, heads, sides = cut[0], [cast_once(x, experts.dtype) for x in cut[1:]], batch.ids.shape[1]
    for p, p_end, m, m_end in chunks(batch, head_rows, whole_groups):
        tile = None if split else 0                                         # few rows: logits are kept for backward
        logps = experts.token_logps(states[..., m:m_end, :], text.targets[m:m_end], tile, heads)    # (K,m)
        logp = sum_responses(logps, text.sequence[m:m_end] - p * sides, p_end - p, sides)           # (b,K,2)
        loss, shown = loss_of(logp, slice(p, p_end))
        if loss.requires_grad:                                              # false if all experts are frozen
            loss.backward()
        seen.append(shown)
    sharded = any(map(is_sharded, experts.parameters()))                    # FSDP2 frees the unembedding with the trunk
    for made_once, part in (reversed if sharded else list)([*zip(made, cut)]):
        if made_once is not part:
            made_once.backward(part.grad)                                   # one pass through the trunk, or the factors
    return seen


def fitting_rows(rows: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> int:
    """The number of response tokens whose logits fit into KEPT bytes. rows (M,C) or (K,M,C), head (V,C) or (K,V,C): a
    token has one row of logits for each of its states and each head."""
    products = rows.shape[:-2].numel() * head.shape[:-2].numel()
    return max(1, KEPT // (products * head.shape[-2] * dtype.itemsize))


def chunks(batch: Batch, head_rows: int, whole_groups: bool):
    """Divides a micro-batch into parts of about head_rows response tokens, without dividing a pair (or a group); 0: one
    part. Yields (first pair, one past the last, first token, one past the last).
    """
    ends = (batch.length - batch.start[:, None]).sum(1).cumsum(0).tolist()  # one past each pair's last token
    group, first, begin = batch.group.tolist(), 0, 0
    for b, end in enumerate(ends):
        last = b + 1 == len(ends)
        full = head_rows > 0 and not last and ends[b + 1] - begin > head_rows
        if last or full and not (whole_groups and group[b] == group[b + 1]):
            yield first, b + 1, begin, end
            first, begin = b + 1, end


def minimise(loss: torch.Tensor, optimizer, clip: float, exchange: Callable = lambda parameters: None) -> float:
    """One step on a scalar loss, for training on texts (data/experiment/finetune.py) or rows; returns the loss.
    exchange: parallel.sum_gradients, if each process has a part of the loss."""
    loss.backward()
    exchange([p for group in optimizer.param_groups for p in group["params"]])
    clip_and_step(optimizer, loss.item(), clip)
    return loss.item()
