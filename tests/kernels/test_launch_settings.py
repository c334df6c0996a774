"""What launch settings are decided from, and what is refused: pure functions, no card."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this system")

from aiexport_edge.kernels.gpu import launch, qk_norm_rope, rms_norm
from aiexport_edge.kernels.gpu.compile import MOST_BLOCKS, MOST_WARPS, Resources
from aiexport_edge.kernels.gpu.elementwise import num_warps_for


def card(name: str, major: int, minor: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=40)


def test_a_card_says_its_architecture() -> None:
    launch._of_cuda_device.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=card("H200", 9, 0)):
        assert launch.architecture_of(torch.device("cuda", 0)) == launch.Architecture(90, 40)
    launch._of_cuda_device.cache_clear()


def test_an_old_card_is_refused_by_name() -> None:
    launch._of_cuda_device.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=card("Tesla T4", 7, 5)),
        pytest.raises(launch.UnsupportedDevice, match=r"Tesla T4 has compute capability 7\.5; 8\.0 or newer is needed"),
    ):
        launch.architecture_of(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, 166912), (86, 101376), (87, 101376), (89, 101376), (90, 232448), (103, 232448), (121, 101376), (110, 101376)],
)
def test_shared_memory_limits(capability: int, expected: int) -> None:
    """A capability that is not in the table takes what is surely there."""
    assert launch.shared_limit(capability) == expected


def test_every_architecture_is_in_every_table() -> None:
    capabilities = {each.capability for each in launch.KNOWN}
    assert capabilities == set(launch.SHARED_LIMIT) == set(MOST_WARPS) == set(MOST_BLOCKS)


@pytest.mark.parametrize(("elements", "warps"), [(1, 1), (256, 1), (257, 2), (4096, 16), (1 << 20, 16)])
def test_warps_for_a_row(elements: int, warps: int) -> None:
    assert num_warps_for(elements) == warps


def test_norm_rows_fit_a_block() -> None:
    for hidden_size in (64, 1000, 4096, 5120, rms_norm.LARGEST_ROW):
        setting = rms_norm.settings(hidden_size)
        assert setting["BLOCK"] >= hidden_size
        assert setting["num_warps"] <= 32
    x = torch.empty(1, rms_norm.LARGEST_ROW + 1, device="meta")
    with pytest.raises(ValueError, match="longer than"):
        rms_norm.rms_norm_launch(x, x[0], 1e-6)


def test_few_tokens_are_spread_over_more_programs() -> None:
    assert qk_norm_rope.settings(1, 128)["HEADS"] < qk_norm_rope.settings(4096, 128)["HEADS"]
    assert qk_norm_rope.settings(1, 2048)["HEADS"] == 1


def test_faults_are_named() -> None:
    within = Resources(128, 0, 0, 40000, 4, 4, 16)
    assert within.faults(80, may_spill=False) == []
    beyond = Resources(255, 8, 8, 150000, 16, 0, 16)
    assert [fault.split()[0] for fault in beyond.faults(86, may_spill=False)] == ["shared", "255", "spills"]
    assert len(beyond.faults(86, may_spill=True)) == 2


def test_an_empty_grid_launches_nothing() -> None:
    launch.Launch(kernel=None, grid=(0, 3), arguments=()).run()
