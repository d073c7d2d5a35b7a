"""`loquent bench load` and `bench soak` against a real server process, in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from loquent.clients import cli
from loquent.clients.load import search
from loquent.clients.soak import growth


@pytest.mark.parametrize("most", [0, 1, 5, 37, 200, 399, 400, 1000])
@pytest.mark.parametrize("start", [1, 16, 300])
def test_the_search_finds_the_largest_number_that_fits(most: int, start: int) -> None:
    tried: list[int] = []

    def fits(streams: int) -> bool:
        tried.append(streams)
        return streams <= most

    found = search(fits, start, 400)
    assert min(most, 400) * 0.95 - 1 <= found <= min(most, 400)
    assert len(tried) == len(set(tried)) <= 20
    assert all(1 <= streams <= 400 for streams in tried)


def test_memory_that_grows_is_seen() -> None:
    flat = [(float(i), 100.0 + (i % 3)) for i in range(100)]
    assert abs(growth(flat)) <= 2
    assert growth([(t, mb + t) for t, mb in flat]) > 50
    assert abs(growth([(t, mb + 80 * (t > 5)) for t, mb in flat])) <= 2  # while it fills up


@pytest.fixture
def talk(tmp_path: Path, tones: Callable[..., NDArray[np.float32]]) -> Path:
    path = tmp_path / "talk.wav"
    pcm = tones([(1 + i % 8, 0.3) for i in range(20)] + [(0, 1.0)])
    soundfile.write(path, pcm, 16000, subtype="PCM_16")
    return path


def where(bundle: Path, talk: Path) -> list[str]:
    cores = ["--server-core", "-1", "--client-core", "-1"]
    return ["--bundle", str(bundle), "--audio", str(talk), *cores]


def test_load(talk: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--chunk-ms 160 --mode batched --streams 3 --seconds 1 --utterance 1"
    status = cli.main(["bench", "load", *where(bundle, talk), *options.split()])
    *table, last = capsys.readouterr().out.splitlines()
    assert status == 0
    assert table[0].startswith("| chunk ms |")
    [run] = json.loads(last)["runs"]
    assert (run["streams"], run["failures"]) == (3, 0)
    assert run["final_p99"] >= run["final_p50"] > 0
    assert run["sessions"] >= 3


def test_soak(talk: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--streams 3 --minutes 0.1 --cut-every 1 --slow-readers 1 --utterance 2"
    cli.main(["bench", "soak", *where(bundle, talk), *options.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["finals"] > 2
    assert result["resumed"] > 2
    assert result["garbage"] > 1
    assert (result["wrong"], result["failures"], result["log_lines"]) == (0, 0, 0)
    assert len(result["memory_mb"]) > 2
