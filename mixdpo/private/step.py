"""The private step: the same gradients, one example at a time, clipped, summed, and released with noise.

An example is a pair, or a user with all of their pairs. Its gradient is that of its whole loss: the experts' (M8) and
the gate's (M9) are clipped together.
"""

import math

from mixdpo.private.dp_sgd import ClippedSum


def clip_examples(clipped: ClippedSum):
    """collect(gradient, micros) for train.EM: `gradient` makes each example's own sum, `clipped` takes it and ends with
    the noised mean in .grad, of a step without examples too. Returns what `gradient` returned, example by example."""
    def collect(gradient, micros: list) -> list:
        seen, example = [], []
        for micro in micros:
            example.append(micro)
            if micro.ends_example:
                seen.append(gradient(example, 1))
                clipped.add()
                example = []
        clipped.release()
        return seen

    return collect


def clipped_share(clipped: ClippedSum) -> float:
    """The share of a step's examples whose gradient was longer than allowed; NaN for a step without examples."""
    norms = clipped.norms
    return sum(norm > clipped.noise.clip for norm in norms) / len(norms) if norms else math.nan
