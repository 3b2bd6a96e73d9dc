"""Where a configuration listens: is each port free, and if not, who has it."""

import errno
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from bestroute.cli.doctor.findings import Finding, fail, ok, warn
from bestroute.config import Settings

_LISTENING = "0A"
_PRIVILEGED, _LAST = 1024, 65535


def checks(settings: Settings) -> Iterator[Finding]:
    """Each address that the configuration listens at, and whether two of them clash."""
    wanted = addresses(settings)
    yield from clashes(wanted)
    for key, address in wanted.items():
        yield free(key, address)


def addresses(settings: Settings) -> dict[str, str]:
    """Where it listens, by the setting that says so; workers take ports in a row for metrics."""
    listens = {"server.listen": settings.server.listen}
    if settings.gateway.listen is not None:
        listens["gateway.listen"] = settings.gateway.listen
    for number in range(1, settings.server.workers + 1):
        if (listen := settings.metrics.of_worker(number).listen) is not None:
            listens["metrics.listen" + (f" of worker {number}" if number > 1 else "")] = listen
    return listens


def clashes(wanted: Mapping[str, str]) -> Iterator[Finding]:
    """Ports that two settings want."""
    taken: dict[str, str] = {}
    for key, address in wanted.items():
        port = address.rpartition(":")[2]
        if port in taken and port != "0":
            yield fail(f"{taken[port]} and {key} are both at port {port}; give one of them another")
        taken.setdefault(port, key)


def free(key: str, address: str) -> Finding:
    """Whether one can listen at host:port."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        return fail(f'{key} = "{address}": must be host:port, as in "127.0.0.1:50051"')
    if int(port) > _LAST:
        return fail(f'{key} = "{address}": there are ports up to {_LAST}')
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
        with closing(socket.socket(family, kind)) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
            tried.listen(1)
    except socket.gaierror as error:
        return fail(f'{key} = "{address}": the name "{host}" is not known here ({error.strerror})')
    except OSError as error:
        return _refused(key, address, int(port), error)
    return ok(f"{key}: {address} is free")


def _refused(key: str, address: str, port: int, error: OSError) -> Finding:
    if error.errno == errno.EADDRINUSE:
        who = owner(port)
        if who is not None and "bestroute" in who:
            return warn(
                f"{key}: {address} is served by a bestroute already ({who}); stop it before you "
                "start another there, or send it SIGHUP to have it read its configuration anew"
            )
        return fail(
            f"{key}: {address} is in use by {who or 'a process that this user may not see'}; stop "
            "that, or listen at another port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return fail(
            f"{key}: {address} is no address of this machine; 127.0.0.1 is reached from here "
            "only, 0.0.0.0 from everywhere"
        )
    if error.errno == errno.EACCES and port < _PRIVILEGED:
        return fail(f"{key}: only root may listen at ports below {_PRIVILEGED}; take a higher one")
    return fail(f"{key}: can't listen at {address}: {error.strerror or error}")


def owner(port: int, proc: Path = Path("/proc")) -> str | None:
    """Which process listens at a port, as its number and its command; None: it can't be seen."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port, proc)}
    for process in proc.glob("[0-9]*"):
        try:
            if any(str(each.readlink()) in sockets for each in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                return f"process {process.name}: {command[:100]}"
        except OSError:
            continue  # it is another user's, or has ended
    return None


def _inodes(port: int, proc: Path) -> Iterator[str]:
    """Sockets that listen at a port, by the kernel's tables."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            at_port = re.search(r":([0-9A-F]{4})$", fields[1])
            if at_port and int(at_port[1], 16) == port and fields[3] == _LISTENING:
                yield fields[9]
