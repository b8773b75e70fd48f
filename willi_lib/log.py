"""Logfmt lines to stdout or syslog, one write each, of which none waits.

The fields and their order are the Go program's. A value is quoted and escaped so that
nothing a client sends can end a line, start a field, or reach a terminal as a control
sequence. A line is at most MAX_LINE octets: a pipe takes so many whole or not at all,
so that the lines of several processes never mix. What the reader of the log, a disk or
syslog does not take is lost and counted, and the first line that gets out again says so.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import traceback
from _socket import AF_UNIX, MSG_DONTWAIT, SOCK_DGRAM
from _socket import socket as Socket  # not gevent's, which would make stdout non-blocking for all that share it
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from .text import visible

LEVELS = {"debug": 0, "info": 1, "warn": 2, "error": 3}
SYSLOG_SOCKET = "/dev/log"
SYSLOG_FACILITY = 2 << 3  # mail, RFC 5424 §6.2.1
SYSLOG_SEVERITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3}
MAX_LINE = 4000  # octets with all that stands around a line; PIPE_BUF is 4096
MAX_PREFIX = 100  # octets of it for the time, or for what syslog wants
ROOM = MAX_LINE - MAX_PREFIX
MAX_OCTETS = 4  # of a character in UTF-8
MAX_VALUE = 1000  # characters; a reply of 200 lines must not flood the log
SHORTER = (MAX_VALUE, 300, 100, 30, 10)  # characters of a value, where the line would be too long
KEPT = frozenset(("sid", "to"))  # are cut last; `to` has no more than fits, see message_log.py
MAX_WAITING = 200  # lines that a slow reader may take later: a fifth of a second on a busy host
LAST_PATIENCE = 1.0  # seconds for it to take them when a process ends

_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, double quote, = and backslash

Value = str | int | float | bool | None


class _Sink:
    def __init__(self) -> None:
        self.threshold = LEVELS["info"]
        self.stdout = _Stdout()
        self.target: _Stdout | _Syslog = self.stdout
        self.lost = 0  # lines, since the last one that was written
        self._waiting: deque[bytes] = deque()

    def put(self, level: str, line: str) -> None:
        """Write a line behind those that wait. It is lost if too many do, or after others that no line tells of yet."""
        if self.lost or self._waiting:
            self.flush()
        if self.lost or len(self._waiting) >= MAX_WAITING:
            self.lost += 1
        else:
            self._waiting.append(self.target.octets(level, line))
            self.flush()

    def flush(self) -> bool:
        """Write what waits; whether all of it was taken."""
        try:
            while self._waiting:
                self.target.send(self._waiting[0])
                self._waiting.popleft()
            if self.lost:
                self.target.send(self.target.octets("error", f'lvl=error msg="Log lines lost" lines={self.lost}'))
                self.lost = 0
        except BlockingIOError:  # the reader is slow, or hangs
            return False
        except OSError:  # a full disk, a closed pipe, no syslog: mail goes on
            self.lost += len(self._waiting)
            self._waiting.clear()
        return True


def set_up(level: str, target: str) -> None:
    """level: a key of LEVELS; target: `stdout` or `syslog`."""
    _sink.threshold = LEVELS[level]
    _sink.target = _Syslog() if target == "syslog" else _sink.stdout


def hold_standard_descriptors() -> None:
    """One that is closed would become that of a client, and the log would be written to it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def shows_on(descriptor: int) -> bool:
    """Whether the last line was written, and to where this descriptor leads."""
    try:
        is_same = _sink.target is _sink.stdout and os.path.samestat(os.fstat(1), os.fstat(descriptor))
    except OSError:  # one of them is closed
        return False
    return is_same and not _sink.lost


def syslog_fault() -> str:
    """Why no line gets to syslog; empty if they do."""
    try:
        _Syslog().connected().close()
    except OSError as error:
        return f"{SYSLOG_SOCKET}: {error.strerror}"
    return ""


def flush() -> None:
    """Write what a slow reader has not taken so far. To be called every second."""
    _sink.flush()


def finish() -> None:
    """The same at the end of a process, with a little patience."""
    deadline = time.monotonic() + LAST_PATIENCE
    while not _sink.flush() and time.monotonic() < deadline:
        time.sleep(LAST_PATIENCE / 50)


def silence() -> None:
    """Write nothing at all: for commands that have a report of their own."""
    _sink.threshold = len(LEVELS)


def debug(message: str, **fields: Value) -> None:
    _log("debug", message, fields)


def info(message: str, **fields: Value) -> None:
    _log("info", message, fields)


def warn(message: str, **fields: Value) -> None:
    _log("warn", message, fields)


def error(message: str, **fields: Value) -> None:
    _log("error", message, fields)


def bug(message: str, **fields: Value) -> None:
    """An unexpected exception, with its traceback on the same line. Call it in an except block."""
    _log("error", message, fields, traceback.format_exc())


