"""``loquent finish``: learn casing and punctuation from text, and measure what it is worth.

Lines of ordinary text become training segments: one to three lines in a row, numbers spelled out as
they are spoken, words normalised as transcripts are. A tenth of the segments is cut off anywhere,
so that the model learns to leave a sentence open. Every fiftieth line is held out and only scored.
"""

from __future__ import annotations

import argparse
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from loquent.engine.finish import (
    CAPITAL,
    LOWER,
    MARKS,
    UPPER,
    Finisher,
    bucket,
    case_features,
    mark_features,
)
from loquent.engine.numbers import format_numbers
from loquent.engine.text import normalise
from loquent.models.data import DataError, refuse_overwriting
from loquent.models.spoken import spoken

_HELD_OUT = 50
_MARK = {",": 1, ";": 1, ":": 1, "—": 1, ".": 2, "!": 2, "…": 2, "?": 3}
_TOKEN = re.compile(r"^(?P<word>.*?)(?P<tail>[^\w]*)$", re.DOTALL)
_IGNORE = -100
_ABBREVIATION = re.compile(r"(?i:mr|mrs|ms|dr|st|jr|sr|prof|capt|col|gen|vs|etc|[ap]\.?m)|[A-Z]")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line's words, lower case; the mark behind each; its casing, or ignored."""

    words: list[str]
    marks: list[int]
    cases: list[int]
    written: list[str]


def read_lines(paths: Iterable[Path]) -> Iterator[str]:
    """Lines of text files, plain or xz. Raises DataError."""
    for path in paths:
        try:
            data = path.read_bytes()
            text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
        except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
            raise DataError(f"{path}: cannot be read as text ({error})") from error
        yield from (line.strip() for line in text.splitlines() if line.strip())


def parse(text: str) -> Line | None:
    """A line as the model sees it; None where a token is not understood."""
    words: list[str] = []
    marks: list[int] = []
    cases: list[int] = []
    written: list[str] = []
    begins = True
    tokens = text.replace("--", " — ").replace("—", " — ").split()
    for number, token in enumerate(tokens):
        if token == "—":
            if marks:
                marks[-1] = max(marks[-1], 1)
            continue
        match = _TOKEN.match(token)
        assert match is not None, "matches anything"
        if (spelled := spoken(match["word"])) is None:
            return None
        parts = normalise(spelled).split()
        if not parts:
            continue
        core = match["word"].strip("\"'“”‘’([{*_")
        mark = max((_MARK.get(c, 0) for c in match["tail"]), default=0)
        if mark == 2 and number < len(tokens) - 1 and _ABBREVIATION.fullmatch(core):
            mark = 0
        for k, part in enumerate(parts):
            last = k == len(parts) - 1
            words.append(part)
            marks.append(mark if last else 0)
            written.append(core if len(parts) == 1 else part)
            known = len(parts) == 1 and core.lower() == part and not begins
            cases.append(_case(core) if known else _IGNORE)
            begins = False
        begins = mark >= 2
    return Line(words=words, marks=marks, cases=cases, written=written) if words else None


def _case(core: str) -> int:
    if core == core.lower():
        return LOWER
    if core == core.upper() and len(core) > 1:
        return UPPER
    return CAPITAL


