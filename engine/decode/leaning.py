"""Hotwords for greedy decoding, where what is said stays said.

There is nothing to take back from, so leaving a phrase costs nothing, and staying in one pays only
for what goes on with it. A phrase's first token is favoured less: most of them begin like words
that are not meant.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loquent.engine.hotwords import HotwordGraph, HotwordState

Float32 = NDArray[np.float32]


class Leaning(NamedTuple):
    """The hotwords of a session, and where in them its text stands."""

    graph: HotwordGraph
    state: HotwordState

    @classmethod
    def towards(cls, graph: HotwordGraph | None) -> Leaning | None:
        """At the beginning."""
        return cls(graph, graph.start) if graph else None

    @property
    def bias(self) -> Float32:
        """What to add to the logits of all tokens (V,). Not to be written to."""
        return self.graph.lean(self.state)

    def after(self, token: int) -> Leaning:
        """Once this token is said."""
        return Leaning(self.graph, self.graph.step(self.state, token)[1])

    def restart(self) -> Leaning:
        """A new sentence begins."""
        return Leaning(self.graph, self.graph.start)
