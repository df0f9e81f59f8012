"""Image to verdict to explanation: face crop, detector, threshold, words; everything above goes through here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava.core.runtime import batched, pick_device
from llava.core.score_map import require_share
from llava.core.types import Content, Explanation, GenerationSettings, InputSpec, Turn, Verdict, VideoVerdict
from llava.core.weights import read_config, shapes_only
from llava.data.answer_texts import VERDICT_QUESTION
from llava.data.dataset import image_of, input_tensors, wants_of
from llava.data.inputs import Image, as_list, named
from llava.detectors.base import Detector, DetectorOutput, from_description
from llava.detectors.base import load as load_detector
from llava.detectors.published import ready_detector
from llava.ops.degrade import VERSIONS
from llava.pipeline.crops import Face, faces_of
from llava.pipeline.settings import FaceSettings, Precision, Quantization, VideoSettings, is_detector
from llava.pipeline.verdict import Finding, VideoFinding, explanation, judge
from llava.pipeline.video import FaceJudge, Video, watch

if TYPE_CHECKING:
    from llava.explainer.generation import Explainer
    from llava.explainer.modeling import Encoded
    from llava.explainer.processing import Pixels


class Chat:
    """Ask about one face again and again.

    verdict: the detector's, known before any word is written. turns: what was said so far. last: the last answer with
    whether it agrees with the verdict; None before the first.
    """

    def __init__(
        self,
        explainer: Explainer,
        verdict: Verdict,
        encoded: Encoded | None,
        settings: GenerationSettings | None = None,
    ) -> None:
        self._explainer = explainer
        self._encoded = encoded
        self._settings = settings
        self.verdict = verdict
        self.turns: list[Turn] = []
        self.last: Explanation | None = None

    @property
    def can_answer(self) -> bool:
        """Whether there is anything to ask about: a face, and a score that counts."""
        return self._encoded is not None

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; it becomes part of the conversation once it is complete.

        Raises ValueError for an empty question, and where there is nothing to talk about.
        """
        if self._encoded is None:
            raise ValueError(f"There is nothing to ask about: {self.verdict.reason}.")
        if not question.strip():
            raise ValueError("The question is empty; ask something, such as: Why?")
        asked = [*self.turns, Turn(role="human", text=question.strip())]
        pieces: list[str] = []
        for piece in self._explainer.stream(self._encoded, asked, self._settings):
            pieces.append(piece)
            yield piece
        text = "".join(pieces).rstrip()
        self.turns = [*asked, Turn(role="assistant", text=text)]
        self.last = explanation(self.verdict, question, text)


