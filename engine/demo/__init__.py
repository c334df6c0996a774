"""The demo model: a very small language model, trained by this package and committed with it.

``aiexport-edge serve`` runs it where nothing else is configured. It demonstrates the machinery, not intelligence.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""The committed Hugging Face directory."""
