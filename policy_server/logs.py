"""Log lines for people (text) or for machines (JSON), each with the ids of what it is about.

Whatever a line is given as `extra` is a field of its own: log.info("episode ended", extra={"episode": episode_id}).
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

MAX_TEXT = 200
"""A field may be a client's word: it is no longer than this."""
REST_S = 1.0
"""How long a refusal silences others of its kind."""
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
"""What every record has; the rest are fields."""

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Gives the fields to every line logged inside, in this task or thread."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def configure(format: LogFormat) -> None:
    """Logs to stderr from now on, in one of the two ways."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class TextFormatter(logging.Formatter):
    """The level's letter and the message, on one line whatever a client has put into it; then the fields."""

    def __init__(self) -> None:
        super().__init__("%(levelname).1s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_word(value)}" for name, value in _fields(record).items())
        return _printable(super().formatMessage(record)) + (f"  [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, the fields, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Sparing(logging.Filter):
    """Lets one line a second through of each kind of refusal (its field `refusal`); the next one counts those left out.

    For lines of one thread.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        super().__init__()
        self._now = now
        self._spoke_s: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = getattr(record, "refusal", None)
        if kind is None:
            return True
        if self._now() - self._spoke_s.get(kind, -REST_S) < REST_S:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        self._spoke_s[kind] = self._now()
        if kind in self._left_out:
            record.left_out = self._left_out.pop(kind)
        return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own = {name: value for name, value in vars(record).items() if name not in STANDARD}
    fields = {**_about.get(), **own}
    return {
        name: value[:MAX_TEXT] if isinstance(value, str) else value for name, value in fields.items() if value != ""
    }


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _word(value: Any) -> str:
    """As one word on one line, whoever chose it."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
