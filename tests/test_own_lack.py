"""What is a lack of our own, and what a failure of a peer."""

from __future__ import annotations

import errno
import socket

import pytest

from willi_lib.net.own_lack import is_own_lack


@pytest.mark.parametrize(
    ("error", "is_ours"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (socket.gaierror(errno.ENOMEM, "ARES_ETIMEOUT: Timeout while contacting DNS servers"), False),
        (socket.herror(1, "Unknown host"), False),
        (RuntimeError("another bug"), False),
    ],
)
def test_a_lack_of_our_own_is_told_by_the_error(error: Exception, is_ours: bool):
    assert is_own_lack(error) == is_ours
