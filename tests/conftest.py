"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# What properties say holds on a busy machine, too, where 200 ms are soon over.
settings.register_profile("loquent", deadline=None)
settings.load_profile("loquent")
