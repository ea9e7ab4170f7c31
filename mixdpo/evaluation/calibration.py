"""Calibration: how much of a run's log-likelihood is lost to margins that are too sure, or not sure enough.

Margins are divided by a temperature, one number for all experts. The temperature is fitted on one half of the users
(of the prompts, without users) and used on the other half, so no choice is predicted with a temperature that was fitted
on it (Guo et al. 2017, arXiv 1706.04599). Weights of the experts stay as they are. Accuracy hardly changes: each
expert's order of two responses is the same at any temperature.
"""

import torch

from mixdpo.mixture import log_marginal

TEMPERATURES = torch.logspace(-1.0, 1.0, 81, dtype=torch.float64)      # 0.1 to 10, in steps of 6 %


def best_temperature(log_w: torch.Tensor, h: torch.Tensor) -> float:
    """The temperature of TEMPERATURES at which h (P,K) predicts best, under weights log_w (P,K)."""
    return float(max(TEMPERATURES, key=lambda t: float(log_marginal(log_w, h / t).sum())))


def calibrated(log_w: torch.Tensor, h: torch.Tensor, owner: list) -> tuple[torch.Tensor, list[float]]:
    """log p (P,) of each choice under the other half's temperature, and the temperatures of the two halves; NaN and []
    with one owner. owner (P): the user of each pair, or another name; pairs of one owner stay in one half."""
    place = {name: n for n, name in enumerate(dict.fromkeys(owner))}
    half = torch.tensor([place[name] % 2 for name in owner]).bool()         # (P,)
    if len(place) < 2:
        return h.new_full((len(h),), torch.nan), []
    temperatures, log_p = [], h.new_empty(len(h))
    for fitted, predicted in ((half, ~half), (~half, half)):
        temperatures.append(best_temperature(log_w[fitted], h[fitted]))
        log_p[predicted] = log_marginal(log_w[predicted], h[predicted] / temperatures[-1])
    return log_p, temperatures
