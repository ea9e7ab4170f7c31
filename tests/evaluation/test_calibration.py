"""mixdpo/evaluation/calibration.py: temperatures of margins. What each test catches stands in its docstring."""

import pytest
import torch

from mixdpo.evaluation.calibration import best_temperature, calibrated
from mixdpo.mixture import log_marginal


def choices(pairs=4000, users=200, seed=0):
    """Choices drawn from the margins of each user's type: the log-odds h (P,2) of what was chosen, certain weights
    (P,2), and the user of each pair."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.arange(pairs) % users
    h = 1.5 * torch.randn(pairs, 2, generator=generator, dtype=torch.float64)
    own = h[torch.arange(pairs), user % 2]
    right = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(own)
    w = torch.full((pairs, 2), 0.02, dtype=torch.float64)
    w[torch.arange(pairs), user % 2] = 0.98
    return torch.where(right[:, None], h, -h), w.log(), user.tolist()


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_a_scale_of_the_margins(scale):
    """Margins that are `scale` times too large are predicted with as if they were right. Caught: margins multiplied by
    the temperature; weights that are tempered too; the least likely temperature."""
    h, log_w, user = choices()
    assert best_temperature(log_w, scale * h) == pytest.approx(scale, rel=0.15)
    log_p, temperatures = calibrated(log_w, scale * h, user)
    assert temperatures == pytest.approx([scale, scale], rel=0.2)
    assert float(log_p.mean()) == pytest.approx(float(log_marginal(log_w, h).mean()), abs=0.003)
    if scale != 1:
        assert log_p.mean() > log_marginal(log_w, scale * h).mean() + 0.005


def test_no_choice_is_predicted_with_a_temperature_that_was_fitted_on_it():
    """The halves need different temperatures, and each gets the other's. Caught: fitted on all pairs, or on the half
    that is predicted; pairs of one user in both halves; log-probs in another order."""
    h, log_w, user = choices(users=20)
    even = torch.tensor([u % 2 == 0 for u in user])
    h = torch.where(even[:, None], 4.0 * h, h)
    log_p, (first, second) = calibrated(log_w, h, [f"user {u}" for u in user])
    of_even, of_odd = best_temperature(log_w[even], h[even]), best_temperature(log_w[~even], h[~even])
    assert {first, second} == {of_even, of_odd} and of_even > 2 * of_odd
    wanted = log_marginal(log_w, h / torch.where(even, of_odd, of_even)[:, None])
    assert log_p.tolist() == pytest.approx(wanted.tolist())


def test_one_user_cannot_be_halved():
    """Caught: a temperature fitted on what it predicts; an error where a file has one user."""
    h, log_w, _ = choices(pairs=6, users=2)
    log_p, temperatures = calibrated(log_w, h, ["u"] * 6)
    assert log_p.isnan().all() and temperatures == []
