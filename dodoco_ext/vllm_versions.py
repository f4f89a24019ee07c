"""Which releases of vLLM the plugin records. Both wings ask, so it is neither's."""

from __future__ import annotations

import re

EXECUTED = "0.32.0"
"""The release that tests run."""

CHECKED = ("0.32.0", "0.33.0")
"""Releases whose sources are checked for the names that are relied on."""

SUPPORTED = ((0, 32), (0, 33))
"""Major and minor numbers of the releases that are recorded; all others are left untouched."""


def is_supported(version: str) -> bool:
    """Whether a version is one whose names were checked; builds of it are, such as `0.32.0+cpu`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) in SUPPORTED


def why_unsupported(version: str) -> str:
    """One line about a version that is not supported."""
    known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
    return f"vLLM {version} is not one of those supported ({known}; {EXECUTED} is tested)"
