"""Devices by name, and the sentences that refuse them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from aiexport_edge.engine.core.device import CACHE_VARIABLE, keep_kernels, select_device
from aiexport_edge.engine.models.config import ModelError


@dataclass(frozen=True)
class FakeCards:
    capabilities: tuple[tuple[int, int], ...] = ()

    def is_available(self) -> bool:
        return bool(self.capabilities)

    def device_count(self) -> int:
        return len(self.capabilities)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return self.capabilities[device]

    def get_device_name(self, device: int) -> str:
        return f"Card {device}"


@pytest.mark.parametrize(
    ("name", "capabilities", "expected"),
    [
        ("auto", (), "cpu"),
        ("auto", ((7, 5),), "cpu"),
        ("auto", ((8, 0),), "cuda:0"),
        ("auto", ((12, 0), (9, 0)), "cuda:0"),
        ("cpu", ((9, 0),), "cpu"),
        ("cuda", ((9, 0),), "cuda:0"),
        ("cuda:1", ((7, 0), (8, 6)), "cuda:1"),
    ],
)
def test_names(name: str, capabilities: tuple[tuple[int, int], ...], expected: str) -> None:
    assert select_device(name, cards=FakeCards(capabilities), built_for_cuda=True) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "capabilities", "built_for_cuda", "sentence"),
    [
        ("cuda:0", (), False, "built without CUDA"),
        ("cuda:0", (), True, "no NVIDIA driver answers"),
        ("cuda:1", ((9, 0),), True, "cuda:0 is the only card"),
        ("cuda:7", ((9, 0), (9, 0)), True, "there are cuda:0 to cuda:1"),
        ("cuda:0", ((7, 5),), True, r"Card 0 has compute capability 7\.5; the kernels need 8\.0"),
        ("tpu", ((9, 0),), True, "there is no device tpu; use auto, cpu or cuda:0"),
        ("cuda:", ((9, 0),), True, "there is no device"),
    ],
)
def test_refusals(name: str, capabilities: tuple[tuple[int, int], ...], built_for_cuda: bool, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        select_device(name, cards=FakeCards(capabilities), built_for_cuda=built_for_cuda)


def test_compiled_kernels_are_kept_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/elsewhere")
    keep_kernels("")
    assert os.environ[CACHE_VARIABLE] == "/elsewhere"
    keep_kernels(str(tmp_path / "state" / "kernels"))
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "state" / "kernels")
    assert (tmp_path / "state" / "kernels").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    (tmp_path / "file").write_text("")
    keep_kernels(str(tmp_path / "file" / "kernels"))
    assert CACHE_VARIABLE not in os.environ
    assert "cannot be written, so kernels are compiled at every start" in capsys.readouterr().err
