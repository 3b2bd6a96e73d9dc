"""The process's log on stderr: lines for people, or one JSON object per line for machines."""

import json
import logging
import sys
import threading
import time
import traceback
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

from bestroute.observe.callers_faults import drop_callers_faults
from bestroute.observe.trace_context import Parent

_log = logging.getLogger("bestroute")
_access = logging.getLogger("bestroute.access")

of_trace: ContextVar[tuple[str, str] | None] = ContextVar("of_trace", default=None)
"""Ids of the trace and the span that what is logged now belongs to, as hexadecimal digits."""

_QUIET = 60.0
"""Seconds between two lines of OpenTelemetry's: a collector that is away is one line a minute."""


def log_to_stderr(
    level: str, form: Literal["text", "json"] = "text", *, worker: int | None = None
) -> None:
    """Log to stderr whatever this process has to say: warnings and uncaught errors too, in JSON.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        form: lines of text, or JSON objects.
        worker: which process that is, where there are several; said in every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Quiet())
    if form == "json":
        handler.setFormatter(JsonFormatter(worker))
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread
        sys.unraisablehook = _unraisable
    else:
        process = "" if worker is None else f"worker {worker} "
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s")
        )
    logging.basicConfig(handlers=[handler], level=level)
    drop_callers_faults()
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # one line per upstream call otherwise
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # one line per retry otherwise


def set_level(level: str) -> None:
    """From now on log what is of a level, DEBUG, INFO, WARNING or ERROR, or above it."""
    logging.getLogger().setLevel(level)


class JsonFormatter(logging.Formatter):
    """A record as a JSON object in one line of ASCII.

    Its keys are timestamp (RFC 3339, UTC), level, logger and message; where they apply trace_id,
    span_id, worker and exception (type, message, stack); and what the record has as `fields`.

    Args:
        worker: see `log_to_stderr`.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._process: dict[str, Any] = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "timestamp": f"{seconds}.{int(record.created * 1000) % 1000:03d}Z",
            "level": record.levelname,
            "logger": _encodable(record.name),
            "message": _message(record),
            **self._process,
        }
        if ids := of_trace.get():
            line["trace_id"], line["span_id"] = ids
        for key, value in getattr(record, "fields", {}).items():
            line[key] = _encodable(value) if isinstance(value, str) else value
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["exception"] = {
                "type": type(error).__qualname__,
                "message": _encodable(_said(error)),
                "stack": _encodable("".join(traceback.format_exception(error))),
            }
        return json.dumps(line)


def log_access(method: str, code: str, seconds: float, caller: str) -> None:
    """Log that an RPC has ended.

    Args:
        method: its name.
        code: gRPC's, by name.
        seconds: from its arrival to its end.
        caller: whose it was; empty if it ended before that was known.
    """
    fields = {"rpc": method, "code": code, "ms": round(seconds * 1e3, 3), "caller": caller}
    _access.info(
        "%s %s after %.3f ms, called by %r",
        method,
        code,
        fields["ms"],
        caller,
        extra={"fields": fields},
    )


def belongs_to(parent: Parent) -> None:
    """What this task logs from now on belongs to the caller's trace."""
    of_trace.set((parent.trace_id, parent.span_id))


def _message(record: logging.LogRecord) -> str:
    try:
        return _encodable(record.getMessage())
    except Exception as error:  # a line that says too little is better than none
        return _encodable(f"{record.msg!r} (its arguments don't fit: {_said(error)})")


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "unprintable"


def _encodable(text: str) -> str:
    """The text with what UTF-8 can't hold written out: half of a surrogate pair is no character."""
    return text.encode("utf-8", "backslashreplace").decode()


class _Quiet(logging.Filter):
    """Lets pass what each logger of OpenTelemetry says first in a minute, and all others."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("opentelemetry."):
            return True
        now = time.monotonic()
        if now < self._next.get(record.name, now):
            return False
        self._next[record.name] = now + _QUIET
        return True


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("uncaught error", exc_info=error)


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "unknown"
    _log.error("uncaught error in thread %s", name, exc_info=args.exc_value)


def _unraisable(args: "sys.UnraisableHookArgs") -> None:
    what = args.err_msg or "error ignored in"
    _log.error("%s: %r", what, args.object, exc_info=args.exc_value)
