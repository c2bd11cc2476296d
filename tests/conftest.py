"""Fixtures that several test files share."""

from tests.helpers.hamming_levels import level, level_library  # noqa: F401
