"""The one exception of the house: a run that ended, but with gaps. Everything else is a ValueError or its kin."""

from __future__ import annotations


class Incomplete(Exception):
    """A result is there, but not for everything that was asked; the message counts what is missing."""
