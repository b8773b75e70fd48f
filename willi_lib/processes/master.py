"""Processes: forks the workers and the status process, replaces those that die, reloads, and ends them all.

The master touches no client and imports no gevent: a hub in the parent of a fork would be inherited by every child.
Signals are blocked; the loop takes one at a time and then looks after its children, at least once in a `TICK`.

It starts with `_begin`: a generation of workers is forked, the *candidate*. When all of them are ready, `_switch` makes
it the current one; if one of them fails, `_give_up` ends the others. A reload does the same beside the current one.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic, monotonic_ns, time

from .. import files, log
from ..config import Address, ConfigError, Settings
from ..config.settings import paths_of
from ..net.tls import CertificateError
from ..status.counts import LIMITS
from ..status.reports import Links, MasterReport, send
from ..status.words import several
from . import systemd
from .child import STATUS, WORKER, Backoff, CannotStart, Child, Role, State
from .fork import SIGNALS, become, name_process
from .generation import GENERATIONS, Generation, Reload, Start, raise_descriptor_limit
from .listeners import CannotBind, Listeners
from .reload import write_answer
from .scoreboard import Row, Scoreboard

TICK = 1.0  # seconds
BUSY_TICK = 0.05  # seconds, while workers start
BIND_INTERVAL = 10.0  # seconds between tries to listen for the status
RELOAD_FAILED = "Reload failed, nothing has changed"
RELOAD_WAITS = "Reload waits for a database, since new workers would remember no answers"


def run(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Serve until told to end. read_again: reads the file for a reload.

    Raises CannotBind, CannotStart.
    """
    name_process("willi-master", in_command=False)  # the init script knows it by its command
    Master(settings, read_again).run()


