"""``loquent lm``: a word n-gram model from text, or from an ARPA file of KenLM or SRILM.

Interpolated Kneser-Ney smoothing with one discount per count of 1, 2 and more (Chen and Goodman,
1999, "modified Kneser-Ney"), written in backoff form. N-grams below a count are left out; their
mass goes to the backoff, so every distribution still sums to one.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from loquent.engine.ngram import START, UNKNOWN, Ngram, Table
from loquent.models.arpa import read_arpa, write_arpa
from loquent.models.data import DataError, refuse_overwriting
from loquent.models.text import normalise

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_MOST_WORDS = 65_000  # ids are 16 bits wide


def read_sentences(path: Path, exclude_licences: Sequence[str] = ()) -> Iterator[str]:
    """Normalised sentences of a text file (one a line, ``.xz`` or not) or a JSONL manifest.

    Rows of a manifest whose licence contains one of ``exclude_licences`` are left out.

    Raises:
        DataError: it cannot be read.
    """
    manifest = path.suffix == ".jsonl"
    try:
        with (
            lzma.open(path, "rt", encoding="utf-8")
            if path.suffix == ".xz"
            else path.open(encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if manifest else {"text": line}
                    licence = str(row.get("licence", ""))
                    if any(part in licence for part in exclude_licences):
                        continue
                    text = str(row["text"] or "")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise DataError(
                        f"{path}:{number}: {error}; expected a JSON object with text"
                    ) from error
                if text := normalise(text):
                    yield text
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def read_texts(paths: Sequence[Path], exclude_licences: Sequence[str]) -> list[str]:
    """Sentences of all of them, with a bar. Raises DataError."""
    return [
        sentence
        for path in paths
        for sentence in tqdm(read_sentences(path, exclude_licences), unit="line", disable=None)
    ]


def add_text_options(parser: argparse.ArgumentParser, *, nargs: str) -> None:
    """Text to learn from."""
    parser.add_argument(
        "text",
        nargs=nargs,
        type=Path,
        help="text, a sentence a line (.xz too), or a JSONL manifest",
    )
    parser.add_argument(
        "--exclude-licence",
        action="append",
        default=[],
        metavar="TEXT",
        help="leave out rows of manifests whose licence contains TEXT (for example NC)",
    )


@dataclass(frozen=True)
class _Counts:
    """Distinct n-grams, sorted: keys (context index or key << 16 | word) and their counts."""

    key: Ints
    count: Ints

    @property
    def context(self) -> Ints:
        return self.key >> 16

    @property
    def word(self) -> Ints:
        return self.key & 0xFFFF


def _distinct(keys: Ints) -> _Counts:
    key, count = np.unique(keys, return_counts=True)
    return _Counts(key, count.astype(np.int64))


def _discounts(count: Ints) -> Floats:
    """What is taken off a count of 0, 1, 2, 3 and more (equation 17 of Chen and Goodman)."""
    n1, n2, n3, n4 = (max(1, int((count == k).sum())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    found = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # Of a text too small to estimate them they come out of range.
    return np.array([min(max(d, 0.1 * k), 0.9 * k) for k, d in enumerate(found)])


def train(sentences: Iterable[str], *, words: int, order: int, least: Sequence[int]) -> Ngram:
    """Count and smooth.

    Args:
        sentences: normalised.
        words: the most frequent so many become the vocabulary.
        order: 2 or 3.
        least: count from which on a bigram, and a trigram, is kept.

    Raises:
        DataError: no text, or a number out of range.
    """
    if not 1 <= words <= _MOST_WORDS:
        raise DataError(f"got {words} words, expected 1 to {_MOST_WORDS}")
    lines = [sentence.split() for sentence in sentences]
    frequent = Counter(word for line in lines for word in line).most_common(words)
    if not frequent:
        raise DataError("got no text to learn a language model from")
    vocabulary = [UNKNOWN, START, *sorted(word for word, _ in frequent)]
    ids = {word: i for i, word in enumerate(vocabulary)}
    flat = np.fromiter(
        (i for line in lines for i in (1, *(ids.get(word, 0) for word in line))), np.int64
    )
    size = len(vocabulary)
    begins = flat == 1
    # An n-gram may begin with <s> but not go across it.
    two = ~begins[1:]
    pairs = _distinct((flat[:-1][two] << 16) | flat[1:][two])
    if order == 3:
        three = two[1:] & two[:-1]
        index = np.searchsorted(pairs.key, (flat[:-2][three] << 16) | flat[1:-1][three])
        triples = _distinct((index << 16) | flat[2:][three])
        # Kneser-Ney: below the highest order an n-gram counts once for every word before it.
        inner = np.searchsorted(pairs.key, (pairs.word[triples.context] << 16) | triples.word)
        spread = np.bincount(inner, minlength=len(pairs.key))
        starts = pairs.context == 1  # nothing comes before <s>
        pair_counts = np.where(starts, pairs.count, spread)
    else:
        pair_counts = pairs.count
    unigrams = np.bincount(pairs.word, minlength=size).astype(np.int64)

    discount = _discounts(unigrams[unigrams > 0])[np.minimum(unigrams, 3)]
    p1 = (unigrams - discount) / unigrams.sum()
    p1 += discount.sum() / unigrams.sum() / (size - 1)
    p1[1] = 0.0
    keep2, p2, bow1 = _smooth(_Counts(pairs.key, pair_counts), size, least[0], p1[pairs.word])
    tables: list[Table] = []
    if order == 3:
        # Probability of the last two words of every trigram, as the model will give it.
        lower = _lower(p2, keep2, bow1, p1, pairs, inner)
        used = np.zeros(len(pairs.key), bool)
        keep3, p3, bow2 = _smooth(triples, len(pairs.key), least[1], lower)
        used[triples.context[keep3]] = True
        # A context has to be there for what follows it.
        bow2_all = bow2
        extra = used & ~keep2
        p2 = np.where(extra, bow1[pairs.context] * p1[pairs.word], p2)
        keep2 = keep2 | used
        place = np.cumsum(keep2) - 1
        counts3 = np.bincount(place[triples.context[keep3]], minlength=int(keep2.sum()))
        tables.append(_table(pairs, keep2, p2, size, bow2_all))
        tables.append(
            Table(
                first=np.concatenate([np.zeros(1, np.uint32), counts3.cumsum(dtype=np.uint32)]),
                word=triples.word[keep3].astype(np.uint16),
                logp=_log(p3[keep3]),
                backoff=np.zeros(0, np.float16),
            )
        )
    else:
        tables.append(_table(pairs, keep2, p2, size, None))
    return Ngram(vocabulary, _log(p1), _log(bow1), tuple(tables))


def _smooth(
    counts: _Counts, contexts: int, least: int, lower: Floats
) -> tuple[NDArray[np.bool_], Floats, Floats]:
    """Which n-grams stay, the probability of every one of them, and the contexts' backoff."""
    c = counts.count
    discount = _discounts(c[c > 0])[np.minimum(c, 3)]
    total = np.bincount(counts.context, weights=c, minlength=contexts)
    keep = c >= least
    free = np.bincount(
        counts.context, weights=np.where(keep, discount, c), minlength=contexts
    ) / np.maximum(total, 1)
    free = np.where(total > 0, free, 1.0)
    mine = np.where(keep, (c - discount) / np.maximum(total[counts.context], 1), 0.0)
    p = mine + free[counts.context] * lower
    return keep, p, free


