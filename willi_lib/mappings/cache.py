"""Routes from a database that may be slow, locked, restarted, failed over or gone.

What was asked is remembered, the database is asked once for all sessions that want the same key, and no session waits
for one that is known to be down. A row that was there a moment ago and is missing now is no "no such row" yet: its
table may just be filled again.

No session ever holds a connection. A query runs in a greenlet of its own, under its own time limit, so that a session
that waits for it may give up or be ended at any time: the answer still comes to the others, and the connection back to
its host.
"""

from __future__ import annotations

import pickle  # noqa: F401 -- gevent loads it for the first exception, when perhaps no descriptor is left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from traceback import format_exception
from typing import NamedTuple

import gevent
from gevent.event import AsyncResult

from .. import log
from ..config import MysqlSettings, SqliteSettings
from ..routing.route import Answer, LookupFailed, MappingError, MappingFacts, Route
from .known_rows import KnownRows
from .source import NOBODY, Down, OwnLack, Source, TooSlow

RETRY_INTERVAL = 5.0  # seconds between sessions that wait for a database that is down ...
QUICK_RETRY = 1.0  # ... and between tries if they cost no time, as with a refused connection ...
QUICK = 0.2  # ... that is, failed within this
CONFIRMATION = 60.0  # seconds a row must be missing until that is believed: a restored table lacks rows for a while
ROW_IS_MISSING = f"A row is missing, it is believed to be gone after {CONFIRMATION:g} s"
NO_ROW = "Database has shown no row, until it does what no other mapping has is told 451"
BACK = "Database is back after {:.1f} s"
MAX_KEY = 512  # characters of a key that is remembered: of real ones 320, and of a command's line 2,000
GRACE = 0.2  # seconds for a query that has just run into the time limit to say why


@dataclass
class _Outage:
    """The database is down."""

    why: str
    since: float
    next_try: float
    failed: float  # when it last gave no answer
    stale_used: bool = False


class _Entry(NamedTuple):
    """An answer that is remembered."""

    route: Route | None
    since: float


