"""Willis that tests of one file use one after the other: a start takes ten times as long as most tests.

A Willi goes on to the next test only if nothing but mail has happened: its log has no other lines, it has the same
processes, and no connection is left. Otherwise it is ended, and the next test has a new one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack

from tests.support.daemon import Willi
from tests.support.loopback import wait_until

# Lines after which it is as before. That a host is down matters only where there is another one; a reload, a signal, a
# fault have other lines.
HARMLESS = {
    "Message accepted", "Message rejected", "RCPT refused", "Too many errors", "Hanging up", "TLS failed",
    "Upstream failed", "Badly framed reply to a message", "Too many upstream connections without a message",
    "Connection refused", "Connection dropped", "Clear text after STARTTLS dropped",
    "A PROXY header is not expected from this host: is it missing in proxy_protocol_hosts?",
    "XCLIENT refused", "XCLIENT failed, and the mail must not go without",
    "XCLIENT: the upstream does not take this address, and was told none",
}  # fmt: skip
LOOKS = 100  # at its sockets, of which the least count: for a moment it may have one more, of its start or the probe's
LEFT_OPEN = 3.0  # seconds for what a test left open; then Willi is ended, which waits for it, too


class SharedWillis:
    """Those of one file."""

    def __init__(self) -> None:
        self._free: defaultdict[str, list[Willi]] = defaultdict(list)  # by what tells them apart
        self._at_first: dict[Willi, tuple[list[int], int]] = {}  # processes, and how many sockets they had

    def take(self, kind: str, start: Callable[[], Willi]) -> Willi:
        """One of this kind, whose log begins now."""
        willis = self._free[kind]
        if willis:
            willi = willis.pop()
        else:
            willi = start()
            willi.probe()
            self._at_first[willi] = willi.children, min(willi.sockets for _ in range(LOOKS))
        willi.forget_log()
        return willi

    def give_back(self, kind: str, willi: Willi) -> None:
        """When a test is over. Raises AssertionError for an error in the log that the test did not tolerate."""
        try:
            is_as_before = self._is_as_before(willi)
        except (OSError, AssertionError):
            is_as_before = False
        if is_as_before:
            self._free[kind].append(willi)
        else:
            del self._at_first[willi]
            willi.end()

    def _is_as_before(self, willi: Willi) -> bool:
        """Or at least in a moment: sessions that have just been left take one."""
        children, sockets = self._at_first[willi]
        if willi.process.poll() is not None or willi.children != children:
            return False
        wait_until(lambda: willi.sockets <= sockets, "the end of all connections", LEFT_OPEN)
        willi.probe()  # the last lines of those sessions are written
        willi.check_log()
        return all(line["msg"] in HARMLESS for line in willi.log)

    def end(self) -> None:
        """When the file is over."""
        with ExitStack() as ends:
            for willis in self._free.values():
                for willi in willis:
                    ends.callback(willi.end)
