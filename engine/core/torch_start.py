"""Imports torch as a core needs it: sooner than `import torch` does.

A quarter of torch's import registers, in Python, what its operations would do on the "meta" device, where tensors have
shapes and no numbers: for compilers and exporters of models, none of which a core uses. Where torch is of a version and
build that is known to do without, that module is left out. It has one thing that others need there: without it
`torch.Generator` cannot be made.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from pathlib import Path
from types import ModuleType

_LEFT_OUT = "torch._meta_registrations"
_KNOWN = re.compile(r"^__version__ = '2\.13\.\d+\+cpu'$", re.MULTILINE)  # a build for processors alone
_importing = threading.Lock()


def import_torch() -> None:
    """Afterwards torch is imported, whole where leaving anything out is not known to be right. For any thread."""
    with _importing:
        if "torch" in sys.modules:
            return
        leaves_out = _is_known()
        if leaves_out:
            sys.modules[_LEFT_OUT] = ModuleType(_LEFT_OUT)
        try:
            import torch
        finally:
            if leaves_out:
                del sys.modules[_LEFT_OUT]
        if leaves_out:
            del torch._meta_registrations  # who wants it after all imports the real one


def _is_known() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        return _KNOWN.search((Path(spec.origin).parent / "version.py").read_text()) is not None
    except OSError:
        return False
