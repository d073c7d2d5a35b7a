"""A recurrent language model over the words of an n-gram, and how it learns.

One LSTM between a table of words that is its input and its output (Press and Wolf, arXiv
1608.05859). Learning looks at a sample of the wrong words (sampled softmax, Jean et al., arXiv
1412.2007) and only at the end at all of them; in both the sum over the words is held near one, so
that a decoder may take a word's score for its log-probability without adding them all up (Devlin
et al., ACL 2014).

Shapes: B sentences, T words, V words of the table, P their width, H the LSTM's.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from loquent.engine.ngram import START, UNKNOWN, Ngram
from loquent.models.checkpoint import CheckpointError, Tensors, read_json, read_tensors, save_folder
from loquent.models.data import DataError
from loquent.models.loop import Loop, LoopConfig

_PADDING = -1
_LONGEST = 256  # words; what is longer goes on as a sentence of its own
_POOL = 8000  # sentences that are sorted by length among each other


@dataclass(frozen=True, kw_only=True)
class WordLmConfig:
    """The shape. ``words`` are those that have a row of their own; the first two are marks.

    Raises:
        DataError: a size that is none.
    """

    words: tuple[str, ...]
    width: int = 192
    hidden: int = 512

    def __post_init__(self) -> None:
        for name in ("width", "hidden"):
            if getattr(self, name) < 1:
                raise DataError(f"got {name} {getattr(self, name)}, expected 1 or more")


class WordLm(nn.Module):
    """The network.

    Attributes:
        table: (V, P).
        bias: (V,) of the scores.
    """

    def __init__(self, config: WordLmConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(len(config.words), config.width)
        nn.init.normal_(self.table.weight, std=config.width**-0.5)
        self.bias = nn.Parameter(torch.zeros(len(config.words)))
        self.lstm = nn.LSTM(config.width, config.hidden, batch_first=True)
        self.out = nn.Linear(config.hidden, config.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words_BT: Tensor) -> Tensor:
        """What to multiply the table with for scores of the next word: (B, T, P)."""
        hidden, _ = self.lstm(self.dropout(self.table(words_BT)))
        out: Tensor = self.out(self.dropout(hidden.float()))
        return out

    def all_scores(self, out_NP: Tensor) -> Tensor:
        """Scores of all words: (N, V)."""
        return F.linear(out_NP, self.table.weight).float() + self.bias


def choose_words(ngram: Ngram, counts: Mapping[str, int], most: int) -> tuple[str, ...]:
    """The marks, and of the n-gram's words those that are most frequent in the text.

    Raises:
        DataError: none are asked for.
    """
    if most < 1:
        raise DataError(f"got {most} words, expected 1 or more")
    known = [(-count, word) for word, count in counts.items() if word in ngram.ids]
    return (UNKNOWN, START, *sorted(word for _, word in sorted(known)[:most]))


class _Objective(nn.Module):
    """Loss of the words of a batch; see the module's head.

    Args:
        model: learns.
        counts: (V,) of the words in the text.
        sample: wrong words that are looked at, of all together.
        full_from: step from which all words are looked at.
        norm: weight of the squared logarithm of the sum over the words.
    """

    frequent: Tensor

    def __init__(
        self, model: WordLm, counts: Tensor, *, sample: int, full_from: int, norm: float
    ) -> None:
        super().__init__()
        self.model, self.sample, self.full_from, self.norm = model, sample, full_from, norm
        share = counts.double() ** 0.75
        self.register_buffer("frequent", (share / share.sum()).float(), persistent=False)
        with torch.no_grad():
            model.bias.copy_((counts.clamp(min=0.5) / counts.sum()).log())

    def forward(self, words_BT: Tensor, step: int) -> dict[str, Tensor]:
        loss, total = self.losses(words_BT, everything=step >= self.full_from)
        return {
            "loss": (loss + self.norm * total**2).sum(),
            "count": torch.tensor(float(len(loss)), device=loss.device),
            "nats": loss.detach().sum(),
        }

    def losses(self, words_BT: Tensor, *, everything: bool) -> tuple[Tensor, Tensor]:
        """Of every word its loss, and the logarithm of the sum over all words: both (N,)."""
        words_BT = words_BT.to(self.frequent.device)
        inputs, targets = words_BT[:, :-1].clamp(min=0), words_BT[:, 1:]
        real = targets != _PADDING
        out, targets = self.model(inputs)[real], targets[real]
        if everything:
            scores = self.model.all_scores(out)
            total = scores.logsumexp(1)
            return total - scores.gather(1, targets[:, None])[:, 0], total
        table, bias = self.model.table.weight, self.model.bias
        others = torch.multinomial(self.frequent, self.sample, replacement=True)
        own = (out * table[targets]).sum(1) + bias[targets]
        weight = bias[others] - (self.frequent[others] * self.sample).log()
        scores = F.linear(out, table[others]).float() + weight
        scores = scores.masked_fill(targets[:, None] == others, -1e4)
        total = torch.logaddexp(scores.logsumexp(1), own)
        return total - own, total


class WordLmTrainer(Loop[Tensor]):
    """One run in one folder, watched by the perplexity of other text.

    Args:
        run: folder.
        shape: of the network, and the words that get a row.
        train, dev: normalised sentences.
        config: of the loop.
        origin: what the text is, for people.
        batch_words: words in a batch, with padding.
        sample, norm: see ``_Objective``.
        dropout: in front of the LSTM and behind it.
        full: last part of the steps, in which all words are looked at.

    Raises:
        DataError: there is no text, or no batch would have a word.
        CheckpointError: the folder has a run of another shape.
    """

    metric = "perplexity"

    def __init__(
        self,
        run: Path,
        shape: WordLmConfig,
        train: Sequence[str],
        dev: Sequence[str],
        config: LoopConfig,
        origin: dict[str, Any],
        *,
        batch_words: int = 2560,
        sample: int = 2048,
        dropout: float = 0.15,
        full: float = 0.08,
        norm: float = 0.1,
    ) -> None:
        if not any(len(sentence.split()) for sentence in train):
            raise DataError("got no text to learn a language model from")
        ids = {word: i for i, word in enumerate(shape.words)}
        if batch_words < 1:
            raise DataError(f"got batches of {batch_words} words, expected 1 or more")
        self.train = [part for sentence in train for part in _ids(sentence, ids)]
        self.dev = [part for sentence in dev for part in _ids(sentence, ids)]
        self.shape, self.origin, self.batch_words = shape, origin, batch_words
        torch.manual_seed(config.seed)
        self.model = WordLm(shape, dropout=dropout)
        counts = np.bincount(np.concatenate(self.train), minlength=len(shape.words))
        counts[1] = 0  # nothing but the first word is the mark of the start
        self.objective = _Objective(
            self.model,
            torch.from_numpy(counts),
            sample=sample,
            full_from=round((1 - full) * config.steps),
            norm=norm,
        )
        super().__init__(run, self.objective, config)

    def _name(self, name: str) -> str:
        return name.removeprefix("model.")

    def _epoch(self, epoch: int) -> Iterable[list[int]]:
        rng = np.random.default_rng((self.config.seed, epoch))
        return _batches(self.train, self.batch_words, rng)

    def _make(self, index: int, indices: list[int]) -> Tensor:
        return _padded([self.train[i] for i in indices])

    def _seconds(self, batch: Tensor) -> float:
        return 0.0  # text has none

    def _describe(self, batch: Tensor) -> str:
        return " ".join(self.shape.words[i] for i in batch[0].tolist() if i != _PADDING)

    def _score(self) -> tuple[float, dict[str, float]]:
        self.module.eval()
        total, sums, count = 0.0, 0.0, 0
        for indices in _batches(self.dev, self.batch_words, None):
            words = _padded([self.dev[i] for i in indices])
            with torch.no_grad():
                loss, sum_of_all = self.objective.losses(words, everything=True)
            known = (words[:, 1:][words[:, 1:] != _PADDING] != 0).to(loss.device)
            total += float(loss[known].sum())
            sums += float(sum_of_all[known].sum())
            count += int(known.sum())
        return math.exp(total / max(1, count)), {"log_sum": sums / max(1, count)}

    def _config(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.shape), "words": list(self.shape.words)}

    def _check(self, folder: Path) -> None:
        if read_json(folder / "config.json") != self._config():
            raise CheckpointError(
                f"{folder}: the run that it belongs to has other words (was the text changed?) or "
                "another shape; remove it, or choose another folder for the run"
            )

    def _write(self, name: str, raw: Tensors | None, optimizer: Tensors | None) -> None:
        state = {
            "progress": dataclasses.asdict(self.progress),
            "training": dataclasses.asdict(self.config),
            "origin": self.origin,
        }
        tensors = {"model": self.average, "raw": raw, "optimizer": optimizer}
        save_folder(self.run / name, self._config(), None, state, tensors)


def load_word_lm(folder: Path) -> tuple[WordLm, dict[str, Any]]:
    """A trained model in eval mode, and its counters and settings. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    try:
        model = WordLm(WordLmConfig(**{**config, "words": tuple(config["words"])}))
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
    except (KeyError, TypeError, RuntimeError, DataError) as error:
        message = f"{folder}: no word model of `loquent lm neural` ({error})"
        raise CheckpointError(message) from error
    return model.eval(), read_json(folder / "state.json")


