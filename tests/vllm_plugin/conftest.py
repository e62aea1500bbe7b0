"""One engine for the tests that need vLLM, and the transformers adapter that it must agree with.

Where vLLM is not installed every test that needs an engine is skipped, and the summary says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm_tools import MISSING, SETTINGS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MISSING:
        terminalreporter.write_line(f"TESTS OF vLLM WERE SKIPPED. {MISSING}", red=True, bold=True)


@pytest.fixture(scope="session")
def folder() -> Any:
    """The embedded model's folder."""
    from steer.embedded import find, resolve

    if not find("smollm2-135m").fetched:
        pytest.skip("smollm2-135m is not in the cache: run `steer models fetch smollm2-135m`")
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def reference(folder: Any) -> Any:
    """The transformers adapter in float32."""
    import steer

    return steer.load("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def engine(folder: Any) -> Iterator[Any]:
    """An eager engine with chunked prefill and prefix caching."""
    if MISSING:
        pytest.skip(MISSING)
    import steer

    yield steer.load("smollm2-135m", engine="vllm", **SETTINGS)
