"""data/experiment/planted.py: one latent a user beside one a pair, where the types are planted. What each test catches
stands in its docstring."""

import json

import brute
import numpy as np
import pytest
import torch
from raising import raises_at

from data.experiment import planted
from data.experiment.planted import PlantedConfig, assigned, world


@pytest.mark.parametrize("types", [2, 4])
def test_users_types_are_found_from_two_comparisons_on(types):
    """16,000 pairs, two a user, ten seeds of ten: the ARI is at least 0.9 of Bayes-optimal assignment's; what a latent
    a pair finds is worse on average, and much worse by its own word. Catches: users' pairs that are not pooled,
    evidence averaged, the first start kept."""
    worlds = [assigned(types, 2, PlantedConfig(starts=3), seed) for seed in range(10)]
    ratio = {way: np.array([w[way] / w["bayes"] for w in worlds]) for way in worlds[0]}
    assert (ratio["user"] >= 0.9).all(), ratio["user"].round(3)
    assert ratio["pair, majority"].mean() < 0.7 and ratio["pair, pooled"].mean() < ratio["user"].mean()
    assert types == 2 or ratio["pair, pooled"].mean() < 0.8


def test_a_world_is_as_it_says():
    """Catches: a pair whose user is of another type, choices without noise or rewards, worlds that are alike."""
    config = PlantedConfig(pairs=6000)
    x, group, z, theta = world(3, 3, config, seed=1)
    assert x.shape == (6000, 8) and torch.equal(group.bincount(), torch.full((2000,), 3))
    assert set(z.tolist()) == {0, 1, 2}
    h = (x * theta[z[group]]).sum(1)
    expected = torch.sigmoid(h.abs()).mean()                                # share right by its own reward
    assert abs((h > 0).double().mean() - expected) < 0.02
    assert not torch.equal(world(3, 3, config, seed=2)[0], x)


def test_the_index_is_that_of_brute_force():
    """Catches: another index, users in another order."""
    config = PlantedConfig(pairs=60, starts=1)
    x, group, z, theta = world(2, 4, config, seed=0)
    log_q = torch.nn.functional.logsigmoid(x @ theta.T).view(15, 4, 2).sum(1)
    by_hand = brute.adjusted_rand(log_q.argmax(1).tolist(), z.tolist())
    assert assigned(2, 4, config, 0)["bayes"] == pytest.approx(by_hand)


def test_the_command_writes_figures_and_a_picture(tmp_path):
    """Catches: a kind of world left out, a picture that the report does not show, numbers that it does not hold."""
    planted.main(f"--out {tmp_path} --types 2,3 --each 1,4 --pairs 60 --seeds 2 --starts 1".split())
    found = json.loads((tmp_path / "planted.json").read_text())
    assert [(row["types"], row["each"], row["users"], len(row["worlds"])) for row in found["rows"]] == [
        (2, 1, 60, 2), (2, 4, 15, 2), (3, 1, 60, 2), (3, 4, 15, 2)]
    text = (tmp_path / "report.md").read_text()
    assert text.count("\n| 2 | ") == text.count("\n| 3 | ") == 2 and "](planted.png)" in text
    assert (tmp_path / "planted.png").read_bytes().startswith(b"\x89PNG")
    for option, value in (("pairs", "3"), ("types", "2,0"), ("each", "0"), ("seeds", "0"), ("features", "-1")):
        with raises_at(value.split(",")[-1], option=option):
            planted.main([f"--{option}", value])