class CachedMapping:
    """A mapping whose answers come from a database, slowly or not at all."""

    def __init__(
        self, name: str, settings: MysqlSettings | SqliteSettings, database: Source, rows: KnownRows | None = None
    ) -> None:
        """rows: what the workers share. Without it each "no such row" is believed, as by `willi.py lookup`."""
        self.name = name
        self._settings = settings
        self._database = database
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one that was used last is the last
        self._asking: dict[str, AsyncResult[Route | None]] = {}
        self._rows = rows
        self._no_row_logged = False
        self._answered = 0.0  # when the database last said anything
        self._outage: _Outage | None = None

    def find(self, keys: Sequence[str]) -> Iterator[Answer]:
        """The answers for these keys, all of them within `timeout`. They raise LookupFailed.

        An old "no such row" lets a more general key serve, but never becomes a "no match" as a whole: the client would
        be told that a recipient does not exist, and that recipient may be new.
        """
        deadline = monotonic() + self._settings.timeout
        stale = False
        for number, key in enumerate(keys, 1):
            answer = self._answer(key, deadline)
            stale = stale or answer.origin == "stale"
            if stale and answer.route is None and number == len(keys):
                raise LookupFailed("the database is down, and no route is remembered", self._outage is not None)
            if answer.route is None and number == len(keys) and not self._is_confirmed(keys, deadline):
                answer = Answer(None, "unsure")
            yield answer

    def close(self) -> None:
        """At the end of the process: the server's log then has no word about lost connections."""
        self._database.close()

    def load(self, reload: bool = False) -> bool:
        """With `reload` ask the database, whatever is known of it. Raises MappingError; passing: it gave no answer."""
        try:
            if reload:
                self._database.ask(NOBODY)
        except TooSlow:
            pass
        except (Down, LookupFailed) as why:
            passing = isinstance(why, Down) and not why.not_there
            raise MappingError(f"{self.name}: {why}", passing=passing) from None
        return False

    def files(self) -> Sequence[str]:
        return ()

    def facts(self, thorough: bool = False) -> MappingFacts:
        now = self._outage
        return MappingFacts(
            last_error=now.why if now else "",
            database_up=not now,
            seen=now.failed if now else self._answered,
            cache_entries=len(self._entries),
            remembers=self._settings.cache_ttl + self._settings.stale_ttl,
            hosts=self._database.inspect_hosts() if thorough else (),
        )

    def _is_confirmed(self, keys: Sequence[str], deadline: float) -> bool:
        """Look for the row that any worker found last, unless it was seen after all of these keys were not found.

        False: no row is known. Raises LookupFailed: that row is missing, too, so the table is empty or being filled.
        In both cases the answers for these keys are forgotten.
        """
        if self._rows is None:
            return True
        found, seen = self._rows.last()
        misses = [self._entries[key].since for key in keys if key in self._entries]
        if found and misses and not self._rows.missing_since(found) and seen >= max(misses):
            return True
        is_there = False
        try:
            is_there = bool(found) and self._ask(found, deadline).route is not None
        finally:
            for key in keys if not is_there else ():
                self._entries.pop(key, None)
        if not is_there and not self._no_row_logged:
            self._no_row_logged = True
            log.warn(NO_ROW, mapping=self.name)
        return is_there

    def _answer(self, key: str, deadline: float) -> Answer:
        now = monotonic()
        entry = self._entries.get(key)
        if entry and now - entry.since < self._settings.cache_ttl:
            self._entries.move_to_end(key)
            return Answer(entry.route, "cache")
        if entry and now - entry.since >= self._settings.cache_ttl + self._settings.stale_ttl:
            entry = None
        return self._ask(key, deadline, entry)

    def _ask(self, key: str, deadline: float, entry: _Entry | None = None) -> Answer:
        """entry: an old answer, which serves if there is no new one. Raises LookupFailed."""
        now = monotonic()
        asking = self._ask_in_turn(key, now)
        if entry and self._outage:
            return self._stale(entry)
        if asking is None:
            assert self._outage
            raise LookupFailed(self._outage.why, logged=True)
        asking.wait(max(0.0, deadline - now) + GRACE)
        if asking.successful():
            return Answer(asking.value, "asked")
        why = asking.exception or Down(f"no answer within {self._settings.timeout:g} s")
        if isinstance(why, Down):
            if entry:
                return self._stale(entry)
            raise LookupFailed(str(why), self._outage is not None)
        if isinstance(why, LookupFailed):
            raise LookupFailed(str(why), why.logged)
        raise RuntimeError("".join(format_exception(why)))  # a bug of ours: the log has its traceback

    def _ask_in_turn(self, key: str, now: float) -> AsyncResult[Route | None] | None:
        """The query for this key, under way or new. None: the database is down, and it is not our turn to try it."""
        if self._outage:
            if now < self._outage.next_try:
                return None
            self._outage.next_try = now + self._settings.timeout + RETRY_INTERVAL  # the end of this try says when
        asking = self._asking.get(key)
        if asking is None:
            asking = AsyncResult()
            gevent.spawn(self._run, key, asking)  # may fail for lack of memory
            self._asking[key] = asking
        return asking

    def _run(self, key: str, asking: AsyncResult[Route | None]) -> None:
        """Ask the database, in a greenlet of its own, and tell all sessions that wait."""
        began = monotonic()
        try:
            route = self._database.ask(key)
            self._note_up()
            self._remember(key, route)
            asking.set(route)
        except Exception as failure:  # noqa: BLE001 -- the sessions hear of it
            if isinstance(failure, TooSlow | LookupFailed):
                self._note_up()
            elif isinstance(failure, Down) and not isinstance(failure, OwnLack) and self._answered < began:
                self._note_down(str(failure), began)  # else others had answers: it is a matter of this key
            asking.set_exception(failure)
        finally:
            if self._asking.get(key) is asking:
                del self._asking[key]

    def _remember(self, key: str, route: Route | None) -> None:
        """Raises LookupFailed: there was a row a moment ago, which this worker or another one has found."""
        now, rows = monotonic(), self._rows
        if rows and route:
            rows.note(key, now)
            self._no_row_logged = False
        elif rows and self._is_missing(rows, key, now):
            raise LookupFailed(f"the row for {key!r} was there, and is missing", logged=True)
        if len(key) > MAX_KEY:
            return
        self._entries[key] = _Entry(route, now)
        self._entries.move_to_end(key)
        if len(self._entries) > self._settings.cache_size:
            self._entries.popitem(last=False)

    def _is_missing(self, rows: KnownRows, key: str, now: float) -> bool:
        """Whether a row was there and is not yet believed to be gone."""
        since, before = rows.missing_since(key), self._entries.get(key)
        if not since and (since is not None or (before and before.route)):
            log.warn(ROW_IS_MISSING, mapping=self.name, error=key)
            rows.note_missing(key, now)
            since = now
        if since is not None and now - since < CONFIRMATION:
            return True
        rows.forget_last(key)
        return False

    def _stale(self, entry: _Entry) -> Answer:
        if self._outage and not self._outage.stale_used:
            self._outage.stale_used = True
            log.warn("Using remembered answers of the database", mapping=self.name)
        return Answer(entry.route, "stale")

    def _note_down(self, why: str, began: float) -> None:
        """An outage begins or goes on. No session waits any longer."""
        now = monotonic()
        if self._outage is None:
            self._outage = _Outage(why, now, now, now)
            log.error("Database is down", mapping=self.name, error=why)
        self._outage.why, self._outage.failed = why, now
        self._outage.next_try = now + (QUICK_RETRY if now - began < QUICK else RETRY_INTERVAL)
        given_up, self._asking = self._asking, {}
        for asking in given_up.values():
            asking.set_exception(Down(why))

    def _note_up(self) -> None:
        self._answered = monotonic()
        if self._outage:
            seconds = self._answered - self._outage.since
            self._outage = None
            log.info(BACK.format(seconds), mapping=self.name)
