"""The entry that stages 2 and 3 launch, by python, torchrun or the deepspeed launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed

from llava.core.config import parse
from llava.core.logs import setup_logging
from llava.train.arguments import ExplainArguments, translate
from llava.train.explain import train


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, train, and leave the process group cleanly."""
    setup_logging()
    try:
        words = list(translate(sys.argv[1:] if argv is None else argv))
        train(parse(ExplainArguments, words, description=__doc__ or ""))
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f"train_deepfake: error: {error}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
