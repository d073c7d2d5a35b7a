"""One session of a client that others publish: python public_clients.py NAME PORT FILE.

Prints what it heard, one line for each final. Run by ``test_public_clients.py``, with whatever
interpreter has the client installed; nothing of Loquent is imported here. FILE is a mono 16-bit
wav file. What does the talking is the client's own code throughout; only addresses are set.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PACKET = 0.1  # seconds


def read(path: str) -> tuple[bytes, int]:
    """All samples of a wav file, and their rate."""
    with wave.open(path) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2), "mono, 16-bit"
        return file.readframes(file.getnframes()), file.getframerate()


def packets(data: bytes, rate: int) -> list[bytes]:
    size = 2 * round(rate * PACKET)
    return [data[at : at + size] for at in range(0, len(data), size)]


def deepgram(port: int, path: str) -> list[str]:
    """PyPI deepgram-sdk, synchronous, interim results on."""
    finals: list[str] = []
    seen: list[str] = []

    def on_message(message: Any) -> None:
        seen.append(message.type)
        if message.type == "Results" and message.is_final:
            finals.append(message.channel.alternatives[0].transcript)

    _deepgram(port, *read(path), on_message, vad_events="true")
    assert seen[-1] == "Metadata", seen
    assert "SpeechStarted" in seen, seen
    return finals


def deepgram_utterances(port: int, path: str) -> list[str]:
    """PyPI deepgram-sdk without endpointing: a client that goes by UtteranceEnd."""
    data, rate = read(path)
    utterances: list[list[Any]] = [[]]

    def on_message(message: Any) -> None:
        if message.type == "Results" and message.is_final:
            utterances[-1] += message.channel.alternatives[0].words
        elif message.type == "UtteranceEnd":
            assert message.last_word_end == utterances[-1][-1].end, utterances
            utterances.append([])

    _deepgram(port, data + bytes(4 * rate), rate, on_message, endpointing="false")
    assert [len(words) for words in utterances] == [3, 1, 0], utterances
    return [word.punctuated_word for words in utterances for word in words]


def _deepgram(port: int, data: bytes, rate: int, on_message: Any, **options: str) -> None:
    from deepgram import DeepgramClient
    from deepgram.core.events import EventType
    from deepgram.environment import DeepgramClientEnvironment

    http, ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
    environment = DeepgramClientEnvironment(base=http, production=ws, agent=ws, agent_rest=http)
    client = DeepgramClient(api_key="none", environment=environment)
    with client.listen.v1.connect(
        model="nova-3",
        encoding="linear16",
        sample_rate=str(rate),
        interim_results="true",
        punctuate="true",
        utterance_end_ms="1000",
        **options,
    ) as connection:
        connection.on(EventType.MESSAGE, on_message)
        listener = threading.Thread(target=connection.start_listening)
        listener.start()
        for packet in packets(data, rate):
            connection.send_media(packet)
        connection.send_keep_alive()
        connection.send_finalize()
        connection.send_close_stream()
        listener.join(60)


def openai_turns(port: int, path: str) -> list[str]:
    """PyPI openai, Realtime transcription in which the server finds the turns."""
    return asyncio.run(_openai(port, path, {"type": "server_vad"}))


def openai_hands_free(port: int, path: str) -> list[str]:
    """PyPI openai, Realtime transcription in which the server finds the turns after a while."""
    said = asyncio.run(_openai(port, path, None, {"type": "server_vad"}))
    assert len(said) == 2, said
    return said


def openai_commit(port: int, path: str) -> list[str]:
    """PyPI openai, Realtime transcription in which the client commits; by its deltas."""
    return asyncio.run(_openai(port, path, None))


async def _openai(port: int, path: str, *turns: Any) -> list[str]:
    """`turns`: its turn detection from the first packet on, the second, and so on."""
    import base64

    from openai import AsyncOpenAI

    data, rate = read(path)
    client = AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1")
    said: dict[str, str] = {}
    deltas: dict[str, str] = {}
    async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        created = await connection.recv()
        assert created.type == "session.created", created
        for number, packet in enumerate(packets(data, rate)):
            if number < len(turns):
                await connection.session.update(
                    session={
                        "type": "transcription",
                        "audio": {
                            "input": {
                                "format": {"type": "audio/pcm", "rate": rate},  # type: ignore[typeddict-item]
                                "transcription": {"model": "gpt-4o-transcribe"},
                                "turn_detection": turns[number],
                            }
                        },
                    }
                )
            await connection.input_audio_buffer.append(audio=base64.b64encode(packet).decode())
        await connection.input_audio_buffer.commit()
        # What was committed before is completed before a commit of nothing is refused.
        await connection.input_audio_buffer.commit()
        async for event in connection:
            if event.type == "conversation.item.input_audio_transcription.delta":
                deltas[event.item_id] = deltas.get(event.item_id, "") + (event.delta or "")
            elif event.type == "conversation.item.input_audio_transcription.completed":
                assert event.usage.type == "duration", event
                said[event.item_id] = event.transcript
            elif event.type == "error":
                assert event.error.code == "input_audio_buffer_commit_empty", event
                break
    assert {item: text for item, text in said.items() if text} == deltas
    return list(said.values())


def openai_file(port: int, path: str) -> list[str]:
    """PyPI openai, the transcription of a file."""
    from openai import OpenAI

    client = OpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1")
    with Path(path).open("rb") as file:
        answer = client.audio.transcriptions.create(
            model="whisper-1",
            file=file,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
        )
    assert answer.segments is not None
    assert answer.words is not None
    assert answer.text == "".join(segment.text for segment in answer.segments).strip()
    bare = [token.rstrip(",.?") for token in answer.text.split()]
    assert bare == [word.word for word in answer.words]
    assert answer.language == "english"
    return [segment.text for segment in answer.segments]


def vosk(port: int, path: str) -> list[str]:
    """PyPI vosk, the part of vosk-transcriber that talks to a server; it needs ffmpeg."""
    from vosk.transcriber import transcriber as module

    # Its constructor loads a model, which nobody needs who uses a server.
    transcriber = module.Transcriber.__new__(module.Transcriber)
    transcriber.args = SimpleNamespace(server=f"ws://127.0.0.1:{port}", output_type="txt")

    async def run() -> Any:
        return await transcriber.recognize_stream_server(
            await transcriber.resample_ffmpeg_async(path)
        )

    results, _ = asyncio.run(run())
    return str(transcriber.format_result(results)).splitlines()


def livekit_deepgram(port: int, path: str) -> list[str]:
    """PyPI livekit-plugins-deepgram."""
    from livekit.plugins import deepgram as plugin

    def make(session: Any) -> Any:
        return plugin.STT(
            api_key="none",
            base_url=f"http://127.0.0.1:{port}/v1/listen",
            http_session=session,
            sample_rate=read(path)[1],
            endpointing_ms=800,
        )

    return asyncio.run(_livekit(make, path))


def livekit_openai(port: int, path: str) -> list[str]:
    """PyPI livekit-plugins-openai, Realtime transcription."""
    from livekit.plugins import openai as plugin

    def make(session: Any) -> Any:
        turns = {"type": "server_vad", "silence_duration_ms": 800}
        return plugin.STT(
            api_key="none",
            base_url=f"http://127.0.0.1:{port}/v1",
            use_realtime=True,
            model="gpt-4o-transcribe",
            turn_detection=turns,
        )

    return asyncio.run(_livekit(make, path))


async def _livekit(make: Any, path: str) -> list[str]:
    import aiohttp
    from livekit import rtc
    from livekit.agents import stt
    from livekit.agents.utils import http_context

    data, rate = read(path)
    finals: list[str] = []
    async with aiohttp.ClientSession() as session, http_context.open():
        stream = make(session).stream()
        for packet in packets(data + bytes(2 * rate * 2), rate):
            stream.push_frame(rtc.AudioFrame(packet, rate, 1, len(packet) // 2))
            await asyncio.sleep(PACKET / 2)
        stream.end_input()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(8):
                async for event in stream:
                    final = event.type == stt.SpeechEventType.FINAL_TRANSCRIPT
                    finals += [event.alternatives[0].text] if final else []
        with contextlib.suppress(Exception):
            await stream.aclose()
    return finals


def pipecat_deepgram(port: int, path: str) -> list[str]:
    """PyPI pipecat-ai, DeepgramSTTService."""
    from pipecat.services.deepgram.stt import DeepgramSTTService

    def make(rate: int) -> Any:
        return DeepgramSTTService(
            api_key="none",
            base_url=f"ws://127.0.0.1:{port}",
            sample_rate=rate,
            settings=DeepgramSTTService.Settings(endpointing=800),
        )

    return asyncio.run(_pipecat(make, path))


def pipecat_openai(port: int, path: str) -> list[str]:
    """PyPI pipecat-ai, OpenAIRealtimeSTTService."""
    from pipecat.services.openai.stt import OpenAIRealtimeSTTService

    def make(rate: int) -> Any:
        return OpenAIRealtimeSTTService(
            api_key="none",
            base_url=f"ws://127.0.0.1:{port}/v1/realtime",
            sample_rate=rate,
            turn_detection={"type": "server_vad", "silence_duration_ms": 800},
            should_interrupt=False,
        )

    return asyncio.run(_pipecat(make, path))


async def _pipecat(make: Any, path: str) -> list[str]:
    from pipecat.frames.frames import EndFrame, InputAudioRawFrame, TranscriptionFrame
    from pipecat.tests.utils import SleepFrame, run_test

    data, rate = read(path)
    frames: list[Any] = [SleepFrame(sleep=1.0)]
    for packet in packets(data + bytes(2 * rate * 2), rate):
        frames += [InputAudioRawFrame(packet, rate, 1), SleepFrame(sleep=PACKET / 2)]
    frames += [SleepFrame(sleep=3.0), EndFrame()]
    down, _ = await run_test(make(rate), frames_to_send=frames, send_end_frame=False)
    return [frame.text for frame in down if isinstance(frame, TranscriptionFrame)]


CLIENTS = {
    "deepgram": deepgram,
    "deepgram_utterances": deepgram_utterances,
    "openai_turns": openai_turns,
    "openai_hands_free": openai_hands_free,
    "openai_commit": openai_commit,
    "openai_file": openai_file,
    "vosk": vosk,
    "livekit_deepgram": livekit_deepgram,
    "livekit_openai": livekit_openai,
    "pipecat_deepgram": pipecat_deepgram,
    "pipecat_openai": pipecat_openai,
}

if __name__ == "__main__":
    name, port, path = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    print(*CLIENTS[name](int(port), path), sep="\n")
