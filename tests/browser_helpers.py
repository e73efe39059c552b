"""What tests in a browser need."""

import os

import pytest

REQUIRED = "TINYSTORIES_NEED_BROWSER"  # where it is set, a browser that is missing fails the tests


def is_missing(what: str) -> None:
    """Skip the test, or fail it where a browser is required."""
    reason = f"{what} is missing; `make test-browser` says what it needs"
    pytest.fail(reason) if os.environ.get(REQUIRED) else pytest.skip(reason)
