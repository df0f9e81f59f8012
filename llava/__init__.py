"""Is this face real or forged, how sure are we, and why?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from llava.pipeline.pipeline import Pipeline

__version__ = "0.1.0"


def load(name: str | Path | None = None, **options: Any) -> Pipeline:
    """Load a detector or an explainer to ask it about images: `load("checkpoints/m2f2").explain("photo.jpg")`.

    name: `starter`, a folder, a name in `checkpoints/` or a hub id; none = the starter, which comes with the package.
    options: those of `Pipeline.from_pretrained` (device, precision, quantization, faces, batch_size, prior, stability).
    """
    from llava.core.types import STARTER  # here, so that `import llava` stays light
    from llava.pipeline.pipeline import Pipeline

    return Pipeline.from_pretrained(STARTER if name is None else name, **options)
