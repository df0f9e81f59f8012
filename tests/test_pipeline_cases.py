"""Case files: what they say of each kind of verdict, that nothing in them can act, and what their pictures show."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from markupsafe import Markup
from page_parser import Page
from PIL import Image
from tiny_world import draw

import llava
from llava import cli
from llava.core.types import Explanation, Verdict, VerdictLabel
from llava.data.inputs import NamedImage, open_input
from llava.jobs.case_file import (
    COLOURS,
    OPACITY,
    Section,
    entry_of,
    entry_section,
    figure,
    fill,
    framed,
    overlay,
    png_bytes,
    render_page,
    shrink,
)
from llava.pipeline.verdict import (
    LIMITS,
    Finding,
    band_in_words,
    explanation,
    meaning,
    ratio_in_words,
    regions_in_words,
)

HOSTILE = "<script>alert('a')</script>\"><img src=http://x.org/a.png onerror=alert(1)>&amp;.png"
FACE = Verdict(
    label=VerdictLabel.FAKE,
    p_fake=0.87,
    raw_p_fake=0.95,
    probabilities={"real": 0.05, "fake": 0.95},
    evidence={"p_real": 0.05, "p_fake": 0.95},
    meanings={"p_fake": "Score for <fake>"},
    detector="m2f2det",
    calibration="calibrated on photos, n = 400",
    band=(0.2, 0.7),
    coverage=0.9,
    real_coverage=0.95,
    likelihood_ratio=6.7,
    prior=0.5,
    face_box=(10, 20, 30, 40),
    image="a.png",
)
BARE = replace(
    FACE,
    p_fake=0.95,
    calibration="not calibrated",
    band=None,
    coverage=None,
    real_coverage=None,
    likelihood_ratio=None,
    prior=None,
)
NOTHING = replace(
    BARE, label=VerdictLabel.INCONCLUSIVE, p_fake=None, evidence={}, face_box=None, reason="no face found."
)
MAP = np.linspace(0.4, 0.6, 16, dtype=np.float32).reshape(4, 4)


def entry(verdict: Verdict, said: Explanation | None = None, name: str = "a.png", evidence_map=MAP) -> dict:
    pixels = None if verdict.p_fake is None else draw(1, 5)
    finding = Finding(
        verdict=verdict, explanation=said, pixels=pixels, evidence_map=None if pixels is None else evidence_map
    )
    return entry_of(
        finding, NamedImage(name=name, pixels=np.zeros((90, 120, 3), np.uint8), sha256="ab12", byte_count=5)
    )


def page_of(*entries: dict) -> Page:
    return Page(render_page("A page", [entry_section(e, f"e{i}") for i, e in enumerate(entries)], "Lead", LIMITS))


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(b64decode(data))))


def test_a_calibrated_verdict_is_said_in_plain_words() -> None:
    text = page_of(entry(FACE)).text
    for words in (
        "FAKE 87 % forged (calibrated on photos, n = 400)",
        "Of 100 faces with such a score, 87 are expected to be forged.",
        "6.7 times likelier to come from a forged face than from a real one: on its own, weak support for “forged”",
        "Before looking, 50 % of such pictures were expected to be forged.",
        "UNCERTAIN between 20.0 % and 70.0 %",
        "among faces like those that the detector was calibrated on, of 100 real faces at least 95 are not called FAKE"
        ", and of 100 forged ones at least 90 are not called REAL",
        "SHA-256 ab12 Length 5 bytes Size 120 × 90 pixels Face x 10, y 20, 30 × 40 pixels",
        "It is no proof that a place was changed.",
        "This is no evidence by itself.",
        "p_fake Score for <fake>",
    ):
        assert words in text
    assert "not calibrated" not in text


def test_the_page_says_where_eyes_nose_and_mouth_are() -> None:
    marks = ((12.2, 31.0), (28.0, 27.6), (20.0, 38.0), (15.0, 46.0), (26.4, 45.0))
    told = entry(replace(FACE, face_landmarks=marks, face_roll=-12.4))
    page = page_of(told)
    assert "(12, 31) (28, 28); (20, 38); (15, 46) (26, 45)" in page.text and "-12° clockwise" in page.text
    assert json.loads(json.dumps(told))["verdict"]["face_landmarks"] == [list(mark) for mark in marks]
    assert "clockwise" not in page_of(entry(FACE)).text


def test_a_bare_score_is_called_no_probability() -> None:
    text = page_of(entry(BARE, evidence_map=None)).text
    assert "FAKE p_fake 0.950 (not calibrated)" in text
    assert "0.950 reaches the threshold of 0.500. The detector is not" in text and "the score is no probability" in text
    assert "This detector draws no map." in text
    assert "% forged" not in text and "likelier" not in text and "UNCERTAIN" not in text


def test_the_undecided_say_why() -> None:
    doubt = replace(FACE, label=VerdictLabel.UNCERTAIN, p_fake=0.5, reason="both get such scores")
    page = page_of(entry(doubt), entry(NOTHING))
    assert "UNCERTAIN 50 % forged" in page.text
    assert "The detector cannot tell: both get such scores. Take this as no answer either way." in page.text
    assert "INCONCLUSIVE There is no verdict: no face found." in page.text
    assert len(page.all("img")) == 3, "crop, map and whole of the first; the second has nothing to show"


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("The image is real.", ["These words contradict the verdict.", "the detector's verdict stands"]),
        ("The nose is odd.", ["Read these words with care.", "takes no side"]),
        ("The image is fake.\nThe nose shows a grid.", []),
    ],
)
def test_words_that_contradict_are_marked(text: str, marks: list[str]) -> None:
    page = page_of(entry(FACE, explanation(FACE, "Why?", text)))
    assert " ".join(text.split()) in page.text and "Asked: Why?" in page.text
    assert [mark for mark in marks if mark not in page.text] == []
    places = [page.text.index(part) for part in ("Asked: Why?", *marks, " ".join(text.split()))]
    assert places == sorted(places), "question, warning, answer"
    assert sum("warning" in tag.get("class", "") for tag in page.all("p")) == bool(marks)


def test_nothing_that_comes_from_outside_can_act() -> None:
    verdict = replace(FACE, image=HOSTILE, calibration=HOSTILE, evidence={HOSTILE: 0.5}, reason=HOSTILE)
    said = explanation(verdict, HOSTILE, HOSTILE)
    hostile = entry(verdict, said, HOSTILE)
    lead = fill("lead.html", made="2026-01-01T00:00:00+00:00", model={"name": HOSTILE}, entries=[hostile, hostile])
    page = Page(render_page(HOSTILE, [entry_section(hostile, "e0")], lead, [HOSTILE]))
    assert page.text.count(HOSTILE) >= 8
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "link", "form", "base"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_a_page_reaches_for_nothing_and_is_readable_without_pictures() -> None:
    source = render_page(
        "A page", [entry_section(entry(FACE, explanation(FACE, "Why?", "fake")), "e0")], "Lead", LIMITS
    )
    page = Page(source)
    assert page.addresses and all(a.startswith(("data:image/png;base64,", "#")) for a in page.addresses)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "@media print" in style
    assert all(image["alt"] for image in page.all("img")) and len(page.all("img")) == 3
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in page.all("svg"))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "default-src 'none'" in page.all("meta")[2]["content"]


def test_other_reports_use_the_same_page() -> None:
    picture = figure(png_bytes(draw(0, 1)), "A curve that falls", Markup("<b>Loss</b>"))
    page = Page(render_page("Report <1>", [Section(title="Training & more", body=picture, anchor="training")]))
    assert page.text == "Report <1> Report <1> Training & more Loss"
    assert (decoded(page.all("img")[0]["src"]) == draw(0, 1)).all() and page.all("img")[0][
        "alt"
    ] == "A curve that falls"
    assert page.all("footer") == [] and {"id": "training", "aria-labelledby": "training-title"} in page.all("section")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (
            1.0,
            "1.0 times likelier to come from a forged face than from a real one: no support for either.",
        ),
        (
            0.05,
            "20 times likelier to come from a real face than from a forged one: moderate support for “real”",
        ),
        (
            1 / 1.9,
            "1.9 times likelier to come from a real face than from a forged one: no support for either.",
        ),
        (2.0, "2.0 times likelier to come from a forged face than from a real one: weak support"),
        (10.0, "10 times likelier to come from a forged face than from a real one: moderate support"),
        (
            100.0,
            "100 times likelier to come from a forged face than from a real one: moderately strong support",
        ),
        (4321.0, "4,300 times likelier to come from a forged face than from a real one: strong support"),
        (
            2e-6,
            "500,000 times likelier to come from a real face than from a forged one: very strong support",
        ),
    ],
)
def test_a_likelihood_ratio_in_words(ratio: float, words: str) -> None:
    said = ratio_in_words(ratio).removeprefix("Such a score is ").replace(": on its own, ", ": ")
    assert said.startswith(words)


def test_a_percentage_is_never_certain_and_an_empty_band_is_said() -> None:
    assert "Of 100 faces with such a score, over 99 are" in meaning(replace(FACE, p_fake=0.9999))
    assert "Of 100 faces with such a score, under 1 are" in meaning(
        replace(FACE, label=VerdictLabel.REAL, p_fake=0.001)
    )
    assert band_in_words(replace(FACE, band=(0.5, 0.5))).startswith("The verdict is UNCERTAIN nowhere.")
    assert band_in_words(BARE) == ""


def test_shares_of_regions_are_said_to_be_shares() -> None:
    shares = {"skin": 0.1, "eyebrows": 0.1, "eyes": 0.15, "nose": 0.05, "mouth": 0.6}
    said = regions_in_words(replace(FACE, evidence={**FACE.evidence, **shares}))
    assert said.endswith("The largest share, 0.60, has the mouth.") and "sum to 1" in said
    assert said in page_of(entry(replace(FACE, evidence={**FACE.evidence, **shares}))).text
    assert regions_in_words(FACE) == "" and "share what the map" not in page_of(entry(FACE)).text


def test_the_map_lies_over_the_central_square_and_fields_stay_fields() -> None:
    pixels = np.full((40, 100, 3), (200, 100, 50), np.uint8)
    shown = overlay(pixels, np.array([[0.25, 0.375], [0.5, 0.75]], np.float32))
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert shown.shape == pixels.shape and (shown[:, :30] == grey).all() and (shown[:, 70:] == grey).all()
    for (row, column), place in {(0, 30): 0.0, (0, 69): 0.25, (39, 30): 0.5, (39, 69): 1.0}.items():
        colour = np.array(matplotlib.colormaps[COLOURS](place)[:3]) * 255
        assert shown[row, column] == pytest.approx((1 - OPACITY) * grey + OPACITY * colour, abs=0.51)
    assert (shown[:20, 30:50] == shown[0, 30]).all() and (pixels == (200, 100, 50)).all()
    assert len(np.unique(overlay(pixels, np.full((2, 2), 0.3, np.float32))[:, 30:70].reshape(-1, 3), axis=0)) == 1


def test_the_map_of_a_tight_view_lies_over_what_was_seen() -> None:
    shown = overlay(np.full((40, 100, 3), 90, np.uint8), np.array([[0.0, 1.0]], np.float32), seen=0.5)
    coloured = np.argwhere((shown != 90).any(axis=2))
    assert coloured.min(axis=0).tolist() == [10, 40] and coloured.max(axis=0).tolist() == [29, 59]


def test_large_pictures_are_shrunk_and_their_real_size_is_told() -> None:
    large = np.zeros((300, 1200, 3), np.uint8)
    assert shrink(large, 600).shape == (150, 600, 3) and shrink(large, 1200) is large
    whole = framed(np.full((100, 100, 3), 255, np.uint8), (20, 30, 40, 50))
    assert (whole[30, 20] != 255).any() and (whole[50, 40] == 255).all() and (whole[5, 5] == 255).all()
    finding = Finding(verdict=FACE, pixels=large, evidence_map=None)
    crop = entry_of(finding, NamedImage(name="a", pixels=large))["crop"]
    wide = entry_of(replace(finding, evidence_map=MAP), NamedImage(name="a", pixels=large))
    assert "The detector sees the coloured square only." in page_of(wide).text
    assert "coloured square" not in page_of(entry(FACE)).text
    assert crop["size"] == [1200, 300] and decoded(crop["png"]).shape == (128, 512, 3)


def test_a_finding_carries_what_the_detector_saw(tiny_explainer: Path) -> None:
    import torch

    from llava.data.dataset import to_tensor
    from llava.pipeline.settings import FaceSettings

    pictures = [draw(i % 2, 300 + i) for i in range(3)]
    for name in ("detector", "explainer"):
        pipeline = llava.load(
            str(tiny_explainer.parent / name), device="cpu", faces=FaceSettings(face="off"), batch_size=2
        )
        found = list(pipeline.findings(pictures))
        assert [f.verdict for f in found] == pipeline.detect(pictures)
        for picture, finding in zip(pictures, found, strict=True):
            assert (finding.pixels == picture).all() and finding.explanation is None
        if name == "detector":
            spec = pipeline.detector.inputs["pixel_values"]
            with torch.no_grad():
                maps = pipeline.detector(torch.stack([to_tensor(p, spec) for p in pictures])).evidence_map.numpy()
        np.testing.assert_allclose(np.stack([f.evidence_map for f in found]), maps, atol=1e-5)


def test_a_map_of_a_mirrored_view_is_turned_back(tiny_explainer: Path) -> None:
    from llava.pipeline.settings import FaceSettings

    plain = llava.load(str(tiny_explainer.parent / "detector"), device="cpu", faces=FaceSettings(face="off"))
    picture = draw(1, 300)
    (upright,) = plain.findings([picture])
    plain.detector.config = replace(plain.detector.config, views=("flip",))
    (turned,) = plain.findings([picture[:, ::-1].copy()])
    np.testing.assert_allclose(turned.evidence_map, upright.evidence_map[:, ::-1], atol=1e-5)


def test_an_input_knows_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(draw(0, 1)).save(file)
    archive = Path(shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path, "a.png"))
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in (str(file), f"{archive}::a.png"):
        opened = open_input(name)
        assert (opened.sha256, opened.byte_count) == (expected, file.stat().st_size) and opened.pixels is not None
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:200])
    cut = open_input(str(tmp_path / "cut.png"))
    assert cut.pixels is None and cut.sha256 == hashlib.sha256(file.read_bytes()[:200]).hexdigest()
    assert open_input(str(tmp_path / "none.png")).sha256 == ""


@pytest.fixture(scope="module")
def case_folder(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `explain` once on two pictures and a damaged one, with both case files."""
    folder = tmp_path_factory.mktemp("case")
    for number in range(2):
        Image.fromarray(draw(number, 700 + number)).save(folder / f"{number}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:100])
    words = [str(folder), "--face", "off", "--model", str(tiny_explainer), "--device", "cpu", "--json"]
    files = ["--html", str(folder / "out" / "case.html"), "--json-file", str(folder / "out" / "case.json")]
    assert cli.main(["explain", *words, *files]) == 1  # one input could not be read
    return folder


def test_the_command_writes_the_same_facts_twice(case_folder: Path, tiny_explainer: Path) -> None:
    from llava.detectors.base import load
    from llava.explainer.delta import fingerprint

    case = json.loads((case_folder / "out" / "case.json").read_text())
    page = Page((case_folder / "out" / "case.html").read_text())
    assert [e["verdict"]["label"] for e in case["entries"]] == ["REAL", "FAKE", "INCONCLUSIVE"]
    first = case["entries"][0]
    assert first["input"]["sha256"] == hashlib.sha256((case_folder / "0.png").read_bytes()).hexdigest()
    assert (decoded(first["crop"]["png"]) == draw(0, 700)).all()
    assert np.array(first["evidence_map"]["fields"]).shape == (4, 4) and first["whole"] is None
    assert case["model"]["detector_sha256"] == load(tiny_explainer.parent / "detector").fingerprint()
    assert case["model"]["explainer_sha256"] == fingerprint(tiny_explainer)
    assert case["settings"]["face"] == "off" and case["model"]["calibration"] is None
    told = [case["made"][11:19], case["model"]["detector_sha256"], case["model"]["explainer_sha256"]]
    told += [case["software"]["versions"]["torch"], case["software"]["python"], llava.__version__, "face = off"]
    for item in case["entries"]:
        told += [item["input"]["name"], item["input"]["sha256"], item["verdict"]["score"], item["in_words"]["meaning"]]
        told += [item["explanation"]["text"]]
    assert [words for words in told if words not in page.text] == []
    links = [a["href"] for a in page.all("a")]
    assert links == ["#entry-1", "#entry-2", "#entry-3"]
    assert {link[1:] for link in links} <= {s["id"] for s in page.all("section")}


def test_lines_on_standard_output_stay_as_they_are(
    case_folder: Path, tiny_explainer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(case_folder / "1.png"), "--face", "off", "--model", str(tiny_explainer), "--device", "cpu", "--json"]
    assert cli.main(["detect", *words]) == 0
    plain = capsys.readouterr().out
    assert cli.main(["detect", *words, "--html", str(case_folder / "again.html")]) == 0
    assert capsys.readouterr().out == plain
    assert cli.main(["detect", *words, "--json-file", str(case_folder)]) == 2
    assert "--json-file" in (error := capsys.readouterr().err) and "is a folder; give the name of a file" in error


@pytest.mark.e2e
def test_a_browser_shows_the_page(case_folder: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    head = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,1200"]
    picture, printed = tmp_path / "case.png", tmp_path / "case.pdf"
    address = (case_folder / "out" / "case.html").as_uri()
    subprocess.run([*head, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120)
    subprocess.run([*head, f"--print-to-pdf={printed}", address], check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    red = (shown[..., 0] > 120) & (shown[..., 1:].max(axis=-1) < 60)
    assert (shown[0, 0] == 255).all() and red.sum() > 50, "white paper, and the FAKE of the table in red"
    assert printed.read_bytes().startswith(b"%PDF")


@pytest.mark.e2e
def test_the_templates_and_the_starter_ship(tmp_path: Path) -> None:
    import sys
    from zipfile import ZipFile

    root = Path(__file__).resolve().parents[1]
    tree = tmp_path / "tree"
    shutil.copytree(root, tree, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "checkpoints", "*.egg-info"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(tree)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    templates, starter = root / "llava" / "jobs" / "templates", root / "llava" / "starter"
    own = {path.relative_to(root).as_posix() for folder in (templates, starter) for path in folder.iterdir()}
    assert len(own) >= 6 + 5 and own <= set(ZipFile(wheel).namelist())
