"""The tensors of one product by their roles in its format ("weight_scale", "qzeros"), and checks of them.

Owns what is said of a tensor that is missing, or has another shape, dtype or values than the format asks for. Knows no
format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from aiexport_edge.engine.models.config_values import ModelError
from aiexport_edge.kernels.quantization import Weight

FLOATS = ("F32", "F16", "BF16")

Shape = tuple[int, int]
# What makes a weight: the tensors' roles, and the weight of them and its shape; None where it is not stored so.
Found = tuple[tuple[str, ...], Callable[[Mapping[str, Tensor], Shape], Weight]] | None


class Header(Protocol):
    """What a file says about a tensor."""

    @property
    def file(self) -> object: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


class Source(Protocol):
    """Where tensors are read, by name."""

    def tensor(self, name: str) -> Tensor: ...


class Unreadable(Exception):
    """What is wrong with a weight's values."""


class ModuleTensors:
    """The tensors `module`.`role` of a product with a weight of `shape` [N, K], by the files' headers."""

    def __init__(self, headers: Mapping[str, Header], module: str, shape: Shape) -> None:
        self._headers = headers
        self.module = module
        self.shape = shape

    def has(self, role: str) -> bool:
        """Whether the files have it."""
        return f"{self.module}.{role}" in self._headers

    def dtype(self, role: str) -> str:
        """Of a tensor that is there, as safetensors calls it."""
        return self._headers[f"{self.module}.{role}"].dtype

    def shape_of(self, role: str) -> tuple[int, ...] | None:
        """Of the tensor as it is stored, None where there is none."""
        header = self._headers.get(f"{self.module}.{role}")
        return None if header is None else header.shape

    def check(self, role: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor. Raises ModelError unless it is one of `shapes`, and the dtype one of `dtypes`."""
        name = f"{self.module}.{role}"
        header = self._headers.get(name)
        if header is None:
            raise ModelError(f"{name} is missing, though the weight of {self.module} is quantized")
        if header.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ModelError(f"{header.file}: {name} has shape {list(header.shape)}, the format asks for {wanted}")
        if header.dtype not in dtypes:
            raise ModelError(f"{header.file}: {name} is {header.dtype}, the format asks for {' or '.join(dtypes)}")
        return header.shape


def positive(scales: Tensor, name: str) -> Tensor:
    """Scales in float32. Raises Unreadable where one is below zero or not finite."""
    wide = finite(scales, name)
    if bool((wide < 0).any()):
        raise Unreadable(f"{name} has numbers below zero")
    return wide


def finite(scales: Tensor, name: str = "scales") -> Tensor:
    """Scales in float32. Raises Unreadable where one is not finite."""
    wide = scales.float()
    if not bool(wide.isfinite().all()):
        raise Unreadable(f"{name} has numbers that are not finite")
    return wide
