"""The ``loquent`` command: finds the subcommand's module and hands over.

A subcommand is a function ``main(argv) -> exit status`` with its own argument parser. Its module is
imported only when the subcommand is called, so ``loquent --help`` answers at once and needs none of
the extras.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

from loquent.engine.errors import LoquentError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


@dataclass(frozen=True)
class Command:
    """One subcommand. `extra` is the extra that brings what its module imports."""

    target: str  # "module:function"
    help: str
    extra: str = "cpu"


COMMANDS: Mapping[str, Command] = {
    "demo": Command("loquent.clients.demo:main", "caption the bundled sample clip; start here"),
    "transcribe": Command(
        "loquent.clients.transcribe:main", "write down audio files: text, JSON, SRT or WebVTT"
    ),
    "mic": Command("loquent.clients.mic:main", "live captions of the microphone"),
    "serve": Command("loquent.clients.serve:main", "the WebSocket server and its web page"),
    "stream": Command(
        "loquent.clients.stream:main", "send a file to a server in real time, show the delays"
    ),
    "lm": Command("loquent.models.ngram:main", "a word language model from text", "train"),
    "lm neural": Command(
        "loquent.export.neural:main", "a recurrent word model beside it", "export"
    ),
    "data": Command(
        "loquent.models.datacli:main", "check training data, convert it, score its labels", "train"
    ),
    "train": Command("loquent.models.cli:main", "train a model, or its teacher", "train"),
    "pretrain": Command(
        "loquent.models.pretraining:main", "a pretrained encoder learns on, without text", "train"
    ),
    "distill": Command(
        "loquent.models.distill:main", "keep what a teacher hears for a student to learn", "train"
    ),
    "finish": Command(
        "loquent.models.finish:main", "casing and punctuation from text: learn, measure", "train"
    ),
    "recipe": Command(
        "loquent.export.recipe:main", "everything from speech to an evaluated model", "export"
    ),
    "export": Command("loquent.export.cli:main", "turn a checkpoint into a bundle", "export"),
    "import": Command(
        "loquent.export.importer:main", "make a bundle of torchaudio's Emformer RNN-T", "export"
    ),
    "tune": Command("loquent.export.tune:main", "find a bundle's decoding weights", "export"),
    "evaluate": Command("loquent.export.evaluate:main", "word and character error rates", "train"),
    "measure": Command(
        "loquent.export.measure:main", "tables: endpoints, stable partials, long streams", "train"
    ),
    "words": Command("loquent.export.words:main", "measure word times and confidences", "report"),
    "bench": Command("loquent.export.bench:main", "time the engine on this machine", "train"),
    "bench load": Command("loquent.clients.load:main", "how many real-time streams a server holds"),
    "bench soak": Command("loquent.clients.soak:main", "a server under load and mischief for long"),
    "version": Command("loquent.clients.cli:version", "print the version"),
}

EXAMPLES = """\
examples:
  loquent demo                                 see it work, no microphone needed
  loquent transcribe talk.mp3 --format srt     subtitles for a recording
  loquent serve                                then open http://127.0.0.1:8765/ in a browser
  loquent COMMAND --help                       what a command can do
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else EXIT_USAGE
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name in ("-V", "--version"):
        name = "version"
    command = COMMANDS.get(name)
    if command is None:
        return fail(f"there is no command {name!r}, expected one of {', '.join(COMMANDS)}", 2)
    try:
        module, _, function = command.target.partition(":")
        run = cast(Callable[[Sequence[str]], int], getattr(import_module(module), function))
        return run(rest)
    except KeyboardInterrupt:
        # The terminal shows ^C where the cursor was; go on below it.
        print("\nloquent: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (`| head`) has had enough. Python would complain once more when
        # it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except LoquentError as exc:
        return fail(str(exc))
    except ImportError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing in ("", "loquent"):
            raise
        return fail(
            f"`loquent {name}` needs {missing}, which cannot be imported ({exc}); "
            f"install it with: pip install 'loquent[{command.extra}]'"
        )
    except OSError as exc:
        return fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))


def usage() -> str:
    """The text of ``loquent --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: loquent COMMAND ...",
            "",
            "Speech in, captions out: streaming speech recognition.",
            "",
            "commands:",
            *lines,
            "",
            EXAMPLES.rstrip(),
        ]
    )


def version(argv: Sequence[str]) -> int:
    """``loquent version``."""
    if argv:
        print("usage: loquent version")
        return 0 if argv[0] in ("-h", "--help") else EXIT_USAGE
    from importlib.metadata import version as installed_version

    print(f"loquent {installed_version('loquent')}")
    return 0


def fail(message: str, status: int = EXIT_ERROR) -> int:
    """Say what is wrong on stderr; returns the exit status."""
    print(f"loquent: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
