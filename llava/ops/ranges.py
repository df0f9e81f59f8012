"""The check that a range of strengths is usable."""

from __future__ import annotations


def require_within(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    """Refuse values outside [low, high] or not in rising order. Raises ValueError naming the setting."""
    if any(not low <= v <= high for v in values) or values[0] > values[-1]:
        raise ValueError(f"{name}: {values} is not usable; allowed: {low} to {high}, the smaller value first.")
