"""Teachers: a pretrained speech encoder, full context, with a new CTC head on top.

A Whisper encoder becomes a :class:`~loquent.models.student.Student` without a transducer, trained
on whole utterances, so that everything that takes a student's checkpoint takes it too. Encoders of
the wav2vec 2.0 family are in ``pretrained.py``.
"""

from __future__ import annotations

import dataclasses

from loquent.models.loop import Freezing
from loquent.models.presets import whisper_encoder
from loquent.models.student import Student, StudentConfig
from loquent.models.whisper import Tensors, WhisperWeightsError, initialise_from_whisper


def freezing_policy(hours: float, layers: int, steps: int) -> Freezing:
    """What to keep of a pretrained encoder, given the hours of labelled speech.

    A new head starts from noise, and its first gradients would wash out what the encoder knows: it
    learns alone at first. The CNN of wav2vec 2.0 hears any language already (arXiv 2006.11477
    freezes it throughout); with an hour and more it may adapt to the recordings, later than the
    rest. With minutes of speech the lower layers would only learn the speakers by heart.

    Args:
        hours: of speech to fine-tune on.
        layers: of the encoder.
        steps: of the run.
    """
    if hours < 1 / 6:
        return Freezing(encoder=steps // 10, front=None, layers=3 * layers // 4)
    if hours < 0.5:
        return Freezing(encoder=steps // 10, front=None, layers=layers // 2)
    if hours < 10:
        return Freezing(encoder=steps // 20, front=steps // 5)
    return Freezing(encoder=steps // 50, front=steps // 10)


def replay_share(hours: float, replay_hours: float, part: float) -> float:
    """Share of the replay data per epoch that makes them ``part`` of what is heard.

    Replaying the source languages keeps what fine-tuning would forget (arXiv 2407.00756).
    """
    return min(1.0, part / (1 - part) * hours / replay_hours) if replay_hours else 0.0


def whisper_teacher(tensors: Tensors, vocab: int) -> Student:
    """Whisper's encoder with a CTC head over ``vocab`` tokens that knows nothing yet."""
    dim, bins, _ = tensors["conv1.weight"].shape
    if bins != 80:
        raise WhisperWeightsError(f"this Whisper takes {bins} mel bins, expected 80")
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    config = StudentConfig(encoder=whisper_encoder(dim=dim, layers=layers), vocab=vocab)
    teacher = Student(dataclasses.replace(config, joiner_dim=0))
    initialise_from_whisper(teacher.encoder, tensors)
    return teacher
