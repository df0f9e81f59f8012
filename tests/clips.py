"""Videos that tests make: without loss, each frame known."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np


def grey(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Draw a frame that tells its number by its brightness."""
    return np.full((height, width, 3), number % 256, np.uint8)


def write_clip(
    target: Any,
    frames: Sequence[np.ndarray],
    rate: int = 25,
    codec: str = "libx264rgb",
    stamps: Sequence[int] | None = None,
    seconds_of_sound: float = 0.0,
    sound: np.ndarray | None = None,
    rotation: int = 0,
    file_format: str | None = None,
    **options: str,
) -> Path:
    """Write frames as a video to a path or file object, without loss unless the codec or `options` say otherwise.

    stamps: when each frame is shown, in 1/1000 s; default: one every 1/rate s. sound: mono, 16,000 Hz, kept without
    loss in a .mkv; seconds_of_sound: so much silence instead.
    """
    if codec == "libx264rgb":
        options = {"qp": "0", **options}
    faststart = {"movflags": "faststart"} if str(target).endswith(".mp4") else {}
    with av.open(target, "w", format=file_format, container_options=faststart) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = {"libx264rgb": "rgb24", "ffv1": "bgr0", "png": "rgb24"}.get(codec, "yuv420p")
        if rotation:
            stream.set_display_rotation(rotation)
        heard = np.zeros(round(16000 * seconds_of_sound), np.float32) if sound is None else sound
        kind = "pcm_f32le" if str(target).endswith(".mkv") else "aac"
        voice = container.add_stream(kind, rate=16000, layout="mono") if len(heard) else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            write_samples(container, voice, heard)
    return target


def write_damaged(path: Path) -> list[np.ndarray]:
    """Write 30 frames of noise, every tenth a keyframe; frame 13 is damaged, and with it 14 to 19. Gives them sound."""
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(30)]
    write_clip(path, frames, g="10", bf="0", sc_threshold="0")
    with av.open(str(path)) as container:
        start, size = next((p.pos, p.size) for n, p in enumerate(container.demux(video=0)) if n == 13)
    content = bytearray(path.read_bytes())
    content[start + 40 : start + size] = bytes(size - 40)
    path.write_bytes(content)
    return frames


def write_samples(container: Any, stream: Any, samples: np.ndarray) -> None:
    """Write mono sound, float32 (N,) at 16,000 Hz."""
    layout = "flt" if stream.codec_context.name.startswith("pcm") else "fltp"
    for start in range(0, len(samples), 1024):
        block = np.ascontiguousarray(samples[None, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(block, format=layout, layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """Write a file that holds sound alone."""
    with av.open(str(path), "w", format="mp4") as container:
        samples = np.zeros(round(16000 * seconds), np.float32)
        write_samples(container, container.add_stream("aac", rate=16000, layout="mono"), samples)
    return path
