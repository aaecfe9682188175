"""A folder of the user's tables, and look-ups that read files anew."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionpass.tuning import store


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    store.forget()
    yield
    store.forget()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FUSIONPASS_CONFIG_DIR", str(tmp_path))
    return tmp_path
