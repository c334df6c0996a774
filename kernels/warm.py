"""Compiles every CPU kernel into its cache: `python -m aiexport_edge.kernels.warm`, a step of the installation.

Without it the first start of an engine compiles them. What is compiled fits this processor and these versions only.
Knows no operation: importing a module of `kernels/cpu` is what compiles it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from aiexport_edge.kernels import cpu


def warm() -> list[str]:
    """Imports every module of `kernels/cpu`; their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(cpu.__path__))
    for name in names:
        importlib.import_module(f"{cpu.__name__}.{name}")
    return names


def main() -> int:
    warm()
    return 0


if __name__ == "__main__":
    sys.exit(main())
