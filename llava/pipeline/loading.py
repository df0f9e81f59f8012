"""Settings to a pipeline; what runs a model is imported here alone, so that `--help` does not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava.pipeline.settings import FaceSettings, PipelineSettings, Quantization

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline


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
