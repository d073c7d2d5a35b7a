"""Subwords: a SentencePiece model whose id 0 is the blank."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

BLANK = 0
BLANK_PIECE = "<blank>"


class Tokenizer:
    """Text to token ids and back.

    Args:
        model: a serialised SentencePiece model (the bytes of a ``.model`` file).

    Raises:
        ValueError: it is none, or its id 0 is not the blank.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        if not model:
            raise ValueError("SentencePiece model: got 0 bytes")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            first = self._processor.id_to_piece(BLANK)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"SentencePiece model: cannot be read ({error})") from error
        if first != BLANK_PIECE:
            raise ValueError(
                f"SentencePiece model: id 0 is {first!r}, expected {BLANK_PIECE!r}; train it with "
                "`loquent train` or --pad_id=0"
            )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a SentencePiece model file."""
        return cls(path.read_bytes())

    @classmethod
    def train(cls, sentences: Iterable[str], vocab: int) -> Tokenizer:
        """Learn ``vocab`` unigram pieces (blank and unknown included) from normalised sentences.

        Raises:
            ValueError: SentencePiece refuses, mostly because the text has too few distinct pieces.
        """
        buffer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=buffer,
                vocab_size=vocab,
                model_type="unigram",
                character_coverage=1.0,
                pad_id=BLANK,
                pad_piece=BLANK_PIECE,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                normalization_rule_name="identity",
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"cannot learn {vocab} subwords from this text: {error}") from error
        return cls(buffer.getvalue())

    @property
    def size(self) -> int:
        """Number of pieces."""
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of normalised text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids (no blanks)."""
        text: str = self._processor.decode(ids)
        return text

    def pieces(self) -> list[str]:
        """Every piece in id order, for the bundle's ``tokens.txt``."""
        return [self._processor.id_to_piece(i) for i in range(self.size)]
