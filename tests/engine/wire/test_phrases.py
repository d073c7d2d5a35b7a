"""Hotwords out of other people's options, and finished text in their answers."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loquent.engine.events import Ended, Final, Partial, Word
from loquent.engine.finish import finisher
from loquent.engine.protocol import Progress
from loquent.engine.wire.deepgram import DeepgramSession
from loquent.engine.wire.openai import OpenAiSession
from loquent.engine.wire.phrases import listed
from loquent.engine.wire.session import Context, Handshake, Refused
from loquent.engine.wire.transcription import Options as TranscriptionOptions
from loquent.engine.wire.written import written

LISTEN = "/v1/listen?encoding=linear16&sample_rate=16000"
FINISH = '{"type": "CloseStream"}'


NOTHING = Progress(received=0.0, processed=0.0)


def test_deepgram_keyterms_that_the_model_cannot_spell_are_reported() -> None:
    context = Context(session="s", bundle="b", spells=str.isalpha)
    handshake = Handshake.parse(f"{LISTEN}&keyterm=Ada&keyterm=GPT-4&smart_format=true", {})
    session = DeepgramSession(handshake, context)
    [opening] = session.connected()
    assert [word.phrase for word in opening.start.hotwords] == ["Ada"]  # type: ignore[union-attr]
    [failure] = session.receive('{"type": "Configure", "keyterms": ["C3PO"]}')
    assert "C3PO" in json.loads(failure.text)["description"]  # type: ignore[union-attr]
    session.receive(FINISH)
    *_, metadata, _ = session.event(Ended(duration=1.0, segments=0), NOTHING)
    warnings = json.loads(metadata.text)["warnings"]  # type: ignore[union-attr]
    assert [w["parameter"] for w in warnings] == ["keyterm=GPT-4", "smart_format"]


def spoken(text: str) -> tuple[Word, ...]:
    return tuple(
        Word(text=word, start=float(i), end=i + 0.5, confidence=0.5 + i / 100)
        for i, word in enumerate(text.split())
    )


@pytest.mark.parametrize("option", ["punctuate", "smart_format"])
def test_deepgram_finals_are_finished_where_that_is_possible(option: str) -> None:
    context = Context(session="s", bundle="en", languages=("en",), finishes=True)
    target = f"{LISTEN}&interim_results=true&numerals=true&{option}=true"
    session = DeepgramSession(Handshake.parse(target, {}), context)
    [opening] = session.connected()
    assert opening.start.finish  # type: ignore[union-attr]
    words = spoken("please bring twenty five dollars")
    about = {"segment": 0, "start": 0.0, "end": 4.5, "words": words}
    partial = Partial(**about, committed="please bring", tentative="twenty five dollars")
    final = Final(**about, text="Please bring $25.", reason="endpoint")
    [interim] = [json.loads(s.text) for s in session.event(partial, NOTHING)]  # type: ignore[union-attr]
    [result] = [json.loads(s.text) for s in session.event(final, NOTHING)]  # type: ignore[union-attr]
    assert interim["channel"]["alternatives"][0]["transcript"] == "please bring twenty five dollars"
    [alternative] = result["channel"]["alternatives"]
    assert alternative["transcript"] == "Please bring $25."
    assert [(w["word"], w["punctuated_word"]) for w in alternative["words"]] == [
        ("please", "Please"),
        ("bring", "bring"),
        ("$25", "$25."),
    ]
    assert [(w["start"], w["end"]) for w in alternative["words"]] == [(0, 0.5), (1, 1.5), (2, 4.5)]
    session.receive(FINISH)
    *_, metadata, _ = session.event(Ended(duration=5.0, segments=1), NOTHING)
    assert "warnings" not in json.loads(metadata.text)  # type: ignore[union-attr]


VOCABULARY = (
    "the a train leaves at five twenty nine hundred and percent of dollars it is may half past"
)


@settings(max_examples=150)
@given(st.lists(st.sampled_from(VOCABULARY.split()), min_size=1, max_size=20))
@example(["the", "five", "five", "five", "the", "five"])
def test_every_word_stands_behind_a_part_of_the_finished_text(said: list[str]) -> None:
    words = spoken(" ".join(said))
    text, _ = finisher("en").finish(said)
    found = written(words, text)
    assert " ".join(part for _, part in found) == text
    assert found[0][0].start == words[0].start
    assert found[-1][0].end == words[-1].end
    times = [time for word, _ in found for time in (word.start, word.end)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("ZyntriQix, Digique Plus, CynapseFive", ["ZyntriQix", "Digique Plus", "CynapseFive"]),
        ("Ada Lovelace;\nKubernetes.", ["Ada Lovelace", "Kubernetes"]),
        ("fruit", ["fruit"]),
        ("expect words related to technology", []),
        ("Hello, how are you?", []),
        ("A talk. Names, terms", []),
        ("", []),
    ],
)
def test_prompts_that_list_names(prompt: str, phrases: list[str]) -> None:
    assert list(listed(prompt)) == phrases


def test_openai_keywords_and_prompts_are_hotwords() -> None:
    context = Context(session="s", bundle="b", spells=lambda phrase: "4" not in phrase)
    session = OpenAiSession(Handshake.parse("/v1/realtime", {}), context)

    def change(**about: Any) -> list[Any]:
        fields = {"audio": {"input": {"transcription": about}}}
        message = json.dumps({"type": "session.update", "session": fields})
        return list(session.receive(message))

    def phrases(action: Any) -> list[str]:
        return [word.phrase for word in action.hotwords]

    audio = base64.b64encode(bytes(480)).decode()
    append = json.dumps({"type": "input_audio_buffer.append", "audio": audio})
    [updated] = change(keywords=["Ada", "GPT-4"], prompt="New York, Kiwi")
    about = json.loads(updated.text)["session"]
    assert about["unsupported"] == ["the phrase GPT-4"]
    assert about["audio"]["input"]["transcription"]["keywords"] == ["Ada", "GPT-4"]
    opening, _ = session.receive(append)
    assert phrases(opening.start) == ["Ada", "New York", "Kiwi"]  # type: ignore[union-attr]
    assert len(change(language="en")) == 1  # the same as before
    _, changed = change(keywords=["Bob"])
    assert phrases(changed) == ["Bob", "New York", "Kiwi"]
    updated, changed = change(prompt="What was said before is this sentence.")
    assert json.loads(updated.text)["session"]["unsupported"] == ["transcription.prompt"]
    assert phrases(changed) == ["Bob"]
    for keywords in ("Ada", [1], [""], ["x"] * 6000):
        [error] = change(keywords=keywords)
        assert json.loads(error.text)["error"]["param"] == "keywords"


def test_lists_that_would_hold_up_the_event_loop_are_not_even_looked_at() -> None:
    asked = []

    def spells(phrase: str) -> bool:
        asked.append(phrase)
        return True

    context = Context(session="s", bundle="b", spells=spells)
    deepgram = DeepgramSession(Handshake.parse(LISTEN, {}), context)
    openai = OpenAiSession(Handshake.parse("/v1/realtime", {}), context)
    deepgram.connected()
    most = [f"{i:020}" for i in range(500)]
    for keywords in (most, [*most[1:], "x" * 21]):
        about = {"audio": {"input": {"transcription": {"keywords": keywords}}}}
        update = json.dumps({"type": "session.update", "session": about})
        configure = json.dumps({"type": "Configure", "keyterms": keywords})
        [updated], [configured, *_] = openai.receive(update), deepgram.receive(configure)
        answers = [json.loads(answer.text) for answer in (updated, configured)]  # type: ignore[union-attr]
        if keywords is most:
            assert [answer["type"] for answer in answers] == ["session.updated", "ConfigureSuccess"]
            assert len(asked) == 2 * len(most)
    why = "500 phrases of 10001 characters together, expected at most 10000; give names"
    assert answers[0]["error"]["param"] == "keywords"
    assert why in answers[0]["error"]["message"]
    assert why in answers[1]["description"]
    assert len(asked) == 2 * len(most)
    with pytest.raises(Refused, match="characters together"):
        TranscriptionOptions.parse({"keywords": ["x" * 99 + str(i) for i in range(101)]}, ["en"])
