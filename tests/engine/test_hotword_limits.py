"""What hotwords may cost the others: sizes, what is kept, who pays, and a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import string
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.loopback import client, receive_all, serving
from websockets.asyncio.client import connect

from loquent.engine import hotwords as module
from loquent.engine import limits
from loquent.engine.errors import ConfigError
from loquent.engine.hotwords import MAX_TOTAL, Hotword, HotwordCache, HotwordGraph, Vocabulary
from loquent.engine.limits import HotwordMeter, Limits, Meter
from loquent.engine.protocol import END, SetHotwords, Start, WireError
from loquent.engine.recognizer import Recognizer
from loquent.engine.wire.openai import OpenAiSession

LETTERS = ["<blank>", "▁", *string.ascii_lowercase, "▁th", "ing"]


def words(count: int, size: int, seed: int = 0) -> tuple[Hotword, ...]:
    letters = np.random.default_rng(seed).choice(list(string.ascii_lowercase), (count, size))
    return tuple(Hotword(phrase="".join(row)) for row in letters)


# The automaton.


def test_a_list_of_five_thousand_names_is_taken_and_a_longer_one_is_not() -> None:
    module.check_size(words(5000, 20))
    message = rf"5000 hotwords of 105000 characters together, expected at most {MAX_TOTAL}; give"
    with pytest.raises(ConfigError, match=message):
        HotwordGraph(words(5000, 21), LETTERS, 0)


def test_an_automaton_is_small() -> None:
    names = words(500, 20)
    HotwordGraph(names, LETTERS, 0)
    tracemalloc.start()
    try:
        graph = HotwordGraph(names, LETTERS, 0)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(graph.words) == 500
    assert size / 10_000 < 100  # bytes a character


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=9), st.text("abcd"))
def test_what_a_word_begins_with(found: list[str], prefix: str) -> None:
    graph = HotwordGraph([Hotword(phrase=word) for word in found], LETTERS, 0)
    assert graph.begins(prefix) == any(word.startswith(prefix) for word in found)


@pytest.mark.parametrize("pieces", [LETTERS, ["<blank>", "▁ab", "▁a", "a", "bc", "'", "<0xC3>"]])
@given(phrase=st.text("abcAé' -+1日."))
def test_what_can_be_spelled_is_what_is_spelled(pieces: list[str], phrase: str) -> None:
    vocabulary = Vocabulary(pieces, 0)
    if vocabulary.can_spell(phrase):
        assert vocabulary.spell(phrase)[1] > 0
    else:
        with pytest.raises(ConfigError, match="cannot spell"):
            vocabulary.spell(phrase)


# What is kept.


def test_the_last_lists_are_kept_by_their_size() -> None:
    cache = HotwordCache(LETTERS, 0)
    small = words(1, 5)
    kept = cache.get(small)
    assert cache.get(small) is kept
    long = [words(1000, 90, seed) for seed in range(3)]  # two of them fit
    cache.get(long[0])
    cache.get(long[1])
    assert cache.find(small) is kept  # which is now the last one
    cache.get(long[2])
    assert [cache.find(hotwords) is not None for hotwords in (small, *long)] == [True, False] + [
        True
    ] * 2
    for seed in range(20):
        cache.get(words(1, 6, seed))
    assert cache.find(small) is None


def test_one_is_built_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    building, most, built = threading.Lock(), [], []
    real = HotwordGraph.__init__

    def watched(self: HotwordGraph, hotwords: Any, *args: Any) -> None:
        most.append(building.acquire(blocking=False))
        built.append(hotwords)
        real(self, hotwords, *args)
        building.release()

    monkeypatch.setattr(HotwordGraph, "__init__", watched)
    cache = HotwordCache(LETTERS, 0)
    lists = [words(200, 20, seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        graphs = list(pool.map(cache.get, lists * 2))
    assert all(most)
    assert sorted(built, key=lists.index) == lists
    assert graphs[:4] == graphs[4:]


# Who pays.


def test_a_client_that_changes_its_hotwords_too_often_waits_and_is_then_refused() -> None:
    meter = HotwordMeter(Limits())
    for _ in range(9):
        assert meter.change("a", MAX_TOTAL, 0.0) == 0.0
    assert meter.change("a", MAX_TOTAL, 0.0) == pytest.approx(0.5)  # 1000 for each list
    assert meter.change("b", MAX_TOTAL, 0.0) == 0.0
    assert meter.change("a", MAX_TOTAL, 0.0) == pytest.approx(5.55)
    for _ in range(3):  # which takes nothing
        with pytest.raises(WireError, match="got new hotwords of 100000 characters") as caught:
            meter.change("a", MAX_TOTAL, 0.0)
        assert (caught.value.code, caught.value.retry_after) == ("flooded", 1)
    assert meter.change("a", MAX_TOTAL, 1.0) == pytest.approx(9.6)
    assert meter.change("a", 0, 30.0) == 0.0


def test_lists_at_hand_cost_little_and_nobody_is_remembered_for_long() -> None:
    meter = HotwordMeter(Limits())
    for _ in range(1000):
        assert meter.change("a", 0, 0.0) == 0.0
    assert meter.change("a", 0, 0.0) > 0
    for number in range(1000):
        meter.change(str(number), 500, 1e3 + number)
    assert len(meter._buckets) < 3
    free = HotwordMeter(Limits(messages_per_second=0))
    assert not any(free.change("a", MAX_TOTAL, 0.0) for _ in range(100))


def test_a_long_text_counts_for_several_messages() -> None:
    meter = Meter(Limits(), 0.0)
    for _ in range(200):
        meter.message(10_000, 0.0, text=True)
    with pytest.raises(WireError, match="more messages"):
        meter.message(10_000, 0.0, text=True)


def test_audio_as_text_is_never_a_flood() -> None:
    meter = Meter(Limits(), 0.0)
    for index in range(2000):  # base64 of 16 bits at 48 kHz, sent as fast as can be
        meter.message(4 * 96_000 // 30 + 100, index * 1e-4, text=True)
        meter.audio(0.1, index * 1e-4)


# A real server.


async def test_a_list_that_is_too_long_is_refused(tiny: Recognizer) -> None:
    start = Start(sample_rate=16000, hotwords=words(5000, 98))
    async with serving(tiny) as server, client(server) as connection:
        await connection.send(start.encode())
        [error] = await receive_all(connection)
    assert error["code"] == "bad_config"
    assert "490000 characters together, expected at most 100000" in error["message"]


async def test_who_floods_with_hotwords_is_slowed_and_refused(
    tiny: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BURST_HOTWORDS", 1000), ("HOTWORDS_PER_SECOND", 50), ("A_LIST", 20)):
        monkeypatch.setattr(limits, name, value)
    monkeypatch.setattr(limits, "MAX_WAIT", 2.0)
    said = [f"mulo{'na' * (i % 8)}{'wi' * (i // 8)}" for i in range(32)]
    spent = sum(map(len, said)) + 20 * len(said)
    start = Start(sample_rate=16000, hotwords=tuple(Hotword(phrase=f"{p}lolo") for p in said))
    async with serving(tiny, trusted_proxies=["127.0.0.1"]) as server:
        began = time.monotonic()
        async with client(server) as connection:
            await connection.send(Start(sample_rate=16000).encode())
            for phrase in said:
                await connection.send(SetHotwords(hotwords=(Hotword(phrase=phrase),)).encode())
            await connection.send(END)
            assert (await receive_all(connection))[-1]["type"] == "ended"
        assert time.monotonic() - began >= (spent - 1000) / 50 > 0.4
        async with client(server) as connection:  # and a new session is no way out
            await connection.send(start.encode())
            [error] = await receive_all(connection)
        assert error["code"] == "flooded"
        assert error["retry_after"] > 1
        other = {"X-Forwarded-For": "192.0.2.7"}
        async with client(server, additional_headers=other) as connection:
            await connection.send(start.encode())
            assert json.loads(await connection.recv())["type"] == "ready"


async def test_hotwords_are_built_beside_the_rounds(
    tiny: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is kept: the worker and the event loop get what was built."""
    monkeypatch.setattr(module, "_LISTS", 0)
    threads = []
    real = HotwordGraph.__init__

    def watched(self: HotwordGraph, *args: Any) -> None:
        threads.append(threading.current_thread().name)
        real(self, *args)

    monkeypatch.setattr(HotwordGraph, "__init__", watched)
    bana, kiwi = ((Hotword(phrase=phrase),) for phrase in ("bana", "kiwi"))
    async with serving(tiny) as server, client(server) as connection:
        await connection.send(Start(sample_rate=16000, hotwords=bana).encode())
        await connection.send(SetHotwords(hotwords=kiwi).encode())
        await connection.send(bytes(6400))
        await connection.send(END)
        assert (await receive_all(connection))[-1]["type"] == "ended"
    assert len(threads) == 2
    assert all(name.startswith("asyncio_") for name in threads), threads


async def test_messages_that_are_there_already_let_the_others_in(
    tiny: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, seen = 0, []
    real = OpenAiSession.receive

    def watched(self: OpenAiSession, message: str | bytes) -> Any:
        seen.append(turns)
        return real(self, message)

    monkeypatch.setattr(OpenAiSession, "receive", watched)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    transcription = {"keywords": ["kiwi", "mu" * 40], "prompt": "x"}
    session = {"audio": {"input": {"transcription": transcription}}}
    message = json.dumps({"type": "session.update", "session": session})
    async with serving(tiny) as server:
        other = asyncio.create_task(others())
        url = f"ws://127.0.0.1:{server.port}/v1/realtime"
        async with connect(url, compression=None, proxy=None) as connection:
            for _ in range(30):
                await connection.send(message)
            for _ in range(31):
                await connection.recv()
        other.cancel()
    assert len(seen) == 30
    assert all(before < after for before, after in itertools.pairwise(seen))
