"""What the README tells a newcomer exists: its links, targets, commands, configuration and code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiexport_edge.proto.config import load
from aiexport_edge.shim.cli.main import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "deploy/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()] == []


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


def test_commands_exist() -> None:
    lines = re.findall(
        r"aiexport-edge ((?:workspaces|keys|config|models|doctor|serve)[^#\n]*)", "\n".join(blocks("sh"))
    )
    assert len(lines) >= 8
    for line in lines:
        words = line.split()
        build_parser(words[0]).parse_args(words)


def test_the_configuration_is_right(tmp_path: Path) -> None:
    [text] = blocks("toml")
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    config = load(file, tmp_path)
    assert [model.source for model in config.models] == [str(tmp_path / "models" / "qwen2.5-0.5b")]


def test_the_code_compiles() -> None:
    for text in blocks("python"):
        compile(text, "README.md", "exec")
