"""Fixtures for all tests: poisoned memory, a fresh Dynamo, golden files."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fusionpass.errors import BuildError
from tests.profiles import PROFILE

QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
# The same examples each time: what CI finds must be a change. The nightly profile draws new ones.
settings.register_profile("ci", **QUIET, max_examples=500, derandomize=True)
settings.register_profile("nightly", **QUIET, max_examples=20_000)
settings.load_profile(PROFILE)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def _skipped_by_the_build() -> Iterator[None]:
    """A build of torch that knows of no GPU traces for none: what asks for one is left out, by torch's own answer."""
    try:
        return (yield)
    except BuildError as error:
        if torch.backends.cuda.is_built():
            raise
        pytest.skip(str(error))


pytest_runtest_call = pytest_fixture_setup = pytest.hookimpl(wrapper=True)(_skipped_by_the_build)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` holds NaN: whoever reads what was never written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text must equal tests/golden/<name>.py; `--update-golden` writes it."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.py"
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"no golden file {path.name}: run pytest --update-golden"
        assert text == path.read_text(), f"{path.name} differs: see the diff, or run pytest --update-golden"

    return check


def pytest_configure(config: pytest.Config) -> None:
    # Tests put other functions in the place of ours, which no key knows of; tests of the cache turn it on.
    os.environ["FUSIONPASS_CACHE"] = "0"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
