"""The three-class ViT's own promises: its evidence, its ImageNet start, and published files that load as they are."""

from __future__ import annotations

import json
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import vit_b_16

from llava.core.weights import shapes_only, without_random_weights
from llava.data.dataset import to_tensor
from llava.detectors import DETECTORS
from llava.detectors.base import load
from llava.detectors.published import LAYOUTS, Unseen, layout_of, ready_detector
from llava.detectors.vit3 import PublishedViT3, ViT3, ViT3Config

TWO_HEADS = ViT3Config(  # 64 channels each, as published, so that shapes say everything
    image_size=24, patch_size=8, num_hidden_layers=11, num_attention_heads=2, hidden_size=128, intermediate_size=16
)


def vit3(config: ViT3Config | None = None) -> ViT3:
    torch.manual_seed(0)
    return ViT3(config or ViT3Config.tiny()).eval()


def published(detector: ViT3) -> dict[str, Tensor]:
    """Give the weights by their published names."""
    return {name.removeprefix("vit."): tensor for name, tensor in detector.state_dict().items()}


def old_name(name: str) -> str:
    """Give the name that torchvision used before 0.13."""
    return name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


def images(config: ViT3Config, count: int = 3) -> Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


# ---- the network ----------------------------------------------------------------------------------------------------


def test_evidence_is_the_softmax_by_name() -> None:
    detector = vit3()
    with torch.no_grad():
        detector.vit.heads.head.weight.zero_()
        detector.vit.heads.head.bias.copy_(torch.tensor([0.1, 0.6, 0.3]).log())  # ai_generated, deepfake, real
        output = detector(images(detector.config))
    row = dict(zip(detector.evidence_names, output.evidence[0].tolist(), strict=True))
    assert row == pytest.approx({"p_ai_generated": 0.1, "p_deepfake": 0.6, "p_real": 0.3, "p_fake": 0.7}, abs=1e-6)
    torch.testing.assert_close(detector.p_fake(output.logits), output.evidence[:, 1])


def test_class_weights_count_by_the_classes_own_order() -> None:
    detector = vit3()
    detector.class_weights.copy_(torch.tensor([5.0, 2.0, 1.0]))
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        output = detector(images(detector.config), labels)
    nll = -output.logits.log_softmax(dim=1)[torch.arange(3), labels]
    torch.testing.assert_close(output.loss, (nll * torch.tensor([5.0, 1.0, 2.0])).sum() / 8)


def test_the_head_is_not_blind_before_training() -> None:
    output = vit3()(images(ViT3Config.tiny()))
    assert output.logits.std(dim=0).min() > 1e-3, "torchvision's head starts at zero, the published one does not"


BLACK_AND_WHITE = {"half": (-1.0, 1.0), "none": (0.0, 1.0), "imagenet": (-0.485 / 0.229, (1 - 0.485) / 0.229)}


@pytest.mark.parametrize("normalisation", BLACK_AND_WHITE)
def test_a_picture_is_squashed_and_normalised(normalisation: Any) -> None:
    spec = vit3(replace(ViT3Config.tiny(), normalisation=normalisation)).inputs["pixel_values"]
    picture = np.zeros((40, 96, 3), np.uint8)
    picture[:, 72:] = 255
    seen = to_tensor(picture, spec)
    assert seen.shape == (3, 32, 32)
    black, white = BLACK_AND_WHITE[normalisation]
    assert seen[0, 5, [0, 31]].tolist() == pytest.approx([black, white])
    assert (seen[0, 5] > (black + white) / 2).sum() == 8, "a quarter of the width is white, before and after"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size: 30 is no multiple of patch_size"),
        ({"num_attention_heads": 5}, "hidden_size: 48 is no multiple of num_attention_heads"),
        ({"pretrained": True}, "leave the sizes as they are"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ViT3Config.tiny(), **changes)


# ---- ImageNet -------------------------------------------------------------------------------------------------------


def imagenet_file(folder: Path) -> None:
    """Write what the cache of torch.hub holds, with constants for weights."""
    with shapes_only():
        shapes = {name: tuple(tensor.shape) for name, tensor in vit_b_16().state_dict().items()}
    state = {old_name(n): torch.full((), 0.5).expand(shape) for n, shape in shapes.items()}  # one number on disk each
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, folder / "hub" / "checkpoints" / "vit_b_16-c867db91.pth")


def test_imagenet_weights_fill_all_but_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    imagenet_file(tmp_path)
    with torch.device("meta"):
        detector = ViT3(ViT3Config(pretrained=True))
    detector.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    detector.load_pretrained()
    filled = {name for name, parameter in detector.named_parameters() if bool((parameter == 0.5).all())}
    left = {name for name, parameter in detector.named_parameters() if not parameter.any()}
    assert left == {"vit.heads.head.weight", "vit.heads.head.bias"}
    assert filled | left == {name for name, _ in detector.named_parameters()}


