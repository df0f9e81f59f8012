"""The published three-class ViT and ours give the same numbers: fixtures in the golden format (`--golden-radar`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from golden import Fixture, find
from PIL import Image
from torch import Tensor

from llava.data.dataset import to_tensor
from llava.detectors.base import load
from llava.detectors.published import Unseen, layout_of
from llava.detectors.vit3 import PublishedViT3, ViT3

pytestmark = pytest.mark.e2e
LOGITS, PIXELS, INNER, GRADIENT_MAP, GREY_LEVELS = 5e-5, 1e-5, 1e-4, 1e-3, 2
PERCENT = 0.0101  # one unit of the last digit
NORMALISATIONS = {"app": "half", "imagenet": "imagenet", "none": "none"}  # published place -> our setting


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vit3" in metafunc.fixturenames:
        metafunc.parametrize("vit3", fixtures(metafunc.config), ids=lambda fixture: fixture.name, scope="module")


@cache
def fixtures(config: pytest.Config) -> list[Fixture]:
    """List the fixtures of the ViT, the same objects for every test, so that each is converted once."""
    root: Path = config.getoption("golden_radar")
    return find(root, config, "vit3/logits") if root.is_dir() else []


@pytest.fixture(scope="module")
def ours(vit3: Fixture, tmp_path_factory: pytest.TempPathFactory) -> ViT3:
    """Save the weights as the published file, convert it, and load the result."""
    folder = tmp_path_factory.mktemp(vit3.name)
    torch.save(vit3.weights, folder / "published.pth")
    assert layout_of(folder / "published.pth") is PublishedViT3
    heads = vit3.manifest["model_config"]["num_heads"]
    published = PublishedViT3.open(folder / "published.pth", Unseen(heads=heads))
    published.write(folder / "ours")
    assert {move.action for move in published.plan.moves} == {"renamed"}
    assert len(published.plan.moves) == len(vit3.weights)
    return load(folder / "ours", expected="vit3")


def pictures(vit3: Fixture) -> dict[str, np.ndarray]:
    """Give the fixture's pictures by name, in the order of its arrays."""
    drawn = {name: vit3.image(vit3.manifest["inputs"][name]) for name in vit3.manifest["order"]}
    for name, picture in drawn.items():
        wanted = vit3.manifest["inputs"][name].get("sha256_rgb")
        assert wanted in (None, hashlib.sha256(picture.tobytes()).hexdigest())
    return drawn


def pixels(vit3: Fixture, detector: ViT3) -> Tensor:
    spec = detector.inputs["pixel_values"]
    return torch.stack([to_tensor(picture, spec) for picture in pictures(vit3).values()])


def normalised_as(detector: ViT3, normalisation: str) -> ViT3:
    """Give the same weights with another normalisation."""
    other = ViT3(replace(detector.config, normalisation=normalisation))
    other.load_state_dict(detector.state_dict())
    return other.eval()


def test_sizes_are_read_from_the_shapes(vit3: Fixture, ours: ViT3) -> None:
    config, wanted = ours.config, dict(vit3.manifest["model_config"])
    assert len(ours.classes) == wanted.pop("num_classes")
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    names |= {"hidden_dim": "hidden_size", "mlp_dim": "intermediate_size"}
    assert {key: getattr(config, names.get(key, key)) for key in wanted} == wanted
    assert config.normalisation == "half", "what the published weights were trained with"
    titles = {"ai_generated": "AI-Generated Face", "deepfake": "Deepfake", "real": "Real"}
    assert [titles[name] for name in ours.classes] == vit3.manifest["classes"]


@pytest.mark.parametrize("place", NORMALISATIONS)
def test_logits_and_probabilities(vit3: Fixture, ours: ViT3, place: str) -> None:
    detector = normalised_as(ours, NORMALISATIONS[place])
    with torch.no_grad():
        output = detector(pixels(vit3, detector))
    vit3.compare(f"{place}.logits", output.logits, LOGITS)
    wanted = vit3.expected[f"{place}.probs"]
    in_order = [detector.evidence_names.index(f"p_{name}") for name in detector.classes]
    vit3.close(f"{place}.probs", output.evidence[:, in_order], wanted, LOGITS)
    vit3.close(f"{place}.p_fake", detector.p_fake(output.logits), wanted[:, 0] + wanted[:, 1], LOGITS)
    assert output.logits.argmax(dim=1).tolist() == vit3.expected[f"{place}.argmax"].tolist()


