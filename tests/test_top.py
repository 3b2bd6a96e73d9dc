"""`bestroute top`: the real command, on a real terminal, against a real server with traffic."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from bestroute.app import Running, serving
from bestroute.cli.frame import View, frame
from bestroute.client import Client
from bestroute.config import Security, Settings
from bestroute.guard.keys import new_key
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1 import routing_pb2
from tests.certificates import Authority
from tests.upstreams import until

COMMAND = (sys.executable, "-m", "bestroute", "top")
ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"
SHOW_CURSOR = "\x1b[?25h"


class Terminal:
    """The command on a terminal of its own.

    Attributes:
        written: all that came.
    """

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process, self.written = process, ""
        self._fd = fd
        asyncio.get_running_loop().add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            self.written += os.read(self._fd, 1 << 16).decode(errors="replace")
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._fd)

    @property
    def screen(self) -> list[str]:
        """The last picture that is complete, without colours."""
        frames = self.written.split("\x1b[H")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames[-2] if len(frames) > 1 else "")
        return plain.replace("\r", "").split("\n")

    async def shows(self, *words: str) -> list[str]:
        """The screen, once all of the words are on it."""
        async with asyncio.timeout(30):
            await until(lambda: all(word in "\n".join(self.screen) for word in words))
        return self.screen

    async def ends(self, number: int) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(30):
            return await self.process.wait()


@asynccontextmanager
async def terminal(*arguments: str, columns: int = 80, lines: int = 24) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)


async def output(*arguments: str, code: int = 0) -> tuple[str, str]:
    """What the command writes where no terminal is."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == code, err
    return out.decode(), err.decode()


@pytest.fixture
async def busy(server: Running) -> Running:
    """A server that has decided something."""
    async with Client(server.address, timeout=10) as client:
        for number in range(3):
            await client.route(f"easy word{number}")
        await client.route("hard hard")
    return server


async def test_a_terminal_is_filled_and_given_back(busy: Running) -> None:
    async with terminal("--address", busy.address, "--interval", "0.2") as top:
        before = await top.shows("small", "decisions/s")
        async with Client(busy.address, timeout=10) as client:
            await client.route("better easy")
        after = await top.shows("5 decisions")
        code = await top.ends(signal.SIGINT)
        written = top.written

    for screen in (before, after):
        assert len(screen) <= 24
        assert max(map(len, screen)) <= 80
    text = "\n".join(after)
    assert re.search(rf"bestroute \S+ at {busy.address}  bundle tiny tiny-1", after[0])
    assert re.search(rf"serving  up \d+ s  process {os.getpid()}", text)
    assert re.search(r"last hour  \$\S+ of \$\S+ \(\d\d\.\d %\)  5 decisions", text)
    assert re.search(r"small x 1 +█{19} +80\.0 %  4", text)
    assert "router  0 waiting" in text
    assert text.count(" saved  ") == 5
    assert code == 0
    assert written.rindex(NORMAL) > written.rindex(ALTERNATE)
    assert written.rindex(SHOW_CURSOR) > written.rindex(ALTERNATE)
    assert "Traceback" not in written


async def test_a_server_that_comes_back_is_seen_again(settings: Settings) -> None:
    async with serving(settings) as running:
        address = running.address
        top = terminal("--address", address, "--interval", "0.2")
        screen = await top.__aenter__()
        await screen.shows("serving")
    try:
        away = await screen.shows("is away for", "trying again")
        server = settings.server.model_copy(update={"listen": address})
        async with serving(settings.model_copy(update={"server": server})):
            async with Client(address, timeout=10) as client:
                await client.route("easy")
            back = await screen.shows("serving", "1 decision")
            code = await screen.ends(signal.SIGINT)
    finally:
        await top.__aexit__(None, None, None)

    assert any(f"{address} is away" in line for line in away)
    assert not any("away" in line for line in back)
    assert code == 0


async def test_once_prints_a_frame(busy: Running) -> None:
    out, err = await output("--once", "--address", busy.address)

    assert err == ""
    assert "\x1b" not in out
    assert "bundle tiny tiny-1" in out
    assert "75.0 %  3" in out
    assert "none good enough" in out


async def test_without_a_terminal_it_is_once(busy: Running) -> None:
    out, _ = await output("--address", busy.address)

    assert out.count("bestroute ") == 1


async def test_once_works_on_a_terminal_too(busy: Running) -> None:
    async with terminal("--once", "--address", busy.address) as top:
        async with asyncio.timeout(30):
            assert await top.process.wait() == 0
        await until(lambda: "queues" in top.written)

    assert ALTERNATE not in top.written


