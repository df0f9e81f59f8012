"""Image to verdict and explanation: the one way that the command line, programs and servers ask.

What runs a model is imported only when it is asked for, so that `m2f2 detect --help` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llava.pipeline.settings import FaceSettings, PipelineSettings, Quantization

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

_PUBLIC = {"Pipeline": "llava.pipeline.pipeline:Pipeline", "Chat": "llava.pipeline.pipeline:Chat"}


def __getattr__(name: str) -> Any:
    """Import a public class by its name. Raises AttributeError for any other name."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def load(settings: PipelineSettings, name: str, quantization: Quantization | None = None) -> Pipeline:
    """Load a model; `quantization` where it was spelled in another way. Raises ValueError or FileNotFoundError."""
    from transformers.utils.logging import disable_progress_bar

    from llava.pipeline.pipeline import Pipeline

    disable_progress_bar()
    return Pipeline.from_pretrained(
        name,
        device=settings.device,
        precision=settings.precision,
        quantization=quantization or settings.quantization,
        faces=FaceSettings(face=settings.face, margin=settings.margin, whole_from=settings.whole_from),
        batch_size=settings.batch_size,
        prior=settings.prior,
        stability=settings.stability,
    )
