"""What the documents name is there: files, headings, commands, flags, settings, metrics."""

import argparse
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bestroute.cli import parser
from bestroute.config import Settings
from bestroute_export.__main__ import parser as export_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"bestroute": parser(), "bestroute-export": export_parser()}
LINKED = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]
LEFT_OUT = ("...", "…")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code; indented ones have no language.

    A block ends at an empty line, since settings and the command that uses them stand together.
    """
    text = page.read_text()
    for language, block in FENCE.findall(text):
        for part in re.split(r"\n\s*\n", block):
            yield language, part.strip("\n")
    for block in re.findall(r"(?:^ {4}.*\n)+", FENCE.sub("", text), re.MULTILINE):
        yield "", re.sub(r"^ {4,7}", "", block, flags=re.MULTILINE)


def inline(page: Path) -> list[str]:
    """What stands between single backticks."""
    prose = re.sub(r"^ {4}.*$", "", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each of our commands in a block of code, up to a pipe, a redirection or `&`."""
    for language, block in blocks(page):
        if language in ("", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.match(r"\s*(?:\$ )?(?:[A-Z_]+=\S* )*(?:\S+/)?(bestroute\S*) .*", line)
                if found and found[1] in PARSERS:
                    words = shlex.split(line[found.start(1) :], comments=True)
                    end = (at for at, word in enumerate(words) if word in ("|", "<", ">", "&"))
                    yield words[: next(end, None)]


def unknown(words: list[str]) -> list[str]:
    """Those of a command's subcommands and flags that there are not."""
    command = PARSERS[words[0]]
    rest = words[1:]
    while subcommands := [
        action for action in command._actions if isinstance(action, argparse._SubParsersAction)
    ]:
        if not rest or rest[0].startswith("-") or rest[0] in LEFT_OUT:
            break
        if rest[0] not in subcommands[0].choices:
            return [rest[0]]
        command = subcommands[0].choices[rest.pop(0)]
    flags = (word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word))
    return [flag for flag in flags if flag not in command._option_string_actions]


def headings(page: Path) -> set[str]:
    """Fragments by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if fragment:
            assert fragment in headings(target), link


@pages
def test_commands_are_as_the_command_line_has_them(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in commands(page):
        assert not unknown(words), words
        if not set(LEFT_OUT) & set(words):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a prompt")))
            try:
                PARSERS[words[0]].parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{shlex.join(words)} does not parse")
    for code in inline(page):
        if code.split()[0] in PARSERS and len(code.split()) > 1:
            assert not unknown(code.split()), code


@pages
def test_settings_are_settings(page: Path) -> None:
    for language, block in blocks(page):
        first = re.match(r"(?:#.*\n)*\[(\w+)", block)
        ours = language == "toml" or (first and first[1] in Settings.model_fields)
        try:
            values = tomllib.loads(block)
        except tomllib.TOMLDecodeError:
            assert not ours, block
            continue
        if ours or values.keys() & Settings.model_fields.keys():
            Settings.model_validate(values)
    for code in inline(page):
        if found := re.fullmatch(r"(?:\[(\w+)\] )?([a-z_.0-9]+ = [^.].*)", code):
            try:
                said = tomllib.loads(found[2])
            except tomllib.TOMLDecodeError:
                continue
            # A key without its section stands where the section is being spoken of.
            sections = [found[1]] if found[1] else [None, *Settings.model_fields]
            assert any(accepted({name: said} if name else said) for name in sections), code


def accepted(values: dict[str, Any]) -> bool:
    """Whether these are settings, each for itself; others that they call for may be missing."""
    try:
        Settings.model_validate(values)
    except ValidationError as invalid:
        return all(error["type"] == "value_error" for error in invalid.errors())
    return True


@pages
def test_names_of_settings_are_settings(page: Path) -> None:
    """`section.key`, where no module, span's attribute or value of the chart is meant."""
    others = {"server.address"}
    names = [re.split(r"\.|\] ", code.lstrip("["), maxsplit=1) for code in inline(page)]
    for variable in re.findall(r"BESTROUTE_([A-Z_]+__[A-Z_]+)", page.read_text()):
        names.append(variable.lower().split("__"))
    for section, key in (name for name in names if len(name) == 2):
        field: Any = Settings.model_fields.get(section)
        known = getattr(field and field.annotation, "model_fields", None)
        if known and page.name != "kubernetes.md" and re.fullmatch(r"[a-z_0-9]+", key):
            module = ROOT / "server" / "bestroute" / section / f"{key}.py"
            assert key in known or module.exists() or f"{section}.{key}" in others, (section, key)


@pages
def test_files_modules_targets_and_metrics_are_there(page: Path) -> None:
    text = page.read_text()
    folders = "benchmarks|deploy|docs|examples|experiments|export|proto|server|tests"
    for code in inline(page):
        if re.fullmatch(rf"(?:{folders})/[\w./-]+", code) and "NNNN" not in code:
            assert (ROOT / code).exists(), code
    for module in re.findall(r"python -m ((?:benchmarks|deploy)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    targets = re.findall(r"^([\w./()$-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = [target.replace("$(DEMO)", ".venv-demo") for target in targets]
    for target in re.findall(r"(?:`|^ {4}|^)make ([a-z./-]+)", text, re.MULTILINE):
        assert target in targets, target
    code = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    for metric in re.findall(r"\bbestroute_[a-z_]+[a-z]\b(?!/|\.|/)", text):
        family = re.sub(r"_(total|bucket|sum|count)$", "", metric)
        assert f'"{metric}' in code or f'"{family}' in code or metric == "bestroute_export", metric
