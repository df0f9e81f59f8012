"""What a library says it will take away is an error here, when our code asks for it.

Transformers tells it in two ways, warnings and log records; both are errors. A warning is laid to the module that it
names: ours, or one of the libraries below, since a call may reach them through `torch.nn.Module.__call__`,
or be told without a stack level. What a library says to itself is allowed by name, with the reason.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

LIBRARIES = ("transformers", "gradio", "gradio_client", "torch", "ray")
CATEGORIES = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
ALLOWED = (
    # Gradio's own queue asks pandas for an option and a keyword that pandas 4 drops; we call neither.
    "ignore::DeprecationWarning:gradio\\.queueing$",
    # PEFT 0.21 asks a model that it wraps for transformers' old property; transformers names no caller.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers\\.modeling_utils$",
)
ALLOWED_RECORDS: tuple[str, ...] = ()  # beginnings of log records; each with its reason, as above


class DeprecatedCall(Exception):
    """A library has logged that something we use will go."""


class Deprecations(logging.Handler):
    """Raise where a library logs a deprecation, in the call that caused it."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        is_deprecation = "deprecated" in text.lower() or "will be removed in" in text.lower()
        if is_deprecation and not text.startswith(ALLOWED_RECORDS):
            raise DeprecatedCall(f"{record.name}: {text}")


def filters() -> list[str]:
    """Give pytest's `filterwarnings`; a later one has precedence."""
    own = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    modules = (f"({'|'.join(('llava', *LIBRARIES))})(\\.|$)", f"({'|'.join(own)})$")
    return [f"error::{category}:{module}" for category in CATEGORIES for module in modules] + list(ALLOWED)


def watch(config: pytest.Config) -> None:
    """Make deprecations errors for this run."""
    for line in filters():
        config.addinivalue_line("filterwarnings", line)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(Deprecations(logging.WARNING))
