"""Video to verdict and explanation: frames (or windows) of one face are scored, their trimmed mean is the score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from llava.core.input_specs import Wants
from llava.core.runtime import atomic_path, batched
from llava.core.types import Content, Explanation, FrameScore, Verdict, VerdictLabel, VideoVerdict
from llava.data.faces import link_faces
from llava.data.frames import Clip, open_clip, read_numbers, read_sound, spread_frames
from llava.data.images import UnreadableImage
from llava.data.inputs import NamedImage, NamedVideo, open_input
from llava.data.windows import sound_fields
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
NO_WINDOW = "the face is in no run of frames such as the detector reads"
DAMAGED = "{} of {} frames are damaged: the next sound one is taken, or none"


def watch(
    video: Video,
    settings: VideoSettings,
    cut: FaceSettings,
    look: FaceJudge,
    judge: Judge,
    batch_size: int,
    wants: Wants | None = None,
) -> tuple[VideoFinding, Encoded | None]:
    """Give the verdict on the face that a video shows longest, and what the explainer made of its most telling frame.

    The score is the trimmed mean of the raw p_fake of the frames with this face; `judge` makes a verdict of it, as of
    a single image. look: judges `batch_size` faces at a time. INCONCLUSIVE with the reason where there is no face.
    wants: what is judged is a window of so many frames of the face, and the sound, instead; its score and its time are
    those of its first frame.
    """
    named = video if isinstance(video, NamedVideo) else open_input(str(video))
    if not isinstance(named, NamedVideo):
        raise ValueError(f"{str(video)!r} is not named like a video; `detect` and `explain` take images.")
    seen = _faces_over_time(named, cut, settings.frames, wants or Wants())
    followed, count, reason = _followed(seen, settings)
    found, encoded = _looked_at(look, batch_size, _shown(seen, followed, wants) if count else {})
    alone = {number: finding.verdict for number, finding in found.items() if finding.verdict.raw_p_fake is not None}
    limit = _limit(found) if found or not count else NO_WINDOW
    clip = Face(image=named.name, pixels=None, count=count, reason=reason)
    judged = judge(clip, _trimmed(list(alone.values()), settings.trim))
    telling = _most_telling(judged, alone)
    frames = tuple(_frame(time, followed.get(n), alone.get(n)) for n, time in enumerate(seen.seconds))
    scores = [_raw(verdict) for verdict in alone.values()]
    known = vars(judged) | {
        "reason": "; ".join(part for part in (judged.reason, limit, seen.limit) if part),
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

    unfit: of each frame that shows only faces that cannot be judged, why the largest cannot. windows: numbers of the
    frames that are judged together; clip: what the sound is read from.
    """

    seconds: list[float]
    faces: list[list[Face]]
    damaged: int
    limit: str
    unfit: Sequence[str] = ()
    windows: Sequence[Sequence[int]] = ()
    clip: Clip | None = None


def _faces_over_time(video: NamedVideo, settings: FaceSettings, count: int, wants: Wants) -> _Sightings:
    """Look for faces in about `count` frames, in evenly spread windows; the reason alone when there is no frame.

    Of each frame only the faces are kept. A face is always cut out, however large it is (`whole_from` is for single
    images), so that all frames of a clip are cut alike.
    """
    if video.source is None:
        return _Sightings([], [], 0, video.problem)
    seconds, faces, unfit = [], [], list[str]()
    cut_out = replace(settings, whole_from=inf)
    try:
        clip = open_clip(video.source, video.name)
        times = [clip.seconds(number) for number in range(len(clip.stamps))]
        starts = wants.starts(times)
        chosen = [starts[n] for n in spread_frames(len(starts), max(count // len(wants.moments), 1))]
        windows = [wants.chosen(times, start) for start in chosen]
        numbers = sorted({number for window in windows for number in window})
        for frame in read_numbers(clip, numbers):
            image = NamedImage(name=video.name, pixels=frame.pixels)
            seconds.append(frame.seconds)
            found = faces_of(image, cut_out)
            faces.append([face for face in found if face.pixels is not None])
            unfit += [found[0].reason] if not faces[-1] and found[0].box is not None else []
    except UnreadableImage as error:
        return _Sightings([], [], 0, str(error).removeprefix(f"{video.name}: "))
    places = {time: place for place, time in enumerate(seconds)}
    read = [[places[times[n]] for n in window if times[n] in places] for window in windows]
    missing = len({times[number] for number in numbers}.difference(seconds))
    damage = "" if not missing else DAMAGED.format(missing, len(numbers)) if faces else NO_FRAME
    limit = "; ".join(part for part in (damage, clip.note) if part)
    return _Sightings(seconds, faces, missing, limit, unfit, read, clip)


def _followed(seen: _Sightings, settings: VideoSettings) -> tuple[dict[int, Face], int, str]:
    """Give the face that is seen longest, how many are in enough frames, and why none is; no reason without a frame."""
    tracks, total = _tracks(seen.faces, settings), len(seen.faces)
    needed = min(settings.least_frames, total)
    count = sum(len(track) >= needed for track in tracks)
    followed = tracks[0] if tracks else {}
    if count or not total:
        return followed, count, ""
    none = _unfit(seen.unfit, total) if seen.unfit else NO_FACE
    return followed, count, TOO_FEW.format(len(followed), total, needed) if followed else none


def _shown(seen: _Sightings, followed: Mapping[int, Face], wants: Wants | None) -> Mapping[int, Face]:
    """Give what is judged by the number of its frame: the followed face, with the frames and sound from there on."""
    if wants is None:
        return followed
    assert seen.clip is not None
    shown = {}
    for window in seen.windows:
        track = [(seen.seconds[number], followed[number]) for number in window if number in followed]
        if track and window[0] in followed:
            clip = Content(
                image=track[0][1].content.image,
                face=track[0][1].inner,
                frames=[face.content.image for _, face in track],
                seconds=[time for time, _ in track],
                **sound_fields(partial(read_sound, seen.clip), track[0][0], wants),
            )
            shown[window[0]] = replace(track[0][1], clip=clip)
    return shown


def _limit(found: Mapping[int, Finding]) -> str:
    """Say why windows have no verdict, or lack inputs: the reason of most of them, and of how many."""
    without = [each for each in found.values() if each.lacks or each.verdict.p_fake is None]
    if not without:
        return ""
    ((reason, count),) = Counter(each.lacks or each.verdict.reason for each in without).most_common(1)
    return reason if count == len(found) else f"in {count} of {len(found)} windows {reason}"


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
            judged = [number for number in numbers if found[number].pixels is not None]
            encoded.update({number: together.take([row]) for row, number in enumerate(judged)})
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
