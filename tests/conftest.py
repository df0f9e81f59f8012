"""Fixtures that several test files share."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import deprecations
import forked
import golden
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from browser import Browser

LONGEST = [
    "test_stages.py",
    "test_demo.py",
    "test_parity.py",
    "test_parity_vit3.py",
    "test_convert.py",
    "test_stage_1.py",
    "test_serve_ray.py",
    "test_serve_stack.py",
    "test_serve_fschat.py",
    "test_serve_attacks.py",
    "test_stage_1_hdf5.py",
    "test_serve_page.py",
    "test_score.py",
    "test_three_classes.py",
    "test_class_words.py",
    "test_serve_verdicts.py",
    "test_parity_vit3.py",
    "test_serve_load.py",
    "test_serve_command.py",
    "test_serve_doors.py",
    "test_docs.py",
    "test_cli_ask.py",
    "test_evaluation_calibration.py",
    "test_pipeline_forge.py",
    "test_evaluation_captions.py",
    "test_serve_page_parts.py",
    "test_evaluation_judgement.py",
    "test_pipeline_cases.py",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the parity tests be run on any folder of fixtures."""
    parser.addoption("--golden", type=Path, default=golden.DEFAULT, help="folder of parity fixtures (test_parity.py)")
    parser.addoption("--golden-radar", type=Path, default=golden.RADAR, help="the same of RADAR and the ViT")


def pytest_configure(config: pytest.Config) -> None:
    """Collect the differences that the parity tests find; make deprecations errors; share what is forked."""
    if not hasattr(config, "workerinput"):  # the workers of xdist have its environment
        forked.share()
    deprecations.watch(config)
    config.stash[golden.DIFFERENCES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left alone with one of them at the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the differences when parity was tested alone."""
    if config.stash[golden.DIFFERENCES] and all("test_parity" in str(word) for word in config.args):
        terminalreporter.write_sep("-", "parity: largest differences")
        terminalreporter.write_line("\n".join(golden.table(config)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real faces beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared face data does not lie beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def tiny_explainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a merged explainer that says what its detector finds; `../detector` is the detector alone."""
    from tiny_explainer import train_explainer

    return once(tmp_path_factory, "tiny_explainer", train_explainer)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Give a browser; what it saves goes to a folder that nobody looks into."""
    from browser import chromium

    with chromium(tmp_path_factory.mktemp("downloads")) as started:
        yield started


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """Make something in a folder once for all processes of this run, and give what that gave; nobody may change it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = shared / name / "made"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            made.parent.mkdir(exist_ok=True)
            made.write_text(str(make(made.parent)))
    return Path(made.read_text())


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    """Write train/val/test folders of generated images: real = smooth waves, fake = the same with a fine grid."""
    rng = np.random.default_rng(0)
    root = tmp_path / "faces"
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for class_name in ("real", "fake"):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(_picture(rng, class_name == "fake")).save(folder / f"{i:02d}.png")
    return root


def _picture(rng: np.random.Generator, is_fake: bool, size: int = 48) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(2 * np.pi * (rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y + rng.random())) for _ in range(3)]
    image = 128 + 60 * np.stack(waves, axis=-1)
    if is_fake:
        image += 30 * ((np.indices((size, size)).sum(0) % 2) * 2 - 1)[..., None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
