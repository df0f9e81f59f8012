"""A small forged world: noise faces with and without a checkerboard, a detector that sees it, and conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.core.runtime import item_rng
from llava.core.score_map import Calibration, ScoreMap
from llava.data.dataset import to_tensor
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.train.tiny_base import TinyBaseConfig, make_llava, train_tokenizer

SCOPE = "sees a checkerboard; has never seen a [bold] stripe"  # brackets, because they are markup for a terminal
REASONS = {0: "The nose has natural pores.", 1: "The nose shows a regular grid."}

CLASS_FOLDERS = {"real": "real", "fake": "deepfake", "aifake": "ai_generated"}


def draw(label: int, index: int, size: int = 32) -> np.ndarray:
    """Draw one picture; forged ones carry a checkerboard, coarse enough to outlast JPEG, halving and a crop."""
    rng = item_rng(7, label, index)
    picture = rng.normal(110 + 30 * rng.random(3), 18, (size, size, 3))
    if label:
        picture += 45 * ((np.indices((size, size)) // 8).sum(0) % 2)[..., None]
    return picture.clip(0, 255).astype(np.uint8)


def calibration_of(weights_sha256: str) -> Calibration:
    """Give a calibration of some weights, as if it had been fitted on this world."""
    return Calibration(
        score_map=ScoreMap(method="temperature", scale=0.5),
        real_below=0.5,
        fake_above=0.5,
        coverage=0.9,
        prior=0.5,
        data="checkerboards",
        images=40,
        groups=40,
        class_groups=(20, 20),
        weights_sha256=weights_sha256,
    )


def draw_class(class_name: str, index: int) -> np.ndarray:
    """Draw one picture of three classes: noise, the checkerboard, or stripes for `ai_generated`."""
    picture = draw(int(class_name == "deepfake"), index)
    if class_name == "ai_generated":
        picture = (picture.astype(float) + 45 * ((np.indices((32, 32))[0] // 4) % 2)[..., None]).clip(0, 255)
    return picture.astype(np.uint8)


def write_classes(folder: Path, count: int = 16) -> Path:
    """Write class folders as the published three-class data have them, train and test; gives the folder."""
    for split, first in (("train", 0), ("val", 200), ("test", 400)):
        for place, class_name in CLASS_FOLDERS.items():
            (folder / split / place).mkdir(parents=True)
            for index in range(first, first + count):
                name = folder / split / place / f"{place}_{index}.png"
                Image.fromarray(draw_class(class_name, index)).save(name)
    return folder


def write_world(folder: Path, count: int = 48) -> Path:
    """Write images and label-free conversations below `folder`; gives the conversation file."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(count):
        label = index % 2
        name = f"{label}_{index:03d}.png"
        Image.fromarray(draw(label, index)).save(folder / "images" / name)
        word = ("real", "fake")[label]
        for number, (question, answer) in enumerate(
            (
                ("Determine the authenticity of this image.", f"The image is {word}."),
                ("Does the nose look real or fake?", f"The image is {word}. {REASONS[label]}"),
            )
        ):
            rows.append(
                {
                    "id": f"{index:03d}_{number}",
                    "image": name,
                    "label": word,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n<deepfake>\n{question}"},
                        {"from": "gpt", "value": answer},
                    ],
                }
            )
    path = folder / "conversations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def train_detector(folder: Path, steps: int = 40) -> M2F2Det:
    """Train a tiny M2F2-Det on the checkerboard with a plain loop and save it."""
    torch.manual_seed(0)
    detector = M2F2Det(M2F2DetConfig.tiny()).train()
    spec = detector.inputs["pixel_values"]
    optimiser = torch.optim.Adam(detector.parameter_groups(3e-3))
    for step in range(steps):
        labels = torch.arange(16) % 2
        pixels = torch.stack([to_tensor(draw(int(y), 1000 + 16 * step + i), spec) for i, y in enumerate(labels)])
        optimiser.zero_grad()
        detector(pixels, labels=labels).loss.backward()
        optimiser.step()
    detector.own_scope = SCOPE
    detector.eval().save(folder)
    return detector


def make_base(folder: Path, detector: Path) -> None:
    """Write a small LLaVA with random words and the detector's vision tower; nothing is trained."""
    from llava.detectors.base import load

    torch.manual_seed(1)
    texts = ["The image is real. The nose has natural pores.", "The image is fake. The nose shows a regular grid."]
    tokenizer = train_tokenizer(iter(texts), 320)
    config = TinyBaseConfig(data=[], image_folder="", detector="", hidden_size=32, layers=2, heads=4)
    make_llava(config, load(detector), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
