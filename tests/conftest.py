"""A model directory made once, for the tests that train; and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                                    # before anything imports triton

import tinyjob  # noqa: E402


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """tinyjob.make_model's directory; nothing may be written into it."""
    return tinyjob.make_model(tmp_path_factory.mktemp("model"))
