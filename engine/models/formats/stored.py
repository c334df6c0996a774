"""Which tensors of a checkpoint make one product's quantized weight, and reading them (`kernels.quantization`).

Owns which format's rules a product is looked for by; the rules are `fp8.py`'s and `integers.py`'s. Which products a
model has is `loader.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from aiexport_edge.engine.models.config_values import ModelError
from aiexport_edge.engine.models.formats.fp8 import find_fp8
from aiexport_edge.engine.models.formats.integers import find_awq, find_gptq, find_int8, find_packed
from aiexport_edge.engine.models.formats.module_tensors import Found, Header, ModuleTensors, Shape, Source, Unreadable
from aiexport_edge.engine.models.formats.scheme import Quantization
from aiexport_edge.kernels.quantization import Weight

# Scales of activations, which are measured as they come; the weight's own sum of what it multiplies; sizes.
UNREAD = ("input_scale", "input_global_scale", "input_zero_point")

SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One product's weight [N, K]. `tensors` by what they are; `unread` belong to it and are not needed."""

    module: str
    shape: Shape
    tensors: Mapping[str, str]
    unread: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor], Shape], Weight]

    @property
    def names(self) -> list[str]:
        """All of its tensors."""
        return [*self.tensors.values(), *self.unread]

    def read(self, source: Source) -> Weight:
        """The weight, a float tensor where no product takes its form; in memory of its own as far as it was converted.

        Raises ModelError for values that cannot be.
        """
        try:
            return self.decode({role: source.tensor(name) for role, name in self.tensors.items()}, self.shape)
        except Unreadable as error:
            raise ModelError(f"{self.module}: {error}") from None


def find_stored(
    headers: Mapping[str, Header], module: str, shape: Shape, quantization: Quantization
) -> StoredWeight | None:
    """The product `module` as it is stored; None where the files have it in 16 or 32 bits, or not at all.

    Raises ModelError naming the tensor that is missing or has another shape or dtype than the format asks for.
    """
    make = {
        "compressed-tensors": _find_compressed,
        "fp8": find_fp8,
        "fbgemm_fp8": find_fp8,
        "awq": find_awq,
        "gptq": find_gptq,
    }[quantization.method]
    found = make(ModuleTensors(headers, module, shape), quantization)
    if found is None:
        return None
    tensors, decode = found
    unread = tuple(f"{module}.{role}" for role in UNREAD if f"{module}.{role}" in headers)
    return StoredWeight(module, shape, {role: f"{module}.{role}" for role in tensors}, unread, decode)


def find_all(
    headers: Mapping[str, Header],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
) -> dict[str, StoredWeight]:
    """Of the tensors `shapes` that a model needs, those that are quantized weights; `names` are the checkpoint's.

    Raises ModelError as `find_stored` does.
    """
    found = {}
    for name, shape in shapes.items():
        if name.endswith(SUFFIX) and len(shape) == 2:
            module = names[name].removesuffix(SUFFIX)
            stored = find_stored(headers, module, (shape[0], shape[1]), quantization)
            if stored is not None:
                found[name] = stored
    return found


def empty_biases(source: Source, left_over: Iterable[str], stored: Mapping[str, StoredWeight]) -> set[str]:
    """Of the tensors `left_over` the biases of quantized weights that add nothing: GPTQ's writers give every product
    one, whether the model has it or not.
    """
    modules = {weight.module for weight in stored.values()}
    biases = {name for name in left_over if name.endswith(".bias") and name.removesuffix(".bias") in modules}
    return {name for name in biases if not bool(source.tensor(name).any())}


def _find_compressed(module: ModuleTensors, quantization: Quantization) -> Found:
    return find_packed(module, quantization) or find_int8(module) or find_fp8(module, quantization)
