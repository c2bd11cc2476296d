"""Fixtures of the tests of training."""

from tests.helpers.digits import digits  # noqa: F401
