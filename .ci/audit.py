"""What a server is made of, and whether any of it is known to be vulnerable.

    .venv/bin/python .ci/audit.py [FILE]

Writes an SBOM (CycloneDX, JSON; the same for the same packages) of what `bestroute` needs to serve,
not of what it is developed with, and has pip-audit look those packages up. Exit codes:

    0   looked up, all of them, and nothing is known against any
    1   there are advisories against some of them
    75  not looked up, or not all: no source of advisories could be reached (EX_TEMPFAIL)
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("cpu", "jwt", "otel", "log")
"""Of what the CPU image installs, and what can be switched on in it."""
SOURCES = ("pypi", "osv")
SECONDS = 45
"""For one source, all packages together."""
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 75


def main() -> int:
    """Write the SBOM, look the packages up, say what came of it."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/sbom.cdx.json")
    names = needed("bestroute", EXTRAS)
    target.parent.mkdir(parents=True, exist_ok=True)
    bill = pruned(bill_of_materials(), names)
    target.write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{target}: {len(bill['components'])} packages")
    found: list[dict[str, Any]] = []
    for source in SOURCES:
        found = looked_up(source, sorted(names - {"bestroute"}))
        if not unknown(found):
            break
    return verdict(found)


def needed(name: str, extras: Sequence[str] = ()) -> set[str]:
    """Canonical names of a distribution and of all that it needs here, directly or not."""
    seen: set[tuple[str, str]] = set()
    pending = [(canonicalize_name(name), extra) for extra in ("", *extras)]
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        try:
            requirements = distribution(one[0]).requires or []
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        seen.add(one)
        for requirement in map(Requirement, requirements):
            if not requirement.marker or requirement.marker.evaluate({"extra": one[1]}):
                other = canonicalize_name(requirement.name)
                pending += [(other, extra) for extra in ("", *requirement.extras)]
    return {found for found, _ in seen}


def bill_of_materials() -> dict[str, Any]:
    """Of this whole environment."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", sys.executable]
    command += ["--pyproject", "pyproject.toml", "--output-reproducible", "--of", "JSON"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    bill: dict[str, Any] = json.loads(made.stdout)
    bill["metadata"]["component"]["version"] = version("bestroute")
    return bill


def pruned(bill: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """A bill of only the packages of these canonical names."""
    components = [c for c in bill["components"] if canonicalize_name(c["name"]) in names]
    root = bill["metadata"]["component"]["bom-ref"]
    kept = {root, *(component["bom-ref"] for component in components)}
    dependencies = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", ()) if ref in kept]}
        for each in bill["dependencies"]
        if each["ref"] in kept
    ]
    return {**bill, "components": components, "dependencies": dependencies}


def looked_up(source: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit says of each package; nothing, where it couldn't ask."""
    with TemporaryDirectory() as directory:
        pinned = Path(directory) / "requirements.txt"
        pinned.write_text("".join(f"{n}=={version(n)}\n" for n in names), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(pinned)]
        command += ["--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        command += ["--vulnerability-service", source, "--timeout", "5"]
        try:
            asked = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=SECONDS
            )
            dependencies: list[dict[str, Any]] = json.loads(asked.stdout)["dependencies"]
        except (subprocess.TimeoutExpired, ValueError):
            return []
    return dependencies


def unknown(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Packages that the source says nothing of, good or bad."""
    return [each["name"] for each in found if "skip_reason" in each] if found else ["any of them"]


def advisories(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each."""
    for each in found:
        for known in each.get("vulns", ()):
            fixed = ", ".join(known.get("fix_versions", ())) or "no release yet"
            yield f"{each['name']} {each['version']}: {known['id']}, fixed in: {fixed}"


def verdict(found: Sequence[Mapping[str, Any]]) -> int:
    """Say what came of it; gives the exit code."""
    if against := list(advisories(found)):
        print("VULNERABLE", *against, sep="\n  ")
        return VULNERABLE
    if missing := unknown(found):
        print(f"NOT AUDITED: no source of advisories has answered for {', '.join(missing)}")
        return UNKNOWN
    print(f"audited: no advisories against any of {len(found)} packages")
    return CLEAN


if __name__ == "__main__":
    sys.exit(main())
