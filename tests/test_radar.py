"""RADAR's own promises: what edges and spectra show, what is repaired, and that every part of it learns."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from llava.core.types import InputSpec
from llava.data.dataset import to_tensor
from llava.data.sources import DataConfig
from llava.detectors.base import create, load
from llava.detectors.published import Unseen, ready_detector
from llava.detectors.radar import Radar, RadarConfig
from llava.detectors.radar_branches import FrequencyBranch
from llava.detectors.radar_published import PublishedRadar, rules_of
from llava.jobs.reasoning import ReasoningSettings, show_reasoning
from llava.ops.edges import sobel_magnitude
from llava.ops.spectrum import high_pass_gate, high_spectrum, published_spectrum

ROOT = Path(__file__).parents[1]
SWITCHES = {
    "whole": {},
    "boundary": {"frequency": False},
    "frequency": {"boundary": False},
    "no reasoning": {"reasoning": False},
    "one round": {"iterations": 1},
    "boundary, no reasoning": {"frequency": False, "reasoning": False},
}
# No gradient in theory, whatever the data: a normalisation takes the mean away again, and so does the softmax over
# sources with what it adds to each of them alike.
NO_SLOPE = ("map_encoder.0.bias", "map_encoder.3.bias", "map_encoder.6.bias", "attention.k_proj.bias")


def radar(**changes: object) -> Radar:
    torch.manual_seed(0)
    return Radar(replace(RadarConfig.tiny(), **changes))


def noise(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# ---- edges ------------------------------------------------------------------------------------------------------


def test_edges_are_where_brightness_steps_and_not_along_the_border() -> None:
    image = torch.full((1, 3, 16, 16), 2.0)
    image[..., 8:] = 5.0
    edges = sobel_magnitude(image)[0, 0]
    assert edges[:, 7:9].eq(1).all() and edges[:, :7].eq(0).all() and edges[:, 9:].eq(0).all()
    framed = sobel_magnitude(image, "zero")[0, 0]
    assert framed[0].max() == 1 and framed[4, 8] < 0.7, "as published: a picture in a frame of zeros"


def test_edges_do_not_depend_on_contrast_nor_on_other_images() -> None:
    images = noise(3)
    torch.testing.assert_close(sobel_magnitude(images[1:2]), sobel_magnitude(7 * images + 3)[1:2])
    assert sobel_magnitude(images).amax(dim=(1, 2, 3)).eq(1).all()


def test_a_flat_image_has_no_edges_and_a_gradient() -> None:
    flat = torch.ones(1, 3, 8, 8, requires_grad=True)
    edges = sobel_magnitude(flat)
    edges.sum().backward()
    assert edges.eq(0).all() and flat.grad is not None and flat.grad.eq(0).all()


# ---- spectra ----------------------------------------------------------------------------------------------------


def wave(side: int, cycles: int) -> Tensor:
    ramp = torch.arange(side) / side * 2 * torch.pi * cycles
    return ramp.cos().expand(1, 3, side, side)


def test_a_fine_pattern_is_in_its_own_bins_of_the_spectrum() -> None:
    spectrum = high_spectrum(wave(64, 24), 64)[0]
    row, column = divmod(int(spectrum.argmax()), 64)
    assert row == 32 and abs(column - 32) == 24 and spectrum.max() == 1


def test_the_finest_pattern_survives_a_smaller_spectrum_and_not_the_published_one() -> None:
    """31 of 64 cycles: published, the picture is averaged down to 32 pixels first, which leaves no trace of them."""
    picture = wave(64, 31) + 0.5 * wave(64, 3)
    ours, theirs = high_spectrum(picture, 32)[0], published_spectrum(picture, 32)[0]
    outer = torch.cat([ours[16, :2], ours[16, -1:]])
    assert outer.max() > 0.9
    assert theirs[16, 13] > 0.9 and theirs[16, [0, 1, 31]].max() < 0.5


def test_brightness_and_broad_shapes_do_not_pass() -> None:
    gate = high_pass_gate(112, 112, torch.ones(()))
    assert gate[56, 56] == 0 and gate[56, 56 + 14] == pytest.approx(0.5**0.5) and gate[56, 0] > 0.99
    image = noise(2)
    torch.testing.assert_close(high_spectrum(image, 32), high_spectrum(image + 100, 32), rtol=0, atol=1e-4)
    theirs = published_spectrum(torch.ones(1, 3, 112, 112), 112)[0]
    assert theirs[56, 56] == 1, "as published: frequency zero is the brightest of all"


def test_each_image_has_its_own_spectrum_and_not_as_published() -> None:
    images = noise(4)
    alone = torch.cat([high_spectrum(image[None], 32) for image in images])
    torch.testing.assert_close(high_spectrum(images, 32), alone)
    theirs = published_spectrum(images, 32, rolled=False)
    torch.testing.assert_close(published_spectrum(images, 32), theirs.roll(2, dims=0))


def test_more_bins_than_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="size: 64 bins can not be had of 32 x 32 pixels; give 32"):
        high_spectrum(noise(1), 64)


def spectral_task(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, half of it with a fine grid of random phase; brightness and contrast tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    phase = 6.28 * torch.rand(count, 1, 1, 1, generator=generator)
    grid = (torch.arange(32) * 2.2 + phase).cos().expand(count, 3, 32, 32)
    images = torch.randn(count, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) * grid
    order = torch.randperm(count, generator=generator)
    return ((images / images.std(dim=(1, 2, 3), keepdim=True))[order], labels[order])


@pytest.mark.parametrize("operators", ["repaired", "published_batches"])
def test_what_only_the_spectrum_shows_is_learned_from_ones_own_alone(operators: str) -> None:
    torch.manual_seed(0)
    branch = FrequencyBranch(8, 8, 0.1)
    optimiser = torch.optim.AdamW(branch.parameters(), lr=3e-3)
    make = high_spectrum if operators == "repaired" else published_spectrum
    for step in range(60):
        images, labels = spectral_task(32, step)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            branch(make(images, 32), torch.zeros(32, 8)).logit, labels.float()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = spectral_task(256, 1000)
    with torch.no_grad():
        parts = [branch.eval()(make(part, 32), torch.zeros(len(part), 8)).logit for part in images.split(32)]
    auc = roc_auc_score(labels, torch.cat(parts))
    assert auc > 0.98 if operators == "repaired" else abs(auc - 0.5) < 0.12


# ---- the network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWITCHES)
def test_every_weight_moves_but_for_those_that_can_not(name: str) -> None:
    detector = radar(**SWITCHES[name]).train()
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    loss = detector(noise(8), labels=labels).loss
    assert loss is not None
    loss.backward()
    still = {key for key, p in detector.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7}
    assert {key for key in still if not key.endswith(NO_SLOPE)} == set()


def test_one_branch_alone_has_nothing_of_the_other() -> None:
    names = {key.split(".")[0] for key in radar(frequency=False, reasoning=False).state_dict()}
    assert names == {"encoder", "boundary", "external"}
    attention = radar(boundary=False).reasoning.attention
    assert not hasattr(attention, "q_proj") and not hasattr(attention, "k_proj")


def test_evidence_names_what_is_switched_on() -> None:
    whole = ("p_real", "p_fake", "boundary", "frequency", "reasoning", "attention_boundary")
    assert radar().evidence_names == whole
    assert radar(frequency=False).evidence_names == ("p_real", "p_fake", "boundary", "reasoning")
    assert radar(reasoning=False).evidence_names == whole[:4]
    assert radar(boundary=False)(noise(1)).evidence_map is None
    detector = radar()
    assert set(detector.evidence_meanings) == set(whole)
    answer, output = detector.eval().answer(noise(2)), detector(noise(2))
    assert answer.reasons is not None and answer.alpha is not None
    attention = answer.reasons.attention
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(2, 3))
    torch.testing.assert_close(output.evidence[:, 5], attention[:, -1, 0])
    torch.testing.assert_close(output.evidence[:, 2], answer.found["boundary"].logit.sigmoid())
    torch.testing.assert_close(output.evidence[:, 4], answer.reasons.logits[:, -1].sigmoid())
    torch.testing.assert_close(detector.p_fake(output.logits), answer.logit.sigmoid())


def test_the_gate_starts_in_the_middle_and_learns() -> None:
    detector = radar().train()
    optimiser = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    labels = torch.arange(8) % 2
    for step in range(5):
        answer = detector.answer(noise(8))
        assert answer.alpha is not None and answer.reasons is not None
        if step == 0:
            assert answer.alpha.item() == 0.5
            middle = (answer.reasons.logits[:, -1] + answer.external) / 2
            torch.testing.assert_close(answer.logit, middle)
        optimiser.zero_grad()
        sum(detector.losses(answer, labels).values(), torch.zeros(())).backward()
        optimiser.step()
    assert abs(detector.gate_logit.item()) > 0.01


def test_losses_are_those_computed_by_hand() -> None:
    detector = radar(iterations=2).eval()
    labels = torch.tensor([0, 1, 1])
    with torch.no_grad():
        answer = detector.answer(noise(3))
        losses = {name: float(value) for name, value in detector.losses(answer, labels).items()}
    assert answer.reasons is not None
    smooth = labels * 0.9 + 0.05

    def own(logit: Tensor) -> float:
        p = logit.sigmoid()
        return float(-(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean())

    first, second = (answer.found[name] for name in ("boundary", "frequency"))
    cosine = torch.nn.functional.cosine_similarity(first.evidence, second.evidence)
    rounds = [own(logit) for logit in answer.reasons.logits.T]
    by_hand = {
        "main": own(answer.logit),
        "branch": 0.3 * (own(first.logit) + own(second.logit)) / 2,
        "orthogonal": 0.1 * float((cosine.abs() - 0.1).clamp(min=0).mean()),
        "deep": 0.05 * (rounds[0] / 3 + 2 * rounds[1] / 3),
    }
    assert losses == pytest.approx(by_hand, abs=1e-5)
    one = radar(frequency=False)
    assert set(one.losses(one.answer(noise(3)), labels)) == {"main", "branch", "deep"}, "its branch is taught, too"


def test_gradients_reach_the_image() -> None:
    images = noise(2)
    images[0, :, :16] = 0.25  # flat: no slope of a square root there
    images.requires_grad_()
    radar().eval()(images).logits[:, 1].sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad[1].abs().sum() > 0


def test_the_published_switch_mixes_images_and_nothing_else_does() -> None:
    images = noise(4)
    for operators in ("repaired", "published", "published_batches"):
        detector = radar(operators=operators).eval()
        with torch.no_grad():
            together, alone = detector(images).logits, torch.cat([detector(image[None]).logits for image in images])
        assert torch.allclose(together, alone, atol=1e-5) == (operators != "published_batches")


def test_the_map_is_high_where_the_boundary_branch_is_convinced() -> None:
    detector = radar().eval()
    with torch.no_grad():
        tokens = torch.zeros(1, 17, 24)
        edges = torch.zeros(1, 1, 32, 32)
        same = detector.judge(tokens, edges, torch.zeros(1, 32, 32))
        assert same.cells is not None and same.cells.shape == (1, 2, 2)
        tokens[0, 1] = 3.0  # the patch at the top left
        other = detector.judge(tokens, edges, torch.zeros(1, 32, 32))
    assert other.cells is not None
    changed = (other.cells - same.cells).abs()[0]
    assert changed[0, 0] > 1e-3 and changed.flatten()[1:].max() < 1e-6
    output = detector(noise(2))
    assert output.evidence_map is not None and output.evidence_map.shape == (2, 2, 2)


def test_saved_and_loaded_with_its_switches(tmp_path: Path) -> None:
    detector = radar(frequency=False, iterations=2).eval()
    detector.save(tmp_path / "one")
    again = load(tmp_path / "one")
    assert again.config == detector.config
    with torch.no_grad():
        torch.testing.assert_close(again(noise(2)).evidence, detector(noise(2)).evidence)


def test_pixels_without_a_filter_keep_what_averaging_takes_away() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 255
    spec = InputSpec(size=16, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="unfiltered", fit="squash")
    assert to_tensor(stripes, spec).std() < 0.01 and to_tensor(np.roll(stripes, 2, axis=1), spec).mean() > 0.49
    smooth = to_tensor(stripes, replace(spec, interpolation="bilinear"))
    assert 0.2 < smooth.mean() < 0.3


def published_file(folder: Path, detector: Radar, **settings: object) -> Path:
    """Write a detector's weights as the published scripts do, with those of the parts that they never train."""
    rules = rules_of(detector.config)
    tensors = {rules.foreign(name): tensor for name, tensor in detector.state_dict().items()}
    width = detector.config.evidence_dim
    tensors |= {"reasoning.init_proj_single.0.weight": torch.zeros(width, width)}
    torch.save({"model_state_dict": tensors, "optimizer_state_dict": {}, **settings}, folder / "best.pth")
    return folder / "best.pth"


