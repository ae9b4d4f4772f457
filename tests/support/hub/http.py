"""The HTTP server of the test Hub: reading requests, answering them, and injected faults."""

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.support.hub.store import HubError, Json

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer


@dataclass
class Fault:
    """
    A fault of some requests.

    Args:
        path (`str`): Regular expression that the path must contain.
        method (`str`): Regular expression that the method must be.
        status (`int`, *optional*): Answer with this status and do nothing.
        action (`str`): In place of a status: `"drop"` the connection, `"hang"`, be `"slow"`, `"hold"` the request
            until the Hub is healed, `"lose"` the answer of a request that was executed, or `"trickle"` an answer
            without an end.
        times, skip (`int`): Number of affected requests, and of requests before them.
        seconds (`float`): Length of the delay or of the hang, or time between the bytes.
        headers, body: Those of the answer with `status`.
    """

    path: str
    method: str = ".*"
    status: int | None = None
    action: str = "status"
    times: int = 10**9
    skip: int = 0
    seconds: float = 3600.0
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None


class Plumbing(BaseHTTPRequestHandler):
    """Handles the requests of one connection. `route` of the subclass executes them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer on a kept connection waits 40 ms
    hub: "HubServer"
    _consumed: bool
    _status: int | None

    def route(self) -> None:
        """Answer with `reply`, or raise a `HubError`."""
        raise NotImplementedError

    def log_message(self, *args: Any) -> None:
        """Log nothing, because `hub.log` has it."""

    # ---- The request ----

    def chunks(self) -> Iterator[bytes]:
        """The body in chunks; nothing if it was read already."""
        if self._consumed:
            return
        self._consumed = True
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0].strip() or b"0", 16):
                yield from self._exactly(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            yield from self._exactly(int(self.headers.get("Content-Length") or 0))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            data = self.rfile.read(min(size, 1 << 20))
            if not data:
                raise ConnectionError("the body ended early")
            size -= len(data)
            yield data

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def json(self) -> Json:
        """The body as JSON."""
        try:
            return json.loads(self.body() or b"{}")
        except ValueError as error:
            raise HubError(400, "Invalid JSON body") from error

    def flag(self, name: str) -> bool:
        """A boolean of the query."""
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    # ---- The answer ----

    def reply(
        self,
        status: int = 200,
        value: Any = None,
        headers: dict[str, Any] | None = None,
        raw: bytes | None = None,
        kind: str = "application/json; charset=utf-8",
    ) -> None:
        """Answer with `value` as JSON, or with raw bytes."""
        for _ in self.chunks():
            pass  # an unread body would be read as the next request
        data = raw if raw is not None else b"" if value is None else json.dumps(value).encode()
        self._status = status
        self.send_response(status)
        length = {"Content-Length": len(data)} if "Content-Length" not in (headers or {}) else {}
        for key, header in {"Content-Type": kind, **length, **(headers or {})}.items():
            self.send_header(key, str(header))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- Between the two ----

    def _handle(self) -> None:
        self._consumed, self._status = False, None
        url = urlsplit(self.path)
        self.url_path, self.query = url.path, parse_qs(url.query, keep_blank_values=True)
        fault = self.hub.take_fault(self.command, self.path)
        injected = fault and (fault.status or fault.action)
        entry: Json = {"method": self.command, "path": self.path, "status": None, "fault": injected}
        self.hub.log.append(entry)  # before the client can see an answer
        try:
            if fault is None:
                self.route()
            else:
                self._fail(fault)
        except HubError as error:
            headers = {**error.headers, "X-Error-Message": error.message.replace("\n", " ")}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply(error.status, error.body, headers)
        except ConnectionError:
            self.close_connection = True
        finally:
            entry["status"] = self._status

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _fail(self, fault: Fault) -> None:
        if fault.action == "slow":
            self.hub.stopping.wait(fault.seconds)
            self.route()
        elif fault.action == "hold":
            self.hub.healed.wait(fault.seconds)
            self.route()
        elif fault.action == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not self.hub.stopping.wait(fault.seconds):
                self.wfile.write(b" ")
        elif fault.action == "status":
            assert fault.status is not None
            body = fault.body if fault.body is not None else json.dumps({"error": f"injected {fault.status}"})
            kind = "application/json" if body[:1] in ("{", "[") else "text/html"
            self.reply(fault.status, raw=body.encode(), headers=fault.headers, kind=kind)
        else:
            if fault.action == "hang":
                self.hub.stopping.wait(fault.seconds)
            elif fault.action == "lose":
                real = self.wfile
                with open(os.devnull, "wb") as self.wfile:
                    self.route()
                self.wfile = real
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
