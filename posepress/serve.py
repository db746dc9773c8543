"""A web service for one machine: a page for photos and a webcam, and predictions as JSON."""

import asyncio
import hashlib
import ipaddress
import math
import re
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posepress import openapi
from posepress.errors import UserError, nearest
from posepress.image_headers import MOST_PIXELS, read_header
from posepress.images import decoded
from posepress.model import Model

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")  # names of this machine in a request's header Host
MOST_WAITING = 200  # requests that wait while each worker of the engine has one
MOST_HELD = 512 << 20  # bytes of all images that arrive or wait

_INSTALL = 'the web page needs starlette and uvicorn; pip install "posepress[serve]"'
_HEAD = 16 << 10  # bytes of an image that are searched for its size while the others arrive; longer searches block the loop
_NAME = Path("body.jpg")  # with a known suffix, OpenCV's decoders of further formats are never reached
_HEADERS = {  # of each response; there are no CORS headers, so other sites' pages cannot read anything
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def application(
    model: Model, seconds: float = 10.0, most_bytes: int = 20 << 20, hosts: Sequence[str] | None = LOOPBACK
) -> "Starlette":
    """The web application: `/`, `/model`, `/predict`, `/openapi.json` and `/docs`.

    `runner.workers` predictions run at once, each in a thread, and further requests wait. A thread cannot be stopped: a
    prediction that takes too long is given up, and keeps its worker until it ends.

    Args:
        model: the loaded model. It stays open.
        seconds: longest time of one prediction, and of an image's arrival. The time before a prediction begins does not count.
        most_bytes: largest body of a request, in bytes.
        hosts: names that a request's header Host may have, without the port, IPv6 addresses in brackets. Others are refused,
            because a foreign site's name may be made to lead here (DNS rebinding). None accepts each name.

    Raises:
        UserError: starlette is not installed, the model needs a detector and has none, or its results have no JSON form.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.requests import ClientDisconnect
        from starlette.routing import Route
    except ImportError as error:
        raise UserError(_INSTALL) from error
    if model.needs_boxes and model.detector is None:
        raise UserError("the network sees one person at a time, and there is no detector of people; give one with --detector")
    if not hasattr(model.decoder.result, "to_dict"):
        raise UserError(f"results of the class {model.decoder.result.__name__} have no JSON form; serve a pose network")
    service = _Service(model, seconds, most_bytes)
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/model", service.about),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/openapi.json", service.document),
            Route("/docs", service.manual),
        ],
        middleware=[Middleware(_Door, hosts=hosts)],
        exception_handlers={
            _RequestError: _refused,
            HTTPException: _unknown,
            ClientDisconnect: _left,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False  # each address has one form
    return app


def serve(model: Model, host: str, port: int) -> None:
    """Serve a model until Ctrl+C, and print the address.

    Bound to a loopback address, the server answers requests to names of this machine alone. Bound to another address, it
    prints a warning, because it has no passwords.

    Args:
        model: the loaded model; the caller closes it.
        host: name or address to listen on.
        port: TCP port, 1 to 65535; 0 takes a free one.

    Raises:
        UserError: starlette or uvicorn is not installed, the address cannot be taken, or `application` refuses the model.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(_INSTALL) from error
    with _listener(host, port) as listener:
        address, taken = listener.getsockname()[:2]
        bound = ipaddress.ip_address(address.partition("%")[0])
        shown = f"[{address}]" if bound.version == 6 else address
        app = application(model, hosts=(*LOOPBACK, host.lower(), shown) if bound.is_loopback else None)
        _warm(model)
        if bound.is_unspecified:
            shown = "[::1]" if bound.version == 6 else "127.0.0.1"
        listener.listen()  # a client may connect as soon as it reads the address
        print(f"http://{shown}:{taken}/ (Ctrl+C stops the server)", flush=True)
        if not bound.is_loopback:
            print(
                f"warning: {host} is not a loopback address, so everybody in the network can use this server; leave --host out "
                "to serve this machine alone",
                file=sys.stderr,
                flush=True,
            )
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=10)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn has finished the requests, and passes the signal on
            print("stopped", file=sys.stderr)


def _listener(host: str, port: int) -> socket.socket:
    """A socket that holds an address.

    Raises:
        UserError: the address is unknown, taken or not allowed.
    """
    if not 0 <= port < 1 << 16:  # getaddrinfo takes 70000 for 4464
        raise UserError(f"{host}:{port}: no TCP port; choose a --port from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: cannot listen there ({what}); choose another --host or --port") from error
    return listener


def _warm(model: Model) -> None:
    """Predict on a blank image, so that numba compiles the decoder before the first request and not within its time limit."""
    size = model.description.resolution
    blank = np.zeros((size.height, size.width, 3), np.uint8)
    model(blank)
    if model.needs_boxes:  # the detector finds no person in a blank image, so the network has not run
        model(blank, boxes=[[0, 0, size.width, size.height]])


