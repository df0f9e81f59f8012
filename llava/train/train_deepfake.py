"""The entry that stages 2 and 3 launch, by python, torchrun or the deepspeed launcher."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch.distributed

from llava.core.config import parse
from llava.core.logs import setup_logging
from llava.train.arguments import ExplainArguments, translate
from llava.train.explain import train

log = logging.getLogger("llava.train.train_deepfake")  # run as a file, __name__ is another


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, train, and leave the process group cleanly; gives 2 for a mistake in what was asked."""
    setup_logging()
    try:
        words = list(translate(sys.argv[1:] if argv is None else argv))
        train(parse(ExplainArguments, words, description=__doc__ or ""))
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
