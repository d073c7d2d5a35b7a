"""Hotwords in all decoders and in streams: they tip the scale where it nearly hangs even."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loquent.engine.decode import Token
from loquent.engine.decode.beam import BeamSearch
from loquent.engine.decode.ctc import CtcGreedy
from loquent.engine.decode.decoder import Decoder, Job, Settings
from loquent.engine.decode.fusion import BeamRules, Fusion
from loquent.engine.decode.rnnt import RnntGreedy
from loquent.engine.decode.transducer import Transducer
from loquent.engine.endpoint import Endpointer, EndpointRules
from loquent.engine.errors import ConfigError
from loquent.engine.events import Final
from loquent.engine.hotwords import Hotword, HotwordGraph
from loquent.engine.ngram import Ngram, Table
from loquent.engine.recognizer import Recognizer

PIECES = ["<blank>", "▁so", "▁lo", "na", "ma", "ki"]
BLANK, SO, LO, NA, MA, KI = range(6)
V = len(PIECES)


class Echo:
    """A transducer that says what the encoder says, whatever came before."""

    initial: Mapping[str, NDArray[Any]] = {"n": np.zeros(1, np.int64)}

    def step(
        self, token: NDArray[np.int64], state: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        return np.zeros((len(token), V), np.float32), {"n": token}

    def join(self, enc: NDArray[np.float32], pred: NDArray[np.float32]) -> NDArray[np.float32]:
        return enc + pred


def rows(*frames: dict[int, float]) -> NDArray[np.float32]:
    """Log-probabilities; what is not named is impossible."""
    found = np.full((len(frames), V), -200.0, np.float32)
    for row, frame in zip(found, frames, strict=True):
        for token, p in frame.items():
            row[token] = np.log(p)
    return found


def graph(*phrases: str, boost: float = 2.0) -> HotwordGraph:
    return HotwordGraph([Hotword(phrase=p, boost=boost) for p in phrases], PIECES, BLANK)


BEAM = BeamRules(beam=50, margin=100.0)
DECODERS: dict[str, Decoder[Any]] = {
    "ctc": CtcGreedy(blank=BLANK),
    "rnnt": RnntGreedy(Transducer(Echo(), blank=BLANK), blank=BLANK, max_symbols=1),
    "ctc-beam": BeamSearch(Fusion(PIECES, None, BEAM), blank=BLANK, share=1.0),
    "rnnt-beam": BeamSearch(
        Fusion(PIECES, None, BEAM), blank=BLANK, share=0.0, model=Transducer(Echo(), blank=BLANK)
    ),
}


every = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)


class Stream:
    def __init__(self, decoder: Decoder[Any], hotwords: HotwordGraph | None = None) -> None:
        self.decoder = decoder
        self.search = decoder.start(Settings(hotwords=hotwords))
        self.tokens: list[Token] = []
        self.at = 0

    def hear(self, log_probs: NDArray[np.float32], rules: EndpointRules | None = None) -> None:
        frames = {"ctc": log_probs, "joiner": log_probs}
        job = Job(self.search, frames, self.at, Endpointer(rules, 0.04))
        ((said, self.search),) = self.decoder.decode([job])
        self.at += len(log_probs)
        self.tokens += [token for frame in said for token in frame.tokens]

    def said(self, *frames: dict[int, float], rules: EndpointRules | None = None) -> str:
        self.hear(rows(*frames), rules)
        tokens = [*self.tokens, *self.search.flush()]
        return "".join(PIECES[token.id] for token in tokens).replace("▁", " ").strip()


LO_NA_OR_MA = ({LO: 1.0}, {NA: 0.6, MA: 0.4}, {BLANK: 1.0})


@every
def test_a_hotword_tips_the_scale(decoder: Decoder[Any]) -> None:
    assert Stream(decoder).said(*LO_NA_OR_MA) == "lona"
    assert Stream(decoder, graph("Loma")).said(*LO_NA_OR_MA) == "loma"
    assert Stream(decoder, graph("so")).said(*LO_NA_OR_MA) == "lona"
    # Only so far.
    assert Stream(decoder, graph("Loma", boost=0.1)).said(*LO_NA_OR_MA) == "lona"
    # In other words the same sounds are what they are.
    assert Stream(decoder, graph("loma")).said({SO: 1.0}, *LO_NA_OR_MA[1:]) == "sona"


@every
def test_the_score_of_a_token_is_the_models(decoder: Decoder[Any]) -> None:
    stream = Stream(decoder, graph("loma"))
    stream.said(*LO_NA_OR_MA)
    token = [*stream.tokens, *stream.search.flush()][1]
    assert token.logp == pytest.approx(np.log(0.4), abs=1e-4)


@pytest.mark.parametrize("name", ["ctc-beam", "rnnt-beam"])
def test_a_beam_takes_back_what_a_phrase_was_promised(name: str) -> None:
    # On the way to "lomaki" the phrase looks good; but what follows is not "ki".
    frames = ({LO: 1.0}, {NA: 0.6, MA: 0.4}, {SO: 1.0}, {BLANK: 1.0})
    stream = Stream(DECODERS[name], graph("lomaki"))
    stream.hear(rows(*frames[:2]))
    assert [t.id for t in (*stream.tokens, *stream.search.pending)] == [LO, MA]
    assert stream.said(*frames[2:]) == "lona so"
    # Nor at the end.
    assert Stream(DECODERS[name], graph("lomaki")).said(*frames[:2]) == "lona"


@pytest.mark.parametrize("name", ["ctc", "rnnt"])
def test_greedy_decoding_leaves_a_phrase_for_nothing(name: str) -> None:
    # Whatever the boost was, going on with something else costs no more than without hotwords.
    frames = ({LO: 1.0}, {NA: 0.45, BLANK: 0.55}, {NA: 0.55, BLANK: 0.45}, {BLANK: 1.0})
    plain = Stream(DECODERS[name]).said(*frames)
    assert Stream(DECODERS[name], graph("lomaki", boost=9)).said(*frames) == plain == "lona"


def test_ctc_holds_a_token_without_saying_it_again() -> None:
    # The second frame is the first one's token held, although "lo lo" is a phrase.
    frames = ({LO: 1.0}, {LO: 0.9, BLANK: 0.1}, {BLANK: 1.0}, {LO: 0.45, BLANK: 0.55})
    assert Stream(DECODERS["ctc"], graph("lo lo")).said(*frames) == "lo lo"


@every
def test_hotwords_change_in_the_middle(decoder: Decoder[Any]) -> None:
    stream = Stream(decoder, graph("loma"))
    stream.hear(rows(*LO_NA_OR_MA))
    stream.search = stream.search.biased(None)
    stream.hear(rows(*LO_NA_OR_MA))
    stream.search = stream.search.biased(graph("loma"))
    assert stream.said(*LO_NA_OR_MA) == "loma lona loma"


@every
def test_a_new_segment_begins_with_no_phrase_half_said(decoder: Decoder[Any]) -> None:
    rules = EndpointRules(trailing_silence=0.04)
    frames = ({LO: 1.0}, {BLANK: 1.0}, {BLANK: 1.0}, {NA: 0.6, MA: 0.4}, {BLANK: 1.0})
    stream = Stream(decoder, graph("loma"))
    assert stream.said(*frames, rules=rules) == "lona"


def test_a_word_that_the_language_model_does_not_know() -> None:
    nothing = np.zeros(0, np.float16)
    pairs = Table(np.zeros(5, np.uint32), np.zeros(0, np.uint16), nothing, nothing)
    values = np.array([-20, -20, -1.2, -1.2], np.float16)
    words = ["<unk>", "<s>", "lona", "so"]
    ngram = Ngram(words, values, np.zeros(4, np.float16), (pairs,))
    beam = BeamSearch(Fusion(PIECES, ngram, BEAM), blank=BLANK, share=1.0)
    frames = ({LO: 1.0}, {NA: 0.1, MA: 0.9}, {BLANK: 1.0})
    assert Stream(beam).said(*frames) == "lona"
    assert Stream(beam, graph("loma", boost=0.5)).said(*frames) == "loma"


# Streams


def finals(recognizer: Recognizer, pcm: Any, **options: Any) -> list[str]:
    stream = recognizer.stream(**options)
    stream.accept(pcm)
    stream.finish()
    while stream.ready:
        recognizer.step([stream])
    return [event.text for event in stream.events() if isinstance(event, Final)]


def test_streams_with_other_hotwords_share_a_step(tiny: Recognizer, tones: Any) -> None:
    pcm = tones([(1, 0.2), (2, 0.2), (0, 0.3), (3, 0.2), (4, 0.2)])
    lists = [(), (Hotword(phrase="bana", boost=1),), (Hotword(phrase="KIWI", boost=1),)]
    for decoder in tiny.bundle.decoders:
        alone = [finals(tiny, pcm, decoder=decoder, hotwords=words) for words in lists]
        assert alone[0] == ["bana kiwi"]
        streams = [tiny.stream(decoder=decoder, hotwords=words) for words in lists]
        for stream in streams:
            stream.accept(pcm)
            stream.finish()
        while any(stream.ready for stream in streams):
            tiny.step(streams)
        together = [[e.text for e in s.events() if isinstance(e, Final)] for s in streams]
        assert together == alone


def test_set_hotwords_refuses_and_changes_nothing(tiny: Recognizer, tones: Any) -> None:
    stream = tiny.stream(hotwords=[Hotword(phrase="bana")])
    search = stream.search
    with pytest.raises(ConfigError, match="this model cannot spell the character 'x'"):
        stream.set_hotwords([Hotword(phrase="xylophone")])
    assert stream.search is search
    stream.set_hotwords([])
    stream.accept(tones([(1, 0.2), (2, 0.2)]))
    stream.finalize()
    while stream.ready:
        tiny.step([stream])
        stream.set_hotwords([Hotword(phrase="kiwi")])
    stream.finish()
    while stream.ready:
        tiny.step([stream])
    assert [e.text for e in stream.events() if isinstance(e, Final)] == ["bana"]
    with pytest.raises(ConfigError, match="cannot spell"):
        tiny.stream(hotwords=[Hotword(phrase="xylophone")])
