"""The way of what was counted: datagrams between the processes, sent without waiting.

The master makes the two pairs of sockets once, and every process inherits their ends: `reports` leads from the workers
and the master to the status process, `questions` from that to whichever worker serves. Nobody ever waits for the
status process: what it does not take stays with the worker, and is sent again a second later.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

from .counts import Counts

Report = dict[str, Any]
MAX_DATAGRAM = 32 << 10  # octets of what we put together; a system's default for a socket is six times that
MAX_ANY = 256 << 10  # octets of whatever may come


class Links:
    """The ends of both ways."""

    def __init__(self) -> None:
        """Raises OSError: no descriptor is left."""
        self.reports, self.to_reports = _pair()
        self.questions, self.to_questions = _pair()

    def close_readers(self) -> None:
        """In a worker, which reads questions only."""
        self.reports.close()
        self.to_questions.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Where to read, where to write."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in pair:
        end.setblocking(False)
    return pair


def send(sender: socket.socket, report: Report) -> bool:
    """Whether it could be sent at once."""
    try:
        sender.send(json.dumps(report, separators=(",", ":")).encode("ascii"))
    except OSError:  # nobody takes it out, or it is too large
        return False
    return True


def send_counts(sender: socket.socket, counts: Counts) -> bool:
    """Send what was counted. Whether all of it has gone; what has not, `counts` keeps."""
    left = [*packed(counts.take())]
    while left and send(sender, {"rows": left[0]}):
        left.pop(0)
    counts.put_back(row for rows in left for row in rows)
    return not left


def packed(rows: list[Any]) -> Iterator[list[Any]]:
    """As many rows together as a datagram may hold."""
    part: list[Any] = []
    size = 0
    for row in rows:
        length = len(json.dumps(row, separators=(",", ":"))) + 1
        if part and size + length > MAX_DATAGRAM:
            yield part
            part, size = [], 0
        part.append(row)
        size += length
    if part:
        yield part


def parse(octets: bytes) -> Report:
    """A report; an empty one if it is none, as of a process of another version."""
    try:
        report = json.loads(octets)
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}
