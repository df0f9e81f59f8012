"""Video to verdict and explanation: the frames of one face are scored, their trimmed mean is the clip's score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llava.core.runtime import atomic_path, batched
from llava.core.types import Explanation, FrameScore, Verdict, VerdictLabel, VideoVerdict
from llava.data.faces import link_faces
from llava.data.frames import open_clip, read_frames
from llava.data.images import UnreadableImage
from llava.data.inputs import NamedImage, NamedVideo, open_input
from llava.pipeline.crops import Face, faces_of
from llava.pipeline.settings import FaceSettings, VideoSettings
from llava.pipeline.verdict import Finding, VideoFinding

if TYPE_CHECKING:
    from llava.explainer.modeling import Encoded

Answer: TypeAlias = Verdict | Explanation
Video: TypeAlias = str | Path | NamedVideo
FaceJudge: TypeAlias = Callable[[Sequence[Face]], "tuple[list[Finding], Encoded | None]"]
Judge: TypeAlias = Callable[[Face, dict[str, Any] | None], Verdict]
NO_FRAME = "none of its frames can be decoded"
NO_FACE = "no face found in any frame"
UNFIT = "no face that can be judged in any frame; in {} of {} frames {}"
TOO_FEW = "the face that is seen longest is in {} of {} frames; {} are needed (--video.least_frames)"
DAMAGED = "{} of {} frames are damaged: the next sound one is taken, or none"


def watch(
    video: Video, settings: VideoSettings, cut: FaceSettings, look: FaceJudge, judge: Judge, batch_size: int
) -> tuple[VideoFinding, Encoded | None]:
    """Give the verdict on the face that a video shows longest, and what the explainer made of its most telling frame.

    The score is the trimmed mean of the raw p_fake of the frames with this face; `judge` makes a verdict of it, as of
    a single image. look: judges `batch_size` faces at a time. INCONCLUSIVE with the reason where there is no face.
    """
    named = video if isinstance(video, NamedVideo) else open_input(str(video))
    if not isinstance(named, NamedVideo):
        raise ValueError(f"{str(video)!r} is not named like a video; `detect` and `explain` take images.")
    seen = _faces_over_time(named, cut, settings.frames)
    tracks = _tracks(seen.faces, settings)
    total = len(seen.faces)
    needed = min(settings.least_frames, total)
    count = sum(len(track) >= needed for track in tracks)
    followed = tracks[0] if tracks else {}
    none = _unfit(seen.unfit, total) if seen.unfit else NO_FACE
    reason = "" if count else TOO_FEW.format(len(followed), total, needed) if followed else none
    found, encoded = _looked_at(look, batch_size, followed if count else {})
    alone = {number: finding.verdict for number, finding in found.items()}
    clip = Face(image=named.name, pixels=None, count=count, reason=reason if total else "")
    judged = judge(clip, _trimmed(list(alone.values()), settings.trim))
    telling = _most_telling(judged, alone)
    frames = tuple(_frame(time, followed.get(n), alone.get(n)) for n, time in enumerate(seen.seconds))
    scores = [_raw(verdict) for verdict in alone.values()]
    known = vars(judged) | {
        "reason": "; ".join(part for part in (judged.reason, seen.limit) if part),
        **({} if telling is None else followed[telling].place),
        "spread": stdev(scores) if len(scores) > 1 else None,
    }
    verdict = VideoVerdict(**known, frames=frames, damaged=seen.damaged, trim=settings.trim, telling=telling)
    if telling is None:
        return VideoFinding(verdict=verdict), None
    shown = found[telling]
    finding = VideoFinding(verdict=verdict, pixels=shown.pixels, evidence_map=shown.evidence_map, seen=shown.seen)
    return finding, encoded.get(telling)


def write_timelines(folder: str | Path, answers: Sequence[Answer]) -> list[Path]:
    """Draw the timeline of every video with scores as <file name>.png; a name that is taken gets a number."""
    from llava.evaluation.pictures import timeline_png  # here, because most runs draw nothing

    drawn: list[Path] = []
    for answer in answers:
        verdict = answer.verdict if isinstance(answer, Explanation) else answer
        if isinstance(verdict, VideoVerdict) and verdict.telling is not None:
            name, number = Path(verdict.image).name, 2
            while (path := Path(folder) / f"{name}.png") in drawn:
                name, number = f"{Path(verdict.image).name}-{number}", number + 1
            with atomic_path(path) as staged:
                staged.write_bytes(timeline_png(verdict))
            drawn.append(path)
    return drawn


class _Sightings(NamedTuple):
    """Times and faces of the frames, how many that were wanted are damaged, and what limits them, in words.

    unfit: of each frame that shows only faces that cannot be judged, why the largest cannot.
    """

    seconds: list[float]
    faces: list[list[Face]]
    damaged: int
    limit: str
    unfit: Sequence[str] = ()


def _faces_over_time(video: NamedVideo, settings: FaceSettings, count: int) -> _Sightings:
    """Look for faces in the frames; the reason alone when there is no frame.

    Of each frame only the faces are kept. A face is always cut out, however large it is (`whole_from` is for single
    images), so that all frames of a clip are cut alike.
    """
    if video.source is None:
        return _Sightings([], [], 0, video.problem)
    seconds, faces, unfit = [], [], []
    cut_out = replace(settings, whole_from=inf)
    try:
        clip = open_clip(video.source, video.name)
        for frame in read_frames(clip, count):
            image = NamedImage(name=video.name, pixels=frame.pixels)
            seconds.append(frame.seconds)
            found = faces_of(image, cut_out)
            faces.append([face for face in found if face.pixels is not None])
            unfit += [found[0].reason] if not faces[-1] and found[0].box is not None else []
    except UnreadableImage as error:
        return _Sightings([], [], 0, str(error).removeprefix(f"{video.name}: "))
    wanted = {clip.seconds(number) for number in clip.chosen(count)}
    missing = len(wanted.difference(seconds))
    damage = "" if not missing else DAMAGED.format(missing, len(wanted)) if faces else NO_FRAME
    return _Sightings(seconds, faces, missing, "; ".join(part for part in (damage, clip.note) if part), unfit)


def _unfit(reasons: Sequence[str], total: int) -> str:
    """Say what is wrong with most of a clip's unfit faces, told by the words before the first face's pixels."""
    kinds = [reason.partition(":")[0] for reason in reasons]
    (kind, count), *_ = Counter(kinds).most_common()
    return UNFIT.format(count, total, reasons[kinds.index(kind)])


def _tracks(frames: Sequence[Sequence[Face]], settings: VideoSettings) -> list[dict[int, Face]]:
    """Give each face over time, longest first: number of the frame -> the face there. Whole frames are one face."""
    boxes = [[face.box for face in faces if face.box is not None] for faces in frames]
    if not any(boxes):
        return [track] if (track := {n: faces[0] for n, faces in enumerate(frames) if faces}) else []
    links = link_faces(boxes, settings.overlap, settings.shift)
    return [{n: frames[n][i] for n, i in sorted(track.items())} for track in links]


def _looked_at(
    look: FaceJudge, batch_size: int, faces: Mapping[int, Face]
) -> tuple[dict[int, Finding], dict[int, Encoded]]:
    """Give the finding on each frame alone, and what the explainer made of it, so that words need no second look."""
    found: dict[int, Finding] = {}
    encoded: dict[int, Encoded] = {}
    for numbers in batched(faces, batch_size):
        findings, together = look([faces[number] for number in numbers])
        found.update(zip(numbers, findings, strict=True))
        if together is not None:
            encoded.update({number: together.take([row]) for row, number in enumerate(numbers)})
    return found, encoded


def _trimmed(verdicts: Sequence[Verdict], trim: float) -> dict[str, Any] | None:
    """Give the trimmed mean of every number of the frames, in the form that `judge` takes; None without frames."""
    from scipy.stats import trim_mean  # here, because it loads for half a second, and a picture needs none

    if not verdicts:
        return None

    def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for row in rows for name in row)  # what a frame lacks, others may have
        return {name: float(trim_mean([row[name] for row in rows if name in row], trim)) for name in names}

    p_fake = float(trim_mean([_raw(v) for v in verdicts], trim))
    evidence, probabilities = means([v.evidence for v in verdicts]), means([v.probabilities for v in verdicts])
    return {"p_fake": p_fake, "probabilities": probabilities, "evidence": evidence}


def _most_telling(clip: Verdict, frames: Mapping[int, Verdict]) -> int | None:
    """Give the number of the frame whose score lies farthest on the verdict's side, or nearest to an undecided one."""
    if not frames:
        return None
    goal = {VerdictLabel.FAKE: 1.0, VerdictLabel.REAL: 0.0}.get(clip.label, clip.raw_p_fake)
    assert goal is not None
    return min(frames, key=lambda number: abs(_raw(frames[number]) - goal))


def _frame(seconds: float, face: Face | None, alone: Verdict | None) -> FrameScore:
    """Give the row of one frame, with the followed face and the verdict on it alone, where there is one."""
    return FrameScore(
        seconds=seconds,
        **({} if face is None else face.place),
        raw_p_fake=None if alone is None else alone.raw_p_fake,
        p_fake=None if alone is None else alone.p_fake,
    )


def _raw(verdict: Verdict) -> float:
    """Give the detector's own score of a face that has pixels, and so has a score."""
    assert verdict.raw_p_fake is not None
    return verdict.raw_p_fake
