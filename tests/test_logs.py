"""JSON logs: whatever is logged, and however it goes wrong, is one JSON object in one line."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from bestroute.observe.logs import JsonFormatter, of_trace
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-00"


def logged(message: object, *args: object, **more: Any) -> dict[str, Any]:
    """What the formatter makes of a record, which has to be one line of JSON."""
    error = more.pop("error", None)
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("the.logger", logging.INFO, "", 0, message, args, info)
    vars(record).update(more)
    line = JsonFormatter(worker=3).format(record)
    assert len(line.splitlines()) == 1
    assert line.isascii()

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(line, parse_constant=no_number)
    assert isinstance(found, dict)
    # Half of a surrogate pair is no text, though json would read it.
    json.dumps(found, ensure_ascii=False).encode()
    return found


def test_the_keys_of_a_line() -> None:
    line = logged("took %d %s", 3, "s")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    age = datetime.now(UTC) - datetime.fromisoformat(line.pop("timestamp"))
    assert 0 <= age.total_seconds() < 60
    assert line == {"level": "INFO", "logger": "the.logger", "message": "took 3 s", "worker": 3}


def test_milliseconds_keep_their_zeros() -> None:
    assert logged("", created=1_700_000_000.007).pop("timestamp") == "2023-11-14T22:13:20.007Z"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ('a "quoted"\nline\r\nand\u2028more\x00\x1b[31m', None),
        ("half a pair \ud83d", r"half a pair \ud83d"),
        ("undecoded \udcff", r"undecoded \udcff"),
        ("naïve 🦀", None),
        (float("nan"), "nan"),
        (ValueError("two\nlines"), None),
    ],
)
def test_any_message_is_one_line(message: object, expected: str | None) -> None:
    assert logged(message)["message"] == (str(message) if expected is None else expected)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("can't be printed")


@pytest.mark.parametrize("args", [(1, 2), (Unprintable(),), ("x",)])
def test_arguments_that_do_not_fit_are_said(args: tuple[object, ...]) -> None:
    assert "%d items" in logged("%d items", *args)["message"]


def test_fields_are_keys() -> None:
    line = logged("", fields={"number": 1, "text": "half \ud83d"})
    assert (line["number"], line["text"]) == (1, r"half \ud83d")


def test_an_exception_is_an_object() -> None:
    try:
        try:
            raise KeyError("the cause")
        except KeyError as error:
            raise ValueError("two\nlines") from error
    except ValueError as error:
        found = logged("failed", error=error)["exception"]
    assert (found["type"], found["message"]) == ("ValueError", "two\nlines")
    assert "KeyError: 'the cause'" in found["stack"]
    assert "test_an_exception_is_an_object" in found["stack"]


def test_an_exception_that_can_not_be_printed() -> None:
    found = logged("failed", error=Unprintable())["exception"]
    assert (found["type"], found["message"]) == ("Unprintable", "unprintable")


def test_lines_of_a_trace_have_its_ids() -> None:
    assert "trace_id" not in logged("before")
    token = of_trace.set((TRACE, SPAN))
    try:
        line = logged("within")
    finally:
        of_trace.reset(token)
    assert (line["trace_id"], line["span_id"]) == (TRACE, SPAN)


@contextmanager
def serving(
    bundle: Path, *flags: str, **environment: str
) -> Iterator[tuple["subprocess.Popen[str]", list[dict[str, Any]]]]:
    """`bestroute serve` with JSON logs while the block lasts; gives its lines up to the ready one.

    After the block there are all of them, each of which has to be JSON.
    """
    command = ["serve", "--listen", "127.0.0.1:0", "--bundle", str(bundle), *flags]
    with subprocess.Popen(
        [sys.executable, "-m", "bestroute", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BESTROUTE_LOG_FORMAT": "json", **environment},
    ) as process:
        assert process.stderr is not None
        lines: list[dict[str, Any]] = []
        try:
            for line in process.stderr:
                lines.append(json.loads(line))
                if "serves bundle" in lines[-1]["message"]:
                    break
            yield process, lines
        finally:
            process.send_signal(signal.SIGTERM)
            lines += map(json.loads, process.stderr)
            assert process.wait(20) == 0


def address_in(lines: list[dict[str, Any]]) -> str:
    return str(lines[-1]["address"])


def test_a_server_logs_nothing_but_json(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as (_, lines):
        ready = lines[-1]
        with grpc.insecure_channel(address_in(lines)) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            stub.Route(pb.RouteRequest(prompt="easy"), timeout=10)
    assert ready["level"] == "INFO"
    assert ready["bundle"] == "tiny tiny-1"
    assert not any(line["logger"] == "bestroute.access" for line in lines)
    assert [line["message"] for line in lines[-2:]][-1] == "stopped"


def test_an_error_inside_has_the_ids_of_its_callers_trace(tiny_bundle: Path) -> None:
    fail_closed = {"BESTROUTE_ROUTING__FAIL_OPEN": "false"}
    with (
        serving(tiny_bundle, **fail_closed) as (_, lines),
        grpc.insecure_channel(address_in(lines)) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for metadata in [(("traceparent", TRACEPARENT),), ()]:
            with pytest.raises(grpc.RpcError) as raised:
                stub.Route(pb.RouteRequest(prompt="broken"), timeout=10, metadata=metadata)
            assert raised.value.code() is grpc.StatusCode.INTERNAL
    traced, untraced = (line for line in lines if "exception" in line)
    assert (traced["trace_id"], traced["span_id"]) == (TRACE, SPAN)
    assert traced["exception"]["type"] == "ArithmeticError"
    assert "trace_id" not in untraced


def test_the_access_log(tiny_bundle: Path) -> None:
    environment = {"BESTROUTE_ACCESS_LOG": "true"}
    with (
        serving(tiny_bundle, **environment) as (_, lines),
        grpc.insecure_channel(address_in(lines)) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        metadata = (("traceparent", TRACEPARENT),)
        stub.Route(pb.RouteRequest(prompt="word77"), timeout=10, metadata=metadata)
        with pytest.raises(grpc.RpcError):
            stub.Route(pb.RouteRequest(), timeout=10)
    good, bad = (line for line in lines if line["logger"] == "bestroute.access")
    assert (good["rpc"], good["code"], good["trace_id"]) == ("Route", "OK", TRACE)
    assert 0 < good["ms"] < 10_000
    assert good["caller"]
    assert (bad["code"], "trace_id" in bad) == ("INVALID_ARGUMENT", False)
    assert "word77" not in json.dumps(lines)


def test_workers_say_which_they_are(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--workers", "2", BESTROUTE_LOG_LEVEL="DEBUG") as (_, lines):
        pass
    assert {line.get("worker") for line in lines} == {None, 1, 2}


def test_uncaught_errors_and_warnings_are_json() -> None:
    script = """
