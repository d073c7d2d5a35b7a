"""The wire protocols under libFuzzer: ``pip install atheris hypothesis pytest``, then

    PYTHONPATH=tests/importroot python tests/engine/wire/fuzz.py CORPUS -max_total_time=600

Sessions are those of `test_fuzz.py`; what crashes here becomes a message in `likely` there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import atheris

from loquent.engine.recognizer import Recognizer

with atheris.instrument_imports(include=["loquent.engine.wire", "loquent.engine.protocol"]):
    from loquent.engine.wire.dispatch import PROTOCOLS

spec = importlib.util.spec_from_file_location("test_fuzz", Path(__file__).with_name("test_fuzz.py"))
assert spec is not None
assert spec.loader is not None
test_fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_fuzz)

recognizer = Recognizer.load("en")
PATHS = [*PROTOCOLS, "/"]
NAMES = list(test_fuzz.NAMES)


def text(data: atheris.FuzzedDataProvider) -> str:
    if data.ConsumeBool():
        return str(data.PickValueInList(NAMES))
    return str(data.ConsumeUnicode(data.ConsumeIntInRange(0, 12)))


def value(data: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    kind = data.ConsumeIntInRange(0, 6 if depth < 3 else 4)
    if kind == 0:
        return data.ConsumeInt(8)
    if kind == 1:
        return data.ConsumeFloat()
    if kind == 2:
        return data.PickValueInList([None, True, False])
    if kind in (3, 4):
        return text(data)
    count = data.ConsumeIntInRange(0, 3)
    if kind == 5:
        return [value(data, depth + 1) for _ in range(count)]
    return {text(data): value(data, depth + 1) for _ in range(count)}


def message(data: atheris.FuzzedDataProvider) -> str | bytes:
    kind = data.ConsumeIntInRange(0, 4)
    if kind == 0:
        return bytes(data.ConsumeBytes(data.ConsumeIntInRange(0, 400)))
    if kind == 1:
        # A text message is UTF-8, or the socket would not have taken it.
        raw = data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 200))
        return str(raw)
    if kind == 2:
        return str(data.PickValueInList(test_fuzz.likely))
    fields = {text(data): value(data) for _ in range(data.ConsumeIntInRange(0, 4))}
    if kind == 3:
        fields["type"] = text(data)
    return json.dumps(fields)


def one(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    path = data.PickValueInList(PATHS)
    query = "&".join(f"{text(data)}={text(data)}" for _ in range(data.ConsumeIntInRange(0, 3)))
    headers = {"sec-websocket-protocol": text(data)} if data.ConsumeBool() else {}
    said = [message(data) for _ in range(data.ConsumeIntInRange(0, 6))]
    test_fuzz.converse(recognizer, f"{path}?{query}", headers, said)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
