"""Real clients through Willi to a real Postfix: what they send is what is stored, in clear and under TLS.

And Postfix knows who they are, since Willi tells it by XCLIENT.
"""

from __future__ import annotations

import os
import re
import shlex
import smtplib
import subprocess
from contextlib import closing
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import StartPostfix, StartWilli, show_on_failure
from tests.support.certificates import Authority
from tests.support.daemon import Willi
from tests.support.exim import Exim
from tests.support.loopback import HOST, ROOT, need, wait_until
from tests.support.opensmtpd import OpenSmtpd
from tests.support.postfix import Postfix, Stored

SENDER = "ann@a.example"
ADDRESS = "127.0.0.7"  # where the clients come from; Willi comes from 127.0.0.1
MESSAGE = b"Subject: a nasty one\r\n\r\n.\r\n..two dots, and 8 bits: \xc3\xa9\r\n" + b"x" * 990 + b"\r\n\r\n"
NODE_MODULES = Path("/usr/share/nodejs")
NODEMAILER = """\
const [host, port, localAddress, from, to, tls] = process.argv.slice(1);
const transport = require("nodemailer").createTransport({
    host, port, localAddress, name: "client.example",
    requireTLS: tls === "true", ignoreTLS: tls !== "true", tls: { rejectUnauthorized: false },
});
const raw = require("fs").readFileSync(0);
transport.sendMail({ envelope: { from, to: [to] }, raw }).then((info) => console.log(info.response));
"""


@pytest.fixture
def front(start_willi: StartWilli, postfix: Postfix, certificates: Authority) -> Willi:
    """A Willi with a certificate, and a CSV that sends b.example and c.example to Postfix."""
    pair = certificates.issue("mx.willi.example", "localhost", HOST)
    return start_willi(
        csv=f"pattern;server;tls_verify\nb.example;{postfix.server};false\nc.example;{postfix.server};false\n",
        domain="mx.willi.example",
        tls_cert=str(pair.cert),
        tls_key=str(pair.key),
    )


def run(*command: str | Path, message: bytes = b"") -> str:
    """Run a client to its end; what it printed. message: its input."""
    environment = {**os.environ, "NODE_PATH": str(NODE_MODULES)}
    done = subprocess.run(
        list(map(str, command)), input=message, capture_output=True, timeout=60, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout + done.stderr).decode()


def known(stored: Stored, helo: str = "client.example", address: str = ADDRESS) -> None:
    """Postfix was told who the client is."""
    assert stored.received.startswith(f"Received: from {helo} (") and f"[{address}]" in stored.received
    assert stored.sender == SENDER


def has_two(postfix: Postfix, recipient: str) -> bool:
    """Whether both messages have been stored."""
    return len(postfix.stored(recipient)) == 2


def logged(willi: Willi, recipient: str, tls: str) -> None:
    """The canonical line says where the mail went, and how."""
    line = willi.wait_for_log(msg="Message accepted", to=recipient)
    assert line["from"] == SENDER
    assert line["client_tls"] == line["upstream_tls"] == tls
    assert "queued as" in line["reply"]


def arrived(postfix: Postfix, recipient: str) -> None:
    """MESSAGE, as it was sent, from who has sent it."""
    stored = postfix.wait_for_message(recipient)
    assert stored.content == MESSAGE.replace(b"\r\n", b"\n")
    known(stored)


