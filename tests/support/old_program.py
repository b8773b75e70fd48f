"""A stand-in for the Willi that was written in Go: its unit, its file, and a program that behaves as it does.

It reads its file once, at its start, and ends with an error if that is no HJSON. Clients get a banner, and then 250s.
"""

from __future__ import annotations

from tests.support.machine import Machine

HOME = "/opt/willi"
CONF = f"{HOME}/etc/willi.conf"
UNIT = "/etc/systemd/system/willi.service"
BANNER = "220 old.example ESMTP Service Ready"
SETTINGS = """\
domain: old.example
mappings: [
    {
        type: csv
        file: etc/mapping.csv
    }
]
"""
UNIT_TEXT = f"""\
[Unit]
Description=SMTP Proxy
After=network.target

[Service]
User=willi
WorkingDirectory={HOME}
ExecStart={HOME}/willi -c ./etc/willi.conf
AmbientCapabilities=CAP_NET_BIND_SERVICE
SyslogIdentifier=willi
SyslogFacility=mail
Restart=on-failure
RestartSec=5s

[Install]
WantedBy=multi-user.target
"""
PROGRAM = """\
#!/usr/bin/python3 -I
import socketserver, sys

path = sys.argv[sys.argv.index("-c") + 1]
with open(path) as file:
    text = file.read()
if "mappings: [" not in text:
    sys.exit(f"Failed to load config file {path}")
domain = next(line.split(": ")[1] for line in text.splitlines() if line.startswith("domain: "))

class Session(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(f"220 {domain} ESMTP Service Ready\\r\\n".encode())
        for line in self.rfile:
            self.wfile.write(b"250 OK\\r\\n")

socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer(("", 25), Session).serve_forever()
"""


def make_account(machine: Machine) -> None:
    """Without a group, as its own install.sh does."""
    machine.run("useradd", "--system", "--gid=nogroup", "--no-create-home", "--shell=/usr/sbin/nologin", "willi")
    machine.run("install", "-d", "-o", "willi", f"{HOME}/etc")


def start(machine: Machine) -> None:
    """As its own install.sh leaves it, with a unit without Type=."""
    make_account(machine)
    machine.write(f"{HOME}/willi", PROGRAM, 0o755)
    machine.write(f"{HOME}/willi.service", UNIT_TEXT)
    machine.write(UNIT, UNIT_TEXT)
    machine.write(CONF, SETTINGS)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "--quiet", "enable", "--now", "willi")