class Pipeline:
    """A detector, alone or inside an explainer, that is asked about images.

    prior: share of fakes expected, None = that of the calibration data. stability: whether `detect`, `explain` and
    `chat` judge delivered versions of each face as well, and say UNCERTAIN where one turns the verdict round. The rule
    is for detectors that read image crops alone: delivery resamples pixels, which tells nothing of native ones, and
    what it does to frames and sound is not known here. It is off for all others, and no stability is told.

    An image is a path, an http(s) address, the bytes of a file, a uint8 RGB array (H, W, 3) or a NamedImage. One that
    cannot be read raises, except as a NamedImage with a problem, which becomes an INCONCLUSIVE verdict.
    """

    def __init__(
        self,
        detector: Detector,
        explainer: Explainer | None,
        name: str,
        faces: FaceSettings | None = None,
        batch_size: int = 8,
        prior: float | None = None,
        stability: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not usable; allowed: 1 or more.")
        if prior is not None and detector.calibration is None:
            raise ValueError(
                f"prior: {prior} moves a calibrated probability, and {name!r} is not calibrated; run eval/calibrate.py "
                "or leave --prior out."
            )
        self.detector = detector
        self.prior = prior
        self.explainer = explainer
        self.name = name
        self.faces = faces or FaceSettings()
        self.batch_size = batch_size
        self.stability = stability and all(isinstance(spec, InputSpec) for spec in detector.inputs.values())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str = "auto",
        precision: Precision = "auto",
        quantization: Quantization = "none",
        faces: FaceSettings | None = None,
        batch_size: int = 8,
        prior: float | None = None,
        stability: bool = True,
        words: bool = True,
    ) -> Pipeline:
        """Load a detector folder or a merged explainer: `starter`, a path, a name in `checkpoints/` or a hub id.

        prior: share of fakes expected, above 0 and below 1, for a calibrated detector; None = the calibration's own.
        precision `auto` is bf16 on a GPU and fp32 elsewhere; it is the explainer's: a detector runs in fp32.
        words: False = only verdicts are wanted; then an explainer's detector is loaded alone, where it can stand alone.
        Raises FileNotFoundError or ValueError when the folder holds neither.
        """
        if prior is not None:
            require_share("prior", prior)
        folder, where = ready_detector(name), pick_device(device)
        settings = read_config(folder)
        if is_detector(settings) or (not words and _stands_alone(settings)):
            if is_detector(settings) and quantization != "none":
                raise ValueError(f"{str(name)!r} is a detector, which is never quantised; leave out --quantization.")
            detector = load_detector(folder, description=settings).to(where)
            return cls(detector, None, str(name), faces, batch_size, prior, stability)
        from llava.explainer.generation import load_explainer  # here, because a detector needs no language model

        explainer = load_explainer(folder, settings, where, precision, quantization)
        return cls(explainer.model.detector, explainer, str(name), faces, batch_size, prior, stability)

    def detect(self, images: Image | Sequence[Image]) -> list[Verdict]:
        """Give one verdict per face, in the order of the images; `Verdict.image` says which one it belongs to."""
        return [finding.verdict for finding in self.findings(as_list(images))]

    def explain(self, image: Image, question: str | None = None) -> Explanation:
        """Give the verdict on an image's largest face with the words that explain it."""
        return next(self.explain_all([image], question))

    def explain_all(
        self, images: Sequence[Image], question: str | None = None, settings: GenerationSettings | None = None
    ) -> Iterator[Explanation]:
        """Yield one explanation per face, in the order of the images; without words where there are no grounds."""
        for finding in self.explained_findings(images, question, settings):
            assert finding.explanation is not None
            yield finding.explanation

    def findings(self, images: Sequence[Image]) -> Iterator[Finding]:
        """Yield the verdicts as `detect` gives them, each beside the crop and the map that it rests on."""
        for found, _ in self.observations(images):
            yield from found

    def observations(self, images: Sequence[Image]) -> Iterator[tuple[list[Finding], Encoded | None]]:
        """Yield what `look` gives for the faces of images, batch by batch."""
        for batch in batched(self.faces_in(images), self.batch_size):
            yield self.look(batch, self.stability)

    def explained_findings(
        self, images: Sequence[Image], question: str | None = None, settings: GenerationSettings | None = None
    ) -> Iterator[Finding]:
        """Yield the explanations as `explain_all` gives them, each beside the crop and the map."""
        explainer, asked = self.needed_explainer(), question or VERDICT_QUESTION
        for found, encoded in self.observations(images):
            shown = [finding for finding in found if finding.pixels is not None]
            rows = [row for row, finding in enumerate(shown) if finding.has_grounds]
            conversations = [[Turn(role="human", text=asked)]] * len(rows)
            texts = iter(explainer.answer(encoded.take(rows), conversations, settings) if encoded and rows else [])
            for finding in found:
                text = next(texts) if finding.has_grounds else ""
                yield replace(finding, explanation=explanation(finding.verdict, asked, text))

    def detect_video(self, video: Video, settings: VideoSettings | None = None) -> VideoVerdict:
        """Give the verdict on the face that a video shows longest; INCONCLUSIVE where it cannot be read or judged."""
        return self.video_finding(video, settings).verdict

    def explain_video(
        self,
        video: Video,
        question: str | None = None,
        settings: VideoSettings | None = None,
        words: GenerationSettings | None = None,
    ) -> Explanation:
        """Give the verdict on a video with words about its most telling frame."""
        finding = self.explained_video_finding(video, question, settings, words)
        assert finding.explanation is not None
        return finding.explanation

    def video_finding(
        self, video: Video, settings: VideoSettings | None = None, look: FaceJudge | None = None
    ) -> VideoFinding:
        """Give the verdict as `detect_video` does, beside the crop and the map of the most telling frame.

        look: judges the faces of a batch of frames, as `look` does; for who runs the model in a thread of its own.
        """
        return self._watch(video, settings, look)[0]

    def explained_video_finding(
        self,
        video: Video,
        question: str | None = None,
        settings: VideoSettings | None = None,
        words: GenerationSettings | None = None,
    ) -> VideoFinding:
        """Give the explanation as `explain_video` does, beside the crop and the map that it is about."""
        explainer, asked = self.needed_explainer(), question or VERDICT_QUESTION
        finding, encoded = self._watch(video, settings)
        grounds = encoded if finding.has_grounds else None
        (text,) = explainer.answer(grounds, [[Turn(role="human", text=asked)]], words) if grounds else ("",)
        return replace(finding, explanation=explanation(finding.verdict, asked, text))

    def chat(self, image: Image, settings: GenerationSettings | None = None) -> Chat:
        """Begin a conversation about the largest face of an image; the verdict is there before the first question."""
        explainer = self.needed_explainer()
        (finding,), encoded = self.look([self.face_of(image)], self.stability)
        return Chat(explainer, finding.verdict, encoded if finding.has_grounds else None, settings)

    def needed_explainer(self) -> Explainer:
        """Give the explainer. Raises ValueError for a detector on its own, which has no words."""
        if self.explainer is None:
            raise ValueError(
                f"{self.name!r} is here as the detector {self.detector.name!r}, which gives verdicts and no words; use "
                "`m2f2 detect`, or load a merged explainer (the output of stage 3), with words."
            )
        return self.explainer

    @torch.inference_mode()
    def look(self, faces: Sequence[Face], stability: bool = False) -> tuple[list[Finding], Encoded | None]:
        """Judge a batch of faces; beside the findings, what the explainer made of those that have pixels.

        stability: judge delivered versions of each face as well.
        """
        faces = [self._read(face) for face in faces]
        shown = [face for face in faces if face.pixels is not None]
        if not shown:
            return [self._finding(face, None, None) for face in faces], None
        pixels = [face.prepared[0] for face in shown]
        encoded = self.explainer.encode(pixels, self.prior) if self.explainer else None
        detection = encoded.detection if encoded else self._detection(pixels)
        scored = self._rows(detection)
        if stability:
            scored = [row | {"versions": p} for row, p in zip(scored, self._versions(shown), strict=True)]
        rows = iter(zip(scored, self._maps(detection, len(shown)), strict=True))
        return [self._finding(face, *((None, None) if face.pixels is None else next(rows))) for face in faces], encoded

    def _finding(self, face: Face, scores: Mapping[str, Any] | None, evidence_map: np.ndarray | None) -> Finding:
        """Give the finding on a face that was made ready."""
        spec = image_of(self.detector.inputs)
        return Finding(
            verdict=judge(self.detector, face, scores, self.prior),
            pixels=face.pixels,
            evidence_map=evidence_map,
            seen=1.0 if spec is None else spec.seen,
            lacks=face.reason if face.prepared else "",
        )

    def pixels(self, image: np.ndarray | Content) -> Pixels:
        """Give what the model reads of an image, or of a face in a video, in the form that `look` takes instead of it.

        `reasons` names the inputs that are missing, with the reason of each.
        """
        if self.explainer is not None:
            return self.explainer.processor.pixels(image)
        content = Content(image=image) if isinstance(image, np.ndarray) else image
        tensors, reasons = input_tensors(content, self.detector.inputs, with_views=True)
        return {"detector_inputs": tensors, "reasons": reasons}

    def _read(self, face: Face) -> Face:
        """Make a face ready, with the reason where inputs are missing, and without pixels when there is no verdict."""
        if face.pixels is None:
            return face
        read = face.prepared or (self.pixels(face.content),)
        reasons = read[0]["reasons"]
        why = self.detector.lacking(reasons) if reasons else ""
        if why:
            return replace(face, pixels=None, prepared=read, reason=why)
        told = "; ".join(f"without {name}: {reason}" for name, reason in reasons.items())
        return replace(face, prepared=read, reason=told)

    def face_of(self, image: Image) -> Face:
        """Give the largest face of an image, without pixels where there is none."""
        return next(self.faces_in([image]))

    def faces_in(self, images: Sequence[Image]) -> Iterator[Face]:
        """Yield the faces of images, largest first, one without pixels where there is none."""
        for number, image in enumerate(images):
            yield from faces_of(named(image, number), self.faces)

    def _watch(
        self, video: Video, settings: VideoSettings | None, look: FaceJudge | None = None
    ) -> tuple[VideoFinding, Encoded | None]:
        return watch(
            video,
            settings or VideoSettings(),
            self.faces,
            look=look or self.look,
            judge=lambda face, scores: judge(self.detector, face, scores, self.prior),
            batch_size=self.batch_size,
            wants=wants_of(self.detector.inputs),
        )

    def _detection(self, images: Sequence[np.ndarray | Pixels]) -> DetectorOutput:
        """Run a detector on its own, averaged over the test-time views that it declares."""
        device = next(self.detector.parameters()).device
        read = [self.pixels(image) if isinstance(image, np.ndarray) else image for image in images]
        names = self.detector.inputs
        inputs = {
            n: torch.stack([each["detector_inputs"][n] for each in read]).to(device) for n in names
        }  # (B, V, ...)
        return self.detector.over_views(inputs)

    def _maps(self, detection: DetectorOutput, count: int) -> list[np.ndarray | None]:
        """Give each image's evidence map as the image lies, also where the first view was mirrored."""
        spec = image_of(self.detector.inputs)
        if detection.evidence_map is None or spec is None:
            return [None] * count
        maps = detection.evidence_map.float().cpu()
        return list((maps.flip(-1) if spec.views[0] == "flip" else maps).numpy())

    def _versions(self, faces: Sequence[Face]) -> Iterator[dict[str, float]]:
        """Yield the raw p_fake of every delivered version of each face by its name.

        The versions of a whole batch are scored together, `batch_size` at a time, so that memory stays what it was.
        """
        images = (image for face in faces for image in face.versions)
        shares_vision = self.detector.shares_vision
        detect = self.explainer.detect if self.explainer and shares_vision else self._detection
        scores: list[float] = []
        for batch in batched(images, self.batch_size):
            logits = detect(batch).logits
            assert logits is not None
            scores += self.detector.p_fake(logits).tolist()
        return (dict(zip(VERSIONS, part, strict=True)) for part in batched(scores, len(VERSIONS)))

    def _rows(self, detection: DetectorOutput) -> list[dict[str, Any]]:
        """Name the numbers: one dictionary of p_fake, probabilities and the evidence that there is, per image."""
        assert detection.logits is not None and detection.evidence is not None
        probabilities = self.detector.class_scores(detection.logits)
        columns = torch.cat([self.detector.p_fake(detection.logits)[:, None], probabilities, detection.evidence], dim=1)
        names = ("p_fake", *self.detector.classes, *self.detector.evidence_names)
        assert columns.shape[1] == len(names)
        first, last = 1, 1 + len(self.detector.classes)
        may_miss = self.detector.optional_evidence
        return [
            {
                "p_fake": row[0],
                "probabilities": dict(zip(names[first:last], row[first:last], strict=True)),
                "evidence": {
                    n: e for n, e in zip(names[last:], row[last:], strict=True) if not (n in may_miss and isnan(e))
                },
            }
            for row in columns.float().tolist()
        ]


def _stands_alone(config: Mapping[str, Any]) -> bool:
    """Say of an explainer's config.json whether the detector inside scores without the explainer's vision tower."""
    with shapes_only():
        return isinstance(config.get("detector"), Mapping) and not from_description(config["detector"]).shares_vision


def generation_settings(
    max_new_tokens: int | None = None, temperature: float = 0.0, layout: str | None = None, seed: int = 0
) -> GenerationSettings:
    """Turn what a command line says of the words into the explainer's settings; None keeps the explainer's limit."""
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return GenerationSettings(temperature=temperature, layout=layout, seed=seed, **limit)
