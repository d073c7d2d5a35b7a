"""Freed memory is given back."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from loquent.engine.memory import trim


def resident_mb() -> float:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries do it by themselves")
def test_holes_between_what_stays_are_given_back() -> None:
    blocks = [bytearray(20_000) for _ in range(4_000)]
    stays = blocks[::100]
    del blocks[:]
    before = resident_mb()
    assert trim()
    assert resident_mb() < before - 50
    assert len(stays) == 40
    trim()  # with nothing to give back, no error either
