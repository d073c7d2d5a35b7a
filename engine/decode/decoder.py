"""What every decoder is to the recogniser: a shared object, and a value for each stream.

A search is never changed: ``decode`` gives the next one. A step that fails has therefore cost
nothing, and whoever wants to try something else first keeps the old value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from loquent.engine.decode import Frame, Token
from loquent.engine.decode.fusion import check_weight
from loquent.engine.endpoint import Endpointer
from loquent.engine.hotwords import HotwordGraph

Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a session chooses; None leaves it to the bundle.

    Attributes:
        blank_penalty: taken off the natural logarithm of blank's probability in every frame:
            above 0 brings more words, below 0 fewer.
        lm_weight: of the word language model; 0 searches without it.
        hotwords: phrases to lean towards.
        horizon: encoder frames behind the latest one from which on a beam search settles a token.

    Raises:
        ConfigError: not a number, or a weight below 0.
    """

    blank_penalty: float | None = None
    lm_weight: float | None = None
    hotwords: HotwordGraph | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        for name in ("blank_penalty", "lm_weight"):
            if (value := getattr(self, name)) is not None:
                check_weight(name, value)


class Search(Protocol):
    """What one stream carries from chunk to chunk."""

    @property
    def pending(self) -> tuple[Token, ...]:
        """What it would say beyond the tokens that it has given out; may still change."""

    def biased(self, hotwords: HotwordGraph | None) -> Search:
        """The same, leaning towards other phrases from here on."""

    def flush(self) -> tuple[Token, ...]:
        """The same once no frame follows: the last word is over."""


S = TypeVar("S", bound=Search)


class Job(NamedTuple):
    """The frames of one stream.

    Attributes:
        search: as it was after the frames before.
        frames: what the decoder reads of the encoder, each (K, ...), right context left out.
        first: number of the first of these K frames, counted from the start of the stream.
        endpointer: a copy of the stream's, which tells where a segment ends.
    """

    search: Any
    frames: Mapping[str, Float32]
    first: int
    endpointer: Endpointer


class Decoder(Protocol[S]):
    """A way to decode. Holds no state of any stream."""

    def start(self, settings: Settings) -> S:
        """The search of a new stream."""

    def decode(self, jobs: Sequence[Job]) -> list[tuple[list[Frame], S]]:
        """Decode frames of several streams together.

        Returns:
            For each job a frame for each of its own, with the tokens that were settled there, and
            the search after them. A beam settles tokens of earlier frames, too.
        """