async def test_json_streams_lines(busy: Running) -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("--json", "--address", busy.address, "--interval", "0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        lines = [json.loads(await process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()

    assert process.returncode == 0, err
    assert err == b""
    assert lines[0]["serving"] is True
    assert [len(line["decisions"]) for line in lines] == [4, 0, 0]
    assert lines[0]["decisions"][0]["model"] == "small"
    assert lines[0]["last_hour"]["decisions"] == "4"


async def test_json_once_is_one_line(busy: Running) -> None:
    out, _ = await output("--json", "--once", "--address", busy.address)

    assert json.loads(out)["bundles"][0]["version"] == "tiny-1"


async def test_nobody_there_is_told_with_what_to_do() -> None:
    _, err = await output("--once", "--address", "127.0.0.1:1", code=1)

    assert "can't be reached" in err
    assert "bestroute serve" in err


async def test_a_service_that_cannot_be_watched_is_told() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _, err = await output("--once", "--address", f"127.0.0.1:{port}", code=1)
    await server.stop(None)

    assert "older than `bestroute top`" in err


async def test_wrong_intervals_are_refused_in_words(server: Running) -> None:
    _, err = await output("--once", "--interval", "9999", "--address", server.address, code=2)

    assert "must be 0.1 to 3600 seconds" in err


async def test_it_connects_as_other_commands_do(settings: Settings, tmp_path: Path) -> None:
    authority, (key, line) = Authority(), new_key("me")
    (ca := tmp_path / "ca.pem").write_bytes(authority.certificate)
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    authority.issue("localhost").write(*files)
    (keys := tmp_path / "keys.toml").write_text(line)
    (token := tmp_path / "token").write_text(key)
    security = Security(certificate=files[0], private_key=files[1], api_keys_file=keys)
    async with serving(settings.model_copy(update={"security": security})) as running:
        there = ("--once", "--address", running.address, "--tls-ca", str(ca))
        out, _ = await output(*there, "--token-file", str(token))
        _, err = await output(*there, code=1)

    assert "serving" in out
    assert "--token-file" in err


# the picture, of what is hard to bring about


def span(seconds: float) -> Duration:
    made = Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made


def at(seconds: int) -> Timestamp:
    return Timestamp(seconds=seconds)


def crowded() -> View:
    """More of everything than fits."""
    period = pb.Period(
        start=at(0),
        length=span(10),
        decisions=9,
        estimated_cost_usd=1,
        estimated_reference_cost_usd=4,
        answers=2,
        cost_usd=0.5,
        reference_cost_usd=2,
        errors=3,
        failovers=1,
        shadow_saving_usd=0.5,
    )
    status = pb.WatchStatusResponse(
        time=at(60_000),
        process=pb.Process(version="0.1.0", pid=7, workers=4, uptime=span(93_784)),
        bundles=[
            pb.Bundle(name="tiny", version="1", role=pb.Bundle.ROLE_STABLE, share=0.95),
            pb.Bundle(
                name="tiny", version="2", role=pb.Bundle.ROLE_CANARY, share=0.05, serving=True
            ),
        ],
        serving=False,
        fault="the router network does not come back",
        decisions_per_second=1234.56,
        networks=[
            pb.Network(name="router", waiting=1000, oldest_wait=span(0.25), runs=2),
            pb.Network(name="reward"),
        ],
        arms=[pb.ArmCount(model=f"m{n}" * 20, samples=n, decisions=50 - n) for n in range(1, 40)],
        lately=period,
        last_hour=period,
        upstreams=[
            pb.Upstream(
                name=f"provider{n}",
                calls=5,
                failures=2,
                breakers=[pb.Breaker(model="a", state=pb.Breaker.STATE_OPEN)],
            )
            for n in range(12)
        ],
        shadow=True,
        disabled_arms=["small:3"],
    )
    past = pb.PastDecision(
        number=1,
        time=at(60_000),
        model="x" * 100,
        samples=1,
        prompt_tokens=5,
        fallback_reason=routing_pb2.FALLBACK_REASON_OVER_BUDGET,
    )
    minutes = [
        pb.Period(
            start=at(60 * (960 + n)),
            decisions=1,
            estimated_reference_cost_usd=n % 8,
        )
        for n in range(0, 41, 2)
    ]
    return View("router:50051", status, minutes, [past] * 50, "")


def drawn(view: View, width: int, height: int | None) -> list[str]:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(view, width, height))
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (200, 60), (20, 5)])
def test_whatever_there_is_fits(width: int, height: int) -> None:
    lines = drawn(crowded(), width, height)

    assert len(lines) == height
    assert max(map(len, lines)) <= width


def test_at_80_by_24_every_part_has_its_place() -> None:
    text = "\n".join(drawn(crowded(), 80, 24))

    assert "NOT SERVING: the router network does not come back" in text
    assert "canary tiny 2 (5.0 %)" in text
    for part in ("savings", "arms", "and ", "queues", "upstreams", "decisions"):
        assert part in text
    assert "shadow mode: the reference answers all; disabled: small:3" in text
    assert "1,234.6 decisions/s" in text
    assert "router  1,000 waiting since 250.00 ms  2 running" in text
    assert "over budget" not in text, "it is cut off at the edge"


def test_shadow_mode_shows_what_would_have_been_run() -> None:
    past = pb.PastDecision(model="large", samples=1, shadow_model="small", shadow_samples=3)
    view = crowded()._replace(decisions=[past])

    assert drawn(view, 100, None)[-1].endswith(
        "large x 1  $0  nothing saved  0 tokens  shadow: small x 3"
    )


def test_one_of_several_workers_says_so() -> None:
    text = "\n".join(drawn(crowded(), 120, 40))

    assert "up 1 d 2 h  process 7, one of 4 workers: figures are its own" in text
    assert "breakers a: open" in text


def test_the_curve_is_of_the_last_hour() -> None:
    [line] = [line for line in drawn(crowded(), 80, 24) if line.startswith("by minute")]

    curve = line.removeprefix("by minute  ")
    assert len(curve) == 60
    assert curve.rstrip("▁▂▃▄▅▆▇█ ") == ""
    assert curve.endswith("▃ ▆ █ ▁"), (
        "two minutes ago most was saved, and a minute ago nothing decided"
    )
