"""gevent in the place of what blocks. Imported before all else by a process that serves in greenlets.

dnspython keeps the socket class that it finds. Not ssl: wire.py drives TLS itself, and gevent's SSLContext can't do SNI
without its own SSLSocket.
"""

from __future__ import annotations

from gevent import events, monkey

# Willi has no plugins for gevent; each of its 23 steps would look for some in all packages: a third of a start.
events.notify_and_call_entry_points = events.notify  # type: ignore[attr-defined]  # not in its stub
monkey.patch_all(ssl=False)