def test_a_published_file_is_used_as_it_is_once_its_switches_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", str(tmp_path / "checkpoints"))
    original = radar(operators="published", normalisation="imagenet", hidden_size=64, num_attention_heads=1).eval()
    file = published_file(tmp_path, original)
    with pytest.raises(ValueError, match=r"put the config\.yaml of the run beside it, or say --iterations NUMBER"):
        ready_detector(file)
    known = {"reasoning_iterations": 3, "fft_size": 32, "reasoning_heads": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(known))
    again = load(ready_detector(file))
    assert again.config == original.config
    with torch.no_grad():
        torch.testing.assert_close(again(noise(2)).evidence, original(noise(2)).evidence)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(known | {"reasoning_iterations": 1}))
    assert load(ready_detector(file)).config.iterations == 1, "another run's settings: another copy"
    inside = published_file(tmp_path, original, config=known | {"use_badm": True, "use_aadm": True})
    (tmp_path / "config.yaml").unlink()
    assert PublishedRadar.open(inside, Unseen()).config == original.config
    assert PublishedRadar.open(inside, Unseen(iterations=5)).config.iterations == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 40}, "image_size: 40 is no multiple of patch_size"),
        ({"image_size": 40, "patch_size": 8}, "image_size: 40 is no multiple of a cell of the edges"),
        ({"evidence_dim": 30}, "evidence_dim: 30 can not be shared among 4 attention heads"),
        ({"iterations": 0}, "iterations: 0 is not usable"),
        ({"spectrum_size": 300}, "spectrum_size: 300 is above image_size"),
        ({"pretrained": True, "num_hidden_layers": 3}, "pretrained: ImageNet weights are those of vit_small"),
        ({"boundary": False, "frequency": False}, "one of them must be on"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("radar", settings)


def test_pretrained_weights_out_of_reach_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    detector = create("radar", {"pretrained": True})
    with pytest.raises(FileNotFoundError, match="can not be downloaded"):
        detector.load_pretrained()


# ---- what the reasoning attends to ------------------------------------------------------------------------------


def test_the_reasoning_is_drawn_and_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        picture = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
        picture.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{number % 2},test,{number}")
    (tmp_path / "table.csv").write_text("\n".join(["file,label,split,group", *rows]))
    detector = radar().eval()
    detector.save(tmp_path / "radar")
    data = DataConfig(source="csv", path=str(tmp_path / "table.csv"))
    settings = ReasoningSettings(model=str(tmp_path / "radar"), data=data, samples=3, output_dir=str(tmp_path / "out"))
    text = show_reasoning(settings)
    assert text.splitlines()[0].split() == ["class", "n", "round", "attention", "to", "boundary", "p_fake"]
    assert "alpha, the share of the reasoning in the verdict: 0.500" in text
    for name in ("samples.png", "attention.png"):
        assert Image.open(tmp_path / "out" / name).width > 300
    report = json.loads((tmp_path / "out" / "reasoning.json").read_text())
    assert [row["id"] for row in report["images"]] == [f"{number}.png" for number in range(6)]
    image = to_tensor(np.array(Image.open(tmp_path / "4.png")), detector.inputs["pixel_values"])
    reasons = detector.answer(image[None]).reasons
    assert reasons is not None
    assert report["images"][4]["attention_boundary"] == pytest.approx(reasons.attention[0, :, 0].tolist(), abs=1e-5)
    means = [round["attention_boundary"]["mean"] for round in report["classes"]["real"]]
    rows_of_real = [row["attention_boundary"] for row in report["images"] if row["label"] == 0]
    assert means == pytest.approx(np.mean(rows_of_real, axis=0).tolist(), abs=1e-6)


@pytest.mark.e2e
def test_the_slips_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        picture = rng.integers(60, 200, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{number % 2},test,{number}")
    (tmp_path / "table.csv").write_text("\n".join(["file,label,split,group", *rows]))
    for operators in ("repaired", "published_batches"):
        radar(operators=operators).save(tmp_path / operators)
    places = [str(tmp_path / name) for name in ("repaired", "published_batches")]
    words = ["--data.source", "csv", "--data.path", str(tmp_path / "table.csv"), "--batch_size", "8"]
    words += ["--resamples", "50", "--json", str(tmp_path / "slips.json")]
    monkeypatch.setattr("sys.argv", ["measure_radar.py", *places, *words])
    runpy.run_path(str(ROOT / "eval" / "measure_radar.py"), run_name="__main__")
    slips = json.loads((tmp_path / "slips.json").read_text())["slips"]
    for place, is_repaired in zip(places, (True, False), strict=True):
        orders = slips[place]["frequency alone"]
        same = {round(orders[name]["value"], 6) for name in ("one by one", "shuffled batches", "batches of one class")}
        assert (len(same) == 1) == is_repaired, "whose spectrum it is must not hang on the batch"
        assert slips[place]["verdict"]["train mode, one class"]["value"] is not None


def test_a_detector_without_such_reasoning_is_refused(tmp_path: Path) -> None:
    radar(frequency=False).save(tmp_path / "one")
    with pytest.raises(ValueError, match="'radar' without reasoning over two branches; give a RADAR with both"):
        show_reasoning(ReasoningSettings(model=str(tmp_path / "one"), data=DataConfig(source="folder", path="x")))