class _RequestError(Exception):
    """A request that gets an error.

    Args:
        status: HTTP status.
        message: what is wrong, then what to do.
        headers: further headers of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


def _busy(message: str) -> _RequestError:
    return _RequestError(503, message, {"Retry-After": "1"})


class _Service:
    """The endpoints. Only the event loop reads and writes the counters.

    Args:
        model: the loaded model.
        seconds: longest time of one prediction, and of an image's arrival.
        most_bytes: largest body of a request, in bytes.
    """

    def __init__(self, model: Model, seconds: float, most_bytes: int) -> None:
        self._model, self._seconds, self._most_bytes = model, seconds, most_bytes
        self._workers = model.runner.workers
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="prediction")
        self._requests = 0  # of predictions: those that arrive, wait or run
        self._held = 0  # bytes of their images
        self._page = _page()
        self._document = openapi.document(seconds, most_bytes)
        self._manual = openapi.manual(self._document)

    async def page(self, _: "Request") -> "Response":
        return _html(self._page)

    async def about(self, _: "Request") -> "Response":
        labels, about = self._model.spec.labels, self._model.description
        return _json(
            {
                "names": list(labels.names),
                "limbs": [list(limb) for limb in getattr(labels, "limbs", ())],
                "resolution": {"height": about.resolution.height, "width": about.resolution.width},
                "threshold": self._model.threshold,
                "engine": f"{about.engine.parent.name}/{about.engine.name}",
                "needs_boxes": self._model.needs_boxes,
                "most_bytes": self._most_bytes,
            }
        )

    async def document(self, _: "Request") -> "Response":
        return _json(self._document)

    async def manual(self, _: "Request") -> "Response":
        return _html(self._manual)

    async def predict(self, request: "Request") -> "Response":
        started = time.perf_counter()
        threshold = _threshold(request.query_params.multi_items())
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most_bytes:
            raise self._too_large()
        if self._requests >= self._workers + MOST_WAITING:
            raise _busy(f"{MOST_WAITING} requests wait already; send it again in a second")
        self._requests += 1
        chunks: list[bytes] = []
        try:
            await self._receive(request, chunks)
            return await self._in_turn(chunks, threshold, [started, time.perf_counter()])
        finally:
            self._requests -= 1
            self._held -= sum(map(len, chunks))

    async def _receive(self, request: "Request", chunks: list[bytes]) -> None:
        """Append the body's parts to `chunks`.

        Raises:
            _RequestError: the body is too large or too slow, or its image is.
        """
        try:
            await asyncio.wait_for(self._read(request, chunks), self._seconds)
        except asyncio.TimeoutError as error:
            message = f"the image did not arrive within {self._seconds:g} s; send a smaller one"
            raise _RequestError(408, message, {"Connection": "close"}) from error

    async def _read(self, request: "Request", chunks: list[bytes]) -> None:
        # Where a response comes before the end of a body, uvicorn drops what still arrives. To close the connection would be
        # worse: many clients lose the response while they send.
        size, searched = 0, False
        async for chunk in request.stream():
            size += len(chunk)
            if size > self._most_bytes:
                raise self._too_large()
            if self._held + len(chunk) > max(MOST_HELD, self._most_bytes):
                raise _busy(f"the images that wait take {MOST_HELD >> 20} MiB; send it again in a second")
            chunks.append(chunk)
            self._held += len(chunk)
            if size >= _HEAD and not searched:
                _check_size(b"".join(chunks)[:_HEAD])
                searched = True
        if not searched:
            _check_size(b"".join(chunks))

    def _too_large(self) -> _RequestError:
        return _RequestError(
            413, f"the image has more than {openapi.mebibytes(self._most_bytes)}; scale it down or compress it more"
        )

    async def _in_turn(self, chunks: list[bytes], threshold: float | None, marks: list[float]) -> "Response":
        """The response to an image, once a worker is free.

        Raises:
            _RequestError: the image cannot be used, or it takes too long.
        """
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def begin() -> None:
            loop.call_soon_threadsafe(begun.set)

        job = self._pool.submit(self._respond, chunks, threshold, marks, begin)
        future = asyncio.wrap_future(job)
        future.add_done_callback(_collect)
        # The requests before this one may each take the whole time; more than that passes only if predictions are stuck.
        patience = self._seconds * (1 + self._requests // self._workers)
        try:
            await asyncio.wait_for(begun.wait(), patience)
        except asyncio.TimeoutError as error:
            job.cancel()  # at once; asyncio's future would pass it on after the response
            raise _busy("earlier predictions take too long; send the image again later, or serve a faster engine") from error
        await asyncio.wait({future}, timeout=self._seconds)
        if not future.done():
            raise _busy(f"the prediction takes longer than {self._seconds:g} s; send a smaller image, or serve a faster engine")
        return future.result()

    def _respond(
        self, chunks: list[bytes], threshold: float | None, marks: list[float], begin: Callable[[], None]
    ) -> "Response":
        """Run a prediction in a thread.

        Args:
            chunks: the image file's bytes, in parts.
            threshold: least score; None for the model's.
            marks: times at which the steps so far began, in seconds.
            begin: called first.

        Raises:
            _RequestError: the image cannot be used.
        """
        begin()
        marks.append(time.perf_counter())
        data = b"".join(chunks)
        _check_size(data)
        try:
            image = decoded(_NAME, data, upright=True)
        except UserError as error:  # its message speaks of a file and of options of the pipeline
            raise _RequestError(
                422,
                f"the body is not a whole image ({len(data)} bytes); send the bytes of a JPEG, PNG, BMP or WebP file, without "
                "a form around them",
            ) from error
        marks.append(time.perf_counter())
        try:
            result = self._model(image, threshold=threshold).to_dict()
        except UserError as error:
            raise _RequestError(422, str(error)) from error
        marks.append(time.perf_counter())
        steps = {name: round(1e3 * (end - start), 2) for name, (start, end) in zip(openapi.STEPS, pairwise(marks), strict=True)}
        milliseconds = {**steps, "total": round(1e3 * (marks[-1] - marks[0]), 2)}
        return _json({**result, "width": image.shape[1], "height": image.shape[0], "milliseconds": milliseconds})


def _collect(future: "asyncio.Future[Any]") -> None:
    """Take the exception of a prediction that was given up, so that asyncio does not log it as lost."""
    if not future.cancelled():
        future.exception()


def _check_size(data: bytes) -> None:
    """Read an image's size in its header.

    Raises:
        _RequestError: the image has more than `MOST_PIXELS` pixels.
    """
    header = read_header(data)
    if header is not None and header.size.height * header.size.width > MOST_PIXELS:
        size = f"{header.size.width}x{header.size.height} pixels"
        raise _RequestError(413, f"the image has {size}, more than {MOST_PIXELS // 10**6} megapixels; scale it down")


def _threshold(parameters: Iterable[tuple[str, str]]) -> float | None:
    """The least score that a request asks for.

    Raises:
        _RequestError: a parameter is unknown, given twice, or no number from 0.
    """
    threshold = None
    for name, text in parameters:
        if name != "threshold":
            hint = nearest(name, ["threshold"]) or "; there is only 'threshold'"
            raise _RequestError(422, f"{name[:40]}: no such parameter{hint}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if threshold is not None or not 0 <= value < math.inf:
            raise _RequestError(422, f"threshold={text[:40]}: give one number, 0 or more")
        threshold = value
    return threshold


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)


def _html(page: str) -> "Response":
    from starlette.responses import HTMLResponse

    return HTMLResponse(page, headers={"content-security-policy": _policy(page)})


def _page() -> str:
    return files("posepress").joinpath("serve.html").read_text("utf-8")


def _policy(page: str) -> str:
    """The content security policy of a page: it runs its own script and style alone, and speaks to this server alone."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src 'self' blob: data:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        rules.append(
            " ".join((f"{tag}-src", *(f"'sha256-{digest}'" for digest in digests))) if digests else f"{tag}-src 'none'"
        )
    return "; ".join((*rules, "frame-ancestors 'none'"))


