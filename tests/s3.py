"""An S3 server on loopback for tests: moto's, behind a gate that can refuse or break requests."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

KEY, SECRET = "testkey", "testsecret"
HANG_S = 30.0


@dataclass
class Fault:
    """Breaks requests whose `METHOD path?query` matches, after `skip` of them, `times` times.

    kind: a status such as 503, `reset` (the connection breaks before an answer), `cut` (the answer
    breaks off in its middle), `hang` (the answer comes after some seconds).
    """

    pattern: str
    kind: int | str = 503
    skip: int = 0
    times: int = 1
    hits: int = 0

    def takes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.hits += 1
        return self.skip < self.hits <= self.skip + self.times

    @property
    def done(self) -> int:
        """Requests that were broken."""
        return max(0, min(self.hits - self.skip, self.times))


@dataclass
class S3:
    """A running server; `requests` has `METHOD path?query` of each request, in order."""

    port: int = 0
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    check_keys: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
        """What a user sets for such a server."""
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, path: str, key: str = KEY, secret: str = SECRET) -> str:
        """A URI that needs no environment."""
        query = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://{quote(key)}:{quote(secret)}@{path}?{query}"

    @contextlib.contextmanager
    def broken(self, pattern: str, kind: int | str = 503, **options: Any) -> Iterator[Fault]:
        """Inside, requests break as `Fault` says."""
        fault = Fault(pattern, kind, **options)
        with self.lock:
            self.faults.append(fault)
        try:
            yield fault
        finally:
            with self.lock:
                self.faults.remove(fault)

    def client(self) -> Any:
        """boto3's client: what is in the bucket by another program's word."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )

    def make(self, bucket: str) -> str:
        self.client().create_bucket(Bucket=bucket)
        return bucket

    def objects(self, bucket: str, prefix: str = "") -> dict[str, int]:
        """Name and bytes of each object."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        )
        return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", [])}

    def read(self, bucket: str, name: str) -> bytes:
        body: bytes = self.client().get_object(Bucket=bucket, Key=name)["Body"].read()
        return body


def gate(app: Callable[..., Any], s3: S3) -> Callable[..., Any]:
    """The WSGI application with the server's faults before it."""

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        with s3.lock:
            s3.requests.append(request)
            fault = next((f for f in s3.faults if f.takes(request)), None)
        if s3.check_keys and not _known(environ):
            fault = Fault("", 403)
        if fault is None:
            return app(environ, start)
        if fault.kind == "reset":
            _reset(environ["werkzeug.socket"])
            raise ConnectionResetError  # werkzeug takes it for the client's doing, and is silent
        if fault.kind == "hang":
            time.sleep(HANG_S)
            return app(environ, start)
        if fault.kind == "cut":
            return _cut(app, environ, start)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"].read(length)
        code = "InvalidAccessKeyId" if fault.kind == 403 else "SlowDown"
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        )
        if environ["REQUEST_METHOD"] == "HEAD":
            body = b""
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start(f"{fault.kind} {code}", headers)
        return [body]

    return answer


def _known(environ: dict[str, Any]) -> bool:
    found = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    return bool(found) and found[1] == KEY  # type: ignore[index]


def _reset(connection: socket.socket) -> None:
    # lingering for 0 s makes close() send a reset instead of a proper end
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)
    connection.close()


def _cut(app: Callable[..., Any], environ: dict[str, Any], start: Callable[..., Any]) -> Any:
    content = b"".join(app(environ, start))
    connection = environ["werkzeug.socket"]
    yield content[: len(content) // 2]
    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving() -> Iterator[S3]:
    """A server on a free port of loopback, ended with the block."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any, **__: Any) -> None: ...

    s3 = S3()
    app = gate(DomainDispatcherApplication(create_backend_app), s3)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    server.daemon_threads = True  # type: ignore[attr-defined]
    s3.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