def count_words(sentences: Iterable[str]) -> Counter[str]:
    """How often each word occurs."""
    return Counter(word for sentence in sentences for word in sentence.split())


def _ids(sentence: str, ids: Mapping[str, int]) -> Iterator[NDArray[np.int64]]:
    """With the mark of the start before each part."""
    words = [ids.get(word, 0) for word in sentence.split()]
    for first in range(0, len(words), _LONGEST):
        yield np.array([1, *words[first : first + _LONGEST]], np.int64)


def _batches(
    sentences: Sequence[NDArray[np.int64]], most: int, rng: np.random.Generator | None
) -> list[list[int]]:
    """Sentences of like length together, at most so many words with padding."""
    order = np.arange(len(sentences)) if rng is None else rng.permutation(len(sentences))
    batches: list[list[int]] = []
    for first in range(0, len(order), _POOL):
        batch: list[int] = []
        for i in sorted(order[first : first + _POOL].tolist(), key=lambda i: len(sentences[i])):
            if batch and len(sentences[i]) * (len(batch) + 1) > most:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    if rng is not None:
        rng.shuffle(batches)
    return batches


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    words = torch.full((len(rows), max(map(len, rows))), _PADDING)
    for i, row in enumerate(rows):
        words[i, : len(row)] = torch.from_numpy(row)
    return words
