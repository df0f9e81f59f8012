"""The four plain networks: the published numbers, their small presets, and pixels as each was pretrained with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from golden import Fixture, find

from llava.core.types import NORMALISATIONS, InputSpec
from llava.data.dataset import to_tensor
from llava.detectors.base import create
from llava.detectors.baselines import HEADS, PUBLISHED, Baseline, BaselineConfig

NAMES = {"vit": "vit_small", "resnet": "resnet50", "efficientnet": "efficientnet_b0", "xception": "xception"}
RELATIVE = 1e-4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", fixtures(metafunc.config), ids=lambda fixture: fixture.name)


@cache
def fixtures(config: pytest.Config) -> list[Fixture]:
    root: Path = config.getoption("golden_radar")
    return find(root, config, "radar/baseline") if root.is_dir() else []


@pytest.mark.e2e
def test_published_logits(case: Fixture) -> None:
    detector = Baseline(BaselineConfig(network=NAMES[case.manifest["baseline"]], normalisation="imagenet")).eval()
    detector.load_state_dict(case.weights)
    mean, std = NORMALISATIONS["imagenet"]
    spec = InputSpec(size=224, mean=mean, std=std, interpolation="unfiltered", fit="squash")
    pictures = [case.image(entry) for entry in case.manifest["inputs"].values()]
    with torch.no_grad():
        output = detector(torch.stack([to_tensor(picture, spec) for picture in pictures]))
    case.compare("logit", output.logits[:, 1:], 0, RELATIVE)
    case.compare("prob", output.evidence[:, 1:], 5e-5)


@pytest.mark.parametrize("network", PUBLISHED)
def test_small_ones_are_small_and_of_one_logit(network: str) -> None:
    torch.manual_seed(0)
    detector = Baseline(BaselineConfig(network=network, small=True, image_size=64)).eval()
    assert sum(p.numel() for p in detector.parameters()) < 4_000_000
    images = torch.randn(2, 3, 64, 64)
    output = detector(images)
    assert output.logits[:, 0].eq(0).all()
    torch.testing.assert_close(output.evidence[:, 1], output.logits[:, 1].sigmoid())
    assert any(name.startswith(HEADS) for name in detector.backbone.state_dict()), "what pretraining leaves fresh"


def test_pixels_are_normalised_as_each_was_pretrained_with() -> None:
    import timm

    for network, (name, normalisation) in PUBLISHED.items():
        config = timm.models.get_pretrained_cfg(name or "resnet50.tv_in1k")
        assert config is not None and (config.mean, config.std) == NORMALISATIONS[normalisation], network
        spec = Baseline(BaselineConfig(network=network, small=True)).inputs["pixel_values"]
        assert (spec.mean, spec.std) == (config.mean, config.std)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 40}, "image_size: 40 is not usable"),
        ({"small": True, "pretrained": True}, "ImageNet weights are those of the whole network"),
        ({"network": "vit_smal"}, "vit_small"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("baseline", settings)
