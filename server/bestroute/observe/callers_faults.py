"""Keeps out of the log what any caller can have a library write there, with a traceback, at will.

A caller that leaves while it is answered, a header that is no text, bytes that are no message to
the health service, or no HTTP: nothing is wrong with the server, and whoever repeats it a thousand
times a second would fill its disk. Where the log's level is DEBUG, they are there.
"""

import logging

from aiohttp.http import HttpProcessingError

_GRPC, _HTTP = "grpc._cython.cygrpc", "aiohttp.server"
_THEIRS = {"ExecuteBatchError", "DecodeError", "UnicodeDecodeError"}
"""Names of exceptions; those of gRPC's core have no public place to import them from."""


def drop_callers_faults() -> None:
    """From now on; more often does no more."""
    for name in (_GRPC, _HTTP):
        logging.getLogger(name).addFilter(_is_ours)


def _is_ours(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    theirs = kind is not None and (
        kind.__name__ in _THEIRS or issubclass(kind, HttpProcessingError)
    )
    return not theirs or logging.getLogger().isEnabledFor(logging.DEBUG)
