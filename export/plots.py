"""Pictures of what word times and confidences are worth; matplotlib is in the extra ``report``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loquent.export.calibration import Reliability
from loquent.export.timing import Errors

_INCHES = 3.2


def plot_reliability(
    path: Path, decoders: Mapping[str, tuple[Reliability, Reliability]], note: str
) -> None:
    """For each decoder, before and after calibration: how often words of a confidence are right."""
    from matplotlib.figure import Figure

    figure = Figure((_INCHES * len(decoders), _INCHES + 0.6), layout="constrained")
    axes = figure.subplots(1, len(decoders), squeeze=False, sharey=True)[0]
    for axis, (name, (before, after)) in zip(axes, decoders.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", lw=1, label="perfect")
        for found, colour, label in (
            (before, "tab:orange", "as decoded"),
            (after, "tab:blue", "calibrated"),
        ):
            confidence, right, words = (
                np.array(column) for column in zip(*found.bins, strict=True)
            )
            size = 10 + 240 * words / found.words
            axis.plot(confidence, right, color=colour, lw=1.2)
            axis.scatter(confidence, right, size, color=colour, alpha=0.6, lw=0)
            axis.plot([], [], "o-", color=colour, label=f"{label}, ECE {100 * found.ece:.1f} %")
        axis.set(title=name, xlabel="confidence", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.legend(loc="upper left", fontsize=7)
    axes[0].set_ylabel("share of words that are right")
    figure.suptitle(note, fontsize=9)
    figure.savefig(path, dpi=130)


def plot_times(path: Path, decoders: Mapping[str, tuple[Errors, Errors]], note: str) -> None:
    """For each decoder: how errors of starts and ends are spread, by frames and by the rules."""
    from matplotlib.figure import Figure

    figure = Figure((_INCHES * len(decoders), _INCHES + 0.6), layout="constrained")
    axes = figure.subplots(1, len(decoders), squeeze=False, sharey=True)[0]
    share = np.linspace(0, 100, 401)
    for axis, (name, (before, after)) in zip(axes, decoders.items(), strict=True):
        for found, style, label in ((before, ":", "frames"), (after, "-", "rules")):
            for values, colour, what in (
                (found.starts, "tab:blue", "starts"),
                (found.ends, "tab:orange", "ends"),
            ):
                error = 1000 * np.percentile(np.abs(values), share)
                axis.plot(error, share, style, color=colour, label=f"{what} by {label}")
        axis.axvline(80, color="0.7", lw=1)
        axis.set(title=name, xlabel="absolute error, ms", xlim=(0, 300), ylim=(0, 100))
        axis.legend(loc="lower right", fontsize=7)
    axes[0].set_ylabel("percent of words within it")
    figure.suptitle(note, fontsize=9)
    figure.savefig(path, dpi=130)
