"""Log lines for people (text) and for machines (one JSON object a line)."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger, message; session and error where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
        }
        if session := getattr(record, "session", None):
            fields["session"] = session
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _one_line(record: logging.LogRecord) -> bool:
    """What a client sent, quoted in a message, must not look like a line of its own."""
    record.msg = "".join(
        char if char.isprintable() else f"\\x{ord(char):02x}" for char in record.getMessage()
    )
    record.args = None
    return True


def set_up(*, format: str, level: str) -> None:
    """Send the log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_one_line)
    text = logging.Formatter(
        "%(asctime)s %(levelname)s %(name)s [%(session)s]: %(message)s", defaults={"session": "-"}
    )
    handler.setFormatter(JsonFormatter() if format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
