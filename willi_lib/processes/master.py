"""Processes: forks the workers, replaces those that die, reloads, and ends them all.

The master touches no client and imports no gevent: a hub in the parent of a fork would be
inherited by every child. Signals are blocked; the loop takes one at a time and then looks after
its children, at least once in a `TICK`.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic, time
from typing import NoReturn

from .. import log
from ..config import ConfigError, MysqlSettings, Settings
from ..mappings.last_row import LastRow
from ..net.tls import CertificateError, server_tls
from ..status.counts import LIMITS
from ..status.reports import MasterReport
from ..status.words import several
from . import systemd
from .certificate_files import CertificateFiles
from .child import DATABASE_DOWN, TRY_AGAIN, Child, Generation, State
from .keeper import Keeper
from .listeners import CannotBind, Listeners
from .news import News, Reload
from .privileges import drop_privileges
from .process_name import name_process
from .reload import write_answer
from .scoreboard import Row, Scoreboard

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
TICK = 1.0  # seconds
BUSY_TICK = 0.05  # seconds, while workers start
START_TIMEOUT = 300.0  # seconds for a worker to read its tables and certificates
HANG_TIMEOUT = 60.0  # seconds without a sign of life, after which a worker is killed
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds before a worker is replaced that soon died; doubled each time
LONG_LIFE = 60.0  # seconds; a worker that dies later is replaced at once
GENERATIONS = 4  # at the same time: one that serves, one that starts, two that drain; then a reload has to wait
DESCRIPTORS_PER_SESSION = 2  # the client and the upstream
SPARE_DESCRIPTORS = 64  # listeners, log, database, DNS
RELOAD_FAILED = "Reload failed, nothing has changed"
RELOAD_WAITS = "Reload waits for a database, since new workers would remember no answers"
NOT_REPLACED = "Cannot replace a worker"


class Unusable(Exception):
    """Something that the file names cannot be used; one line for each fault."""


class CannotStart(Exception):
    """The workers could not start, and that is no fault of the file: another time they may."""


class DatabaseDown(Exception):
    """An automatic reload has to wait: new workers remember none of the answers that the old ones have."""


def block_signals() -> None:
    """Keep all signals for `run`. To be called first of all: a SIGHUP that comes before would end us."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would tell us nothing
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def run(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Serve until told to end. read_again: reads the file for a reload.

    Raises CannotBind, Unusable, CannotStart.
    """
    name_process("willi-master", in_command=False)  # the init script knows it by its command
    Master(settings, read_again).run()


def look_at_surroundings(settings: Settings) -> None:
    """Raise the limit on open files as far as max_connections needs, and warn of what is no fault of the file."""
    if os.geteuid() == 0 and not settings.user:
        log.warn("Willi runs as root: set user")
    wanted = settings.max_connections * DESCRIPTORS_PER_SESSION + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        log.warn("Too few file descriptors for max_connections", limit=hard, needed=wanted)


def _board_for(settings: Settings, present: Scoreboard | None = None) -> Scoreboard:
    """The present one, if it will do. What still drains is not counted in another one."""
    rows, rates = GENERATIONS * settings.workers, settings.max_connection_rate > 0
    if present and present.rows >= rows and present.rates >= rates:
        return present
    return Scoreboard(rows, rates)


def _last_rows(
    settings: Settings, present: Mapping[MysqlSettings, LastRow] | None = None
) -> dict[MysqlSettings, LastRow]:
    """Of each database; the present one as long as its settings are the same."""
    databases = [mapping for mapping in settings.mappings if isinstance(mapping, MysqlSettings)]
    return {database: (present or {}).get(database) or LastRow() for database in databases}


class Facts:
    """What the status shows of the master itself."""

    def __init__(self) -> None:
        self._started = time()
        self._reloads = self._failed = 0
        self._last_reload: float | None = None
        self._error = ""

    def reloaded(self) -> None:
        """The new workers have taken over."""
        self._reloads += 1
        self._last_reload, self._error = time(), ""

    def reload_failed(self, why: str) -> None:
        """Nothing has changed."""
        self._failed += 1
        self._error = why

    def report(
        self, settings: Settings, listen: str, states: dict[str, str], connections: int, stopping: bool
    ) -> MasterReport:
        """states: of the workers, by pid."""
        return MasterReport(
            pid=os.getpid(),
            started=self._started,
            domain=settings.domain,
            log=settings.log,
            loglevel=settings.loglevel,
            listen=listen.split(",") if listen else [],
            wanted=settings.workers,
            workers=states,
            reloads=self._reloads,
            reloads_failed=self._failed,
            last_reload=self._last_reload,
            last_reload_error=self._error,
            stopping=stopping,
            connections=connections,
            limits={name: getattr(settings, name) for name in LIMITS},
        )


class Master:
    """The workers and what they share."""

    def __init__(self, settings: Settings, read_again: Callable[[], Settings]) -> None:
        """Raises Unusable."""
        self._certificates = CertificateFiles()
        self._current = self._new_generation(settings)
        self._candidate: Generation | None = None  # whose workers are starting
        self._read_again = read_again
        self._pid = os.getpid()
        self._listeners = Listeners()
        self._status = Keeper(self._become_status)
        self._facts = Facts()
        self._children: list[Child] = []
        self._wanted: Reload = ""  # a reload that has not begun yet
        self._reload: Reload = ""  # the last one that has
        self._waits_since: float | None = None  # for a database, with an automatic reload
        self._reload_began = 0.0
        self._stopping = False
        self._delay = 0.0  # before the next dead worker is replaced
        self._replace_at = 0.0
        self._last_tick = self._awake_since = self._petted = monotonic()

    def run(self) -> None:
        """Raises CannotBind, Unusable, CannotStart."""
        self._listeners.close_others(self._current.settings.listen)  # a kept one may be in the way of a new one
        self._begin(self._current)
        while self._children or self._status.has_children or not self._stopping:
            arrived = signal.sigtimedwait(SIGNALS, BUSY_TICK if self._candidate else TICK)
            try:
                if arrived:
                    self._on_signal(arrived.si_signo)
                self._look_after_children()
            except (Unusable, CannotStart):
                raise
            except Exception:  # noqa: BLE001 -- those that serve shall go on, whatever it is
                log.bug("Internal error")
        log.info("Stopped")

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            if self._wanted != "asked" and (self._candidate or not self._has_room()):
                log.info("Reload waits for workers that still start or drain", workers=len(self._children))
            self._wanted = "asked"
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop()

    def _look_after_children(self) -> None:
        self._bury()
        self._listen()
        self._end_hopeless()
        if not self._stopping:
            self._replace()
            self._reload_if_asked()
        self._pet_watchdog()
        self._look_after_status()
        log.flush()

    def _look_after_status(self) -> None:
        """It ends last: until then it shows how the workers drain."""
        if self._stopping and not self._children:
            self._status.end()
        self._status.look_after(self._awake_since)
        states = {str(child.pid): child.state.name.lower() for child in self._children}
        connections = sum(board.total for board in {child.generation.board for child in self._children})
        settings = self._current.settings
        self._status.tell(
            self._facts.report(settings, str(self._listeners), states, connections, stopping=self._stopping)
        )

    def _stop(self) -> None:
        if self._stopping:
            log.warn("Ended at once", workers=len(self._children))
            self._status.end(at_once=True)
        else:
            log.info("Stopping", workers=len(self._children), drain_timeout=self._current.settings.drain_timeout)
            systemd.notify("STOPPING=1")
            self._listeners.close()
        for child in self._children:
            if not self._stopping and child.state is State.SERVING:
                child.drain()
            elif self._stopping or child.state is not State.DRAINING:
                child.kill()
        self._stopping = True
        self._candidate = None

    # -- one generation after the other

    def _new_generation(self, settings: Settings, before: Generation | None = None) -> Generation:
        """Reads the certificates for clients, once for all workers. Raises Unusable."""
        self._certificates.will_be_read(settings)
        try:
            tls = server_tls(settings, before.tls if before else None)
        except CertificateError as error:
            raise Unusable(str(error)) from None
        if before is None:
            return Generation(settings, _board_for(settings), tls, _last_rows(settings))
        last_rows = _last_rows(settings, before.last_rows)
        return Generation(settings, _board_for(settings, before.board), tls, last_rows, News(before.news.tables))

    def _begin(self, generation: Generation) -> None:
        """Start the workers of a file; `_listen` goes on when they are ready. Raises CannotBind, CannotStart."""
        self._listeners.open(generation.settings.listen)
        self._status.open(generation.settings)
        look_at_surroundings(generation.settings)
        self._candidate = generation
        for _ in range(generation.settings.workers):
            try:
                self._fork(generation)
            except OSError as error:
                raise CannotStart(f"cannot start a worker: {error.strerror}") from None

    def _listen(self) -> None:
        """Hear who is ready; when all of a new generation are, they take over."""
        for child in self._children:
            child.listen()
            if child.is_leaving:
                log.error("Worker ends by itself", pid=child.pid)
                child.drain()
            elif child.state is State.READY and child.generation is not self._candidate:
                child.go()
                log.info("Worker replaced", pid=child.pid)
        new = [child for child in self._children if child.generation is self._candidate]
        if self._candidate and all(child.state is State.READY for child in new):
            self._switch(self._candidate, new)

    def _switch(self, generation: Generation, new: list[Child]) -> None:
        first, settings = generation is self._current, generation.settings
        for child in new:
            child.go()
        for child in self._children:
            if child.state is State.SERVING and child not in new:
                child.drain()
            elif child.state in (State.STARTING, State.READY):  # a replacement that comes too late
                child.kill()
        self._current, self._candidate = generation, None
        self._delay, self._waits_since = 0.0, None
        self._certificates.are_served()
        self._listeners.close_others(settings.listen)
        self._status.follow(settings)
        if not first:
            self._facts.reloaded()
        log.set_up(settings.loglevel, settings.log)
        log.info("Ready" if first else "Reloaded", listen=str(self._listeners), workers=len(new), pid=os.getpid())
        workers = several(len(new), "worker listens", "workers listen")
        systemd.notify("READY=1", f"STATUS={workers} on {self._listeners}")
        if not first:
            self._answer_reload()

    def _reload_if_asked(self) -> None:
        if self._candidate:
            return
        if self._certificates.have_changed(self._current.settings):
            log.info("A certificate or password has changed")
            self._wanted = self._wanted or ("overdue" if self._waits_too_long() else "automatic")
        if not self._wanted or not self._has_room():
            return
        self._reload, self._wanted = self._wanted, ""
        self._certificates.will_be_read(self._current.settings)  # or tried: willi.conf may have a fault
        self._reload_began = monotonic()
        log.info("Reloading")
        systemd.notify_reloading()
        try:
            settings = self._read_again()
            self._begin(self._new_generation(settings, self._current))
        except (ConfigError, CannotBind, CannotStart, Unusable) as faults:
            self._give_up(str(faults))
        except Exception:  # noqa: BLE001 -- systemd must hear READY again
            log.bug("Internal error")
            self._give_up("internal error")

    def _has_room(self) -> bool:
        """Whether one more generation of workers may be."""
        return len(self._free_rows(self._current.board)) * GENERATIONS >= self._current.board.rows

    def _give_up(self, faults: str, kind: type[Exception] = Unusable) -> None:
        """The new workers cannot be: those that serve go on. Raises an exception of that kind if there are none."""
        for child in self._children:
            if child.generation is self._candidate:
                child.kill()
        first = self._candidate is self._current
        self._candidate = None
        if first:
            for child in self._children:
                os.waitpid(child.pid, 0)
            raise kind(faults)
        self._listeners.close_others(self._current.settings.listen)
        self._status.close_others(self._current.settings)
        if kind is DatabaseDown:
            self._waits_since = self._waits_since or monotonic()
            log.warn(RELOAD_WAITS, error=faults)
            systemd.notify("READY=1", f"STATUS={RELOAD_WAITS}: {faults}")
            return
        first_fault = faults.partition("\n")[0]
        self._facts.reload_failed(first_fault)
        for fault in faults.split("\n"):
            log.error(RELOAD_FAILED, error=fault)
        systemd.notify("READY=1", f"STATUS={RELOAD_FAILED}: {first_fault}")
        self._answer_reload(faults)

    def _answer_reload(self, faults: str = "") -> None:
        try:
            write_answer(self._reload_began, faults)
        except OSError as error:
            log.warn("Cannot write down what became of the reload", error=str(error))

    def _waits_too_long(self) -> bool:
        """Whether nothing is remembered any more for which an automatic reload would wait."""
        databases = [one for one in self._current.settings.mappings if isinstance(one, MysqlSettings)]
        longest = max([one.cache_ttl + one.stale_ttl for one in databases], default=0.0)
        return self._waits_since is not None and monotonic() - self._waits_since > longest

    # -- one child after the other

    def _fork(self, generation: Generation) -> None:
        """Raises OSError."""
        row = min(self._free_rows(generation.board))

        def become(channel: socket.socket) -> NoReturn:
            self._become_worker(generation, row, channel)

        self._children.append(Child(generation, row, become))

    def _free_rows(self, board: Scoreboard) -> set[int]:
        return set(range(board.rows)) - {child.row for child in self._children if child.generation.board is board}

    def _become_worker(self, generation: Generation, number: int, channel: socket.socket) -> NoReturn:
        """In the child: what only the master may have is let go of, and then the worker is on its own."""
        status = 1
        try:
            self._leave(generation.settings, "willi-worker")
            self._listeners.close_others(generation.settings.listen)
            self._status.close_in_child(sockets=self._status.sockets)
            links = self._status.links
            links.close_readers()
            from . import worker  # not before: it brings gevent
            from .mapping_watch import Start

            alone = not any(child.state is State.SERVING for child in self._children)
            reload = self._reload if generation is self._candidate else ""
            start = Start(self._current.news.tables, alone, reload, generation.last_rows)
            row = Row(generation.board, number)
            settings, tls = generation.settings, generation.tls
            status = worker.run(settings, tls, self._listeners.sockets, row, links, channel, start)
        except BaseException:  # noqa: BLE001 -- the stack below is the master's
            log.bug("Internal error")
        finally:
            os._exit(status)

    def _become_status(self, settings: Settings, channel: socket.socket, since: float) -> NoReturn:
        """The same for the status process."""
        try:
            self._leave(settings, "willi-status")
            self._listeners.close()
            mine = self._status.sockets_for(settings)
            self._status.close_in_child(sockets=set(self._status.sockets) - set(mine))
            from ..status import process  # not before: it brings gevent

            process.run(settings, mine, self._status.links, channel, since, partial(drop_privileges, settings))
        except BaseException:  # noqa: BLE001 -- the stack below is the master's
            log.bug("Internal error")
            os._exit(1)
        finally:
            os._exit(0)

    def _leave(self, settings: Settings, name: str) -> None:
        """In a child: let go of what every child must let go of."""
        name_process(name)
        os.environ.pop("NOTIFY_SOCKET", None)
        for number in (signal.SIGHUP, signal.SIGINT):  # meant for the master, even if a terminal sends it to all
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for child in self._children:
            child.channel.close()
        log.set_up(settings.loglevel, settings.log)
        _end_with_the_master_while_starting(self._pid)

    def _bury(self) -> None:
        """Take note of those that have ended."""
        while self._children or self._status.has_children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            self._status.bury(pid, status)
            child = next((child for child in self._children if child.pid == pid), None)
            if child:
                child.listen()
                child.forget()
                self._children.remove(child)
                self._mourn(child, os.waitstatus_to_exitcode(status))

    def _mourn(self, child: Child, status: int) -> None:
        """Say so, unless it was to be expected."""
        ended = f"ended with signal {-status}" if status < 0 else f"ended with {status}"
        if child.state is State.KILLED or (child.state is State.DRAINING and status == 0):
            return
        if child.faults:
            kinds: dict[int, type[Exception]] = {TRY_AGAIN: CannotStart, DATABASE_DOWN: DatabaseDown}
            self._mourn_start(child, child.faults, kinds.get(status, Unusable))
        elif child.state is State.STARTING or child.generation is self._candidate:
            self._mourn_start(child, f"worker {ended}", CannotStart)
        else:
            log.error("Worker ended by itself", pid=child.pid, error=ended)
            self._schedule_replacement(monotonic() - child.started)

    def _mourn_start(self, child: Child, faults: str, kind: type[Exception]) -> None:
        """It could not start: nor can its generation, but a replacement is tried again."""
        if child.generation is self._candidate:
            self._give_up(faults, kind)
            return
        for fault in faults.split("\n"):
            log.error(NOT_REPLACED, error=fault)
        self._schedule_replacement(0)

    def _schedule_replacement(self, lived: float) -> None:
        if lived > LONG_LIFE:
            self._delay = 0.0
        else:
            self._delay = min(max(FIRST_DELAY, self._delay * 2), LONGEST_DELAY)
        self._replace_at = monotonic() + self._delay

    def _replace(self) -> None:
        """Have as many workers as there should be."""
        if self._candidate is self._current or monotonic() < self._replace_at:
            return
        alive = (State.STARTING, State.READY, State.SERVING)
        serving = [c for c in self._children if c.generation is self._current and c.state in alive]
        for _ in range(self._current.settings.workers - len(serving)):
            if not self._free_rows(self._current.board):
                return  # one that was killed has not ended yet, or too many drain
            try:
                self._fork(self._current)
            except OSError as error:
                log.error(NOT_REPLACED, error=str(error))
                self._schedule_replacement(0)
                return

    def _end_hopeless(self) -> None:
        """Kill what takes too long to start, to drain or to show that it is alive."""
        now = monotonic()
        if now - self._last_tick > 5 * TICK:  # we were not running ourselves: nor may they have been
            self._awake_since = now
        self._last_tick = now
        for child in self._children if now - self._awake_since > HANG_TIMEOUT else ():
            if child.state is State.STARTING and now - child.started > START_TIMEOUT:
                child.kill()
                self._mourn_start(child, f"worker was not ready within {START_TIMEOUT:g} s", CannotStart)
            elif child.state is State.SERVING and child.silence() > HANG_TIMEOUT:
                log.error("Worker hangs, it is killed", pid=child.pid, silent=child.silence())
                child.kill()
                self._schedule_replacement(now - child.started)
            elif child.is_late():
                log.error("Worker drains too long, it is killed", pid=child.pid)
                child.kill()

    def _pet_watchdog(self) -> None:
        interval = systemd.watchdog_interval()
        if interval and monotonic() - self._petted >= interval / 2:
            self._petted = monotonic()
            systemd.notify("WATCHDOG=1")


def _end_with_the_master_while_starting(master: int) -> None:
    """Until gevent waits for the end of the socket to the master: a table may hang for ever on a dead file server.

    master: its process number as it was before the fork; it may be dead already.
    """

    def look(*_: object) -> None:
        if os.getppid() != master:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)  # `run` in worker.py ends it
