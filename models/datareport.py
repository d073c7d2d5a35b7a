"""The report of ``loquent data check`` as text and as one HTML page that loads nothing."""

from __future__ import annotations

from html import escape

from loquent.models.datacheck import Finding, Report

_MARKS = {"error": "✗", "warning": "!", "note": "·"}
_WORDS = {"error": "Error", "warning": "Look at this", "note": "Note"}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --error: #c62828; --warning: #b26a00;
  --note: #4a6572; --pass: #2e7d32; }
@media (prefers-color-scheme: dark) {
  :root { --error: #ff8a80; --warning: #ffcc80; --note: #b0bec5; --pass: #a5d6a7; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.verdict { font-weight: 600 } .pass { color: var(--pass) } .fail { color: var(--error) }
table { border-collapse: collapse } th, td { padding: .3rem .8rem; text-align: right;
  border-bottom: 1px solid var(--line) } th:first-child, td:first-child { text-align: left }
article { border-left: .3rem solid var(--kind); padding: .1rem 0 .1rem 1rem; margin: 1rem 0 }
article.error { --kind: var(--error) } article.warning { --kind: var(--warning) }
article.note { --kind: var(--note) }
article b { color: var(--kind); margin-right: .5rem } article p { margin: .2rem 0 }
ul { margin: .3rem 0; padding-left: 1.2rem; font: .9rem/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere }
.letters { display: flex; flex-wrap: wrap; gap: .3rem } .letters span { border: 1px solid
  var(--line); border-radius: .3rem; padding: .1rem .5rem } .letters small { opacity: .7 }
"""


def as_text(report: Report) -> str:
    """For a terminal."""
    lines = []
    for f in report.findings:
        lines.append(f"{_MARKS[f.level]} {f.title}")
        if f.remedy:
            lines.append(f"    -> {f.remedy}")
        lines += [f"    {example}" for example in f.examples]
    lines.append("")
    for split in report.hours:
        by_language = ", ".join(f"{n} {h:.2f} h" for n, h in report.hours[split].items())
        lines.append(
            f"{split}: {report.clips[split]} clips, {report.speakers[split]} speakers, "
            f"{len(report.letters[split])} characters; {by_language or 'nothing'}"
        )
    lines.append(verdict(report))
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """One line."""
    found = []
    for level in _MARKS:
        count = sum(f.level == level for f in report.findings)
        found.append(f"{count} {level}{'' if count == 1 else 's'}")
    return f"{'passed' if report.passed else 'FAILED'}: {', '.join(found)}"


def as_html(report: Report, title: str) -> str:
    """One page."""
    rows = []
    for split in report.hours:
        hours = ", ".join(f"{escape(n)} {h:.2f}" for n, h in report.hours[split].items())
        rows.append(
            f"<tr><td>{split}<td>{report.clips[split]}<td>{report.speakers[split]}"
            f"<td>{hours or '0'}<td>{len(report.letters[split])}"
        )
    letters = []
    known = set(report.letters.get("train", ()))
    for split, counts in report.letters.items():
        chips = "".join(
            f"<span>{escape(c)} <small>{n}</small></span>"
            for c, n in sorted(counts.items(), key=lambda item: -item[1])
            if split == "train" or c not in known
        )
        name = "train" if split == "train" else f"{split}, but not in train"
        letters.append(f"<h2>Characters of {name}</h2><div class=letters>{chips or 'none'}</div>")
    outcome = "pass" if report.passed else "fail"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p class='verdict {outcome}'>{escape(verdict(report))}</p>"
        "<table><tr><th>split<th>clips<th>speakers<th>hours by language<th>characters"
        f"{''.join(rows)}</table>"
        f"<h2>Findings</h2>{''.join(map(_article, report.findings)) or '<p>none</p>'}"
        f"{''.join(letters)}</html>\n"
    )


def _article(f: Finding) -> str:
    examples = "".join(f"<li>{escape(example)}" for example in f.examples)
    remedy = f"<p>{escape(f.remedy)}</p>" if f.remedy else ""
    return (
        f"<article class={f.level}><p><b>{_WORDS[f.level]}</b>{escape(f.title)}</p>{remedy}"
        f"{f'<ul>{examples}</ul>' if examples else ''}</article>"
    )
