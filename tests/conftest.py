"""Fixtures of the tests that train: a model directory made once."""

import pytest

import tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """tiny.make_model's directory; nothing may be written into it."""
    return tiny.make_model(tmp_path_factory.mktemp("model"))
