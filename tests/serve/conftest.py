"""A server that the tests share."""

from collections.abc import Iterator

import pytest
from servers import server_process


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server of the embedded pair. Under coupled acceptance a seed alone says what the text is."""
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    with server_process("--acceptance", "coupled") as (url, _):
        yield url
