"""`models import`: what it takes in, what it leaves out, what it refuses, and that nothing half done is ever there."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import stat
import struct
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiexport_edge.proto import config as configuration
from aiexport_edge.shim.cli import model_sources, models_import
from aiexport_edge.shim.cli.main import main

KEPT = {"config.json", "tokenizer.json", "model.safetensors"}


def safetensors(num_bytes: int = 64) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(num_bytes))


FILES = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(),
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04.",
    ".gitattributes": b"",
    "picture.png": b"",
}


class Import:
    """Runs commands on one state directory."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = folder / "state"
        self._capsys = capsys

    def __call__(self, source: Path, *words: str, status: int = 0) -> tuple[str, str]:
        return self.run("import", str(source), *words, status=status)

    def run(self, *words: str, status: int = 0) -> tuple[str, str]:
        self._capsys.readouterr()
        assert main(["models", *words, "--state", str(self.state)]) == status
        captured = self._capsys.readouterr()
        return captured.out, captured.err

    def refuses(self, source: Path, expected: str) -> None:
        """One sentence, and nothing left behind."""
        out, err = self(source, status=1)
        assert out == ""
        assert expected in err
        assert err.count("\n") == 1
        assert [path.name for path in (self.state / "models").iterdir()] == []


@pytest.fixture
def models(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Import:
    monkeypatch.chdir(tmp_path)
    return Import(tmp_path, capsys)


def directory(path: Path, files: dict[str, bytes] = FILES) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def tar(path: Path, files: dict[str, bytes] = FILES, *more: tarfile.TarInfo, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for member in more:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def zipped(path: Path, files: dict[str, bytes] = FILES, *more: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for member in more:
            archive.writestr(member, b"/etc/passwd")
    return path


def under(folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in FILES.items()}


# ---------------------------------------------------------------------------------------------------- what is taken in


def check(models: Import, target: Path) -> None:
    assert {path.name for path in target.iterdir()} == KEPT | {"SHA256SUMS"}
    assert all((target / name).read_bytes() == FILES[name] for name in KEPT)
    assert {path.name for path in target.parent.iterdir()} == {target.name}


def test_a_directory(models: Import, tmp_path: Path) -> None:
    source = directory(tmp_path / "tiny")
    (source / "onnx").mkdir()
    out, err = models(source)
    target = models.state / "models" / "tiny"
    check(models, target)
    assert (target / "model.safetensors").samefile(source / "model.safetensors")  # a hard link
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o700
    assert {
        "aiexport-edge: left out modeling_custom.py: code: never run here",
        "aiexport-edge: left out pytorch_model.bin: pickle: loading it could run code",
        "aiexport-edge: left out .gitattributes: hidden",
        "aiexport-edge: left out picture.png: not read by the server",
        "aiexport-edge: left out onnx/: a folder: other formats of the model",
    } == set(err.splitlines())
    assert out.startswith(f"imported 3 files into {target}; put this into the configuration:\n\n[[models]]\n")
    (tmp_path / "edge.toml").write_text(out.partition("\n\n")[2])
    [model] = configuration.load(tmp_path / "edge.toml", tmp_path).models
    assert (model.id, model.source) == ("tiny", str(target))
    assert f"{target} is already there" in models(source, status=1)[1]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tar, "tiny.tar"),
        (lambda path: tar(path, under("some/where"), mode="w:gz"), "tiny.tar.gz"),
        (lambda path: tar(path, {"./" + name: content for name, content in FILES.items()}, mode="w:xz"), "tiny.tar.xz"),
        (lambda path: zipped(path, under("tiny") | {"tiny/old/config.json": b"{}"}), "tiny.zip"),
    ],
)
def test_archives(models: Import, tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    document = json.loads(models(make(tmp_path / name), "--json")[0])
    target = models.state / "models" / "tiny"
    check(models, target)
    assert document["directory"] == str(target)
    assert document["linked"] == 0
    assert {file["path"] for file in document["files"]} == {str(target / name) for name in KEPT}
    assert all(re.fullmatch(r"[0-9a-f]{64}", file["sha256"]) for file in document["files"])
    assert tomllib.loads(document["entry"])["models"][0]["source"] == str(target)
    assert len(document["skipped"]) >= 4


def test_a_snapshot_of_the_download_cache(models: Import, tmp_path: Path) -> None:
    """Its files are links to blobs of the same repository, which are followed; the model has the repository's name."""
    repository = tmp_path / "models--Org--Tiny-1B"
    blobs = directory(repository / "blobs", {f"blob{i}": FILES[name] for i, name in enumerate(sorted(KEPT))})
    snapshot = directory(repository / "snapshots" / "abc", {})
    for i, name in enumerate(sorted(KEPT)):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"blob{i}"))
    models(snapshot)
    check(models, models.state / "models" / "Tiny-1B")
    assert len(list(blobs.iterdir())) == 3
    (snapshot / "extra.json").symlink_to("/etc/passwd")
    assert "is a link" in models(snapshot, "--to", str(tmp_path / "again"), status=1)[1]


