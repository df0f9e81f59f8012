"""What `m2f2 score` is told, and what its engines are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from llava.core.cluster import ClusterSettings
from llava.core.config import setting
from llava.pipeline.settings import PipelineSettings

Missing: TypeAlias = Mapping[int, Sequence[str]]  # names by number of the part


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(PipelineSettings):
    """What is scored, by which model, where the rows go, and who does the work."""

    source: str = setting(help="folder, zip, image, or a list of images: .txt, .csv, .parquet", positional=True)
    out: str = setting(help="folder to write; its rows/ is one table for pandas and pyarrow")
    model: str = setting("m2f2", "detector or merged explainer: folder, name in checkpoints/, or hub id")
    face: Literal["largest", "off"] = setting("largest", "largest = the largest face, off = the whole image")
    column: str = setting("path", "column of a .csv or .parquet list that holds the names")
    root: str | None = setting(None, "folder where relative names of a list begin; none = that of the list")
    engine: Literal["local", "ray"] = setting("local", "local = this process, ray = many, on one machine or a cluster")
    workers: int | None = setting(None, "processes of --engine ray; none = as many as there is room for")
    part_rows: int = setting(1000, "rows of a file; what a killed run has to do again is a file for each process")
    cluster: ClusterSettings = setting(ClusterSettings())

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be done."""
        super().__post_init__()
        if Path(self.out).is_file() or self.out.endswith((".parquet", ".csv")):
            raise ValueError(f"out: {self.out!r} is the name of a file; give a folder, its rows/ is read as one table.")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("workers: only --engine ray has more than one; add it, or leave --workers out.")
        for name in ("part_rows", "workers", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not usable; allowed: 1 or more.")