def split(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Lines to learn from and lines held out, by their hash: the same every time."""
    train: list[str] = []
    held: list[str] = []
    for line in read_lines(paths):
        (held if crc32(line.encode()) % _HELD_OUT == 0 else train).append(line)
    return train, held


def segments(lines: Iterable[str], rng: np.random.Generator, *, cut: float) -> Iterator[Line]:
    """One to three lines in a row as one segment, some of them cut off anywhere."""
    waiting: list[Line] = []
    count = int(rng.integers(1, 4))
    for text in lines:
        line = parse(text)
        if line is None or line.marks[-1] < 2:
            continue
        waiting.append(line)
        if len(waiting) < count:
            continue
        one = Line(
            words=[w for line in waiting for w in line.words],
            marks=[m for line in waiting for m in line.marks],
            cases=[c for line in waiting for c in line.cases],
            written=[w for line in waiting for w in line.written],
        )
        waiting, count = [], int(rng.integers(1, 4))
        if rng.random() < cut:
            keep = int(rng.integers(1, len(one.words) + 1))
            one = Line(
                words=one.words[:keep],
                marks=one.marks[:keep],
                cases=one.cases[:keep],
                written=one.written[:keep],
            )
        yield one


@dataclass(frozen=True)
class _Examples:
    marks: NDArray[np.int32]  # (N, features) rows of the table
    mark_targets: NDArray[np.int8]
    cases: NDArray[np.int32]
    case_targets: NDArray[np.int8]
    forms: dict[str, str]


def _examples(lines: Sequence[str], size: int, words: int) -> _Examples:
    marks: list[list[int]] = []
    mark_targets: list[int] = []
    cases: list[list[int]] = []
    case_targets: list[int] = []
    spellings: dict[str, Counter[str]] = {}
    rng = np.random.default_rng(0)
    order = rng.permutation(len(lines))
    with tqdm(total=words, unit="word", desc="features") as bar:
        for line in segments((lines[i] for i in order), rng, cut=0.1):
            start = 0
            for at, (word, mark, case) in enumerate(
                zip(line.words, line.marks, line.cases, strict=True)
            ):
                rows = mark_features(line.words, at, start)
                marks.append([bucket(f, size) for f in rows])
                mark_targets.append(mark)
                if mark >= 2:
                    start = at + 1
                if case != _IGNORE:
                    cases.append([bucket(f, size) for f in case_features(line.words, at)])
                    case_targets.append(case)
                    spellings.setdefault(word, Counter())[line.written[at]] += 1
            bar.update(len(line.words))
            if len(marks) >= words:
                break
    forms = {}
    for word, counts in spellings.items():
        form, count = counts.most_common(1)[0]
        plain = (word, word.upper(), word[:1].upper() + word[1:])
        if count >= 5 and form not in plain and form.lower() == word:
            forms[word] = form
    return _Examples(
        np.array(marks, np.int32),
        np.array(mark_targets, np.int8),
        np.array(cases, np.int32),
        np.array(case_targets, np.int8),
        forms,
    )


def _fit(
    rows: NDArray[np.int32], targets: NDArray[np.int8], size: int, classes: int, epochs: int
) -> NDArray[np.int8]:
    """Multinomial logistic regression, then weights in eight bits."""
    torch.manual_seed(0)
    table = nn.EmbeddingBag(size, classes, mode="sum", sparse=True)
    nn.init.zeros_(table.weight)
    optimiser = torch.optim.Adagrad(table.parameters(), lr=0.1)
    inputs, labels = torch.from_numpy(rows), torch.from_numpy(targets).long()
    batch = min(4096, max(32, len(inputs) // 200))
    for epoch in range(epochs):
        order = torch.randperm(len(inputs))
        total = 0.0
        for at in tqdm(range(0, len(order), batch), desc=f"epoch {epoch + 1}", leave=False):
            pick = order[at : at + batch]
            loss = nn.functional.cross_entropy(table(inputs[pick].long()), labels[pick])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            # Torch warns where this is left open.
            with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
                optimiser.step()
            total += float(loss.detach()) * len(pick)
        print(f"epoch {epoch + 1}: loss {total / len(order):.4f}")
    weights = table.weight.detach().numpy()
    scale = 127 / max(1e-6, float(np.abs(weights).max()))
    return np.round(np.clip(weights * min(scale, 16.0), -127, 127)).astype(np.int8)


def learn(lines: Sequence[str], *, size: int, words: int, epochs: int) -> Finisher:
    """Train on lines of text; ``words`` of them at the most."""
    ex = _examples(lines, size, words)
    marks = _fit(ex.marks, ex.mark_targets, size, len(MARKS), epochs)
    cases = _fit(ex.cases, ex.case_targets, size, 3, epochs)
    return Finisher(marks, cases, ex.forms)


@dataclass(frozen=True, kw_only=True)
class FinishScore:
    """Held-out scores as fractions.

    Attributes:
        casing: of words within sentences, those written exactly as in the text.
        capitals_f1: of words that are not lower case there.
        marks: precision, recall and F1 by mark.
        numbers, numbers_total: lines with digits, spelled out, that come out as they were written;
            numbers below ten may be words.
    """

    casing: float
    lowercase: float
    capitals_f1: float
    marks: dict[str, tuple[float, float, float]]
    any_mark: tuple[float, float, float]
    numbers: int
    numbers_total: int


def score(model: Finisher, lines: Sequence[str]) -> FinishScore:
    """Score a model on lines that it has not seen."""
    confusion = np.zeros((len(MARKS), len(MARKS)), np.int64)
    right = lower = total = hit = said = wanted = 0
    for line in segments(lines, np.random.default_rng(1), cut=0.0):
        for want, got in zip(line.marks, model.marks(line.words), strict=True):
            confusion[want, MARKS.index(got)] += 1
        for at, case in enumerate(line.cases):
            if case == _IGNORE:
                continue
            written, form = line.written[at], model.case(line.words, at)
            total += 1
            right += form == written
            lower += written == line.words[at]
            wanted += written != line.words[at]
            said += form != line.words[at]
            hit += form == written != line.words[at]
    numbers = [found for text in lines if (found := _number_line(text)) is not None]
    same = sum(
        _same(" ".join(s.text for s in format_numbers(words, breaks)), want)
        for words, breaks, want in numbers
    )
    by_mark = {
        MARKS[k]: _f1(confusion[k, k], confusion[:, k].sum(), confusion[k].sum())
        for k in range(1, len(MARKS))
    }
    hits = np.trace(confusion) - confusion[0, 0]
    return FinishScore(
        casing=right / max(1, total),
        lowercase=lower / max(1, total),
        capitals_f1=_f1(hit, said, wanted)[2],
        marks=by_mark,
        any_mark=_f1(hits, confusion[:, 1:].sum(), confusion[1:].sum()),
        numbers=same,
        numbers_total=len(numbers),
    )


def _same(got: str, want: str) -> bool:
    # Numbers below ten may be words: that is how numbers.py has it, and no mistake.
    got, want = (
        " ".join((spoken(t) or t) if len(t) == 1 else t for t in text.split()).replace(
            " percent", "%"
        )
        for text in (got, want)
    )
    return got == want


def _number_line(text: str) -> tuple[list[str], list[bool], str] | None:
    """A line with digits as spoken words, where punctuation is, and as it was written."""
    if not re.search(r"\d", text):
        return None
    line = parse(text)
    if line is None:
        return None
    want = []
    for token in text.replace("--", " ").replace("—", " ").split():
        match = _TOKEN.match(token)
        assert match is not None, "matches anything"
        tail = "%" if match["tail"].startswith("%") else ""
        word = match["word"] + tail
        want.append(word if re.search(r"\d", word) else normalise(word))
    clean = " ".join(w for w in want if w).lower()
    return line.words, [mark > 0 for mark in line.marks], clean


def _f1(hit: float, said: float, wanted: float) -> tuple[float, float, float]:
    precision, recall = hit / max(1, said), hit / max(1, wanted)
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def report(result: FinishScore) -> str:
    """As Markdown."""
    lines = ["| mark | precision | recall | F1 |", "|---|---|---|---|"]
    for name, (p, r, f) in [*result.marks.items(), ("any", result.any_mark)]:
        lines.append(f"| {name} | {100 * p:.1f} | {100 * r:.1f} | {100 * f:.1f} |")
    lines.append(
        f"\ncasing: {100 * result.casing:.1f} % of words right (all lower case: "
        f"{100 * result.lowercase:.1f} %), F1 of words with capitals "
        f"{100 * result.capitals_f1:.1f}\n"
        f"numbers: {result.numbers} of {result.numbers_total} lines with digits come out as written"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loquent finish", description=__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="text files, a line each, plain or .xz")
    parser.add_argument("-o", "--output", type=Path, help="learn a model and write it here (.npz)")
    parser.add_argument("--language", default="en", help="score this one if nothing is learnt")
    parser.add_argument("--words", type=int, default=3_000_000, help="to learn from at the most")
    parser.add_argument("--bits", type=int, default=18, help="of the hash (default: 18)")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args(argv)
    try:
        if args.output:
            refuse_overwriting(args.output, args.text)
        train, held = split(args.text)
    except DataError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if args.output:
        model = learn(train, size=1 << args.bits, words=args.words, epochs=args.epochs)
        args.output.write_bytes(model.write())
        print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB")
    else:
        model = Finisher.load(args.language)
    print(f"{len(held)} lines held out\n\n{report(score(model, held))}")
    return 0
