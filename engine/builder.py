"""Hotwords for the server's sessions, built beside what it does for everybody.

    hotwords -> HotwordMeter -> [thread: Recognizer.hotwords, one list at a time] -> HotwordGraph

A long list takes some tenths of a second of Python, during which everybody else is slower. So one
is built at a time, and each client pays for what it has built.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from loquent.engine.gate import Visitor
from loquent.engine.hotwords import Hotword, HotwordGraph, characters
from loquent.engine.limits import HotwordMeter, Limits
from loquent.engine.recognizer import Recognizer


class HotwordBuilder:
    """Builds hotwords. Every method belongs to the event loop's thread."""

    def __init__(self, recognizer: Recognizer, limits: Limits) -> None:
        self._recognizer = recognizer
        self._meter = HotwordMeter(limits)
        self._building = asyncio.Lock()

    async def build(
        self, hotwords: Sequence[Hotword], visitor: Visitor | None = None
    ) -> HotwordGraph | None:
        """What a stream takes as its hotwords, None for an empty list.

        Args:
            hotwords: a session's.
            visitor: who pays; who has asked for too much waits.

        Raises:
            ConfigError: see `Recognizer.hotwords`.
            WireError: the visitor would have to wait for too long.
        """
        if not hotwords:
            return None
        graph = self._recognizer.kept_hotwords(hotwords)
        if visitor is not None:
            client = visitor.key or visitor.household or visitor.address
            new = 0 if graph else characters(hotwords)
            await asyncio.sleep(self._meter.change(client, new, time.monotonic()))
        if graph is None:
            async with self._building:
                graph = await asyncio.to_thread(self._recognizer.hotwords, hotwords)
        return graph
