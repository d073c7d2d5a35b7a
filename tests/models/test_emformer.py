"""The encoder: streaming equals the masked pass, batched equals single, and nothing looks ahead.

Lengths are in feature frames, but in units of the subsampling where a name says so.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loquent.models.emformer import EmformerConfig, State
from loquent.models.encoder import Encoder, EncoderConfig
from loquent.models.frontend import FrontendConfig

TOLERANCE = 2e-5
# The fixtures are modules whose weights never change.
many = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def features(encoder: Encoder, batch: int, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, encoder.config.frontend.features, generator=generator)


def room(encoder: Encoder, right: int) -> int:
    """Frames that stand behind the last segment."""
    return right + encoder.config.lookahead


@torch.no_grad()
def masked(encoder: Encoder, x: Tensor, segment: int, right: int, lengths: Tensor) -> Tensor:
    out, _ = encoder(x, lengths, segment, right)
    return out  # type: ignore[no-any-return]


@torch.no_grad()
def infer(
    encoder: Encoder, x: Tensor, segment: int, right: int, state: State | None = None
) -> tuple[Tensor, State]:
    """Window by window; the last segment is short where the frames run out."""
    state = encoder.initial_state(len(x)) if state is None else state
    whole = x.shape[1] - room(encoder, right)
    parts = []
    for start in range(0, whole, segment):
        stop = min(start + segment, whole)
        window = x[:, start : stop + room(encoder, right)]
        out, state = encoder.step(window, torch.tensor(right), state)
        parts.append(out[:, : (stop - start) // encoder.config.subsampling])
    return torch.cat(parts, dim=1), state


def full(x: Tensor, encoder: Encoder, right: int) -> Tensor:
    return torch.full((len(x),), x.shape[1] - room(encoder, right))


# 2: infer == forward


@many
@given(
    segment_units=st.integers(1, 6),
    right_units=st.integers(0, 7),
    segments=st.integers(1, 7),
    batch=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_infer_is_masked_forward(
    encoder: Encoder, segment_units: int, right_units: int, segments: int, batch: int, seed: int
) -> None:
    unit = encoder.config.subsampling
    segment, right = segment_units * unit, right_units * unit
    x = features(encoder, batch, segments * segment + room(encoder, right), seed)
    expected = masked(encoder, x, segment, right, full(x, encoder, right))
    got, _ = infer(encoder, x, segment, right)
    assert got.shape == (batch, segments * segment_units, encoder.config.width)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


@many
@given(
    segment_units=st.integers(2, 6),
    right_units=st.integers(0, 4),
    segments=st.integers(0, 4),
    rest=st.integers(1, 5),
)
def test_infer_is_masked_forward_with_a_short_last_segment(
    encoder: Encoder, segment_units: int, right_units: int, segments: int, rest: int
) -> None:
    # A window shorter than the others would miscount the slots of the memory bank: the engine
    # pads its last window, so it never feeds one.
    if encoder.config.emformer.memory:
        segments = 0
    unit = encoder.config.subsampling
    segment, right = segment_units * unit, right_units * unit
    frames = (segments * segment_units + min(rest, segment_units - 1)) * unit
    x = features(encoder, 2, frames + room(encoder, right))
    expected = masked(encoder, x, segment, right, full(x, encoder, right))
    got, _ = infer(encoder, x, segment, right)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_segment_longer_than_the_utterance_is_one_segment(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    x = features(encoder, 2, 12 * unit + room(encoder, unit))
    lengths = full(x, encoder, unit)
    torch.testing.assert_close(
        masked(encoder, x, 1000 * unit, unit, lengths),
        masked(encoder, x, 12 * unit, unit, lengths),
    )


@pytest.mark.parametrize("right_units", [0, 2])
def test_padding_of_a_batch_changes_nothing(encoder: Encoder, right_units: int) -> None:
    """An utterance gives the same frames behind padding as alone.

    Only those of a last, unfinished segment see other right context: that is cut off behind the
    segment, so what the padding holds is what they see.
    """
    unit = encoder.config.subsampling
    segment, right = 3 * unit, right_units * unit
    x = features(encoder, 3, 14 * unit + room(encoder, right))
    lengths = torch.tensor([14, 7, 2]) * unit
    together = masked(encoder, x, segment, right, lengths)
    for row, units in enumerate((14, 7, 2)):
        alone = x[row : row + 1, : units * unit + room(encoder, right)]
        expected = masked(encoder, alone, segment, right, lengths[row : row + 1])
        same = units // 3 * 3 if right else units
        torch.testing.assert_close(together[row, :same], expected[0, :same], atol=TOLERANCE, rtol=0)


def test_output_lengths_are_rounded_up(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    x = features(encoder, 4, 8 * unit + room(encoder, 0))
    lengths = torch.tensor([8 * unit, 7 * unit + 1, unit, 1])
    out, valid = encoder(x, lengths, 4 * unit, 0)
    assert out.shape[1] == 8
    assert valid.tolist() == [8, 8, 1, 1]


# Causality


@pytest.mark.parametrize(("segment_units", "right_units"), [(1, 0), (2, 1), (4, 0), (3, 5)])
def test_more_input_never_changes_old_output(
    encoder: Encoder, segment_units: int, right_units: int
) -> None:
    unit = encoder.config.subsampling
    segment, right = segment_units * unit, right_units * unit
    long = features(encoder, 2, 6 * segment + room(encoder, right))
    short = long[:, : 3 * segment + room(encoder, right)]
    torch.testing.assert_close(
        masked(encoder, long, segment, right, full(long, encoder, right))[:, : 3 * segment_units],
        masked(encoder, short, segment, right, full(short, encoder, right)),
        atol=TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize(("segment_units", "right_units"), [(2, 0), (3, 2)])
def test_a_frame_sees_its_segment_right_context_and_lookahead_and_no_more(
    encoder: Encoder, segment_units: int, right_units: int
) -> None:
    unit = encoder.config.subsampling
    segment, right = segment_units * unit, right_units * unit
    frames = 5 * segment + room(encoder, right)
    x = features(encoder, 1, frames)
    before = masked(encoder, x, segment, right, full(x, encoder, right))
    edge = 2 * segment + room(encoder, right)  # the first frame that segment 1 must not see
    for change, differs in ((edge - 1, True), (edge, False)):
        y = x.clone()
        y[:, change] += 5.0
        after = masked(encoder, y, segment, right, full(y, encoder, right))
        seen = not torch.allclose(
            after[:, : 2 * segment_units], before[:, : 2 * segment_units], atol=TOLERANCE
        )
        assert seen is differs, change


# 4: batched == single; 6: reset == fresh


@pytest.mark.parametrize("right_units", [0, 2])
def test_streams_of_mixed_age_in_a_batch_are_like_single_ones(
    encoder: Encoder, right_units: int
) -> None:
    unit = encoder.config.subsampling
    segment, right = 2 * unit, right_units * unit
    streams = features(encoder, 4, 9 * segment + room(encoder, right))
    expected = [infer(encoder, streams[i : i + 1], segment, right)[0][0] for i in range(4)]
    # Stream i enters in round i; rows are gathered anew in each round.
    states = [encoder.initial_state(1) for _ in range(4)]
    got: list[list[Tensor]] = [[] for _ in range(4)]
    for round_ in range(12):
        active = [i for i in range(4) if i <= round_ < i + 9]
        windows = [
            streams[i, (round_ - i) * segment : (round_ - i + 1) * segment + room(encoder, right)]
            for i in active
        ]
        state = {n: torch.cat([states[i][n] for i in active]) for n in states[0]}
        with torch.no_grad():
            out, state = encoder.step(torch.stack(windows), torch.tensor(right), state)
        for row, i in enumerate(active):
            got[i].append(out[row, :2])
            states[i] = {n: t[row : row + 1] for n, t in state.items()}
    for i in range(4):
        torch.testing.assert_close(torch.cat(got[i]), expected[i], atol=TOLERANCE, rtol=0)


def test_a_stream_reset_in_a_batch_is_like_a_fresh_one(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    segment, right = 3 * unit, unit
    before = features(encoder, 2, 4 * segment + room(encoder, right), seed=1)
    after = features(encoder, 2, 4 * segment + room(encoder, right), seed=2)
    _, state = infer(encoder, before, segment, right)
    kept = {n: t[:1].clone() for n, t in state.items()}
    for tensor in state.values():
        tensor[1] = 0
    got, _ = infer(encoder, after, segment, right, state)
    going_on, _ = infer(encoder, after[:1], segment, right, kept)
    fresh, _ = infer(encoder, after[1:], segment, right)
    torch.testing.assert_close(got[:1], going_on, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got[1:], fresh, atol=TOLERANCE, rtol=0)


def test_the_cache_of_a_new_stream_is_masked_not_attended(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    x = features(encoder, 1, 2 * unit + room(encoder, 0))
    new = encoder.initial_state(1)
    # What lies in the caches of a stream without a past is of no importance.
    dirty = {
        name: torch.ones_like(t) if name.split(".")[-1] in ("key", "value") else t
        for name, t in new.items()
    }
    old = {n: torch.full_like(t, 50) if n == "processed_frames" else t for n, t in dirty.items()}
    outs = [infer(encoder, x, 2 * unit, 0, state)[0] for state in (new, dirty, old)]
    torch.testing.assert_close(outs[0], outs[1], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(outs[0], outs[2], atol=1e-3)


def test_state_has_the_shapes_it_says(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    x = features(encoder, 3, 5 * unit + room(encoder, unit))
    _, state = infer(encoder, x, 5 * unit, unit)
    assert {n: tuple(t.shape[1:]) for n, t in state.items()} == encoder.state_shapes()
    assert {n: t.dtype for n, t in state.items()} == {
        n: t.dtype for n, t in encoder.initial_state(3).items()
    }
    assert state["processed_frames"].tolist() == [5 * encoder.config.pool] * 3


def test_step_leaves_its_arguments_alone(encoder: Encoder) -> None:
    unit = encoder.config.subsampling
    x = features(encoder, 1, 2 * unit + room(encoder, 0))
    state = encoder.initial_state(1)
    infer(encoder, x, 2 * unit, 0, state)
    assert all(not t.any() for t in state.values())


# Positions


def test_positions_start_where_they_are_told_and_wrap_around(whisper: Encoder) -> None:
    period = whisper.config.frontend.positions
    x = features(whisper, 2, 12 * 4 + 1)
    lengths = torch.full((2,), 48)

    def at(*starts: int) -> Tensor:
        with torch.no_grad():
            return whisper(x, lengths, 16, 0, torch.tensor(starts))[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(at(0, 0), at(period, 3 * period))
    mixed = at(0, 4)
    torch.testing.assert_close(mixed[0], at(0, 0)[0])
    assert not torch.allclose(mixed[1], at(0, 0)[1], atol=1e-3)


@pytest.fixture(scope="module")
def whisper() -> Encoder:
    torch.manual_seed(0)
    return Encoder(
        EncoderConfig(
            frontend=FrontendConfig(kind="conv", features=8, dim=16, strides=(1, 2), positions=11),
            emformer=EmformerConfig(dim=16, heads=2, ffn_dim=24, layers=1, left_context=4),
            pool=2,
        )
    ).eval()


# Mistakes


@pytest.mark.parametrize(
    ("segment", "right", "frames", "message"),
    [
        (6, 0, 33, "segment of 6 feature frames, expected a multiple of 4, at least 4"),
        (0, 0, 33, "segment of 0"),
        (8, 3, 36, "right_context of 3 feature frames, expected a multiple of 4, at least 0"),
        (8, -4, 36, "right_context of -4"),
        (8, 0, 31, "utterance of 30 feature frames"),
        (8, 4, 5, "utterance of 0 feature frames"),
    ],
)
def test_wrong_lengths_are_named(
    whisper: Encoder, segment: int, right: int, frames: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        whisper(features(whisper, 1, frames), torch.tensor([4]), segment, right)


def test_wrong_shapes_are_named() -> None:
    good = EmformerConfig(dim=16, heads=2, ffn_dim=24, layers=1, left_context=4)
    with pytest.raises(ValueError, match="dim 16 is not a multiple of heads 3"):
        dataclasses.replace(good, heads=3)
    with pytest.raises(ValueError, match="left_context is 0, expected at least 1"):
        dataclasses.replace(good, left_context=0)
    with pytest.raises(ValueError, match="activation is 'swish', expected one of"):
        dataclasses.replace(good, activation="swish")  # type: ignore[arg-type]
    front = FrontendConfig(kind="stack", features=8, dim=24)
    with pytest.raises(ValueError, match="front end gives width 24, layers take 16"):
        EncoderConfig(frontend=front, emformer=good)
    stack = FrontendConfig(kind="stack", features=8, dim=18)
    with pytest.raises(ValueError, match="dim 18 is not a multiple of 4"):
        Encoder(EncoderConfig(frontend=stack, emformer=dataclasses.replace(good, dim=18)))
