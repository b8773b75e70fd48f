"""Processes: the listening sockets, and who serves them.

For now one worker in this very process. No gevent up here: a hub in the parent of a
fork would be inherited by every child.
"""

from __future__ import annotations

import errno
import resource
import socket

from . import log
from .config import Address, Settings

BACKLOG = 4096  # connections that the kernel keeps until we accept them; net.core.somaxconn caps it
DESCRIPTORS_PER_SESSION = 2  # the client and the upstream
SPARE_DESCRIPTORS = 64  # listeners, log, database, DNS


class CannotBind(Exception):
    """An address of `listen` cannot be had."""


class Unusable(Exception):
    """Something that the file names cannot be used; one line for each fault."""


def open_listeners(addresses: tuple[Address, ...]) -> list[socket.socket]:
    """Bound, listening, non-blocking sockets; two of them for an address without a host. Raises CannotBind."""
    return [listener for address in addresses for listener in _open(address)]


def _open(address: Address) -> list[socket.socket]:
    if address.host:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return [_bind(family, address.host, address.port)]
    listeners = [_bind(socket.AF_INET, "0.0.0.0", address.port)]
    try:
        listeners.append(_bind(socket.AF_INET6, "::", address.port))
    except CannotBind as failure:
        cause = failure.__cause__
        if not (isinstance(cause, OSError) and cause.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)):
            raise
        log.info("No IPv6 on this host", listen=str(address))
    return listeners


def _bind(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by every connection (Linux)
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        hint = "; start Willi as root, it becomes `user` afterwards" if error.errno == errno.EACCES else ""
        raise CannotBind(f"cannot listen on {Address(host, port)}: {error.strerror}{hint}") from error
    return listener


def allow_descriptors(settings: Settings) -> None:
    """Raise the limit on open files as far as max_connections needs, or say that it is too low."""
    wanted = settings.max_connections * DESCRIPTORS_PER_SESSION + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        log.warn("Too few file descriptors for max_connections", limit=hard, needed=wanted)


def run(settings: Settings) -> None:
    """Serve until told to end. Raises CannotBind, Unusable."""
    listeners = open_listeners(settings.listen)
    allow_descriptors(settings)
    from . import worker  # not before: it brings gevent

    try:
        serving = worker.Worker(settings, listeners)
    except worker.STARTUP_FAULTS as faults:
        raise Unusable(str(faults)) from None
    serving.run()