def test_pixels_tokens_and_a_raw_tensor(vit3: Fixture, ours: ViT3) -> None:
    seen = pixels(vit3, ours)
    vit3.compare("app.pixels", seen, PIXELS)
    with torch.no_grad():
        tokens = ours.vit._process_input(seen[:1])
        tokens = ours.vit.encoder(torch.cat([ours.vit.class_token, tokens], dim=1))
        vit3.compare("app.encoder_tokens_image0", tokens, INNER)
        vit3.compare("tensor.logits", ours(vit3.input("tensor")).logits, LOGITS)


def gradient_map(detector: ViT3, image: Tensor, chosen: int) -> np.ndarray:
    """Give the published "heat map" (S, S): mean gradient over channels after the last block's first norm, stretched.

    It is no Grad-CAM: what the layer answers has no part in it.
    """
    kept: list[Tensor] = []
    layer = detector.vit.encoder.layers[-1].ln_1
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = detector(image[None]).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, chosen], kept[0])
    side = detector.config.image_size // detector.config.patch_size
    cells = stretched(gradient[0, 1:].mean(dim=-1).reshape(side, side).numpy())
    size = detector.config.image_size
    return stretched(cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC))


def stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def overlaid(picture: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Give the published picture of a map: half colour map, half the picture squashed to the map's size."""
    colours = cv2.applyColorMap(np.uint8(255 * cells), cv2.COLORMAP_JET)[..., ::-1]
    small = np.array(Image.fromarray(picture).resize(cells.shape[::-1]))  # bicubic, unlike what the network sees
    return np.uint8(0.5 * colours + 0.5 * small)


def test_published_gradient_maps(vit3: Fixture, ours: ViT3) -> None:
    wanted = [name for name in vit3.expected if name.startswith("gradcam.") and not name.endswith("@idx")]
    if not wanted:
        pytest.skip("this fixture has no gradient maps")
    drawn, seen = pictures(vit3), pixels(vit3, ours)
    maps: dict[str, np.ndarray] = {}
    for name in sorted(wanted):
        _, image, what = name.split(".")
        if what.startswith("class"):  # the overlay belongs to the last of them
            index = vit3.manifest["order"].index(image)
            maps[image] = gradient_map(ours, seen[index], int(what.removeprefix("class")))
            vit3.compare(name, maps[image], GRADIENT_MAP)
        else:
            vit3.compare(name, overlaid(drawn[image], maps[image]), GREY_LEVELS)


def test_the_percentages_of_the_published_service(vit3: Fixture, ours: ViT3, request: pytest.FixtureRequest) -> None:
    replies = replies_of(request.config.getoption("golden_radar"), vit3.name)
    with torch.no_grad():
        probabilities = ours(pixels(vit3, ours)).logits.softmax(dim=1)
    compared = 0
    for index, name in enumerate(vit3.manifest["order"]):
        for reply in (r for r in replies if r["name"].startswith("predict_") and r["name"].endswith(name)):
            local = reply["json"]["sources"]["local_model"]
            shown = [percentage(local["scores"][title]) for title in vit3.manifest["classes"]]
            vit3.close(f"{name}.percent in the replies", probabilities[index] * 100, shown, PERCENT)
            assert vit3.manifest["classes"][int(probabilities[index].argmax())] == local["prediction"]
            compared += 1
    assert compared >= len(vit3.manifest["order"])


def replies_of(root: Path, name: str) -> list[dict[str, Any]]:
    """Read the recorded answers of the published service, if they are those of this fixture's weights."""
    recorded = json.loads((root / "vit3_replies.json").read_text(encoding="utf-8"))
    if name not in recorded["weights"]:
        pytest.skip(f"the recorded answers are those of the {recorded['weights']}")
    return recorded["replies"]


def percentage(text: str) -> float:
    return float(text.removesuffix("%"))
