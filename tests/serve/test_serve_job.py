"""`jobs/serve.py` as a user starts it: Ray Serve, its ports, many clients at once, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pipeline.embed.vectors import open_vectors
from tests.cluster.nodes import living, wait_for
from tests.jobs.test_loopback import listening
from tests.serve.made import Made
from tests.serve.test_app import bomb

ROOT = Path(__file__).parents[2]
QUEUE = 16
BODY_S = 15  # serve.timeout_s


@dataclass
class Endpoint:
    """A job that serves."""

    process: subprocess.Popen[str]
    address: str
    token: str
    said: str

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (or bytes)."""
        headers = {"Authorization": f"Bearer {self.token}"} | (headers or {})
        request = urllib.request.Request(self.address + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                content = answer.read()
                return answer.status, json.loads(content) if content[:1] == b"{" else content
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def environment(**more: str) -> dict[str, str]:
    gone = {"RAY_ADDRESS", "PIPELINE_DEBUG", "PYTHONPATH", "RAYDINO_TOKEN"}
    return {k: v for k, v in os.environ.items() if k not in gone} | {"OMP_NUM_THREADS": "1"} | more


def command(*fields: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "serve.py"), *fields]


@pytest.fixture(scope="module")
def endpoint(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """Started once; ended by SIGTERM, after which nothing of it is left."""
    folder = tmp_path_factory.mktemp("endpoint")
    fields = [f"model={made.model}", f"vectors={made.vectors}", "port=0", f"serve.queue={QUEUE}"]
    limits = [f"serve.timeout_s={BODY_S}", "serve.max_mb=1", "serve.max_pixels=1000000"]
    out = (folder / "out").open("w+")
    process = subprocess.Popen(
        command(*fields, *limits, "resources.object_store_gb=0.2", "resources.cpus=2"),
        cwd=folder, env=environment(TMPDIR=str(folder)), stdout=out, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    said = ""
    begun = time.monotonic()
    while "page " not in said and process.poll() is None and time.monotonic() < begun + 600:
        time.sleep(0.2)
        said = (folder / "out").read_text()
    match = re.search(r"(http://127\.0\.0\.1:\d+/)#token=(\S+)", said)
    assert match, said
    served = Endpoint(process, match[1], match[2], said)
    children = psutil.Process(process.pid).children(recursive=True)
    yield served
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and schedulers do
    assert process.wait(300) == 143, (folder / "out").read_text()
    said = (folder / "out").read_text()
    assert "Traceback" not in said
    assert said.count(served.token) == 1
    wait_for(
        lambda: not any(map(living, children)),
        "all that was started to end",
        60,
        lambda: str([child for child in children if living(child)]),
    )


def test_it_answers_as_the_model_does(endpoint: Endpoint, made: Made) -> None:
    vectors = open_vectors(made.vectors).read("cls")
    for row in (1, 30):
        image = made.images[made.ids[row]]
        status, answer = endpoint.ask("embed", image)
        assert status == 200
        np.testing.assert_allclose(answer["cls"], vectors[row], rtol=1e-5, atol=1e-5)
        status, answer = endpoint.ask("search?k=3", image)
        assert answer["neighbours"][0]["image_id"] == made.ids[row]
        assert endpoint.ask(f"image/{made.ids[row]}") == (200, image)
        status, picture = endpoint.ask(f"look/attention/{made.ids[row]}")
        assert picture.startswith(b"\x89PNG")
    assert endpoint.ask("healthz", headers={"Authorization": ""}) == (200, {"status": "ok"})
    assert endpoint.ask("set", headers={"Authorization": "Bearer no"})[0] == 401


def test_images_that_come_together_are_one_batch_with_the_same_answers(
    endpoint: Endpoint, made: Made
) -> None:
    vectors = open_vectors(made.vectors).read("cls")
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda i: endpoint.ask("embed", made.images[i]), made.ids[:12])
        for row, (status, answer) in enumerate(answers):
            assert status == 200
            np.testing.assert_allclose(answer["cls"], vectors[row], rtol=1e-4, atol=1e-4)
        mixed = ["embed", "embed?output=patches"] * 6
        answers = pool.map(lambda path: endpoint.ask(path, made.images[made.ids[0]]), mixed)
        shapes = [np.shape(answer.get("cls", answer.get("patches"))) for _, answer in answers]
        assert shapes == [(64,), (16, 64)] * 6


def test_two_hundred_at_once_are_answered_or_refused(endpoint: Endpoint, made: Made) -> None:
    image = made.images[made.ids[0]]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: endpoint.ask("embed", image), range(200)))
    statuses = Counter(status for status, _ in answers)
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[200] >= QUEUE
    assert statuses[503] > 0
    assert endpoint.ask("embed", image)[0] == 200


