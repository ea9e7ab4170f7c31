"""What a bad input must lead to: an InputError whose fields say where. Its wording is free."""

import contextlib
from pathlib import Path

import pytest

from mixdpo.config import InputError


@contextlib.contextmanager
def raises_at(*named, file=None, line=None, option=None, kind=InputError):
    """Within it an error of the type `kind` is raised, with exactly these fields (file: str or Path; of an option with
    either "-" or "_"), and its message holds each of `named`: values, never wording."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    got = (error.file and Path(error.file), error.line, error.option and error.option.replace("-", "_"))
    assert got == (file and Path(file), line, option and option.replace("-", "_")), str(error)
    for value in named:
        assert str(value) in error.message, f"{value!r} is not in: {error.message}"
