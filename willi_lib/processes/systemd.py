"""What systemd wants to hear and what it hands over (sd_notify(3), sd_listen_fds(3)).

Without systemd there are no such variables in the environment, and nothing here does anything.
"""

from __future__ import annotations

import os
import socket
from time import monotonic

from .. import log

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
NOTIFY_TIMEOUT = 1.0  # seconds for systemd to take a message, which is a matter of microseconds

_kept: list[str] = []  # the names of sockets that it keeps for us, besides those that it has handed over


def notify(*lines: str, descriptor: int | None = None) -> None:
    """Tell systemd something, such as READY=1, and hand it a descriptor to keep."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    ancillary = [] if descriptor is None else [descriptor]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(NOTIFY_TIMEOUT)
            sender.connect("\0" + path[1:] if path.startswith("@") else path)
            socket.send_fds(sender, ["\n".join(lines).encode("utf-8", "backslashreplace")], ancillary)
    except (FileNotFoundError, ConnectionRefusedError):
        return  # the program that waited for READY=1 has gone, such as the init script
    except OSError as error:
        log.warn("Cannot talk to systemd", error=str(error))


def notify_watchdog(last: float) -> float:
    """Twice in the time without a sign of life after which systemd ends us, if it does. last, result: when we did."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    is_ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not (is_ours and microseconds.isdigit() and int(microseconds)) or monotonic() - last < int(microseconds) / 2e6:
        return last
    notify("WATCHDOG=1")
    return monotonic()


def keep_socket(name: str, descriptor: int) -> None:
    """Have it keep a listening socket during a restart."""
    _kept.append(name)
    notify("FDSTORE=1", f"FDNAME={name}", descriptor=descriptor)


def forget_sockets() -> None:
    """For a Willi that cannot start: in sockets that nobody serves, clients would wait for minutes before they go on to
    another MX host."""
    for name in filter(None, [*os.environ.get("LISTEN_FDNAMES", "").split(":"), *_kept]):
        notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def take_sockets() -> list[tuple[str, socket.socket]]:
    """The sockets that systemd has for us, with their names; at most once."""
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    number = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not number.isdigit():
        return []
    names += [""] * (int(number) - len(names))
    sockets = []
    for descriptor, name in zip(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(number)), names, strict=False):
        os.set_inheritable(descriptor, False)
        sockets.append((name, socket.socket(fileno=descriptor)))
    return sockets
