"""``loquent bench``: how long a chunk takes on this machine, on one thread.

The first table times ``Recognizer.step``, that is features, encoder and decoding of B streams that
are fed speech. With ``--torchaudio`` a second table times the encoder alone, with the size and the
random weights of torchaudio's ``emformer_rnnt_base``, against torchaudio's own
``transcribe_streaming`` in turns within the same run. Times are medians over the measured steps;
``p90`` shows the spread. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loquent.engine.audio import load_audio
from loquent.engine.bundle import DECODERS
from loquent.engine.encoder import OnnxEncoder
from loquent.engine.errors import LoquentError
from loquent.engine.recognizer import Recognizer

BATCHES = (1, 4, 16)
SAMPLE = Path(sys.modules["loquent.engine"].__path__[0]) / "samples" / "morning.flac"


def _median_p90(seconds: Sequence[float]) -> tuple[float, float]:
    return float(np.median(seconds)) * 1e3, float(np.quantile(seconds, 0.9)) * 1e3


def _speech(path: Path, sample_rate: int, seconds: float) -> NDArray[np.float32]:
    """Mono audio of a file, repeated to ``seconds``."""
    return np.resize(load_audio(path, sample_rate=sample_rate), round(seconds * sample_rate))


def time_steps(
    recognizer: Recognizer,
    speech: NDArray[np.float32],
    *,
    batch: int,
    chunk_ms: float,
    decoder: str,
    steps: int,
) -> tuple[float, float]:
    """Median and p90 milliseconds of one ``step`` of ``batch`` streams at different places."""
    rate = recognizer.bundle.sample_rate
    chunk = round(chunk_ms * rate / 1000)
    streams = [recognizer.stream(chunk_ms=chunk_ms, decoder=decoder) for _ in range(batch)]
    seconds: list[float] = []
    position = 0
    while len(seconds) < steps + 3:
        for i, stream in enumerate(streams):
            # Streams hear different parts of the recording, as sessions would.
            start = (position + i * rate) % len(speech)
            stream.accept(np.take(speech, range(start, start + chunk), mode="wrap"))
        position += chunk
        if not all(stream.ready for stream in streams):
            continue
        before = time.perf_counter()
        recognizer.step(streams)
        seconds.append(time.perf_counter() - before)
        for stream in streams:
            stream.events()
    return _median_p90(seconds[3:])


def time_decoders(
    recognizer: Recognizer, *, decoders: Sequence[str], chunk_ms: float, batch: int, steps: int
) -> dict[str, float]:
    """Milliseconds of processor time of one ``step`` of ``batch`` streams, by decoder.

    The decoders take turns, so that whatever else the machine does is the same for all; the mean of
    the steps without the slowest tenth, as a beam's work differs from chunk to chunk.
    """
    rate = recognizer.bundle.sample_rate
    speech = _speech(SAMPLE, rate, 60.0)
    chunk = round(chunk_ms * rate / 1000)
    streams = {
        decoder: [recognizer.stream(chunk_ms=chunk_ms, decoder=decoder) for _ in range(batch)]
        for decoder in decoders
    }
    seconds: dict[str, list[float]] = {decoder: [] for decoder in decoders}
    position = 0
    while len(seconds[decoders[-1]]) < steps + 3:
        for decoder, members in streams.items():
            for i, stream in enumerate(members):
                start = (position + i * rate) % len(speech)
                stream.accept(np.take(speech, range(start, start + chunk), mode="wrap"))
            if all(stream.ready for stream in members):
                before = time.thread_time()
                recognizer.step(members)
                seconds[decoder].append(time.thread_time() - before)
            for stream in members:
                stream.events()
        position += chunk
    kept = {decoder: sorted(times[3:])[: -(-9 * steps // 10)] for decoder, times in seconds.items()}
    return {decoder: 1e3 * float(np.mean(times)) for decoder, times in kept.items()}


def bench_bundle(
    source: str, speech_file: Path, chunks_ms: Sequence[float], decoders: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """Rows of the first table."""
    recognizer = Recognizer.load(source, threads=1)
    bundle = recognizer.bundle
    speech = _speech(speech_file, bundle.sample_rate, 60.0)
    print(f"{bundle.name} {bundle.precision}, one thread, {steps} steps each")
    print("| chunk ms | decoder | streams | ms/chunk | p90 | real-time factor | streams/core |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for chunk_ms in chunks_ms or bundle.chunks_ms:
        for decoder in decoders or bundle.decoders:
            for batch in BATCHES:
                median, p90 = time_steps(
                    recognizer,
                    speech,
                    batch=batch,
                    chunk_ms=chunk_ms,
                    decoder=decoder,
                    steps=steps,
                )
                row = {
                    "chunk_ms": chunk_ms,
                    "decoder": decoder,
                    "batch": batch,
                    "ms": round(median, 3),
                    "p90": round(p90, 3),
                    "rtf": round(median / chunk_ms / batch, 5),
                    "streams": round(chunk_ms * batch / median, 1),
                }
                rows.append(row)
                print(
                    f"| {chunk_ms:g} | {decoder} | {batch} | {median:.2f} | {p90:.2f} | "
                    f"{row['rtf']:.4f} | {row['streams']:.0f} |"
                )
    return rows


Step = Callable[[Any], Any]  # of a state, to the next state


def _torchaudio_step(model: Any, window: Any, lengths: Any) -> Step:
    return lambda state: model.transcribe_streaming(window, lengths, state)[2]


def _our_step(engine: OnnxEncoder, window: NDArray[np.float32], right: int) -> Step:
    return lambda state: engine.step(window, right, state)[1]


def bench_torchaudio(steps: int) -> list[dict[str, Any]]:
    """Rows of the second table: the same weights in torchaudio and in our graphs."""
    import torch
    import torchaudio

    from loquent.engine.features import torchaudio_spec
    from loquent.export.bundle import BundleSpec, write_bundle, write_int8
    from loquent.models.torchaudio_weights import student_from_torchaudio

    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = torchaudio.models.emformer_rnnt_base(4097).eval()
    student = student_from_torchaudio(reference.state_dict())
    segment, right = 16, 4
    spec = BundleSpec(
        name="torchaudio-size",
        features=torchaudio_spec(np.zeros(80, np.float32), np.ones(80, np.float32)),
        pieces=[f"p{i}" for i in range(4097)],
        spm=None,
        licence="random weights",
        chunks_ms=(160,),
        chunk_ms=160,
        right_contexts_ms=(40,),
        right_context_ms=40,
    )
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        single = write_bundle(student, spec, Path(folder) / "fp32")
        quantised = write_int8(Path(folder) / "fp32", Path(folder) / "int8")
        engines = {"fp32": OnnxEncoder(single), "int8": OnnxEncoder(quantised)}
        print("emformer_rnnt_base (random weights), encoder, 160 ms + 40 ms, one thread")
        print("| streams | system | ms/chunk | p90 | ms/stream | torchaudio, 1 stream, by |")
        print("|---|---|---|---|---|---|")
        alone = 0.0
        for batch in BATCHES:
            window = rng.standard_normal((batch, segment + right, 80)).astype(np.float32)
            tensor, lengths = torch.from_numpy(window), torch.full((batch,), segment + right)
            runs = {"torchaudio": _torchaudio_step(reference, tensor, lengths)}
            states: dict[str, Any] = {"torchaudio": None}
            for name, engine in engines.items():
                runs[f"loquent {name}"] = _our_step(engine, window, right)
                states[f"loquent {name}"] = {
                    n: np.repeat(a, batch, axis=0) for n, a in engine.initial.items()
                }
            times: dict[str, list[float]] = {name: [] for name in runs}
            with torch.inference_mode():
                for _ in range(steps + 10):
                    for name, run in runs.items():
                        before = time.perf_counter()
                        states[name] = run(states[name])
                        times[name].append(time.perf_counter() - before)
            for name, seconds in times.items():
                # The first steps fill torchaudio's left context, which grows until then.
                median, p90 = _median_p90(seconds[10:])
                alone = alone or median
                ratio = alone / (median / batch)
                rows.append(
                    {
                        "batch": batch,
                        "system": name,
                        "ms": round(median, 3),
                        "p90": round(p90, 3),
                        "ratio": round(ratio, 2),
                    }
                )
                print(
                    f"| {batch} | {name} | {median:.2f} | {p90:.2f} | {median / batch:.2f} | "
                    f"{ratio:.1f}x |"
                )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="loquent bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", default="en", help="name, folder or tar (default %(default)s)")
    parser.add_argument("--audio", type=Path, help="speech to feed (default: the bundled sample)")
    parser.add_argument("--chunk-ms", type=float, action="append", help="may be repeated")
    parser.add_argument("--decoder", choices=DECODERS, action="append")
    parser.add_argument("--steps", type=int, default=60, help="measured steps per row")
    parser.add_argument(
        "--torchaudio", action="store_true", help="compare with torchaudio (needs loquent[export])"
    )
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict[str, Any] = {}
    try:
        result["bundle"] = bench_bundle(
            args.bundle, args.audio or SAMPLE, args.chunk_ms, args.decoder, args.steps
        )
    except LoquentError as error:
        parser.exit(1, f"loquent bench: {error}\n")
    if args.torchaudio:
        result["torchaudio"] = bench_torchaudio(args.steps)
    print(json.dumps(result))
    return 0
