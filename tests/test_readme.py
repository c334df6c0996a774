"""What the README tells a newcomer exists: its links, targets, commands, configuration and code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from aiexport_edge.proto.config import load
from aiexport_edge.proto.config_text import effective
from aiexport_edge.shim.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder in (".", "benchmarks", "deploy", "engine", "kernels", "proto", "shim", "tests")
    for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as they are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document: str) -> None:
    page = ROOT / document
    for link, anchor in re.findall(r"\]\((?![a-z]+://)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def test_folders_are_described() -> None:
    named = set(re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE))
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    left_over = {"build", "dist"} | {name for name in there if name.endswith(".egg-info")}
    assert named == there - left_over


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert (
        set(re.findall(r"\bmake ([a-z]+)", " ".join([*blocks("sh"), *re.findall(r"`(make [^`]+)`", README)])))
        <= targets
    )


@pytest.mark.parametrize("page", [page for page in PAGES if "aiexport-edge " in "".join(blocks("sh", page))])
def test_commands_exist(page: str) -> None:
    text = re.sub(r"\\\n *", "", "\n".join(blocks("sh", page)))
    lines = re.findall(rf"(?:bin/|^)aiexport-edge ((?:{'|'.join(COMMANDS)})\b[^#\n]*)", text, re.MULTILINE)
    assert lines
    for line in lines:
        build_parser().parse_args(shlex.split(line))


def test_the_configuration_is_right(tmp_path: Path) -> None:
    [text] = blocks("toml")
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    config = load(file, tmp_path)
    assert [model.source for model in config.models] == [str(tmp_path / "models" / "qwen2.5-0.5b")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("toml", page)])
def test_every_configuration_is_read(page: str, tmp_path: Path) -> None:
    for text in blocks("toml", page):
        file = tmp_path / "aiexport-edge.toml"
        file.write_text(text)
        load(file, tmp_path)


def test_every_setting_is_explained() -> None:
    """`config show` prints them all; what each does stands in an example."""
    pages = ("README.md", "deploy/README.md", "engine/backends/VLLM.md")
    explained = set(re.findall(r"^(\w+) = ", "".join("".join(blocks("toml", page)) for page in pages), re.MULTILINE))
    sections = effective(load(None, ROOT))
    tables = [*sections.pop("models"), *sections.pop("plans").values(), *sections.values()]
    assert {key for table in tables for key in table} - explained == set()


def test_the_code_compiles() -> None:
    for text in blocks("python"):
        compile(text, "README.md", "exec")