def test_another_place(models: Import, tmp_path: Path) -> None:
    source = directory(tmp_path / "tiny")
    models(source, "--to", str(tmp_path / "elsewhere"))
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == KEPT | {"SHA256SUMS"}
    assert "make it, or name another" in models(source, "--to", str(tmp_path / "a" / "b"), status=1)[1]
    assert "name a place outside" in models(source, "--to", str(source / "copy"), status=1)[1]
    assert not models.state.exists()


def test_where_no_link_can_be_made(models: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    source = directory(tmp_path / "tiny")
    models(source)
    target = models.state / "models" / "tiny"
    check(models, target)
    assert not (target / "model.safetensors").samefile(source / "model.safetensors")


# ---------------------------------------------------------------------------------------------------- verify


def test_verify_compares_with_the_hashes_of_the_import(models: Import, tmp_path: Path) -> None:
    models(tar(tmp_path / "tiny.tar"))
    target = models.state / "models" / "tiny"
    config = tmp_path / "aiexport-edge.toml"
    config.write_text(f'[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "{target}"\n')
    assert models.run("verify")[0].endswith("tiny: complete\n")

    altered = bytearray(FILES["model.safetensors"])
    altered[-1] ^= 1
    (target / "model.safetensors").write_bytes(altered)
    out, _ = models.run("verify", status=1)
    assert "model.safetensors is not what SHA256SUMS says it was; import the model again" in out

    (target / "model.safetensors").write_bytes(FILES["model.safetensors"])
    (target / "SHA256SUMS").write_text("0" * 64 + "  ../../store.db\n")
    assert "is no list of hashes" in models.run("verify", status=1)[0]
    (target / "SHA256SUMS").write_text("0" * 64 + "  gone.json\n")
    assert "gone.json is missing, which SHA256SUMS lists" in models.run("verify", status=1)[0]


def test_the_sources_own_hashes_count(models: Import, tmp_path: Path) -> None:
    models(tar(tmp_path / "tiny.tar"))
    exported = tmp_path / "exported"
    shutil.copytree(models.state / "models" / "tiny", exported)
    models(exported)
    (exported / "tokenizer.json").write_text("[]")
    _, err = models(exported, "--to", str(tmp_path / "again"), status=1)
    assert "tokenizer.json is not what SHA256SUMS says it was" in err
    assert not (tmp_path / "again").exists()


# ---------------------------------------------------------------------------------------------------- what is refused


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (member("../escaped.json"), "leads out of it"),
        (member("/absolute.json"), "leads out of it"),
        (member("a/../../escaped.py"), "leads out of it"),
        (member("a\\..\\b.json"), "leads out of it"),
        (member("\x1b[2J.json"), "leads out of it"),
        (member("link.json", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member("hard.json", tarfile.LNKTYPE, "config.json"), "is a link"),
        (member("pipe", tarfile.FIFOTYPE), "is a device"),
        (member("device", tarfile.CHRTYPE), "is a device"),
        (member("config.json"), "is there twice"),
        (member("./config.json"), "is there twice"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_tars(models: Import, tmp_path: Path, bad: tarfile.TarInfo, expected: str) -> None:
    models.refuses(tar(tmp_path / "bad.tar", FILES, bad), expected)
    assert not (tmp_path / "escaped.json").exists()
    assert b"\x1b" not in models(tmp_path / "bad.tar", status=1)[1].encode()


def test_a_header_that_would_fill_memory(models: Import, tmp_path: Path) -> None:
    huge = member("x", tarfile.XHDTYPE, size=4 << 20)
    models.refuses(tar(tmp_path / "bad.tar.gz", {}, huge, mode="w:gz"), "a header that is too long")


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("../escaped.json", 0, "leads out of it"),
        ("/absolute.json", 0, "leads out of it"),
        ("link.json", stat.S_IFLNK | 0o777, "is a link"),
        ("pipe.json", stat.S_IFIFO, "is a device"),
    ],
)
def test_hostile_zips(models: Import, tmp_path: Path, name: str, mode: int, expected: str) -> None:
    bad = zipfile.ZipInfo(name)
    bad.external_attr = mode << 16
    models.refuses(zipped(tmp_path / "bad.zip", FILES, bad), expected)


def test_a_zip_that_lies_about_a_size(models: Import, tmp_path: Path) -> None:
    """The directory at its end says less than there is."""
    path = zipped(tmp_path / "bad.zip", {**FILES, "config.json": b"{}" + b" " * 998})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24  # the first entry's uncompressed size
    assert struct.unpack_from("<I", data, at) == (1000,)
    struct.pack_into("<I", data, at, 10)
    path.write_bytes(data)
    models.refuses(path, "damaged")


@pytest.mark.parametrize("name", ["bad.tar", "bad.tar.gz", "bad.tar.xz", "bad.tar.bz2", "bad.zip"])
def test_damaged_archives(models: Import, tmp_path: Path, name: str) -> None:
    kind = name.rpartition(".")[2]
    whole = zipped(tmp_path / "w") if kind == "zip" else tar(tmp_path / "w", mode="w" if kind == "tar" else f"w:{kind}")
    data = whole.read_bytes()
    for content in (b"", b"not an archive", data[: 2570 if kind == "tar" else len(data) // 2]):
        (tmp_path / name).write_bytes(content)
        models.refuses(tmp_path / name, str(tmp_path / name))


def without(*names: str, **more: bytes) -> dict[str, bytes]:
    return {name: content for name, content in (FILES | more).items() if name not in names}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (without("model.safetensors"), "weights as pickles can run code"),
        (without("config.json"), "holds no config.json"),
        (without("tokenizer.json"), "tokenizer.json is missing"),
        (FILES | {"model.safetensors": safetensors()[:-1]}, "is cut short"),
        (
            FILES | {"model.safetensors.index.json": b'{"weight_map": {"v": "../../x.safetensors"}}'},
            "lacks v, which model.safetensors.index.json says it holds",
        ),
    ],
)
def test_what_is_not_whole(models: Import, tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    models.refuses(directory(tmp_path / "bad", files), expected)
    models.refuses(tar(tmp_path / "bad.tar", files), expected)


def test_links_and_pipes_in_a_directory(models: Import, tmp_path: Path) -> None:
    source = directory(tmp_path / "bad")
    (source / "link.json").symlink_to("/etc/passwd")
    models.refuses(source, "'link.json' is a link")
    (source / "link.json").unlink()
    os.mkfifo(source / "pipe.json")
    models.refuses(source, "'pipe.json' is a device or a pipe")


def test_several_models_and_no_source(models: Import, tmp_path: Path) -> None:
    models.refuses(tar(tmp_path / "two.tar", under("a") | under("b")), "holds several models (a, b)")
    models.refuses(tmp_path / "nowhere", "there is no directory or archive")
    (tmp_path / "x.tar.zst").write_bytes(b"")
    assert "unpack it first: zstd -d" in models(tmp_path / "x.tar.zst", "--to", str(tmp_path / "x"), status=1)[1]
    (tmp_path / "x.rar").write_bytes(b"")
    assert "is no directory and none of .tar" in models(tmp_path / "x.rar", status=1)[1]
    strange = directory(tmp_path / "a b")
    assert "'a b' is no name for a model's directory; name one with --to" in models(strange, status=1)[1]


def test_too_many_files(models: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sources, "MAX_ENTRIES", 5)
    models.refuses(tar(tmp_path / "many.tar"), "holds more than 5 files")


def test_a_disk_without_room(models: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_import, "RESERVE", 1 << 60)
    models.refuses(tar(tmp_path / "tiny.tar"), "free some, or name another disk with --to")


# ---------------------------------------------------------------------------------------------------- cut short


def test_what_a_killed_import_left_is_removed(models: Import, tmp_path: Path) -> None:
    left = models.state / "models" / ".tiny.importing"
    directory(left / "0", {"half.safetensors": b"x"})
    models(directory(tmp_path / "tiny"))
    check(models, models.state / "models" / "tiny")


def test_two_imports_of_one_model(models: Import, tmp_path: Path) -> None:
    staging = models.state / "models" / ".tiny.importing"
    staging.mkdir(parents=True)
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another import into" in models(directory(tmp_path / "tiny"), status=1)[1]
    os.close(descriptor)
    models(tmp_path / "tiny")
    check(models, models.state / "models" / "tiny")