async def _refused(_: "Request", error: Exception) -> "Response":
    assert isinstance(error, _RequestError)
    return _json({"error": error.message}, error.status, error.headers)


async def _unknown(request: "Request", error: Exception) -> "Response":
    status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None) or {}
    where = f"{request.method} {request.url.path[:80]}"
    methods = ", ".join(sorted(headers.get("Allow", "").split(", ")))
    wrong = f"not allowed; use {methods}" if methods else "nothing is there; /docs lists the addresses"
    return _json({"error": f"{where}: {wrong}"}, status, headers)


async def _left(_: "Request", __: Exception) -> "Response":
    return _json({"error": "the connection ended within the image; send it again"}, 400)


async def _failed(_: "Request", error: Exception) -> "Response":
    # The response comes from outside of the middleware, so it needs the headers here.
    return _json({"error": f"the server failed ({type(error).__name__}); its log says more"}, 500, _HEADERS)


class _Door:
    """Middleware that refuses foreign names of this machine, and adds the headers to each response.

    Args:
        app: the application behind it.
        hosts: accepted names; None accepts each.
    """

    def __init__(self, app: "ASGIApp", hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                further = ((name.encode(), value.encode()) for name, value in _HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in further if pair[0] not in there)]
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        app = self._app
        if self._hosts is not None and _name(host) not in self._hosts:
            message = f"Host '{host[:80]}' is not a name of this machine; open the address that the server printed"
            app = _json({"error": message}, 421)
        await app(scope, receive, guarded)


def _name(host: str) -> str:
    """The name in a header Host, without the port; empty if it is no name."""
    match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:\d*)?", host.strip().lower())
    return match[1] if match else ""
