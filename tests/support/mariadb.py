"""A private instance of the real MariaDB server: own data, socket and port, TLS on, loopback only."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pymysql

from tests.support.certificates import Pair
from tests.support.daemon import Setting
from tests.support.loopback import HOST, PATIENCE, free_port, wait_until

ACCOUNT = "mysql"  # whom the package creates; mariadbd does not want to be root
PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
USER, PASSWORD = "willi", "pass%word'?"
MOST_TIME = "@@GLOBAL.long_query_time"  # of a query: a number that `most_time` changes, and of no other use here
QUERY = "SELECT server, tls_verify FROM routes WHERE pattern = ?"
TABLE = """routes (
    pattern    VARCHAR(255) NOT NULL PRIMARY KEY,
    server     VARCHAR(255),
    tls_verify BOOLEAN
)"""

Row = tuple[str, "str | None", "bool | None"]

OPTIONS = """\
[mariadbd]
datadir = {home}/data
# Each server that starts removes all temporary tables that it finds there, also those of another one that runs.
tmpdir = {home}
socket = {home}/socket
pid_file = {home}/pid
log_error = {home}/error.log
bind_address = 127.0.0.1
port = {port}
ssl_cert = {home}/cert.pem
ssl_key = {home}/key.pem
skip_name_resolve
# Nothing in it is worth keeping
innodb_flush_log_at_trx_commit = 0
innodb_log_file_size = 16M
sync_binlog = 0
performance_schema = 0
secure_file_priv = {home}
max_connections = 200
max_user_connections = 150
"""


class Mariadb:
    """A running server. `query` runs as its root; the account for Willi is `USER` with `PASSWORD`."""

    def __init__(self, tls: Pair) -> None:
        # Not below pytest's own directory: that one is closed to other users.
        self.home = Path(tempfile.mkdtemp(prefix="willi-mariadb-"))
        self.port = free_port()
        self._numbers = itertools.count(1)
        self.socket = self.home / "socket"
        self.log_file = self.home / "error.log"
        self._options = self.home / "my.cnf"
        self._process: subprocess.Popen[bytes] | None = None
        shutil.copy(tls.cert, self.home / "cert.pem")
        shutil.copy(tls.key, self.home / "key.pem")
        self._options.write_text(OPTIONS.format(home=self.home, port=self.port))
        self._give(self.home)
        try:
            self._install()
            self.start()
            self._create_account()
        except BaseException:
            self.remove()
            raise

    def _create_account(self) -> None:
        self.query(f"CREATE USER {USER}@localhost IDENTIFIED BY %s", PASSWORD)
        self.query(f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY %s", PASSWORD)
        self.query(f"GRANT SELECT, EXECUTE ON *.* TO {USER}@localhost, {USER}@'127.0.0.1'")

    @property
    def host(self) -> str:
        """As willi.conf names it."""
        return f"{HOST}:{self.port}"

    def table(self, *rows: Row, charset: str = "utf8mb4", engine: str = "InnoDB") -> str:
        """A new database with the table `routes` as docs/configure.md defines it; the name of the database."""
        name = f"routes{next(self._numbers)}"
        self.query(f"CREATE DATABASE {name} CHARACTER SET {charset}")
        self.query(f"CREATE TABLE {name}.{TABLE} ENGINE = {engine}")
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO {name}.routes VALUES (%s, %s, %s)", rows)
        return name

    def mapping(self, name: str, **settings: Setting) -> dict[str, Setting]:
        """The section of willi.conf for such a database."""
        server: dict[str, Setting] = {} if "unix_socket" in settings else {"host": self.host}
        return {
            "type": "mysql", **server, "user": USER, "password": PASSWORD, "database": name, "query": QUERY,
            "timeout": "30s", **settings,
        }  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process is not None

    def query(self, statement: str, *values: object) -> Sequence[tuple[object, ...]]:
        """Run a statement; all its rows."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall()

    def connect(self) -> pymysql.Connection[pymysql.cursors.Cursor]:
        """As root, by the socket."""
        return pymysql.connect(
            unix_socket=str(self.socket), user="root", charset="utf8mb4", autocommit=True, ssl_disabled=True
        )  # fmt: skip

    def connections(self, database: str) -> list[int]:
        """The numbers of the connections that use this database."""
        rows = self.query("SELECT id FROM information_schema.processlist WHERE db = %s", database)
        return [int(str(row[0])) for row in rows]

    def kill_connections(self, database: str) -> None:
        """End them, whatever they are doing."""
        for number in self.connections(database):
            with suppress(pymysql.MySQLError):  # it has just ended
                self.query(f"KILL {number}")

    def count_queries(self) -> int:
        """SELECT statements so far, those of the tests included."""
        return int(str(self.query("SHOW GLOBAL STATUS LIKE 'Com_select'")[0][1]))

    def start(self) -> None:
        """Also after `stop` or `kill`, on the same port."""
        command = ["mariadbd", f"--defaults-file={self._options}", *self._as_account()]
        self._process = subprocess.Popen(
            command, env=PATH, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(self._is_up, "MariaDB's first answer", PATIENCE)
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}:\n{self._log_text()}") from None

    def stop(self) -> None:
        """SIGTERM: as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    @contextmanager
    def most_time(self, seconds: float) -> Iterator[None]:
        """What MOST_TIME is in the block. Otherwise it is ten seconds."""
        self.query(f"SET GLOBAL long_query_time = {seconds}")
        try:
            yield
        finally:
            self.query("SET GLOBAL long_query_time = DEFAULT")

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It takes connections and octets, and answers nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self._process.pid}/task")
        try:
            wait_until(lambda: all(_is_stopped(thread) for thread in threads.iterdir()), "all threads stopped")
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """For good."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self._process:
            self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
            self._process.kill()
            self._process.wait()
            self._process = None

    def _is_up(self) -> bool:
        assert self._process and self._process.poll() is None, "mariadbd has ended"
        with suppress(pymysql.MySQLError):
            self.connect().close()
            return True
        return False

    def _log_text(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else "no log"

    def _install(self) -> None:
        command = [
            "mariadb-install-db", f"--defaults-file={self._options}", *self._as_account(),
            "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve",
        ]  # fmt: skip
        done = subprocess.run(command, env=PATH, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"mariadb-install-db: {done.stdout}\n{done.stderr}\n{self._log_text()}"

    def _as_account(self) -> list[str]:
        return [f"--user={ACCOUNT}"] if os.geteuid() == 0 else []

    def _give(self, directory: Path) -> None:
        """Hand the directory and its files to the server's account."""
        if os.geteuid() == 0:
            account = pwd.getpwnam(ACCOUNT)
            for path in (directory, *directory.iterdir()):
                os.chown(path, account.pw_uid, account.pw_gid)


def _is_stopped(thread: Path) -> bool:
    return (thread / "stat").read_text().rpartition(") ")[2].startswith("T")