import asyncio, logging, threading, warnings
from bestroute.observe.logs import log_to_stderr
log_to_stderr("INFO", "json")
warnings.warn("two\\nlines")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
class Broken:
    def __del__(self): raise ValueError("in __del__")
Broken()
async def main():
    asyncio.get_running_loop().call_soon(lambda: [].pop())
    await asyncio.sleep(0)
asyncio.run(main())
raise SystemError("the end")
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == [
        *("py.warnings", "bestroute", "bestroute", "asyncio", "bestroute")
    ]
    errors = [line["exception"]["type"] for line in lines[1:]]
    assert errors == ["ZeroDivisionError", "ValueError", "IndexError", "SystemError"]
    assert done.returncode == 1


def test_text_is_for_people() -> None:
    script = """
from bestroute.observe.logs import log_to_stderr
import logging
log_to_stderr("INFO", worker=2)
logging.getLogger("a.b").info("said")
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert re.fullmatch(r"\S+ \S+ INFO worker 2 a\.b: said\n", done.stderr)


def test_opentelemetry_may_say_one_thing_a_minute() -> None:
    script = """
from bestroute.observe.logs import log_to_stderr
import logging
log_to_stderr("INFO", "json")
for _ in range(3):
    logging.getLogger("opentelemetry.exporter").error("lost")
    logging.getLogger("opentelemetry.exporter").warning("transient")
    logging.getLogger("bestroute").error("ours")
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    said = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert sorted(said) == ["lost", "ours", "ours", "ours"]
