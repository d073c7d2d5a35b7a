"""The decoders of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from loquent.engine.bundle import Bundle, DecoderName
from loquent.engine.decode.beam import BeamSearch
from loquent.engine.decode.ctc import CtcGreedy
from loquent.engine.decode.decoder import Decoder
from loquent.engine.decode.fusion import BeamRules, Fusion
from loquent.engine.decode.neural import Neural
from loquent.engine.decode.rnnt import RnntGreedy
from loquent.engine.decode.transducer import Transducer
from loquent.engine.ngram import Ngram
from loquent.engine.predictor import OnnxPredictor
from loquent.engine.session import Device
from loquent.engine.spelling import Speller
from loquent.engine.wordlm import OnnxWordModel

# For a bundle that says nothing: what `loquent tune` found for the English model.
DEFAULTS: Mapping[DecoderName, BeamRules] = {
    "joint": BeamRules(
        beam=12,
        margin=6.0,
        ctc=0.15,
        lm_weight=0.36,
        own_weight=0.18,
        word_bonus=0.8,
        unknown=-8.4,
        blank_penalty=0.55,
    ),
    "rnnt-beam": BeamRules(
        lm_weight=0.36, own_weight=0.18, word_bonus=0.7, unknown=-8.0, blank_penalty=0.55
    ),
    "ctc-beam": BeamRules(beam=16, margin=7.0),
}


class Decoders:
    """Makes each decoder when it is first asked for; greedy ones need no language model.

    Raises:
        BundleError: a graph does not fit the manifest.
        MissingExtra: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle, *, threads: int, device: Device = "cpu") -> None:
        self._bundle = bundle
        self._threads, self._device = threads, device
        self._model: Transducer | None = None
        if bundle.rnnt:
            networks = OnnxPredictor(bundle, bundle.rnnt, threads=threads, device=device)
            self._model = Transducer(networks, blank=bundle.blank)
        self._made: dict[DecoderName, Decoder[Any]] = {}

    def __getitem__(self, name: DecoderName) -> Decoder[Any]:
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def _make(self, name: DecoderName) -> Decoder[Any]:
        blank = self._bundle.blank
        if name == "ctc":
            return CtcGreedy(blank=blank)
        if name == "rnnt":
            assert self._model, "a bundle offers what it has heads for"
            return RnntGreedy(self._model, blank=blank)
        return self.beam(name, self._bundle.beams.get(name, DEFAULTS[name]))

    def beam(self, name: DecoderName, rules: BeamRules) -> BeamSearch:
        """One of the beam searches with these rules."""
        share = {"ctc-beam": 1.0, "rnnt-beam": 0.0, "joint": rules.ctc}[name]
        return BeamSearch(
            self._fusion.ruled(rules), blank=self._bundle.blank, share=share, model=self._model
        )

    @cached_property
    def speller(self) -> Speller | None:
        """Puts misspelt words right; None if the bundle does not ask for it."""
        lm, ngram = self._bundle.lm, self._ngram
        return Speller(ngram, lm.spelling) if ngram and lm and lm.spelling else None

    @cached_property
    def _fusion(self) -> Fusion:
        return Fusion(self._bundle.tokens, self._ngram, BeamRules(), self._neural)

    @cached_property
    def _neural(self) -> Neural | None:
        lm, ngram = self._bundle.lm, self._ngram
        if not (lm and lm.neural and ngram):
            return None
        model = OnnxWordModel(
            self._bundle, lm.neural, ngram, threads=self._threads, device=self._device
        )
        return Neural(model, share=lm.neural.share, start=ngram.start[-1])

    @cached_property
    def _ngram(self) -> Ngram | None:
        return self._bundle.language_model()
