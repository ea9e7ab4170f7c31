"""The private step: the same gradients, one example at a time, clipped, summed, and released with noise.

An example is a pair, or a user with all of their pairs. Its gradient is that of its whole loss: the experts' (M8) and
the gate's (M9) are clipped together.
"""

import math

import torch

from mixdpo.private.dp_sgd import ClippedSum


def clip_examples(clipped: ClippedSum, experts: int):
    """accumulate(gradient, micros) for train.EM: `gradient` makes the gradient of one example's loss, `clipped` adds it
    to its sum, and in the end .grad is the noised mean, also for a step without examples. Returns what `gradient`
    returned for each example, and an empty entry. If `clipped` sums over several processes, `micros` are those of this
    one."""
    device = clipped.parameters[0].device if clipped.parameters else None

    def accumulate(gradient, micros: list) -> list:
        none = [torch.empty(0, width, device=device) for width in (experts, experts, 4)]
        seen, example = [(torch.empty(0, dtype=torch.int64, device=device), *none)], []
        for micro in micros:
            example.append(micro)
            if micro.ends_example:
                seen.append(gradient(example, 1))
                clipped.add()
                example = []
        clipped.release()
        return seen

    return accumulate


def clipped_share(clipped: ClippedSum) -> float:
    """The share of a step's examples whose gradient was longer than allowed; NaN for a step without examples."""
    longer, examples = clipped.counts.tolist()
    return longer / examples if examples else math.nan