def _lower(
    p2: Floats, keep2: NDArray[np.bool_], bow1: Floats, p1: Floats, pairs: _Counts, inner: Ints
) -> Floats:
    backed_off = bow1[pairs.context] * p1[pairs.word]
    found: Floats = np.where(keep2, p2, backed_off)[inner]
    return found


def _table(
    pairs: _Counts, keep: NDArray[np.bool_], p: Floats, contexts: int, backoff: Floats | None
) -> Table:
    count = np.bincount(pairs.context[keep], minlength=contexts)
    return Table(
        first=np.concatenate([np.zeros(1, np.uint32), count.cumsum(dtype=np.uint32)]),
        word=pairs.word[keep].astype(np.uint16),
        logp=_log(p[keep]),
        backoff=_log(backoff[keep]) if backoff is not None else np.zeros(0, np.float16),
    )


def _log(p: Floats) -> NDArray[np.float16]:
    # -20 stands for what cannot happen (<s> in the middle); float16 ends at -65504.
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(p), -20.0).astype(np.float16)


def perplexity(model: Ngram, sentences: Iterable[str]) -> tuple[float, float]:
    """Perplexity over known words, and the share of words that are unknown."""
    total, known, unknown = 0.0, 0, 0
    for sentence in sentences:
        state = model.start
        for word in sentence.split():
            index = model.ids.get(word, model.unknown)
            logp, state = model.score(state, index)
            if index == model.unknown:
                unknown += 1
            else:
                total += logp
                known += 1
    return float(np.exp(-total / max(1, known))), unknown / max(1, known + unknown)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent lm", description=__doc__)
    add_text_options(parser, nargs="*")
    parser.add_argument(
        "--arpa", type=Path, metavar="FILE", help="instead of text: an ARPA file, .gz or not"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="file to write: .npz for `loquent export --lm`, or .arpa or .arpa.gz for other tools",
    )
    parser.add_argument("--words", type=int, default=30_000, help="vocabulary (%(default)s)")
    parser.add_argument("--order", type=int, choices=(2, 3), default=3)
    parser.add_argument(
        "--least",
        type=int,
        nargs=2,
        default=(2, 3),
        metavar=("BIGRAM", "TRIGRAM"),
        help="counts from which on bigrams and trigrams are kept (2 3)",
    )
    parser.add_argument("--dev", type=Path, help="text or manifest to measure perplexity on")
    args = parser.parse_args(argv)
    if bool(args.text) == bool(args.arpa):
        parser.error("expected either text or --arpa FILE")
    try:
        refuse_overwriting(args.output, [*args.text, args.arpa, args.dev])
        if args.arpa:
            model = read_arpa(args.arpa)
            source = args.arpa.name
        else:
            sentences = read_texts(args.text, args.exclude_licence)
            model = train(sentences, words=args.words, order=args.order, least=args.least)
            source = f"{sum(map(len, map(str.split, sentences)))} words of text"
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if ".arpa" in args.output.suffixes:
            write_arpa(model, args.output)
        else:
            args.output.write_bytes(model.to_bytes())
        size = args.output.stat().st_size / 1e6
        print(f"{args.output}: {source}, {len(model.words)} words known, {size:.1f} MB")
        if args.dev:
            value, unknown = perplexity(model, read_sentences(args.dev))
            print(f"{args.dev.name}: perplexity {value:.0f}, {100 * unknown:.1f} % unknown words")
    except (DataError, OSError) as error:
        parser.exit(1, f"loquent lm: {error}\n")
    return 0
