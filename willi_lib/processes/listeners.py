"""The listening sockets: bound once by the master, shared by all workers, never closed in between.

They come from a socket unit of systemd, which then decides where Willi listens; or are what an
earlier Willi gave systemd to keep during a restart; or are bound here.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator, Sequence
from time import monotonic, sleep

from .. import log
from ..config import Address
from ..hosts import EVERYWHERE
from . import systemd

BACKLOG = 4096  # connections that the kernel keeps until we accept them; net.core.somaxconn caps it
PATIENCE = 1.0  # seconds for old workers to let go of an address that comes back after it was taken out of `listen`
KEPT = "listen "  # begins the names of the sockets that systemd keeps for us


class CannotBind(Exception):
    """An address of `listen` cannot be had."""


class Listeners:
    """Listening, non-blocking sockets, by the address that `listen` or `status_listen` names."""

    def __init__(self, with_systemd: bool = False) -> None:
        """with_systemd: take what it has, and have it keep all during a restart. Raises CannotBind."""
        self._bound: dict[Address, socket.socket] = {}
        self._with_systemd = with_systemd
        self._given = False  # by a socket unit
        for name, listener in systemd.take_sockets() if with_systemd else ():
            internet = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
            if not internet or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise CannotBind(f"the socket {name!r} from LISTEN_FDS is not a listening TCP socket")
            kept = _kept_as(name)
            self._given |= kept is None
            self._bound[kept or _address(listener)] = _made_ready(listener)

    def __str__(self) -> str:
        return ",".join(str(_address(listener)) for listener in self.sockets)

    @property
    def sockets(self) -> list[socket.socket]:
        return list(self._bound.values())

    def open(self, addresses: Sequence[Address], patience: float = PATIENCE) -> None:
        """Listen on these addresses, too: on all of them or on none. Raises CannotBind.

        patience: seconds to wait for an address that is in use.
        """
        if self._given:
            log.info("The sockets of systemd are used, not `listen`", listen=str(self))
            return
        fresh: dict[Address, socket.socket] = {}
        try:
            for one, needed in (pair for address in addresses for pair in _families(address)):
                if one not in self._bound and one not in fresh and (listener := _bind(one, needed, patience)):
                    fresh[one] = listener
        except CannotBind as fault:
            for listener in fresh.values():
                listener.close()
            ours = [held for held in self._bound if held.port == one.port and {held.host, one.host} & EVERYWHERE.keys()]
            if ours and getattr(fault.__cause__, "errno", 0) == errno.EADDRINUSE:
                raise CannotBind(f"{fault}; Willi has {ours[0]}, and must be restarted for this change") from None
            raise
        self._bound |= fresh
        for one, listener in fresh.items() if self._with_systemd else ():
            systemd.keep_socket(_name(one), listener.fileno())

    def close_others(self, addresses: Sequence[Address]) -> None:
        """Close what is for none of these addresses."""
        needed = {one for address in addresses for one, _ in _families(address)}
        for one in () if self._given else self._bound.keys() - needed:
            self._bound.pop(one).close()
            if self._with_systemd:
                systemd.notify("FDSTOREREMOVE=1", f"FDNAME={_name(one)}")

    def close(self) -> None:
        """Close all, in this process. What systemd keeps stays open."""
        for listener in self.sockets:
            listener.close()
        self._bound.clear()


def _families(address: Address) -> Iterator[tuple[Address, bool]]:
    """What to bind, and whether it is needed: an address without a host is IPv4 and, if the machine has it, IPv6."""
    if address.host:
        yield address, True
    else:
        yield Address("0.0.0.0", address.port), True
        yield Address("::", address.port), False


def _bind(address: Address, needed: bool, patience: float) -> socket.socket | None:
    """None: it is not needed, and this host has no IPv6. Raises CannotBind."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _listen(listener, address, patience)
        return _made_ready(listener)
    except OSError as error:
        if listener:
            listener.close()
        if not needed and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            log.info("No IPv6 on this host", listen=str(address))
            return None
        hint = "; start Willi as root, it becomes `user` afterwards" if error.errno == errno.EACCES else ""
        raise CannotBind(f"cannot listen on {address}: {error.strerror}{hint}") from error


def _listen(listener: socket.socket, address: Address, patience: float) -> None:
    """Raises OSError."""
    deadline = monotonic() + patience
    while True:
        try:
            listener.bind((address.host, address.port))
            listener.listen(BACKLOG)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or monotonic() > deadline:
                raise
        sleep(patience / 50)


def _made_ready(listener: socket.socket) -> socket.socket:
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # inherited by every connection (Linux)
    return listener


def _address(listener: socket.socket) -> Address:
    return Address(*listener.getsockname()[:2])


def _name(address: Address) -> str:
    """The name under which systemd keeps it; without colons, which it uses itself."""
    return f"{KEPT}{address.host.replace(':', '_')} {address.port}"


def _kept_as(name: str) -> Address | None:
    """The address of a name that `_name` has made; None for others."""
    match = re.fullmatch(f"{KEPT}([0-9a-f._]*) ([0-9]+)", name)
    return Address(match[1].replace("_", ":"), int(match[2])) if match else None
