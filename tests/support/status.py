"""The status address of a Willi, as Prometheus, a load balancer and a browser see it."""

from __future__ import annotations

import html
import http.client
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from prometheus_client.parser import text_string_to_metric_families

from tests.support.daemon import Willi
from tests.support.loopback import HOST, PATIENCE, wait_until

UNANSWERED = "no worker has answered within 3 s"

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]  # by name; by the labels in their order


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: str
    headers: Mapping[str, str]

    @property
    def text(self) -> str:
        """Of a page: without what is between < and >."""
        return html.unescape(re.sub(r"<[^>]*>", " ", self.body))


class Status:
    """One status address."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def setting(self) -> str:
        """For `status_listen`."""
        return f"{HOST}:{self.port}"

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """headers: such as Host."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            body = response.read().decode()
            return Answer(response.status, body, {name.lower(): value for name, value in response.getheaders()})
        finally:
            connection.close()

    def answers(self) -> bool:
        """Whether anybody is there."""
        try:
            return self.get("/metrics").status == 200
        except (OSError, http.client.HTTPException):
            return False

    def samples(self) -> Samples:
        """All of /metrics, as prometheus-client itself reads it."""
        answer = self.get("/metrics")
        assert answer.status == 200
        found: Samples = {}
        for family in text_string_to_metric_families(answer.body):
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                series = found.setdefault(sample.name, {})
                assert labels not in series, f"{sample.name}{labels} twice"
                series[labels] = sample.value
        return found

    def value(self, name: str, **labels: str) -> float:
        """The sum of all series of that name with these labels."""
        series = self.samples().get(name, {})
        return sum(value for key, value in series.items() if labels.items() <= dict(key).items())

    def wait_for(self, number: float, name: str, **labels: str) -> None:
        """Until a value has come to that: what the workers count is told once a second."""
        wait_until(lambda: self.answers() and self.value(name, **labels) == number, f"{name}{labels} to be {number}")

    def overview(self) -> dict[str, Any]:
        """/status.json."""
        answer = self.get("/status.json")
        assert answer.status == 200
        parsed: dict[str, Any] = json.loads(answer.body)
        return parsed

    def lookup(self, address: str) -> str:
        """The text of the page that answers for an address, once a worker has had the time to."""
        return wait_until(lambda: self._answer_for(address), "a worker that answers")

    def _answer_for(self, address: str) -> str:
        answer = self.get(f"/?address={quote(address)}")
        assert answer.status == 200
        return "" if UNANSWERED in answer.text else answer.text


def status_process(willi: Willi) -> int | None:
    """Its pid."""
    found = [pid for pid in willi.children if willi.name_of(pid) == "willi-status"]
    return found[0] if found else None
