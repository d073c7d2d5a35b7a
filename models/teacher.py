"""Teachers: a pretrained speech encoder, full context, with a new CTC head on top.

A Whisper encoder becomes a :class:`~loquent.models.student.Student` without a transducer, trained
on whole utterances, so that everything that takes a student's checkpoint takes it too. Encoders of
the wav2vec 2.0 family are in ``pretrained.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from loquent.models.loop import Freezing
from loquent.models.presets import whisper_encoder, whisper_student
from loquent.models.pretrained import model_type
from loquent.models.student import Student, StudentConfig
from loquent.models.whisper import (
    Tensors,
    WhisperWeightsError,
    initialise_from_whisper,
    whisper_shape,
)


def is_whisper(source: str) -> bool:
    """Whether a hub id, folder or file is a Whisper, not one of the wav2vec 2.0 family.

    Raises:
        CheckpointError: it is nothing that could be read or fetched.
    """
    path = Path(source)
    if path.is_file() or (path / "model.bin").exists():
        return True
    return model_type(source) == "whisper"


def source_name(source: str) -> str:
    """Of pretrained weights, for the model card: a name, never a path of this machine."""
    path = Path(source)
    if path.is_file():
        return path.resolve().parent.name
    return path.name if path.exists() else source


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
    dim, layers = whisper_shape(tensors)
    config = StudentConfig(encoder=whisper_encoder(dim=dim, layers=layers), vocab=vocab)
    teacher = Student(dataclasses.replace(config, joiner_dim=0))
    initialise_from_whisper(teacher.encoder, tensors)
    return teacher


def student_of(teacher: Student, layers: Sequence[int] | None = None) -> Student:
    """A student that begins as some of its teacher's layers, with the teacher's CTC head.

    Layers add to what runs past them, so leaving some out costs less than it seems, and little
    training mends it (DistilBERT, arXiv 1910.01108, starts from every other layer).

    Args:
        teacher: a Whisper teacher.
        layers: which to take, from below; all by default.

    Raises:
        WhisperWeightsError: the teacher has no such layer.
    """
    shape = teacher.config.encoder.emformer
    chosen = list(range(shape.layers) if layers is None else layers)
    if wrong := [layer for layer in chosen if not 0 <= layer < shape.layers]:
        raise WhisperWeightsError(
            f"got layer {wrong[0]}, expected layers from 0 to {shape.layers - 1} of the teacher"
        )
    student = Student(whisper_student(teacher.config.vocab, dim=shape.dim, layers=len(chosen)))
    theirs = teacher.state_dict()
    own = student.state_dict()
    for name in own:
        place = name.split(".")
        if name.startswith("encoder.emformer.layers."):
            place[3] = str(chosen[int(place[3])])
        if (source := ".".join(place)) in theirs:
            own[name] = theirs[source]
    try:
        student.load_state_dict(own)
    except RuntimeError as error:
        raise WhisperWeightsError(f"no student begins as this teacher: {error}") from error
    return student
