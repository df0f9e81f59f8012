"""What all tests share: no network, end-to-end tests last, the data folder that may lie beside the checkout."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
OFF_BY_DEFAULT = ("gpu", "network")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put end-to-end tests last; leave `gpu` and `network` tests out unless `-m` names them."""
    unwanted = {name for name in OFF_BY_DEFAULT if name not in config.option.markexpr}
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in unwanted)]
    config.hook.pytest_deselected(items=dropped)
    kept = [item for item in items if item not in dropped]
    items[:] = sorted(kept, key=lambda item: item.get_closest_marker("e2e") is not None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder with real test images, or skip: it is no part of the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data folder beside the checkout")
    return folder