class Master:
    """The children and what they share."""

    def __init__(self, settings: Settings, read_again: Callable[[], Settings]) -> None:
        """Raises CannotStart, CannotBind."""
        self._watch = files.FileWatch(files.INTERVAL, files.RETRY)  # of certificates and the like
        self._current = self._new_generation(settings, None)
        self._candidate: Generation | None = None  # whose workers are starting
        self._read_again = read_again
        self._pid = os.getpid()
        self._listeners = Listeners(with_systemd=True)
        self._status_listeners = Listeners()
        self._status_fault = ""  # why its address cannot be had
        self._status_since = monotonic()  # what older workers have counted before is no news for the status process
        self._links = Links()
        self._report = self._sent = MasterReport(pid=self._pid, started=time())  # to the status process
        self._sent_at = 0.0
        self._children: list[Child] = []
        self._backoff = {WORKER: Backoff(), STATUS: Backoff()}
        self._wanted: Reload = ""  # a reload that has not begun yet
        self._reload: Reload = ""  # the last one that has
        self._reload_began = 0.0
        self._waits_until: float | None = None  # an automatic reload, for a database
        self._stopping = False
        self._failure: CannotStart | None = None  # of the first generation
        self._last_tick = self._awake_since = self._notified = monotonic()

    def run(self) -> None:
        """Raises CannotBind, CannotStart."""
        self._listeners.close_others(self._current.settings.listen)  # a kept one may be in the way of a new one
        self._begin(self._current)
        while not self._stopping or any(not child.is_lost for child in self._children):
            arrived = signal.sigtimedwait(SIGNALS, BUSY_TICK if self._candidate else TICK)
            try:
                if arrived:
                    self._on_signal(arrived.si_signo)
                self._look_after_children()
            except Exception:  # noqa: BLE001 -- those that serve shall go on, whatever it is
                log.bug("Internal error")
        for child in self._children:
            log.error("A process that was killed does not end", pid=child.pid)
        if self._failure:
            raise self._failure
        log.info("Stopped")

    @property
    def _workers(self) -> list[Child]:
        return [child for child in self._children if child.role is WORKER]

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            if self._wanted != "asked" and (self._candidate or not self._has_room()):
                log.info("Reload waits for workers that still start or drain", workers=len(self._workers))
            self._wanted = "asked"
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._stop()

    def _look_after_children(self) -> None:
        self._reap()
        self._listen()
        self._kill_stuck()
        if self._stopping:
            if not self._workers:  # the status process ends last: until then it shows how they drain
                for child in self._children:
                    child.end()
        elif self._candidate is not self._current:
            self._replace_workers()
            self._replace_status()
            self._reload_if_wanted()
        if len(self._workers) < len(self._children):
            self._send_report()
        self._notified = systemd.notify_watchdog(self._notified)
        log.flush()

    # -- start and reload: one generation after the other

    def _new_generation(self, settings: Settings, before: Generation | None) -> Generation:
        """Raises CannotStart."""
        self._watch.note(_watched_files(settings))
        try:
            return Generation.of(settings, before)
        except CertificateError as error:
            raise CannotStart(str(error)) from None

    def _begin(self, generation: Generation) -> None:
        """Start the workers of a file; `_listen` goes on when they are ready. Raises CannotBind."""
        self._listeners.open(generation.settings.listen)
        raise_descriptor_limit(generation.settings)
        self._status_since = monotonic()
        self._candidate = generation
        for _ in range(generation.settings.workers):
            try:
                self._fork_worker(generation)
            except OSError as error:
                self._give_up(CannotStart(f"cannot start a worker: {error.strerror}", may_pass=True))
                return

    def _listen(self) -> None:
        """Read what the children tell; when all workers of a new generation are ready, they take over."""
        for child in self._children:
            child.listen()
            if child.is_leaving:
                log.error("Worker ends by itself", pid=child.pid)
                child.end()
            elif child.state is State.READY and child.generation is not self._candidate:
                child.go()
                if child.role is WORKER:
                    log.info("Worker replaced", pid=child.pid)
        new = [child for child in self._workers if child.generation is self._candidate]
        if self._candidate and all(child.state is State.READY for child in new):
            self._switch(self._candidate, new)

    def _switch(self, generation: Generation, new: list[Child]) -> None:
        first, settings = generation is self._current, generation.settings
        for child in new:
            child.go()
        for child in self._children:
            if child.role is STATUS and _has_same_status(child.generation.settings, settings):
                child.generation = generation
            elif child not in new:
                child.end()  # also a replacement that comes too late
        self._current, self._candidate, self._waits_until = generation, None, None
        self._backoff = {WORKER: Backoff(), STATUS: Backoff()}
        self._watch.were_read()
        self._listeners.close_others(settings.listen)
        self._status_listeners.close_others(_status_addresses(settings))
        log.set_up(settings.loglevel, settings.log)
        log.info("Ready" if first else "Reloaded", listen=str(self._listeners), workers=len(new), pid=self._pid)
        workers = several(len(new), "worker listens", "workers listen")
        systemd.notify("READY=1", f"STATUS={workers} on {self._listeners}")
        if not first:
            self._report = replace(
                self._report, reloads=self._report.reloads + 1, last_reload=time(), last_reload_error=""
            )
            self._answer_reload()

    def _reload_if_wanted(self) -> None:
        if self._candidate:
            return
        if self._watch.look(_watched_files(self._current.settings)):
            log.info("A certificate or password has changed", files=",".join(self._watch.changed))
            waited_too_long = self._waits_until is not None and monotonic() > self._waits_until
            self._wanted = self._wanted or ("overdue" if waited_too_long else "automatic")
        if not self._wanted or not self._has_room():
            return
        self._reload, self._wanted = self._wanted, ""
        self._reload_began = monotonic()
        self._watch.note(_watched_files(self._current.settings))
        self._watch.failed()  # unless the following succeeds: willi.conf may have a fault
        log.info("Reloading")
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")
        try:
            self._begin(self._new_generation(self._read_again(), self._current))
        except CannotStart as failure:
            self._give_up(failure)
        except (ConfigError, CannotBind) as faults:
            self._give_up(CannotStart(str(faults)))
        except Exception:  # noqa: BLE001 -- systemd must hear READY again
            log.bug("Internal error")
            self._give_up(CannotStart("internal error"))

    def _has_room(self) -> bool:
        """Whether one more generation of workers may be."""
        return len(self._free_rows(self._current.board)) * GENERATIONS >= self._current.board.rows

    def _give_up(self, failure: CannotStart) -> None:
        """The new workers cannot be: those that serve go on. If there are none, `run` raises the failure."""
        for child in self._workers:
            if child.generation is self._candidate:
                child.kill()
        first, faults = self._candidate is self._current, str(failure)
        self._candidate = None
        if first:
            self._failure, self._stopping = failure, True
            return
        self._listeners.close_others(self._current.settings.listen)
        if failure.remembered is not None:
            self._waits_until = self._waits_until or monotonic() + failure.remembered
            log.warn(RELOAD_WAITS, error=faults)
            systemd.notify("READY=1", f"STATUS={RELOAD_WAITS}: {faults}")
            return
        first_fault = faults.partition("\n")[0]
        failed = self._report.reloads_failed + 1
        self._report = replace(self._report, reloads_failed=failed, last_reload_error=first_fault)
        for fault in faults.split("\n"):
            log.error(RELOAD_FAILED, error=fault)
        systemd.notify("READY=1", f"STATUS={RELOAD_FAILED}: {first_fault}")
        self._answer_reload(faults)

    def _answer_reload(self, faults: str = "") -> None:
        try:
            write_answer(self._reload_began, faults)
        except OSError as error:
            log.warn("Cannot write down what became of the reload", error=str(error))

    # -- replace: one child after the other

    def _replace_workers(self) -> None:
        """Have as many as there should be."""
        backoff, generation = self._backoff[WORKER], self._current
        alive = [child for child in self._workers if child.generation is generation and not child.is_ending]
        for _ in range(generation.settings.workers - len(alive) if backoff.is_over() else 0):
            if not self._free_rows(generation.board):
                return  # one that was killed has not ended yet, or too many drain
            try:
                self._fork_worker(generation)
            except OSError as error:
                log.error(WORKER.cannot_start, error=str(error))
                backoff.died()
                return

    def _replace_status(self) -> None:
        """Have one if the file wants it. No mail waits for an address that cannot be had: it is tried again."""
        backoff, settings = self._backoff[STATUS], self._current.settings
        is_there = any(child.role is STATUS for child in self._children)
        if is_there or not settings.status_listen or not backoff.is_over():
            return
        try:
            self._status_listeners.open(_status_addresses(settings), patience=0.0)
            self._status_fault = ""
            self._fork(STATUS, self._current, Row(Scoreboard(1, rates=False), 0), self._run_status)
        except CannotBind as error:
            if str(error) != self._status_fault:
                log.warn("There is no status for now", error=str(error))
            self._status_fault = str(error)
            backoff.wait(BIND_INTERVAL)
        except OSError as error:
            log.error(STATUS.cannot_start, error=str(error))
            backoff.died()

    def _fork_worker(self, generation: Generation) -> None:
        """Raises OSError."""
        row = Row(generation.board, min(self._free_rows(generation.board)))
        self._fork(WORKER, generation, row, self._run_worker)

    def _free_rows(self, board: Scoreboard) -> set[int]:
        return set(range(board.rows)) - {child.row.number for child in self._children if child.row.board is board}

    def _fork(self, role: Role, generation: Generation, row: Row, work: Callable[..., int]) -> None:
        """Raises OSError."""
        siblings, work = [*self._children], partial(work, generation, row)
        start = partial(become, role.name, generation.settings, self._pid, siblings, work)
        self._children.append(Child(role, generation, row, start))

    def _run_worker(self, generation: Generation, row: Row, channel: socket.socket) -> int:
        self._listeners.close_others(generation.settings.listen)
        self._status_listeners.close()
        self._links.close_readers()
        from . import worker  # not before: it brings gevent

        alone = not any(child.state is State.SERVING for child in self._workers)
        reload: Reload = self._reload if generation is self._candidate else ""
        start = Start(self._current.news.tables, alone, reload)
        return worker.run(generation, self._listeners.sockets, row, self._links, channel, start)

    def _run_status(self, generation: Generation, row: Row, channel: socket.socket) -> int:
        self._listeners.close()
        from . import status_process  # not before: it brings gevent

        sockets = self._status_listeners.sockets
        status_process.run(generation.settings, sockets, row, self._links, channel, self._status_since)
        return 0

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            for child in [child for child in self._children if child.pid == pid]:
                child.listen()
                child.forget()
                self._children.remove(child)
                self._note_exit(child, os.waitstatus_to_exitcode(status))

    def _note_exit(self, child: Child, status: int) -> None:
        """Log it, unless it was to be expected, and have the child replaced later."""
        if child.role is STATUS and child.state is not State.DRAINING:  # at a reload `since` is when that began
            self._status_since = monotonic()
        ended = f"ended with signal {-status}" if status < 0 else f"ended with {status}"
        if child.state is State.KILLED or (child.state is State.DRAINING and status == 0):
            return
        if child.failure:
            self._start_failed(child, child.failure)
        elif child.role is WORKER and (child.state is State.STARTING or child.generation is self._candidate):
            self._start_failed(child, CannotStart(f"worker {ended}", may_pass=True))
        else:
            log.error(child.role.ended, pid=child.pid, error=ended)
            self._backoff[child.role].died(monotonic() - child.started)

    def _start_failed(self, child: Child, failure: CannotStart) -> None:
        """Nor can its generation start, but a replacement is tried again."""
        if child.generation is self._candidate:
            self._give_up(failure)
            return
        for fault in str(failure).split("\n"):
            log.error(child.role.cannot_start, error=fault)
        self._backoff[child.role].died()

    def _kill_stuck(self) -> None:
        """Kill what takes too long to start, to drain or to show that it is alive."""
        now = monotonic()
        if now - self._last_tick > 5 * TICK:  # we were not running ourselves: nor may they have been
            self._awake_since = now
        self._last_tick = now
        for child in self._children:
            stuck, state = child.stuck(self._awake_since), child.state
            if stuck and state is State.STARTING:
                child.kill()
                self._start_failed(child, CannotStart(stuck, may_pass=True))
            elif stuck:
                log.error(stuck, pid=child.pid, silent=child.silence())
                child.kill()
            if stuck and state is State.SERVING:
                self._backoff[child.role].died(now - child.started)

    def _send_report(self) -> None:
        """What the status shows of the master: when it has changed, and each second."""
        settings, listen = self._current.settings, str(self._listeners)
        report = replace(
            self._report,
            domain=settings.domain,
            log=settings.log,
            loglevel=settings.loglevel,
            listen=listen.split(",") if listen else [],
            wanted=settings.workers,
            workers={str(worker.pid): worker.state.name.lower() for worker in self._workers},
            stopping=self._stopping,
            connections=sum(board.total for board in {worker.row.board for worker in self._workers}),
            limits={name: getattr(settings, name) for name in LIMITS},
        )
        is_due = report != self._sent or monotonic() - self._sent_at >= TICK
        if is_due and send(self._links.to_reports, master=report):
            self._sent, self._sent_at = report, monotonic()

    # -- stop

    def _stop(self) -> None:
        """Let the workers drain. At a second signal, end them at once."""
        if self._stopping:
            log.warn("Ended at once", workers=len(self._workers))
            for child in self._children:
                child.kill()
            return
        log.info("Stopping", workers=len(self._workers), drain_timeout=self._current.settings.drain_timeout)
        systemd.notify("STOPPING=1")
        self._listeners.close()
        for child in self._workers:
            child.end()
        self._stopping, self._candidate = True, None


def _watched_files(settings: Settings) -> list[str]:
    """Certificates, keys, authorities, and passwords of databases."""
    of_system = ssl.get_default_verify_paths()
    named = [path for path, key in paths_of(settings) if key.is_watched]
    return [*named, *(path for path in (of_system.cafile, of_system.capath) if path)]


def _status_addresses(settings: Settings) -> list[Address]:
    return [settings.status_listen] if settings.status_listen else []


def _has_same_status(old: Settings, new: Settings) -> bool:
    """Whether a status process of the old file may go on under the new one; the master reports the rest to it."""
    return (old.status_listen, old.user, old.group) == (new.status_listen, new.user, new.group)
