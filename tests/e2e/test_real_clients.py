"""Real clients through Willi to a real Postfix: what they send is what is stored, in clear and under TLS."""

from __future__ import annotations

import smtplib
import subprocess
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import StartPostfix, StartWilli
from tests.support.certificates import Authority
from tests.support.daemon import Willi
from tests.support.loopback import HOST, need, wait_until
from tests.support.postfix import Postfix

SENDER = "ann@a.example"


@pytest.fixture
def front(start_willi: StartWilli, postfix: Postfix, certificates: Authority) -> Willi:
    """A Willi with a certificate, and a CSV that sends b.example to Postfix."""
    pair = certificates.issue("mx.willi.example", "localhost", HOST)
    return start_willi(
        csv=f"pattern;server;tls_verify\nb.example;{postfix.server};false\n",
        domain="mx.willi.example",
        tls_cert=str(pair.cert),
        tls_key=str(pair.key),
    )


def run(*command: str | Path) -> str:
    """Run a client to its end; what it printed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def has_two(postfix: Postfix, recipient: str) -> bool:
    """Whether both messages have been stored."""
    return len(postfix.stored(recipient)) == 2


def logged(willi: Willi, recipient: str, tls: str) -> None:
    """The canonical line says where the mail went, and how."""
    line = willi.wait_for_log(msg="Message accepted", to=recipient)
    assert line["from"] == SENDER
    assert line["client_tls"] == line["upstream_tls"] == tls
    assert "queued as" in line["reply"]


@pytest.mark.parametrize("tls", ["false", "true"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_swaks(front: Willi, postfix: Postfix, tls: str, pipeline: bool):
    need("swaks")
    recipient = f"swaks-{tls}-{pipeline}@b.example".lower()
    said = run(
        "swaks", "--server", f"{HOST}:{front.port}", "--helo", "client.example", "--from", SENDER, "--to", recipient,
        "--body", "first\n.\n..second\n", *(["--tls"] if tls == "true" else []), *(["--pipeline"] if pipeline else []),
    )  # fmt: skip
    assert "queued as" in said
    stored = postfix.wait_for_message(recipient)
    assert stored.content.endswith(b"\nfirst\n.\n..second\n\n\n")
    logged(front, recipient, tls)


@pytest.mark.parametrize("tls", ["false", "true"])
def test_swaks_is_told_what_postfix_said(front: Willi, tls: str):
    need("swaks")
    command = ["swaks", "--server", f"{HOST}:{front.port}", "--from", SENDER, "--to", "@b.example,nobody@c.example"]
    done = subprocess.run(
        [*command[:-1], "nobody@c.example", *(["--tls"] if tls == "true" else [])],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 24  # "all recipients refused"
    assert "554 5.7.1 Relay access denied" in done.stdout


@pytest.mark.parametrize("tls", ["false", "true"])
def test_curl(front: Willi, postfix: Postfix, tmp_path: Path, tls: str):
    need("curl")
    recipient = f"curl-{tls}@b.example"
    secure = ["--ssl-reqd", "-k"] if tls == "true" else []
    message = b"Subject: from curl\r\n\r\n.\r\na dot before, and 8 bits: \xc3\xa9\r\n"
    (tmp_path / "message").write_bytes(message)
    run(
        "curl", "--silent", "--show-error", f"smtp://{HOST}:{front.port}/client.example", "--mail-from", SENDER,
        "--mail-rcpt", recipient, "--upload-file", tmp_path / "message", *secure,
    )  # fmt: skip
    assert postfix.wait_for_message(recipient).content == message.replace(b"\r\n", b"\n")
    logged(front, recipient, tls)


@pytest.mark.parametrize("tls", ["false", "true"])
def test_smtplib_with_smtputf8(front: Willi, postfix: Postfix, certificates: Authority, tls: str):
    recipient = f"jörg-{tls}@b.example"
    message = EmailMessage(policy=SMTP.clone(utf8=True))
    message["Subject"], message["From"], message["To"] = "Grüße", SENDER, recipient
    message.set_content("Gruß\n")
    with smtplib.SMTP(HOST, front.port, local_hostname="client.example", timeout=30) as client:
        if tls == "true":
            client.starttls(context=certificates.client_context())
        client.send_message(message)
    stored = postfix.wait_for_message(recipient)
    assert stored.content == message.as_bytes().replace(b"\r\n", b"\n")
    logged(front, recipient, tls)


def test_smtplib_with_bdat(front: Willi, postfix: Postfix):
    message = b"Subject: in two chunks\r\n\r\n.one\r\ntwo\r\n"
    with smtplib.SMTP(HOST, front.port, local_hostname="client.example", timeout=30) as client:
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
        settings={"relayhost": f"[{HOST}]:{front.port}", "smtp_tls_security_level": security},
    )
    recipients = [f"{name}-{security}@b.example" for name in ("eva", "udo")]
    body = "Subject: hello\r\n\r\n.dot\r\n" + "x" * 900 + "\r\n"
    with sender.client() as client:
        for number in (1, 2):
            client.sendmail(SENDER, recipients, f"X-Number: {number}\r\n{body}")
    for recipient in recipients:
        wait_until(partial(has_two, postfix, recipient), f"both mails for {recipient}")
        assert all(message.sender == SENDER for message in postfix.stored(recipient))
        assert all(b"\n\n.dot\n" + b"x" * 900 in message.content for message in postfix.stored(recipient))
    wait_until(lambda: not sender.queue(), "an empty queue")
    assert len(front.lines(msg="Message accepted")) == 2
    for line in front.lines(msg="Message accepted"):
        assert line["client_tls"] == ("true" if security == "may" else "false")
