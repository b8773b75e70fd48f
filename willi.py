#!/usr/bin/env python3
"""Willi, an SMTP proxy that chooses the upstream by the recipient.

Usage:
  willi.py [-c FILE] [--debug]
  willi.py check [-c FILE] [--quick] [--json]
  willi.py lookup [-c FILE] [--json] (--from FILE | ADDRESS...)
  willi.py lookup [-c FILE] --diff OLD
  willi.py top [-c FILE]
  willi.py (-h | --help | -V | --version)

Commands:
  (none)          Serve in the foreground until SIGTERM or Ctrl-C. SIGHUP reads the file again.
  check           Try the file and all that it names, and say what is wrong and what to do: one line per finding.
  lookup          Show each key asked in each mapping for an address, and its route; or what a new table changes.
  top             Show in the terminal what the status page shows (status_listen), until q or Ctrl-C.

Options:
  -c FILE         The configuration. Default: ./willi.conf, then /opt/willi/etc/willi.conf.
  --quick         Only whether Willi would start: the file, tables, certificates and ports. No server is asked.
  --from FILE     The addresses of a file, one a line; - is stdin.
  --diff OLD      The patterns that go elsewhere by the table (CSV) of the configuration than by this old one.
  --json          check: the findings as a list of {"level", "subject", "what", "advice"}.
                  lookup: for each address a line {"address", "route", "tls_verify", "mapping", "key", "result"}.
  --debug         One worker, and the whole dialogue in the log on the terminal.
  -h --help       Show this text.
  -V --version    Show the version.

Exit status: 0 good, 1 something is wrong with the configuration, 2 wrong usage, 3 cannot listen, 4 something else went
wrong, and another start may help.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GOOD, BAD_CONFIGURATION, BAD_USAGE, CANNOT_BIND, FAILED = range(5)

try:
    from docopt import DocoptExit, docopt

    from willi_lib import VERSION, log
    from willi_lib.config import ConfigError, Settings, load
    from willi_lib.processes import master, systemd
    from willi_lib.processes.child import CannotStart
    from willi_lib.processes.fork import block_signals
    from willi_lib.processes.listeners import CannotBind
    from willi_lib.text import visible
except ModuleNotFoundError as missing:  # usual after an upgrade of the system: the libraries are for one Python only
    print(
        f"Willi cannot start: there is no module {missing.name!r} for Python {sys.version_info.major}."
        f"{sys.version_info.minor}. If the system has another Python now, run install.sh of the release again.",
        file=sys.stderr,
    )
    if not str(missing.name).startswith("willi_lib"):
        from willi_lib.processes.systemd import forget_sockets  # needs no library

        forget_sockets()
    sys.exit(FAILED)

DEFAULT_FILES = ("willi.conf", "/opt/willi/etc/willi.conf")
# Of each command, besides -c
OPTIONS = {
    "": ("--debug", "--help", "--version"), "check": ("--quick", "--json"), "lookup": ("--json", "--from", "--diff"),
    "top": (),
}  # fmt: skip
WITH_FILE = ("-c", "--from", "--diff")


def main() -> int:
    try:
        arguments = docopt(__doc__, version=f"willi {VERSION}")
    except DocoptExit as usage:
        print(f"willi.py: {visible(wrong_usage(sys.argv[1:]))}; see willi.py --help\n\n{usage}", file=sys.stderr)
        return BAD_USAGE
    asks = any(arguments[command] for command in ("check", "lookup", "top"))
    if not asks:
        log.hold_standard_descriptors()
        block_signals()
    try:
        settings = load(arguments["-c"] or default_file())
        if arguments["top"]:
            from willi_lib.status.terminal import top

            return top(settings)
        if arguments["check"] or arguments["lookup"]:
            return ask(settings, arguments)
        return serve(settings, arguments["--debug"])
    except ConfigError as error:
        if arguments["check"] and arguments["--json"]:
            from willi_lib.check.finding import faults, report

            return report(faults(str(error)), as_json=True)
        print(error, file=sys.stderr)
        if not asks:
            systemd.forget_sockets()
        return FAILED if error.may_pass and not asks else BAD_CONFIGURATION


def wrong_usage(words: Sequence[str]) -> str:
    """What docopt does not say: which of the words is wrong."""
    files = [at for at, word in enumerate(words) if word in WITH_FILE]
    others = [word for at, word in enumerate(words) if not {at, at - 1} & set(files)]
    command, *arguments = [word for word in others if not word.startswith("-")] or [""]
    if command and command not in OPTIONS:
        return f"there is no command {command!r}{nearest(command, OPTIONS)}"
    for word in others:
        if word.startswith("-") and not any(option.startswith(word.split("=")[0]) for option in OPTIONS[command]):
            return f"{command or 'willi.py'} has no option {word}{nearest(word, OPTIONS[command])}"
    if arguments and command != "lookup":
        return f"{command} takes no {arguments[0]!r}"
    sources = {"--from", "--diff"} & set(words)
    if command == "lookup" and not arguments and not sources:
        return "lookup needs an address"
    if command == "lookup" and bool(arguments) + len(sources) > 1:
        return "lookup takes addresses, or --from, or --diff"
    if {"--diff", "--json"} <= set(words):
        return "lookup --diff has no option --json"
    return f"{words[files[-1]]} must be there once, with a file behind it" if files else "an option is there twice"


def nearest(word: str, words: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, words, 1, cutoff=0.7)
    return f", did you mean {found[0]!r}" if found else ""


def ask(settings: Settings, arguments: Mapping[str, Any]) -> int:
    from willi_lib import check  # not before: it brings gevent

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no reason for a traceback
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # nor are letters it does not have
    try:
        if arguments["lookup"]:
            if (old := arguments["--diff"]) is not None:
                return check.compare(settings, old)
            file = arguments["--from"]
            addresses = arguments["ADDRESS"] if file is None else check.addresses_in(file)
            return check.lookup(settings, addresses, as_json=arguments["--json"])
        return check.check(settings, quick=arguments["--quick"], as_json=arguments["--json"])
    except BrokenPipeError:  # `willi.py check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at its end
        return FAILED
    except OSError as error:  # the file of addresses, or a full disk
        print(f"willi.py: {visible(str(error.filename or 'input or output'))}: {error.strerror}", file=sys.stderr)
        return FAILED


def default_file() -> str:
    """The first of the default files that exists, or is where we may not look. Raises ConfigError."""
    for path in DEFAULT_FILES:
        if os.path.exists(path):  # noqa: PTH110 -- Path.exists() raises where we may not look, such as in /root
            return path
    directory = os.path.dirname(path)  # noqa: PTH120 -- as above
    if os.path.isdir(directory) and not os.access(directory, os.X_OK):  # noqa: PTH112
        return path  # reading it says why not
    raise ConfigError([f"no configuration: neither {' nor '.join(DEFAULT_FILES)} exists; copy willi.conf.example"])


def serve(settings: Settings, debug: bool) -> int:
    # An upgrade turns /opt/willi/venv to another release: workers forked after it shall find the libraries of ours.
    sys.path[:] = map(os.path.realpath, sys.path)
    if debug:
        settings = for_debug(settings)
    log.set_up(settings.loglevel, settings.log)
    log.info("Starting", version=VERSION, config=settings.path)
    if settings.log == "syslog" and (fault := log.syslog_fault()):
        print(f"willi.py: no line of the log is kept: {fault}", file=sys.stderr, flush=True)
    try:
        master.run(settings, lambda: for_debug(load(settings.path)) if debug else load(settings.path))
    except CannotBind as error:
        return cannot_start(str(error), CANNOT_BIND)
    except CannotStart as error:
        return cannot_start(str(error), FAILED if error.may_pass else BAD_CONFIGURATION)
    except Exception:  # noqa: BLE001 -- a fault of ours: the supervisor shall start us again
        log.bug("Internal error")
        return FAILED
    finally:
        log.finish()
    return GOOD


def for_debug(settings: Settings) -> Settings:
    return dataclasses.replace(settings, loglevel="debug", log="stdout", workers=1)


def cannot_start(faults: str, status: int) -> int:
    """Say why in the log, and on stderr unless that is the same; the exit status."""
    for fault in faults.split("\n"):
        log.error("Cannot start", error=fault)
        if not log.shows_on(2):
            print(f"willi.py: cannot start: {visible(fault)}", file=sys.stderr)
    systemd.forget_sockets()
    return status


if __name__ == "__main__":
    sys.exit(main())
