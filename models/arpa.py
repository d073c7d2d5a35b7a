"""ARPA files, the text format of SRILM and KenLM, to and from the engine's n-gram table.

The format: https://www.speech.sri.com/projects/srilm/manpages/ngram-format.5.html. Its logarithms
are decimal, the engine's natural.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

import numpy as np

from loquent.engine.ngram import START, UNKNOWN, Ngram, Table
from loquent.models.data import DataError
from loquent.models.text import normalise

_LN10 = math.log(10)
_NEVER = -20.0  # natural logarithm of what cannot happen
_MOST_WORDS = 65_000  # ids are 16 bits wide
_ORDER = 3
_END = "</s>"
_Grams = list[tuple[tuple[str, ...], float, float]]


def _open(path: Path, mode: Literal["rt", "wt"]) -> IO[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, encoding="utf-8")


def read_arpa(path: Path) -> Ngram:
    """Read a model of words, ``.gz`` or not.

    Words are normalised as the recogniser's are. Of a longer model the first three orders count,
    of a larger vocabulary the 65,000 most probable words; n-grams with other words, and with the
    end of the sentence, are left out.

    Raises:
        DataError: no ARPA file, or one without words.
    """
    try:
        with _open(path, "rt") as lines:
            orders = _read(path, lines)
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as an ARPA file ({error})") from error
    grams = orders.get(1, [])
    found: dict[str, tuple[float, float]] = {}
    for (word,), logp, backoff in grams:
        if word not in found or logp > found[word][0]:
            found[word] = (logp, backoff)
    unknown = found.pop(UNKNOWN, (_NEVER, 0.0))
    start = found.pop(START, (_NEVER, 0.0))
    if not found:
        raise DataError(f"{path}: got no words, expected 1-grams")
    frequent = sorted(found, key=lambda word: found[word][0], reverse=True)[:_MOST_WORDS]
    words = [UNKNOWN, START, *sorted(frequent)]
    ids = {word: i for i, word in enumerate(words)}
    rows = [unknown, (_NEVER, start[1]), *(found[word] for word in words[2:])]
    logp, backoff = np.maximum(np.array(rows, np.float64).T, _NEVER)
    tables: list[Table] = []
    contexts: dict[tuple[int, ...], int] = {(i,): i for i in range(len(words))}
    last = max(n for n in orders if n <= _ORDER)
    for order in range(2, last + 1):
        table, contexts = _table(orders.get(order, []), ids, contexts, highest=order == last)
        tables.append(table)
    return Ngram(words, logp.astype(np.float16), backoff.astype(np.float16), tuple(tables))


def _read(path: Path, lines: IO[str]) -> dict[int, _Grams]:
    """N-grams by order, their words normalised."""
    orders: dict[int, _Grams] = {}
    order = 0
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith("\\"):
            name = line.strip("\\:")
            if name == "end":
                return orders
            if name.endswith("-grams") and name.removesuffix("-grams").isdigit():
                order = int(name.removesuffix("-grams"))
                orders[order] = []
            continue
        if not line or not order or order > _ORDER:
            continue
        try:
            fields = line.split()
            if len(fields) not in (order + 1, order + 2):
                raise ValueError(f"got {len(fields)} fields")
            logp = float(fields[0]) * _LN10
            backoff = float(fields[order + 1]) * _LN10 if len(fields) == order + 2 else 0.0
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: {error}; expected a decimal logarithm, {order} words and "
                "perhaps a backoff"
            ) from error
        words = tuple(_word(word) for word in fields[1 : order + 1])
        if all(words) and _END not in words:
            orders[order].append((words, logp, backoff))
    raise DataError(f"{path}: got no \\end\\, expected a whole ARPA file")


def _word(word: str) -> str:
    if word in (START, _END):
        return word
    return UNKNOWN if word.lower() == UNKNOWN else normalise(word).replace(" ", "")


def _table(
    grams: _Grams,
    ids: dict[str, int],
    contexts: dict[tuple[int, ...], int],
    *,
    highest: bool,
) -> tuple[Table, dict[tuple[int, ...], int]]:
    best: dict[tuple[int, ...], tuple[float, float]] = {}
    for words, logp, backoff in grams:
        if all(word in ids for word in words):
            key = tuple(ids[word] for word in words)
            if key[:-1] in contexts and (key not in best or logp > best[key][0]):
                best[key] = (logp, backoff)
    keys = sorted(best, key=lambda key: (contexts[key[:-1]], key[-1]))
    count = np.bincount([contexts[key[:-1]] for key in keys], minlength=len(contexts))
    values = np.array([best[key] for key in keys], np.float64).reshape(-1, 2)
    logp, backoff = np.maximum(values, _NEVER).T.astype(np.float16)
    table = Table(
        first=np.concatenate([np.zeros(1, np.uint32), count.cumsum(dtype=np.uint32)]),
        word=np.array([key[-1] for key in keys], np.uint16),
        logp=logp,
        backoff=np.zeros(0, np.float16) if highest else backoff,
    )
    return table, {key: i for i, key in enumerate(keys)}


def write_arpa(model: Ngram, path: Path) -> None:
    """Write a model; ``.gz`` compresses it."""
    orders = [list(_lines(model, order)) for order in range(1, model.order + 1)]
    with _open(path, "wt") as out:
        out.write("\\data\\\n")
        out.writelines(f"ngram {n}={len(lines)}\n" for n, lines in enumerate(orders, 1))
        for n, lines in enumerate(orders, 1):
            out.write(f"\n\\{n}-grams:\n")
            out.writelines(lines)
        out.write("\n\\end\\\n")


def _lines(model: Ngram, order: int) -> Iterator[str]:
    for words, logp, backoff in model.grams(order):
        # -99 is how the format writes the logarithm of zero.
        decimal = -99.0 if logp <= _NEVER else logp / _LN10
        tail = f"\t{backoff / _LN10:.6g}" if backoff is not None else ""
        yield f"{decimal:.6g}\t{' '.join(words)}{tail}\n"
