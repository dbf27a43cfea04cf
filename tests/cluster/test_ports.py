"""Who holds a port, and which is free."""

import os
import socket

import pytest

from cluster.errors import ClusterError
from cluster.ports import free_port, is_bindable, port_holder


@pytest.fixture
def taken():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def test_holder_names_the_process(taken):
    assert port_holder(taken).endswith(f"(pid {os.getpid()})")


def test_free_port_skips_a_taken_one(taken):
    found = free_port(taken)
    assert taken < found < taken + 100
    assert not is_bindable(taken)
    assert port_holder(found) is None


def test_no_free_port_is_an_error(taken):
    with pytest.raises(ClusterError, match=f"no port from {taken} to {taken} is free"):
        free_port(taken, tries=1)