@pytest.mark.parametrize("tls", ["false", "true"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_swaks(front: Willi, postfix: Postfix, tls: str, pipeline: bool):
    need("swaks")
    recipient = f"swaks-{tls}-{pipeline}@b.example".lower()
    said = run(
        "swaks", "--server", f"{HOST}:{front.port}", "--helo", "client.example", "--from", SENDER, "--to", recipient,
        "--local-interface", ADDRESS,
        "--body", "first\n.\n..second\n", *(["--tls"] if tls == "true" else []), *(["--pipeline"] if pipeline else []),
    )  # fmt: skip
    assert "queued as" in said
    stored = postfix.wait_for_message(recipient)
    assert stored.content.endswith(b"\nfirst\n.\n..second\n\n\n")
    known(stored)
    logged(front, recipient, tls)


def test_the_first_mails_of_the_readme_arrive_in_clear_and_over_tls(front: Willi, postfix: Postfix):
    need("swaks")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (swaks --server 127\.0\.0\.1 --to ann@example\.org.*)$", readme, re.MULTILINE)
    for number, (command, tls) in enumerate(zip(commands, ("false", "true"), strict=True)):
        recipient = f"first-{number}@b.example"
        typed = command.replace("127.0.0.1", f"127.0.0.1:{front.port}").replace("ann@example.org", recipient)
        assert "queued as" in run(*shlex.split(typed))
        line = front.wait_for_log(msg="Message accepted", to=recipient)
        assert (line["client_tls"], line["upstream_tls"]) == (tls, tls)
        postfix.wait_for_message(recipient)


@pytest.mark.parametrize("tls", ["false", "true"])
def test_swaks_is_told_what_postfix_said(front: Willi, tls: str):
    need("swaks")
    command = ["swaks", "--server", f"{HOST}:{front.port}", "--from", SENDER, "--to", "@b.example,nobody@d.example"]
    done = subprocess.run(
        [*command[:-1], "nobody@d.example", *(["--tls"] if tls == "true" else [])],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 24  # "all recipients refused"
    assert "554 5.7.1 Relay access denied" in done.stdout


@pytest.mark.parametrize("tls", ["false", "true"])
def test_curl(front: Willi, postfix: Postfix, tmp_path: Path, tls: str):
    need("curl")
    recipient = f"curl-{tls}@b.example"
    secure = ["--ssl-reqd", "-k"] if tls == "true" else []
    (tmp_path / "message").write_bytes(MESSAGE)
    run(
        "curl", "--silent", "--show-error", f"smtp://{HOST}:{front.port}/client.example", "--mail-from", SENDER,
        "--mail-rcpt", recipient, "--interface", ADDRESS, "--upload-file", tmp_path / "message", *secure,
    )  # fmt: skip
    arrived(postfix, recipient)
    logged(front, recipient, tls)


@pytest.mark.parametrize("tls", ["false", "true"])
def test_msmtp(front: Willi, postfix: Postfix, tls: str):
    need("msmtp")
    recipient = f"msmtp-{tls}@b.example"
    secure = ["--tls=on", "--tls-certcheck=off"] if tls == "true" else ["--tls=off"]
    run(
        "msmtp", f"--host={HOST}", f"--port={front.port}", "--domain=client.example", f"--from={SENDER}",
        f"--source-ip={ADDRESS}", "--set-from-header=off", "--set-date-header=off",
        "--set-msgid-header=off", *secure, "--", recipient, message=MESSAGE.replace(b"\r\n", b"\n"),
    )  # fmt: skip
    arrived(postfix, recipient)
    logged(front, recipient, tls)


@pytest.mark.parametrize("tls", ["false", "true"])
def test_nodemailer(front: Willi, postfix: Postfix, tls: str):
    need("node")
    if not (NODE_MODULES / "nodemailer").exists():
        pytest.skip("needs node-nodemailer: see tests/e2e/packages.txt")
    recipient = f"nodemailer-{tls}@b.example"
    arguments = [HOST, str(front.port), ADDRESS, SENDER, recipient, tls]
    assert "queued as" in run("node", "-e", NODEMAILER, "--", *arguments, message=MESSAGE)
    arrived(postfix, recipient)
    logged(front, recipient, tls)


def smtplib_client(willi: Willi) -> smtplib.SMTP:
    return smtplib.SMTP(
        HOST, willi.port, local_hostname="client.example", timeout=60, source_address=(ADDRESS, 0)
    )  # fmt: skip


@pytest.mark.parametrize("tls", ["false", "true"])
def test_smtplib_with_smtputf8(front: Willi, postfix: Postfix, certificates: Authority, tls: str):
    recipient = f"jörg-{tls}@b.example"
    message = EmailMessage(policy=SMTP.clone(utf8=True))
    message["Subject"], message["From"], message["To"] = "Grüße", SENDER, recipient
    message.set_content("Gruß\n")
    with smtplib_client(front) as client:
        if tls == "true":
            client.starttls(context=certificates.client_context())
        client.send_message(message)
    stored = postfix.wait_for_message(recipient)
    assert stored.content == message.as_bytes().replace(b"\r\n", b"\n")
    known(stored)
    logged(front, recipient, tls)


def test_smtplib_with_bdat(front: Willi, postfix: Postfix):
    message = b"Subject: in two chunks\r\n\r\n.one\r\ntwo\r\n"
    with smtplib_client(front) as client:
        client.ehlo()
        client.mail(SENDER)
        client.rcpt("chunks@b.example")
        for chunk, last in ((message[:30], ""), (message[30:], " LAST")):
            client.send(f"BDAT {len(chunk)}{last}\r\n".encode() + chunk)
            assert client.getreply()[0] == 250
    assert postfix.wait_for_message("chunks@b.example").content == message.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("security", ["none", "may"])
def test_postfix_delivers_through_willi(front: Willi, postfix: Postfix, start_postfix: StartPostfix, security: str):
    """Two messages for two people each, with all that Postfix does as a client: PIPELINING, BDAT or DATA, caching."""
    sender = start_postfix(
        "sender.example",
        domains=(),
        settings={
            "relayhost": f"[{HOST}]:{front.port}",
            "smtp_tls_security_level": security,
            "smtp_bind_address": ADDRESS,
        },
    )
    recipients = [f"{name}-{security}@b.example" for name in ("eva", "udo")]
    body = "Subject: hello\r\n\r\n.dot\r\n" + "x" * 900 + "\r\n"
    with sender.client() as client:
        for number in (1, 2):
            client.sendmail(SENDER, recipients, f"X-Number: {number}\r\n{body}")
    for recipient in recipients:
        wait_until(partial(has_two, postfix, recipient), f"both mails for {recipient}")
        for message in postfix.stored(recipient):
            known(message, "sender.example")
        assert all(b"\n\n.dot\n" + b"x" * 900 in message.content for message in postfix.stored(recipient))
    wait_until(lambda: not sender.queue(), "an empty queue")
    assert len(front.lines(msg="Message accepted")) == 2
    for line in front.lines(msg="Message accepted"):
        assert line["client_tls"] == ("true" if security == "may" else "false")


@pytest.mark.parametrize("sender", [Exim, OpenSmtpd])
def test_exim_and_opensmtpd_deliver_through_willi(
    request: pytest.FixtureRequest, front: Willi, start_willi: StartWilli, postfix: Postfix,
    sender: type[Exim] | type[OpenSmtpd],
):  # fmt: skip
    """To b.example by a Willi without a certificate, to c.example by one that has one, two messages each."""
    plain = start_willi(server=postfix.server)
    willis = {"b.example": (plain, "false"), "c.example": (front, "true")}
    server = sender(relays={domain: willi.port for domain, (willi, _) in willis.items()}, source=ADDRESS)
    with closing(server), server.client() as client:
        show_on_failure(request, sender.__name__, server.log_file)
        recipients = [f"{name}-{sender.__name__.lower()}@{domain}" for name in ("eva", "udo") for domain in willis]
        for number in (1, 2):
            client.sendmail(SENDER, recipients, b"Message-ID: <%d@a.example>\r\n" % number + MESSAGE)
        for recipient in recipients:
            wait_until(partial(has_two, postfix, recipient), f"both mails for {recipient}", 60)
    for recipient in recipients:
        for message in postfix.stored(recipient):
            assert message.content.endswith(MESSAGE.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n"))
            known(message, "mx.example")
    for willi, tls in willis.values():
        assert {line["client_tls"] for line in willi.lines(msg="Message accepted")} == {tls}
