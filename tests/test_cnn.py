"""The CNN that is taught by forgeries: its losses against independent computation, its weights from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.core.types import REGIONS
from llava.detectors.base import create
from llava.detectors.cnn import FaceCnn, FaceCnnConfig, region_loss
from llava.ops.forge import ARTEFACTS


def cnn(**changes: object) -> FaceCnn:
    torch.manual_seed(0)
    return FaceCnn(FaceCnnConfig(backbone="conv_tiny", image_size=64, width=16, **changes))  # type: ignore[arg-type]


def test_the_region_loss_knows_the_whole_face_and_leaves_the_unknown_out() -> None:
    logits = torch.randn(3, len(REGIONS), generator=torch.Generator().manual_seed(0))
    told = logits.log_softmax(dim=1)
    expected = -(told[0, 2] + told[1].mean()) / 2
    torch.testing.assert_close(region_loss(logits, torch.tensor([2, len(REGIONS), -1])), expected)
    assert region_loss(logits, torch.tensor([-1, -1, -1])) == 0


def test_what_training_tells_is_learned_beside_the_class() -> None:
    detector, images, labels = cnn(), torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    told = {"region": torch.tensor([-1, 1, -1, 5]), "artefact": torch.tensor([-1, 3, -1, 6])}
    output = detector(images, labels=labels, masks=torch.zeros(4, 4, 4), **told)
    assert set(output.losses) == {"class", "map", "region", "trace"}
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    named = dict(zip(detector.evidence_names, output.evidence.T, strict=True))
    for names in (REGIONS, ARTEFACTS):
        torch.testing.assert_close(sum(named[name] for name in names), torch.ones(4))
    assert output.evidence_map.shape == (4, 4, 4) and 0 <= output.evidence_map.min() <= output.evidence_map.max() <= 1
    assert set(detector(images, labels=labels).losses) == {"class"}
    assert detector(images).loss is None


def test_softer_shares_keep_their_sum() -> None:
    detector = cnn()
    evidence = detector(torch.randn(2, 3, 64, 64)).evidence
    softer = detector.soften(evidence, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(softer[0], evidence[0])
    torch.testing.assert_close(softer[:, :2], evidence[:, :2])
    for part in (slice(2, 7), slice(7, 14)):
        torch.testing.assert_close(softer[:, part].sum(dim=1), torch.ones(2))
    assert softer[1, 2:].max() < evidence[1, 2:].max()


def test_wrong_settings_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"image_size: 100 .* multiples of 32"):
        cnn_config(image_size=100)
    with pytest.raises(ValueError, match=r"weights: a file is for efficientnet_lite0.*not for 'conv_tiny'"):
        cnn_config(weights="a.pth")


def cnn_config(**changes: object) -> FaceCnnConfig:
    return FaceCnnConfig(**{"backbone": "conv_tiny", "image_size": 64, **changes})  # type: ignore[arg-type]


def published_state(detector: FaceCnn) -> dict[str, torch.Tensor]:
    """Give random weights in the layout of the published files: other names, the same order, a classifier after it."""
    generator = torch.Generator().manual_seed(1)
    state = {
        f"_layer{number}.{name.rpartition('.')[2]}": torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        for number, (name, tensor) in enumerate(detector.backbone.state_dict().items())
    }
    return {**state, "_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def test_published_weights_fill_the_backbone_and_nothing_else(tmp_path: Path) -> None:
    detector = create("cnn", {"weights": str(tmp_path / "lite0.pth"), "image_size": 32})
    with pytest.raises(FileNotFoundError, match=r"lite0\.pth"):
        detector.load_pretrained()
    state, before = published_state(detector), detector.classifier.weight.clone()
    torch.save(state, tmp_path / "lite0.pth")
    detector.load_pretrained()
    for tensor, theirs in zip(detector.backbone.state_dict().values(), state.values(), strict=False):
        assert torch.equal(tensor, theirs)
    assert torch.equal(detector.classifier.weight, before)
    assert str(tmp_path) not in str(detector.describe()), "a saved detector says nothing of where the file lay"
    first, *rest = state.items()
    torch.save(dict([*rest[:1], first, *rest[1:]]), tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match="another network"):
        detector.load_pretrained()


def test_the_default_is_small_enough_to_ship() -> None:
    count = sum(p.numel() for p in create("cnn", {}).parameters())
    assert count <= 6_000_000
