"""Tells a lack of our own, such as of descriptors, from a failure of a peer: it says nothing about the peer."""

from __future__ import annotations

import errno
import socket

OWN_LACK = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))  # of descriptors and memory


def is_own_lack(error: BaseException) -> bool:
    """error: of connecting, or of looking for a name, whose numbers are others."""
    if isinstance(error, socket.gaierror | socket.herror):
        return False
    if isinstance(error, OSError):
        return error.errno in OWN_LACK
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)
