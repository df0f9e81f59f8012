"""Image to verdict and explanation: the one way that the command line, programs and servers ask.

What runs a model is imported only when it is asked for, so that `m2f2 detect --help` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {"Pipeline": "llava.pipeline.pipeline:Pipeline", "Chat": "llava.pipeline.pipeline:Chat"}


def __getattr__(name: str) -> Any:
    """Import a public class by its name. Raises AttributeError for any other name."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)