def test_imagenet_weights_that_are_nowhere_say_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with torch.device("meta"):
        detector = ViT3(ViT3Config(pretrained=True))
    with pytest.raises(FileNotFoundError, match=r"vit_b_16-c867db91\.pth into .*hub/checkpoints.*pretrained false"):
        detector.load_pretrained()
    vit3().load_pretrained()  # asks for nothing


# ---- published files ------------------------------------------------------------------------------------------------


def test_every_layout_is_that_of_a_detector_of_ours() -> None:
    assert set(LAYOUTS) <= set(DETECTORS)
    assert all(LAYOUTS.get(name).detector is DETECTORS.get(name) for name in LAYOUTS)
    assert all(LAYOUTS.get(name).marks for name in LAYOUTS), "without a mark a layout would take every file"


@pytest.mark.parametrize("kind", ["flat", "old_names", "wrapped"])
def test_a_published_file_gives_the_same_logits(tmp_path: Path, checkpoints: Path, kind: str) -> None:
    original = vit3(TWO_HEADS)
    content: dict[str, Any] = published(original)
    if kind == "old_names":
        content = {
            n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in content.items()
        }
    if kind == "wrapped":
        content = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in content.items()}}
    torch.save(content, tmp_path / "any name.pth")
    folder = ready_detector(tmp_path / "any name.pth")
    assert folder.parent == checkpoints / "converted" and folder == ready_detector(tmp_path / "any name.pth")
    ours = load(folder, expected="vit3")
    assert ours.config == TWO_HEADS
    seen = images(TWO_HEADS)
    with torch.no_grad():
        torch.testing.assert_close(ours(seen).logits, original(seen).logits, rtol=0, atol=0)
    report = json.loads((folder / "conversion.json").read_text())
    assert len(report["moves"]) == len(original.state_dict()) and {m["action"] for m in report["moves"]} == {"renamed"}
    assert report["left"] == (["epoch"] if kind == "wrapped" else [])


def test_a_folder_stands_for_the_one_published_file_in_it(tmp_path: Path, checkpoints: Path) -> None:
    folder = tmp_path / "vit3class.pth"  # the published hub id ends in .pth
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, folder / "other.pth")
    assert ready_detector(folder) == folder
    torch.save(published(vit3(TWO_HEADS)), folder / "weights.pth")
    assert load(ready_detector(folder)).config == TWO_HEADS
    torch.save(published(vit3(TWO_HEADS)), folder / "retrained.pth")
    with pytest.raises(ValueError, match=r"several published detectors \(retrained.pth, weights.pth\); name one"):
        ready_detector(folder)
    vit3().save(folder)
    assert ready_detector(folder) == folder, "what has a config.json is ours"


def test_what_is_missing_or_too_much_is_named_by_its_published_name(tmp_path: Path) -> None:
    weights = published(vit3(TWO_HEADS))
    del weights["encoder.layers.encoder_layer_3.ln_2.bias"]
    torch.save({**weights, "surprise": torch.ones(1)}, tmp_path / "short.pth")
    missing = r"1 missing \(encoder\.layers\.encoder_layer_3\.ln_2\.bias\); 1 unexpected \(surprise\)"
    with pytest.raises(ValueError, match=missing):
        PublishedViT3(tmp_path / "short.pth").write(tmp_path / "out")
    weights = published(vit3(TWO_HEADS))
    torch.save({**weights, "heads.head.weight": torch.ones(1000, 128)}, tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match=r"heads\.head\.weight: \[1000, 128\] where \[3, 128\] is needed"):
        PublishedViT3(tmp_path / "imagenet.pth").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.save({k: v for k, v in weights.items() if "mlp" not in k}, tmp_path / "no_mlp.pth")
    with pytest.raises(ValueError, match=r"not the tensors of a three-class ViT: .*mlp\.0\.bias"):
        PublishedViT3(tmp_path / "no_mlp.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds 1 tensors \(a, \.\.\.\), .*known are files of m2f2det, vit3"):
        layout_of(tmp_path / "other.pth")


def test_heads_that_shapes_do_not_show_are_asked_for(tmp_path: Path) -> None:
    original = vit3()
    torch.save(published(original), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"48 channels are no multiple of 64.*--heads NUMBER"):
        PublishedViT3(tmp_path / "tiny.pth")
    assert PublishedViT3.open(tmp_path / "tiny.pth", Unseen(heads=3)).config == original.config


def test_building_without_random_weights_ends_whatever_memory_held() -> None:
    """trunc_normal_ draws again until all values lie in bounds; memory that is left as it was may never do so."""
    with without_random_weights():
        weights = torch.nn.init.trunc_normal_(torch.full((4, 4), 1e9), std=0.02)
    assert not weights.any()
