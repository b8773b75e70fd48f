"""Logfmt lines to stdout or syslog, one write each.

The fields and their order are the Go program's. A value is quoted and escaped so that
nothing a client sends can end a line, start a field, or reach a terminal as a control
sequence.
"""

from __future__ import annotations

import os
import re
import select
import socket
import stat
import time
import traceback
from collections.abc import Callable
from functools import lru_cache

LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3}
SYSLOG_SOCKET = "/dev/log"
SYSLOG_FACILITY = 2 << 3  # mail, RFC 5424 §6.2.1
SYSLOG_SEVERITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3}
PATIENCE = 100  # milliseconds for whoever reads the log from a pipe; then lines are lost, and counted
MAX_VALUE = 1000  # characters; a reply of 200 lines must not flood the log

_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, double quote, = and backslash

Value = str | int | float | bool | None


class _Sink:
    """Where lines go, and the lowest level that is written."""

    def __init__(self) -> None:
        self.threshold = LEVELS["info"]
        self.write: Callable[[str, str], None] = _write_stdout
        self.lost = 0  # lines that could not be written


def set_up(level: str, target: str) -> None:
    """level: a key of LEVELS; target: `stdout` or `syslog`."""
    _sink.threshold = LEVELS[level]
    _sink.write = _Syslog().write if target == "syslog" else _write_stdout


def silence() -> None:
    """Write nothing at all: for commands that have a report of their own."""
    _sink.threshold = len(LEVELS)


def enabled(level: str) -> bool:
    """Whether lines of this level are written: ask before preparing a costly one."""
    return LEVELS[level] >= _sink.threshold


def debug(message: str, **fields: Value) -> None:
    """For whoever looks for a fault."""
    _log("debug", message, fields)


def info(message: str, **fields: Value) -> None:
    """What happens every day."""
    _log("info", message, fields)


def warn(message: str, **fields: Value) -> None:
    """What an administrator should look at some time."""
    _log("warn", message, fields)


def error(message: str, **fields: Value) -> None:
    """What an administrator must mend."""
    _log("error", message, fields)


def bug(message: str, **fields: Value) -> None:
    """An exception that nobody expected, with its traceback on the same line. Call it in an except block."""
    _log("error", message, fields, traceback.format_exc())


def tracer(sid: str, peer: str) -> Callable[[str, bytes], None] | None:
    """For a connection's dialogue: writes its lines at debug level; None if that is off."""
    if not enabled("debug"):
        return None

    def trace(direction: str, octets: bytes) -> None:
        for line in octets.splitlines():
            debug(f"{peer} {direction}", sid=sid, line=line.decode("utf-8", "backslashreplace"))

    return trace


def quote(value: Value) -> str:
    """One logfmt value."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        return "true" if value else "false"
    elif isinstance(value, float):
        return f"{value:.3f}"
    else:
        text = str(value)
    if len(text) > MAX_VALUE:
        text = text[:MAX_VALUE] + "..."
    return text if _PLAIN.fullmatch(text) else _in_quotes(text)


def _in_quotes(text: str) -> str:
    if '"' not in text and "\\" not in text and text.isprintable():
        return f'"{text}"'
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    if character.isascii():
        return character.encode("unicode_escape").decode("ascii")
    return f"\\u{ord(character):04x}" if character <= "\uffff" else f"\\U{ord(character):08x}"


def _log(level: str, message: str, fields: dict[str, Value], trace: str = "") -> None:
    if LEVELS[level] < _sink.threshold:
        return
    words = [f"lvl={level}", f"msg={quote(message)}"]
    words += [f"{key}={quote(value)}" for key, value in fields.items() if value is not None]
    if trace:
        words.append(f"traceback={_in_quotes(trace)}")
    try:
        if _sink.lost:
            _sink.write("error", f'lvl=error msg="Log lines lost" lines={_sink.lost}')
            _sink.lost = 0
        _sink.write(level, " ".join(words))
    except OSError:
        # Nobody reads the log (a full disk, a closed pipe): mail goes on, and the next line that gets out says so.
        _sink.lost += 1


@lru_cache(maxsize=1)
def _stamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))


def _write_stdout(_level: str, line: str) -> None:
    if not _HAS_JOURNAL:
        line = f"t={_stamp(int(time.time()))} {line}"
    if _stdout is not None and not _stdout.poll(0 if _sink.lost else PATIENCE):
        raise BlockingIOError("nobody reads the log")
    os.write(1, (line + "\n").encode("utf-8", "backslashreplace"))


def _watch_stdout() -> select.poll | None:
    """Of a pipe or socket we must know whether somebody reads it: a write would stop all mail until somebody does."""
    try:
        mode = os.fstat(1).st_mode
    except OSError:  # closed: writing will say so
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    poller = select.poll()
    poller.register(1, select.POLLOUT)
    return poller


class _Syslog:
    """Datagrams to the local syslog daemon (RFC 3164 as glibc's syslog(3) writes it)."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None

    def write(self, level: str, line: str) -> None:
        """Raises OSError: no daemon, or one that does not keep up."""
        text = f"<{SYSLOG_FACILITY + SYSLOG_SEVERITIES[level]}>willi[{os.getpid()}]: {line}"
        octets = text.encode("utf-8", "backslashreplace")
        try:
            self._connected().send(octets)
        except ConnectionError:  # the daemon was restarted: its socket is a new one
            self._socket = None
            self._connected().send(octets)

    def _connected(self) -> socket.socket:
        if self._socket is None:
            fresh = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            fresh.setblocking(False)
            fresh.connect(SYSLOG_SOCKET)
            self._socket = fresh
        return self._socket


_HAS_JOURNAL = "JOURNAL_STREAM" in os.environ  # systemd stamps the time itself
_sink = _Sink()
_stdout = _watch_stdout()
