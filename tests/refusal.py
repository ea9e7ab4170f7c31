"""What a bad input must lead to: an InputError that says what a user has to know."""

import pytest

from mixdpo.config import InputError


def assert_refused(call, *words):
    """call() is an InputError whose message holds every one of `words`."""
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
