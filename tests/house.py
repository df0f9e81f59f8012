"""The house in numbers: its files, what a plain verdict costs, and through how many files three thoughts pass.

`python tests/house.py` prints them; with --names also which files. That takes a minute or two.
"""

from __future__ import annotations

import argparse
import ast
import base64
import inspect
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import llava

HOUSE = Path(llava.__file__).parent
PORTRAITS = [HOUSE.parent / "utils" / "demo_faces" / name for name in ("astronaut.png", "portrait_cc0_1.png")]


def sizes() -> str:
    """Count the package's files, their lines, and the files that one other file of the checkout alone imports."""
    from test_architecture import PACKAGE, SOURCES, dotted_name, imported, relative

    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE]
    readers: dict[str, set[Path]] = {}
    for path in SOURCES:
        for _, name, _ in imported(ast.parse(path.read_text(encoding="utf-8")), relative(path)):
            readers.setdefault(name, set()).add(path)
    alone = [path for path in PACKAGE if len(readers.get(dotted_name(relative(path)), set()) - {path}) == 1]
    median, most = int(statistics.median(lines)), max(lines)
    return f"{len(lines)} files, median {median} lines, maximum {most}; {len(alone)} with a single reader"


def cost(*words: str) -> str:
    """Give time and largest memory of a Python program in a process of its own: of three runs, the middle one."""
    runs = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.perf_counter()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, words
        runs.append((time.perf_counter() - began, usage.ru_maxrss / 1024))
    seconds, megabytes = sorted(runs)[1]
    return f"{seconds:.1f} s, {megabytes:.0f} MB"


def functions_of(journey: AbstractContextManager[Callable[[], object]]) -> set[CodeType]:
    """Give the functions of the package that run, in any thread, while a journey is walked.

    What makes it ready is not counted. It is walked twice and watched the second time, so that what an import runs is
    not counted either; comprehensions and bodies of classes are no functions.
    """
    passed: set[CodeType] = set()
    is_watched = threading.Event()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and is_watched.is_set():
            passed.add(frame.f_code)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        with journey as walk:
            walk()
            is_watched.set()
            walk()
            is_watched.clear()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {code for code in passed if _is_function(code) and HOUSE in Path(code.co_filename).parents}


def files_of(functions: set[CodeType]) -> list[str]:
    """List the files of functions, by their path in the package."""
    return sorted({Path(code.co_filename).relative_to(HOUSE).as_posix() for code in functions})


def image_to_verdict(image: Path, detector: Path) -> AbstractContextManager[Callable[[], object]]:
    """Give `m2f2 detect` on an image with a detector, from the command line to the printed verdict."""
    from llava.cli import main

    return nullcontext(lambda: _expect_success(main, ["detect", str(image), "--model", str(detector)]))


@contextmanager
def question_to_words(images: Iterable[Path], explainer: Path) -> Iterator[Callable[[], object]]:
    """Give a chat request to the API of a running server about the next image, until the last word came."""
    from fastapi.testclient import TestClient

    from llava.pipeline import Pipeline
    from llava.serve.api import Service, build_app
    from llava.serve.batching import BatchingEngine
    from llava.serve.measures import MeasuredEngine, Measures

    measures, upcoming = Measures(), iter(images)

    def ask() -> None:
        address = f"data:image/png;base64,{base64.b64encode(next(upcoming).read_bytes()).decode()}"
        parts = [{"type": "text", "text": "Real or fake?"}, {"type": "image_url", "image_url": {"url": address}}]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
        reply = client.post("/v1/chat/completions", json=asked).raise_for_status().json()
        assert reply["choices"][0]["message"]["content"] and reply["verdict"]["label"]

    with closing(BatchingEngine(Pipeline.from_pretrained(explainer))) as engine:
        service = Service(engines={"tiny": MeasuredEngine(engine, measures, "tiny")}, measures=measures)
        with TestClient(build_app(service)) as client:
            yield ask


def recipe_to_detector(faces: Path, out: Path) -> AbstractContextManager[Callable[[], object]]:
    """Give a training of stage 1 on class folders, from its recipe to the saved detector, two steps long."""
    from llava.train.stage_1 import main

    recipe = HOUSE.parent / "scripts" / "configs" / "stage_1" / "m2f2_tiny.yaml"
    words = ["--config", str(recipe), "--data.path", str(faces), "--steps", "2", "--eval_steps", "2"]
    words += ["--workers", "0", "--collapse.min_sd", "0", "--collapse.min_recall", "0", "--near_duplicates", "false"]
    runs = iter(range(2))
    return nullcontext(lambda: _expect_success(main, [*words, "--output_dir", str(out / str(next(runs)))]))


def _expect_success(program: Callable[[list[str]], int], words: list[str]) -> None:
    with redirect_stdout(io.StringIO()) as printed:
        code = program(words)
    assert code == 0, printed.getvalue()


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_NEWLOCALS) and not code.co_name.startswith("<")


def journeys_of(folder: Path) -> dict[str, AbstractContextManager[Callable[[], object]]]:
    """Give the three journeys by name, with small models and pictures that are made below `folder`."""
    from tiny_explainer import train_explainer

    faces, explainer = _write_pictures(folder / "faces"), train_explainer(folder / "models", steps=20)
    return {
        "image to verdict": image_to_verdict(PORTRAITS[0], explainer.parent / "detector"),
        "question to words": question_to_words(PORTRAITS, explainer),
        "recipe to detector": recipe_to_detector(faces, folder / "runs"),
    }


def _write_pictures(root: Path) -> Path:
    from PIL import Image
    from tiny_world import draw

    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for label, name in enumerate(("real", "fake")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(draw(label, number)).save(folder / f"{number}.png")
    return root


def main() -> None:
    """Print the numbers; with --names also the files that each journey passes through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", action="store_true", help="name the files that each journey passes through")
    with_names = parser.parse_args().names
    print(sizes())
    with tempfile.TemporaryDirectory() as name:
        journeys = journeys_of(Path(name))
        detector = Path(name) / "models" / "detector"
        print("import of the pipeline:", cost("-c", "import llava.pipeline.pipeline"))
        print("plain detect:", cost("-m", "llava.cli", "detect", str(PORTRAITS[0]), "--model", str(detector)))
        for title, journey in journeys.items():
            functions = functions_of(journey)
            files = files_of(functions)
            print(f"{title}: {len(files)} files, {len(functions)} functions", *(files if with_names else []))


if __name__ == "__main__":
    main()
