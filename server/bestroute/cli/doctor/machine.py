"""This machine: what is installed on it, and what processes may have."""

import importlib.metadata
import re
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

from bestroute.cli.doctor.findings import Finding, fail, ok, warn

_FEW_FILES = 4096
_RUNTIME = re.compile(r"onnxruntime(-[a-z0-9]+)?")
_NO_RUNTIME = {"onnxruntime-extensions", "onnxruntime-tools", "onnxruntime-genai"}
"""Packages of that name beside it."""
MIB = 2**20


def checks(*, serves: bool) -> Iterator[Finding]:
    """What is the same for every configuration.

    Args:
        serves: whether a service is to run here.
    """
    yield installed(importlib.metadata.distributions(), serves=serves)
    yield open_files()


def installed(
    packages: Iterable[importlib.metadata.Distribution], *, serves: bool = True
) -> Finding:
    """Whether exactly one ONNX Runtime is there."""
    found = {package.metadata["Name"]: package.version for package in packages}
    runtimes = {
        name: version
        for name, version in found.items()
        if name and _RUNTIME.fullmatch(name.lower()) and name.lower() not in _NO_RUNTIME
    }
    named = " and ".join(f"{name} {version}" for name, version in sorted(runtimes.items()))
    if len(runtimes) > 1:
        return fail(
            f"{named} are both installed, and overwrite each other's files: run pip uninstall -y "
            f"{' '.join(sorted(runtimes))}, then pip install 'bestroute[cpu]' or 'bestroute[gpu]'"
        )
    if not runtimes:
        how = "pip install 'bestroute[cpu]', or 'bestroute[gpu]' with an NVIDIA GPU"
        if serves:
            return fail(f"ONNX Runtime is not installed: {how}")
        return ok(f"no ONNX Runtime: this machine can call a service, but not be one ({how})")
    return ok(f"{named} is installed, and no other ONNX Runtime")


def open_files() -> Finding:
    """Whether connections may be many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        return warn(
            f"a process may have {soft} files open, connections included; a service with many "
            f"clients needs more: ulimit -n {_FEW_FILES if hard < 0 else min(hard, 65536)}, "
            "LimitNOFILE= of systemd, or --ulimit nofile= of Docker"
        )
    return ok(f"a process may have {'any number of' if soft < 0 else soft} files open")


def memory(needed: int, root: Path = Path("/")) -> Finding:
    """Whether what is needed is there.

    Args:
        needed: bytes.
        root: of the file system.
    """
    free = available(root)
    if free is None:
        return ok(f"about {needed // MIB} MiB of memory will be needed")
    if free < needed:
        return warn(
            f"{free // MIB} MiB of memory are available, and about {needed // MIB} MiB will be "
            "needed; take fewer workers or a smaller bundle, or give it more (the limit of the "
            "container, or the machine's)"
        )
    return ok(f"{free // MIB} MiB of memory are available, of which {needed // MIB} are needed")


def available(root: Path) -> int | None:
    """Bytes that a process may still take: the system's, and the cgroup's if that has a limit."""
    free = []
    if found := re.search(r"^MemAvailable: +(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE):
        free.append(int(found[1]) * 1024)
    cgroup = root / "sys/fs/cgroup"
    most, used = _text(cgroup / "memory.max").strip(), _text(cgroup / "memory.current").strip()
    if most.isdecimal() and used.isdecimal():
        # What is cached of files is given up for others.
        cached = re.search(r"^inactive_file (\d+)", _text(cgroup / "memory.stat"), re.MULTILINE)
        free.append(int(most) - int(used) + (int(cached[1]) if cached else 0))
    return min(free, default=None)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
