"""How strong and how obvious are self-made forgeries? SSIM to their untouched images, and a blind spectrum baseline."""

from __future__ import annotations

from dataclasses import dataclass

from llava.core.config import parse, setting
from llava.core.runtime import write_json
from llava.core.terminal import console
from llava.evaluation.forgeries import open_forged, strength_report, strength_tables
from llava.evaluation.tables import run_script


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure."""

    manifest_path: str = setting(help="manifest.csv that `m2f2 data forge` wrote; images and masks lie beside it")
    split: str = setting("test", "whose forgeries to measure, all = every split; the baseline trains on split train")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    seed: int = setting(0, "seed of the bootstrap")
    json: str | None = setting(None, "write the report to this file as well")


def main() -> None:
    """Print the tables and write the report when asked."""
    settings = parse(Settings, description=__doc__ or "")
    report = strength_report(open_forged(settings.manifest_path), settings.split, settings.n_boot, settings.seed)
    out = console()
    for table in strength_tables(report):
        out.print(table)
    if settings.json:
        write_json(settings.json, report | {"manifest_path": settings.manifest_path})


if __name__ == "__main__":
    run_script(main)
