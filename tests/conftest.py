"""Fixtures of the tests that train: a model directory made once."""

import pytest

import tinyjob


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """tinyjob.make_model's directory; nothing may be written into it."""
    return tinyjob.make_model(tmp_path_factory.mktemp("model"))
