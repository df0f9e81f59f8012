"""Pixels to evidence: every detector by its name. A new detector is one file and one line here."""

from llava.core.registry import Registry
from llava.detectors.base import Detector

DETECTORS: Registry[type[Detector]] = Registry(
    "detector",
    {
        "m2f2det": "llava.detectors.m2f2det:M2F2Det",
        "cnn": "llava.detectors.cnn:FaceCnn",
        "vit3": "llava.detectors.vit3:ViT3",
        "baseline": "llava.detectors.baselines:Baseline",
        "radar": "llava.detectors.radar:Radar",
        "ensemble": "llava.detectors.ensemble:Ensemble",
    },
)
