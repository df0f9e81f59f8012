"""Is this face real or forged, how sure are we, and why?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

__version__ = "0.1.0"


def load(name: str, **options: Any) -> Pipeline:
    """Load a detector or an explainer to ask it about images: `load("checkpoints/m2f2").explain("photo.jpg")`.

    options: those of `Pipeline.from_pretrained` (device, precision, quantization, faces, batch_size, prior, stability).
    """
    from llava.pipeline.pipeline import Pipeline  # here, so that `import llava` stays light

    return Pipeline.from_pretrained(name, **options)