def tracer(sid: str, peer: str) -> Callable[[str, bytes], None] | None:
    """For a connection's dialogue: writes its lines at debug level; None if that is off."""
    if _sink.threshold > LEVELS["debug"]:
        return None

    def trace(direction: str, octets: bytes) -> None:
        for line in octets.splitlines():
            debug(f"{peer} {direction}", sid=sid, line=line.decode("utf-8", "backslashreplace"))

    return trace


def quote(value: Value, most: int = MAX_VALUE) -> str:
    """One logfmt value, of at most so many characters."""
    if not isinstance(value, str):
        return f"{value:.3f}" if isinstance(value, float) else str(value).lower()  # true, false
    text = value if len(value) <= most else value[:most] + "..."
    return text if _PLAIN.fullmatch(text) else _in_quotes(text)


def length(value: Value) -> int:
    """Octets that it takes in a line."""
    return len(_octets(quote(value)))


def _in_quotes(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{visible(escaped)}"'


def _log(level: str, message: str, fields: dict[str, Value], trace: str = "") -> None:
    if LEVELS[level] < _sink.threshold:
        return
    for most in SHORTER:  # the first will do, as a rule
        line = _line(level, message, fields, trace, most)
        if len(line) * MAX_OCTETS <= ROOM or len(_octets(line)) <= ROOM:
            break
    _sink.put(level, line)


def _line(level: str, message: str, fields: dict[str, Value], trace: str, most: int) -> str:
    """most: characters of a value. Of a traceback the end matters."""
    kept = MAX_VALUE if most > SHORTER[-1] else most
    words = [
        f" {key}={quote(value, kept if key in KEPT else most)}" for key, value in fields.items() if value is not None
    ]
    if trace:
        words.append(f" traceback={_in_quotes(trace[-3 * most :])}")
    return f"lvl={level} msg={quote(message, most)}{''.join(words)}"


def _octets(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace")


@lru_cache(maxsize=1)
def _stamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))


class _Stdout:
    """Whatever stdout is. It is opened at the first line, which is the master's: it may still be root."""

    def __init__(self) -> None:
        self._write: Callable[[bytes], int] | None = None
        self._has_journal = False
        self._is_torn = False  # half a line is the last thing that was written

    def octets(self, _level: str, line: str) -> bytes:
        """With the time, unless it goes to the journal, which has its own."""
        if self._write is None:
            with suppress(OSError):  # stdout is closed
                status = os.fstat(1)
                journal = f"{status.st_dev}:{status.st_ino}"  # systemd.exec(5)
                self._has_journal = os.environ.get("JOURNAL_STREAM") == journal
                self._write = _writer(status.st_mode)
        return _octets(f"{line}\n" if self._has_journal else f"t={_stamp(int(time.time()))} {line}\n")

    def send(self, octets: bytes) -> None:
        """All of it or nothing, without waiting. Raises BlockingIOError if it may go later, another OSError if not."""
        if self._write is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._is_torn:
            octets = b"\n" + octets
        written = self._write(octets)
        self._is_torn = written < len(octets) and not _take_back(written)
        if written < len(octets):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _writer(mode: int) -> Callable[[bytes], int]:
    """What writes to stdout without waiting for a reader. Raises OSError.

    O_NONBLOCK belongs to the open file, which we share with the process that started us. So a pipe or a terminal is
    opened once more, for Willi alone, and for a socket each call says so. A pipe that another user has made cannot
    be opened again.
    """
    if stat.S_ISSOCK(mode):
        connection = Socket(fileno=os.dup(1))
        return lambda octets: connection.send(octets, MSG_DONTWAIT)
    descriptor = 1
    if stat.S_ISFIFO(mode) or os.isatty(1):
        try:
            descriptor = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            os.set_blocking(1, not stat.S_ISFIFO(mode))
    return lambda octets: os.write(descriptor, octets)


def _take_back(octets: int) -> bool:
    """Remove the half of a line that a full disk took, or another process would go on behind it."""
    try:
        end = os.lseek(1, 0, os.SEEK_CUR)
        if end != os.fstat(1).st_size:
            return False
        os.ftruncate(1, end - octets)
        os.lseek(1, end - octets, os.SEEK_SET)
    except OSError:  # no file
        return False
    return True


class _Syslog:
    """Datagrams to the local syslog daemon (RFC 3164 as glibc's syslog(3) writes it)."""

    def __init__(self) -> None:
        self._socket: Socket | None = None

    def octets(self, level: str, line: str) -> bytes:
        """The daemon adds the time."""
        return _octets(f"<{SYSLOG_FACILITY + SYSLOG_SEVERITIES[level]}>willi[{os.getpid()}]: {line}")

    def send(self, octets: bytes) -> None:
        """Raises BlockingIOError: the daemon does not keep up; another OSError: there is none."""
        try:
            self.connected().send(octets)
        except ConnectionError:  # the daemon was restarted: its socket is a new one
            self._socket = None
            self.connected().send(octets)

    def connected(self) -> Socket:
        """Raises OSError."""
        if self._socket is None:
            fresh = Socket(AF_UNIX, SOCK_DGRAM)
            fresh.setblocking(False)
            fresh.connect(SYSLOG_SOCKET)
            self._socket = fresh
        return self._socket


_sink = _Sink()
