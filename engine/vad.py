"""Silero's voice activity detector, over many streams at once and for streams without an end.

The network comes with the package ``silero-vad`` (MIT) as an ONNX file, which ONNX Runtime runs;
the package's own code, and with it torch, is never imported. It takes 512 samples of 16 kHz behind
the 64 before them and carries the state of an LSTM.

That state drifts: in ten minutes of steady noise its largest cell was seen to grow from 20 to 720,
and it does not come back (silero-vad issues 571 and 725). Resetting it loses the start of a word.
So every stream has two states at times: 2 s before a state is 10 s old a second one begins from
nothing and hears the same blocks, and then takes over. No state is ever older than that, so hour
eight is as minute one, with or without silence in between.

Shapes: B streams, 576 = context + block samples, state (2, B, 128).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loquent.engine.errors import MissingExtra
from loquent.engine.session import onnxruntime

Float32 = NDArray[np.float32]
Vad = Literal["silero"]

SAMPLE_RATE = 16000
BLOCK, CONTEXT = 512, 64
# Silero's own thresholds: speech begins above the first and ends below the second.
_ON, _OFF = 0.5, 0.35
# Blocks of 32 ms.
_TAKES_OVER, _BEGINS = 312, 250
# Blocks whose answer is remembered; a window of the encoder is far shorter.
_REMEMBERED = 1024


class Voice:
    """What the detector knows of one stream.

    Args:
        frame: samples of an encoder frame.
    """

    def __init__(self, frame: int) -> None:
        self._frame = frame
        self._waiting: Float32 = np.zeros(CONTEXT, np.float32)  # from the next block's context on
        self.state: Float32 = np.zeros((2, 128), np.float32)
        self.younger: Float32 | None = None
        self._age = 0
        self._speaking = False
        self._heard = bytearray()  # 1 for every block with speech, from `_forgotten` on
        self._forgotten = 0

    def accept(self, samples: Float32) -> None:
        """Append (N,) samples of 16 kHz, any N."""
        self._waiting = np.concatenate([self._waiting, samples])

    def finish(self) -> None:
        """No samples follow: fill up the last block with silence."""
        if missing := (CONTEXT - len(self._waiting)) % BLOCK:
            self.accept(np.zeros(missing, np.float32))

    def fork(self) -> Voice:
        """A copy that goes its own way."""
        other = copy(self)
        other._heard = bytearray(self._heard)
        return other

    def speech(self, frame: int) -> bool:
        """Whether there is speech in an encoder frame; none in frames that were not heard."""
        first = frame * self._frame // BLOCK - self._forgotten
        last = ((frame + 1) * self._frame - 1) // BLOCK - self._forgotten
        return any(self._heard[max(0, first) : max(0, last + 1)])

    # For the detector.

    def block(self) -> Float32 | None:
        """The next (576,) samples, None if they are not there yet."""
        size = CONTEXT + BLOCK
        return self._waiting[:size] if len(self._waiting) >= size else None

    def advance(self, probability: float, state: Float32, younger: Float32 | None) -> None:
        """The block's result."""
        self._speaking = probability >= (_OFF if self._speaking else _ON)
        self._heard.append(self._speaking)
        if len(self._heard) > 2 * _REMEMBERED:
            del self._heard[:_REMEMBERED]
            self._forgotten += _REMEMBERED
        self._waiting = self._waiting[BLOCK:]
        self._age += 1
        self.state, self.younger = state, younger
        if self._age == _BEGINS:
            self.younger = np.zeros_like(state)
        elif self._age == _TAKES_OVER and younger is not None:
            self.state, self.younger = younger, None
            self._age = _TAKES_OVER - _BEGINS


class SileroVad:
    """The network. Holds no state of any stream.

    Raises:
        MissingExtra: ``silero-vad`` or ONNX Runtime is not installed.
    """

    def __init__(self, *, threads: int = 1) -> None:
        path = _network()
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = ort.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, voices: Iterable[Voice]) -> None:
        """Hear every block that is waiting, those of all streams together."""
        busy = list(voices)
        while pairs := [(voice, block) for voice in busy if (block := voice.block()) is not None]:
            rows = [(voice.state, block) for voice, block in pairs]
            young = [i for i, (voice, _) in enumerate(pairs) if voice.younger is not None]
            rows += [(y, pairs[i][1]) for i in young if (y := pairs[i][0].younger) is not None]
            said, states = self._session.run(
                None,
                {
                    "input": np.stack([block for _, block in rows]),
                    "state": np.stack([state for state, _ in rows], axis=1),
                    "sr": np.array(SAMPLE_RATE, np.int64),
                },
            )
            after = dict(zip(young, range(len(pairs), len(rows)), strict=True))
            for i, (voice, _) in enumerate(pairs):
                younger = states[:, after[i]] if i in after else None
                voice.advance(float(said[i, 0]), states[:, i], younger)
            busy = [voice for voice, _ in pairs]


def _network() -> Path:
    # Found without being imported: the package's own code needs torch.
    spec = importlib.util.find_spec("silero_vad")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "data" / "silero_vad_16k_op15.onnx"
        if path.is_file():
            return path
        raise MissingExtra(
            f"the package silero-vad that is installed has no {path.name}; install another with "
            "`pip install 'loquent[vad]'`"
        )
    raise MissingExtra(
        'vad="silero" needs the package silero-vad; install it with `pip install "loquent[vad]"` '
        "(or `pip install --no-deps silero-vad`: only its ONNX file is used, torch is not)"
    )
