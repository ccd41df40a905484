"""A server that answers several requests at a time."""

from __future__ import annotations

import pytest
import twt
from pytest_httpserver import HTTPServer


@pytest.fixture(scope="session")
def make_httpserver():
    server = HTTPServer(host="127.0.0.1", threaded=True)
    server.start()
    yield server
    server.clear()
    if server.is_running():
        server.stop()


@pytest.fixture
def made(httpserver, tmp_path):
    """A stub server of teachers, and what makes a configuration's mapping."""
    return twt.make(httpserver, tmp_path)
