"""Pack folders of face crops, or videos, into one HDF5 file; run again, it goes on where it was."""

from __future__ import annotations

import logging
import sys

from llava.core.config import parse
from llava.core.runtime import Incomplete, setup_logging
from llava.data.hdf5_pack import PackConfig, pack

log = logging.getLogger("llava.pack_hdf5")  # run as a script, __name__ is another


def main() -> int:
    """Give 0, or 1 when something could not be read, or 2 for a mistake in what was asked."""
    setup_logging()
    config = parse(PackConfig, description=__doc__ or "")
    try:
        pack(config)
    except Incomplete as error:
        log.error("%s", error)
        return 1
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