def test_what_is_hostile_gets_a_sentence(endpoint: Endpoint) -> None:
    json_type = {"Content-Type": "application/json"}
    for path, body, headers, expected in (
        ("embed", bomb(8000), {}, 413),
        ("embed", b"x" * 1_000_001, {}, 413),
        ("embed", b"nothing of the kind", {}, 415),
        ("embed", b"", {}, 422),
        ("search", b'{"image_id": "../../etc/passwd"}', json_type, 404),
        ("search", b'{"image_id": "a", "k": 1000000000}', json_type, 422),
        ("search", b"{" * 1000, json_type, 422),
        ("image/..%2F..%2Fetc%2Fpasswd", None, {}, 404),
        ("image/%F0%9F%98%80", None, {}, 404),
    ):
        status, answer = endpoint.ask(path, body, headers)
        assert status == expected, (path, answer)
        assert list(answer) == ["error"]


def test_who_is_still_sending_gets_the_sentence(endpoint: Endpoint) -> None:
    host, port = "127.0.0.1", endpoint.port
    head = f"POST /embed HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 6000000"
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(f"{head}\r\nAuthorization: Bearer {endpoint.token}\r\n\r\n".encode())
        for _ in range(6):
            time.sleep(0.2)  # by the second piece it is answered
            connection.sendall(b"x" * 1_000_000)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b" 413 " in answer.partition(b"\r\n")[0]
    assert answer.endswith(b'"}')


def test_slow_clients_are_ended_and_hold_nobody_up(endpoint: Endpoint, made: Made) -> None:
    host, port = "127.0.0.1", endpoint.port
    head = (
        f"POST /embed HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {endpoint.token}\r\n"
        "Content-Length: 5000\r\n\r\nabc"
    )
    slow = [socket.create_connection((host, port)) for _ in range(QUEUE - 4)]
    for one in slow:
        one.sendall(head.encode())
    begun = time.monotonic()
    assert endpoint.ask("embed", made.images[made.ids[0]])[0] == 200
    assert time.monotonic() - begun < BODY_S  # not after the slow ones
    for one in slow:
        one.settimeout(60)
        assert b" 408 " in one.recv(4096).partition(b"\r\n")[0]
        one.close()
    assert endpoint.ask("embed", made.images[made.ids[0]])[0] == 200


def test_nothing_listens_beyond_this_machine(endpoint: Endpoint) -> None:
    found = listening(psutil.Process(endpoint.process.pid))
    assert endpoint.port in {port for _, _, port in found}
    open_to_all = {x for x in found if x[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")}
    assert not open_to_all


@pytest.mark.jobs
def test_a_taken_port_is_one_sentence(made: Made, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command(f"model={made.model}", f"port={port}"), cwd=tmp_path, env=environment(),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error: port {port} of 127.0.0.1 is taken" in done.stderr
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*command(f"vectors={made.vectors}", "port=0"), "--dry-run"], cwd=tmp_path,
        env=environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "60 vectors at http://127.0.0.1:" in done.stdout
    assert not list(tmp_path.iterdir())
