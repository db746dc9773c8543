"""The web service: each answer and each refusal that its OpenAPI document lists, over real connections."""

import asyncio
import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import onnx
import pytest
import uvicorn
from PIL import Image

import posepress
from posepress import cli, openapi, serve
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes, Poses
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec

PEOPLE = Poses(
    np.array([[[20, 10, 0.9], [20, 60, 0.8], [0, 0, 0]], [[90, 15, 0.5], [90, 70, 0.6], [100, 80, 0.4]]], np.float32),
    np.array([0.9, 0.4], np.float32),
    boxes=np.array([[10, 5, 20, 60], [80, 10, 30, 75]], np.float32),
    labels=Skeleton(("head", "foot", "hand"), ((0, 1), (0, 2))),
)


class Model:
    """What the service uses of a model; `work` runs within each prediction."""

    needs_boxes, detector, threshold = False, None, 0.3
    description = SimpleNamespace(engine=Path("/secret/demo/engine.onnx"), resolution=Resolution(96, 128))
    spec = SimpleNamespace(labels=PEOPLE.labels)

    def __init__(self, work=lambda: None, workers=2, found=PEOPLE):
        self.work, self.found, self.calls = work, found, []
        self.runner, self.decoder = SimpleNamespace(workers=workers), SimpleNamespace(result=type(found))

    def __call__(self, image, boxes=None, threshold=None):
        self.calls.append((image.shape, boxes, threshold))
        self.work()
        return self.found.above(self.threshold if threshold is None else threshold)


class Blocked(Model):
    """Predictions that last until `go` is set."""

    def __init__(self, workers=1):
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        super().__init__(self.block, workers)

    def block(self):
        self.begun.release()
        assert self.go.wait(20)


def photo(height=48, width=64, kind=".jpg"):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(kind, pixels)[1].tobytes()


def vast_png(side=30_000):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@contextmanager
def running(model, **options):
    """The port of a server in a thread."""
    app = serve.application(model, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with serve._listener("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.002)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()


def ask(port, method, path, body=None, headers=None):
    """Status, headers with small letters, and content: plain data for JSON, else text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        given, text = {k.lower(): v for k, v in response.getheaders()}, response.read().decode()
        return response.status, given, json.loads(text) if given["content-type"] == "application/json" else text
    finally:
        connection.close()


def refusal(port, body=None, query="", method="POST", path="/predict", headers=None):
    """Status and message of an error, which is JSON with the security headers."""
    status, given, content = ask(port, method, path + query, body, headers)
    assert list(content) == ["error"]
    assert given["x-content-type-options"] == "nosniff"
    assert given["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in given
    return status, content["error"]


@pytest.fixture(scope="module")
def server():
    model = Model()
    with running(model) as port:
        yield SimpleNamespace(model=model, port=port)


# --- what a client gets ------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_runs_nothing_else(server):
    status, headers, page = ask(server.port, "GET", "/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"(?:src|href)=[\"'](?!data:,|docs)", page)
    assert not re.findall(r"https?://(?!localhost)", page)
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    for name in re.findall(r'element\("(\w+)"\)', page):
        assert f'id="{name}"' in page
    for control in re.findall(r"<(?:input|canvas)[^>]*>", page):
        assert "aria-label" in control or re.search(rf"<label[^>]*>[^/]*{re.escape(control)}", page), control


def test_the_model_is_described_without_paths_of_the_machine(server):
    status, headers, content = ask(server.port, "GET", "/model")
    assert (status, headers["content-security-policy"]) == (200, "default-src 'none'; frame-ancestors 'none'")
    assert content == {
        "names": ["head", "foot", "hand"],
        "limbs": [[0, 1], [0, 2]],
        "resolution": {"height": 96, "width": 128},
        "threshold": 0.3,
        "engine": "demo/engine.onnx",
        "needs_boxes": False,
        "most_bytes": 20 << 20,
    }


@pytest.mark.parametrize("kind", [".jpg", ".png", ".bmp", ".webp"])
def test_a_prediction_has_people_size_and_times(server, kind):
    status, _, content = ask(server.port, "POST", "/predict", photo(kind=kind))
    assert status == 200
    times = content.pop("milliseconds")
    assert content == {**PEOPLE.to_dict(), "width": 64, "height": 48}
    assert content["people"][0]["keypoints"] == {"head": [20, 10, 0.9], "foot": [20, 60, 0.8], "hand": None}
    total = times.pop("total")
    assert list(times) == ["receiving", "waiting", "reading", "predicting"]
    assert sum(times.values()) == pytest.approx(total, abs=0.03)


def test_the_size_is_that_of_the_upright_image(server):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(stream, "JPEG", exif=exif)
    _, _, content = ask(server.port, "POST", "/predict", stream.getvalue())
    assert (content["width"], content["height"]) == (48, 64)
    assert server.model.calls[-1][0] == (64, 48, 3)


def test_the_threshold_of_a_request_counts(server):
    _, _, content = ask(server.port, "POST", "/predict?threshold=.5", photo())
    assert [person["score"] for person in content["people"]] == [0.9]
    assert server.model.calls[-1][2] == 0.5
    ask(server.port, "POST", "/predict", photo())
    assert server.model.calls[-1][2] is None


def test_detections_are_boxes(server, monkeypatch):
    monkeypatch.setattr(server.model, "found", Boxes(np.array([[1, 2, 3, 4.0], [5, 6, 7, 8]]), np.array([0.5, 0.2])))
    _, _, content = ask(server.port, "POST", "/predict", photo())
    assert content["boxes"] == [{"box": [1, 2, 3, 4], "score": 0.5}]
    conforms(content, {"$ref": "#/components/schemas/Boxes"}, openapi.document(1, 1))


# --- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b"II*\0" + bytes(99), photo()[:-40], photo(kind=".png")[:-20], b"--x\r\n\r\n" + photo() + b"\r\n--x--"],
    ids=["empty", "text", "tiff", "cut jpeg", "cut png", "form"],
)
def test_what_is_no_whole_image_is_refused(server, body):
    calls = len(server.model.calls)
    status, message = refusal(server.port, body)
    assert status == 422
    assert message == (
        f"the body is not a whole image ({len(body)} bytes); send the bytes of a JPEG, PNG, BMP or WebP file, without a form "
        "around them"
    )
    assert len(server.model.calls) == calls


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?threshold=high", "threshold=high: give one number, 0 or more"),
        ("?threshold=", "threshold=: give one number, 0 or more"),
        ("?threshold=-1", "threshold=-1: give one number, 0 or more"),
        ("?threshold=nan", "threshold=nan: give one number, 0 or more"),
        ("?threshold=inf", "threshold=inf: give one number, 0 or more"),
        ("?threshold=.1&threshold=.2", "threshold=.2: give one number, 0 or more"),
        ("?treshold=.1", "treshold: no such parameter; did you mean 'threshold'?"),
        ("?boxes=1", "boxes: no such parameter; there is only 'threshold'"),
    ],
)
def test_a_wrong_parameter_is_refused(server, query, message):
    assert refusal(server.port, photo(), query) == (422, message)


def test_other_addresses_and_methods_are_refused(server):
    assert refusal(server.port, method="GET", path="/x") == (404, "GET /x: nothing is there; /docs lists the addresses")
    assert refusal(server.port, method="GET", path="/docs/")[0] == 404
    assert refusal(server.port, method="GET") == (405, "GET /predict: not allowed; use POST")
    assert refusal(server.port, b"", path="/model") == (405, "POST /model: not allowed; use GET, HEAD")


def test_a_large_body_is_refused_before_it_comes():
    with running(Model(), most_bytes=5000) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5001\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
        message = "the image has more than 5000 bytes; scale it down or compress it more"
        assert refusal(port, bytes(5001)) == (413, message)
        assert refusal(port, iter([bytes(2500)] * 3)) == (413, message)
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:  # no end of the body is in sight
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.sendall(b"1389\r\n" + bytes(5001) + b"\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert refusal(port, bytes(5000))[0] == 422


@pytest.mark.parametrize("far", [0, 100_000], ids=["first bytes", "far behind"])
def test_a_vast_image_is_refused_at_once_and_not_decoded(server, far):
    if far:  # a size behind more metadata than is searched at first
        parts = [b"\xff\xe2" + struct.pack(">H", 2 + 50_000) + bytes(50_000)] * (far // 50_000)
        frame = struct.pack(">HBHHB", 17, 8, 30_000, 30_000, 3) + b"\x01\x22\0\x02\x11\1\x03\x11\1"
        body = b"\xff\xd8" + b"".join(parts) + b"\xff\xc0" + frame + b"\xff\xda\0\x02" + bytes(99) + b"\xff\xd9"
    else:
        body = vast_png()
    calls = len(server.model.calls)
    with mock.patch.object(cv2, "imdecode") as imdecode:
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            status, message = refusal(server.port, body)
            taken.append(time.perf_counter() - started)
    assert (status, message) == (413, "the image has 30000x30000 pixels, more than 100 megapixels; scale it down")
    assert min(taken) < 0.05
    assert not imdecode.called
    assert len(server.model.calls) == calls


def test_a_vast_image_is_refused_before_its_end_comes(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n")
        client.sendall(vast_png() + bytes(20_000))
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_slow_body_is_refused():
    with running(Model(), seconds=0.1) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc")
            answer = b"".join(iter(lambda: client.recv(1000), b""))  # the connection is closed, too
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
            "error": "the image did not arrive within 0.1 s; send a smaller one"
        }


def test_a_client_that_leaves_is_forgotten(server):
    app, sent = serve.application(Model()), []
    parts = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [(b"host", b"localhost")]}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"]) == {"error": "the connection ended within the image; send it again"}


def test_the_models_own_refusal_is_passed_on(server, monkeypatch):
    def work():
        raise UserError("the network does not run at [1, 3, 9, 9]; choose another size")

    monkeypatch.setattr(server.model, "work", work)
    assert refusal(server.port, photo()) == (422, "the network does not run at [1, 3, 9, 9]; choose another size")


def test_a_failure_is_told_without_its_details(server, monkeypatch):
    def work():
        raise KeyError("/secret/path")

    monkeypatch.setattr(server.model, "work", work)
    assert refusal(server.port, photo()) == (500, "the server failed (KeyError); its log says more")
    monkeypatch.undo()
    assert ask(server.port, "POST", "/predict", photo())[0] == 200


def test_a_long_prediction_is_given_up_and_keeps_its_worker():
    model = Blocked()
    with running(model, seconds=0.25) as port:
        try:
            status, headers, content = ask(port, "POST", "/predict", photo())
            assert (status, headers["retry-after"]) == (503, "1")
            assert content["error"] == (
                "the prediction takes longer than 0.25 s; send a smaller image, or serve a faster engine"
            )
            assert refusal(port, photo()) == (
                503,
                "earlier predictions take too long; send the image again later, or serve a faster engine",
            )
        finally:
            model.go.set()
        assert ask(port, "POST", "/predict", photo())[0] == 200
    assert len(model.calls) == 2  # the one that never began is not run later


# --- many requests -----------------------------------------------------------------------------------------------------------


def test_of_fifty_requests_at_once_none_is_lost():
    at_once, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        with lock:
            at_once -= 1

    # The last one waits for 1.2 s, which is longer than the time limit: waiting does not count.
    with running(Model(work), seconds=1) as port, ThreadPoolExecutor(50) as clients:
        queries = [f"/predict?threshold={n / 100}" for n in range(50)]
        answers = list(clients.map(lambda query: ask(port, "POST", query, photo()), queries))
    assert most == 2
    assert [status for status, _, _ in answers] == [200] * 50
    assert [len(content["people"]) for _, _, content in answers] == [2] * 41 + [1] * 9
    assert max(content["milliseconds"]["waiting"] for _, _, content in answers) > 1000


def test_too_many_waiting_requests_are_refused(monkeypatch):
    monkeypatch.setattr(serve, "MOST_WAITING", 3)
    model = Blocked(workers=1)
    with running(model) as port, ThreadPoolExecutor(5) as clients:
        try:
            answers = [clients.submit(ask, port, "POST", "/predict", photo()) for _ in range(5)]
            first = next(as_completed(answers, timeout=20))
            status, headers, content = first.result()
            assert (status, headers["retry-after"]) == (503, "1")
            assert content["error"] == "3 requests wait already; send it again in a second"
            assert ask(port, "GET", "/model")[0] == 200  # the event loop goes on
        finally:
            model.go.set()
        assert sorted(answer.result()[0] for answer in answers) == [200] * 4 + [503]
        assert ask(port, "POST", "/predict", photo())[0] == 200


def test_the_memory_of_waiting_images_is_limited(monkeypatch):
    monkeypatch.setattr(serve, "MOST_HELD", 3 << 20)
    model = Blocked(workers=1)
    large = photo() + bytes(2 << 20)
    with running(model, most_bytes=3 << 20) as port, ThreadPoolExecutor(1) as clients:
        try:
            first = clients.submit(ask, port, "POST", "/predict", large)
            assert model.begun.acquire(timeout=5)
            status, message = refusal(port, large)
            assert (status, message) == (503, "the images that wait take 3 MiB; send it again in a second")
        finally:
            model.go.set()
        assert first.result()[0] == 200
        assert ask(port, "POST", "/predict", large)[0] == 200


# --- names of this machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LocalHost:99", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are_answered(server, host):
    assert ask(server.port, "GET", "/model", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1]x", "192.168.0.2"]
)
def test_foreign_names_are_refused(server, host):
    for path in ("/", "/model"):
        status, message = refusal(server.port, method="GET", path=path, headers={"Host": host})
        assert status == 421
        assert message == f"Host '{host}' is not a name of this machine; open the address that the server printed"


def test_without_names_each_is_answered():
    with running(Model(), hosts=None) as port:
        assert ask(port, "GET", "/model", headers={"Host": "box.example"})[0] == 200


# --- the description of the interface ----------------------------------------------------------------------------------------


def conforms(value, schema, document):
    """Assert that plain data has the form of a schema, as far as the document uses JSON Schema."""
    if "$ref" in schema:
        assert schema["$ref"].startswith("#/components/schemas/")
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "number": (int, float), "integer": int}
    known = {
        "type",
        "required",
        "properties",
        "additionalProperties",
        "items",
        "minItems",
        "maxItems",
        "minimum",
        "description",
    }
    assert set(schema) <= known
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert any(value is None if name == "null" else isinstance(value, kinds[name]) for name in names), (value, schema)
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value)
        for name, one in value.items():
            conforms(one, schema.get("properties", {}).get(name) or schema["additionalProperties"], document)
    if isinstance(value, list):
        assert schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1000)
        for one in value:
            conforms(one, schema["items"], document)
    if isinstance(value, (int, float)):
        assert value >= schema.get("minimum", -1e9)


def test_the_document_describes_what_is_answered(server):
    status, _, document = ask(server.port, "GET", "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    app = serve.application(Model())
    routes = {(route.path, method.lower()) for route in app.routes for method in route.methods - {"HEAD"}}
    assert routes == {(path, method) for path, methods in document["paths"].items() for method in methods}
    _, _, content = ask(server.port, "POST", "/predict", photo())
    conforms(content, {"$ref": "#/components/schemas/People"}, document)
    conforms(ask(server.port, "GET", "/model")[2], {"$ref": "#/components/schemas/Model"}, document)
    for reference in re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    responses = document["paths"]["/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "408", "413", "421", "422", "500", "503"}  # each has a test above
    identities = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(identities)) == len(identities)


def test_the_document_is_shown_as_a_page(server):
    status, headers, page = ask(server.port, "GET", "/docs")
    document = ask(server.port, "GET", "/openapi.json")[2]
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'none'" in headers["content-security-policy"]
    for path in document["paths"]:
        assert re.search(rf"(GET|POST) {re.escape(path)}<", page)
    for code in document["paths"]["/predict"]["post"]["responses"]:
        assert f"<td>{code}</td>" in page
    assert "without a form: at most 20 MiB and 100 megapixels" in page


# --- start and stop ----------------------------------------------------------------------------------------------------------


def test_models_without_an_answer_are_refused_at_the_start():
    model = Model()
    model.needs_boxes = True
    with pytest.raises(UserError, match="no detector of people; give one with --detector"):
        serve.application(model)
    model.detector = model
    serve.application(model)
    model.decoder.result = type("Depth", (), {})
    with pytest.raises(UserError, match="results of the class Depth have no JSON form; serve a pose network"):
        serve.application(model)


@pytest.mark.parametrize("name", ["starlette.applications", "uvicorn"])
def test_missing_packages_are_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=re.escape('pip install "posepress[serve]"')):
        serve.serve(Model(), "127.0.0.1", 0)


@pytest.fixture
def served(monkeypatch):
    """The applications and the addresses of servers that `serve` would run."""
    runs = []

    def run(server, sockets):
        runs.append((server.config.app, sockets[0].getsockname()))

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return runs


def test_a_loopback_address_is_printed_without_a_warning(served, capsys):
    model = Model()
    serve.serve(model, "127.0.0.1", 0)
    ((app, (address, port)),) = served
    printed = capsys.readouterr()
    assert (address, printed.out, printed.err) == ("127.0.0.1", f"http://127.0.0.1:{port}/ (Ctrl+C stops the server)\n", "")
    assert app.user_middleware[0].kwargs["hosts"] == (*serve.LOOPBACK, "127.0.0.1", "127.0.0.1")
    assert model.calls == [((96, 128, 3), None, None)]  # the first request finds compiled code


def test_a_network_of_people_is_warmed_with_a_box(served):
    model = Model()
    model.needs_boxes, model.detector = True, model
    serve.serve(model, "localhost", 0)
    assert [boxes for _, boxes, _ in model.calls] == [None, [[0, 0, 128, 96]]]


def test_other_addresses_are_printed_with_a_warning(served, capsys):
    serve.serve(Model(), "0.0.0.0", 0)
    ((app, (_, port)),) = served
    printed = capsys.readouterr()
    assert printed.out.startswith(f"http://127.0.0.1:{port}/")
    assert printed.err == (
        "warning: 0.0.0.0 is not a loopback address, so everybody in the network can use this server; leave --host out to "
        "serve this machine alone\n"
    )
    assert app.user_middleware[0].kwargs["hosts"] is None


def test_addresses_that_cannot_be_taken_are_named(served):
    with serve._listener("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"127\.0\.0\.1:{port}: cannot listen there \(Address already in use\); choose another"
        ):
            serve.serve(Model(), "127.0.0.1", port)
    for host in ("no-such-host.invalid", "x" * 99):
        with pytest.raises(UserError, match=f"{host}:0: cannot listen there"):
            serve.serve(Model(), host, 0)
    for port in (-1, 70_000):
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: no TCP port; choose a --port from 1 to 65535"):
            serve.serve(Model(), "127.0.0.1", port)
    assert not served


def bundle(folder):
    """A bundle whose network finds one person in each image, at a fixed place of the input of 64x64 pixels."""
    labels = Skeleton(("head", "foot"), ((0, 1),))
    values = {"boxes": [8, 8, 40, 56], "scores": [0.9], "keypoints": [24, 12, 0.8, 24, 52, 0.7]}
    outputs = tuple(OutputSpec(name, 1, len(row), axes="NC") for name, row in values.items())
    spec = NetworkSpec(InputSpec("image", size=Resolution(64, 64)), outputs, labels, frozenset())
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Identity", [f"{name}_value"], [name]) for name in values]
    constants = [onnx.numpy_helper.from_array(np.array([[row]], np.float32), f"{name}_value") for name, row in values.items()]
    graph = helper.make_graph(
        nodes,
        "fixed",
        [helper.make_tensor_value_info("image", real, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, real, [1, 1, len(row)]) for name, row in values.items()],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save(model, folder / "engine.onnx")
    content = {
        "engine": "engine.onnx",
        "provider": "CPUExecutionProvider",
        "resolution": "64x64",
        "batch": 1,
        "framing": {"_target_": "posepress.framing.whole_image.WholeImage"},
        "decoder": {"_target_": "posepress.decoders.onestage.OneStageDecoder"},
        "detector": None,
    }
    (folder / "model.json").write_text(json.dumps(content))


def test_a_real_model_is_served_by_the_command_until_ctrl_c(tmp_path, monkeypatch, capsys):
    bundle(tmp_path)
    listener, addresses, answers = serve._listener, [], []

    def recorded(host, port):
        bound = listener(host, port)
        addresses.append(bound.getsockname())
        return bound

    def client():
        answers.extend(ask(addresses[0][1], "POST", "/predict", photo(128, 128)) for _ in range(2))
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl+C does; uvicorn takes it while it runs

    begun = threading.Thread(target=client)
    monkeypatch.setattr(serve, "_listener", recorded)
    monkeypatch.setattr(uvicorn.Server, "startup", once_started(uvicorn.Server.startup, begun.start))
    cli.main(["serve", str(tmp_path), "--port", "0"])
    begun.join()
    printed = capsys.readouterr()
    assert printed.out == f"http://127.0.0.1:{addresses[0][1]}/ (Ctrl+C stops the server)\n"
    assert printed.err == "stopped\n"
    for status, _, content in answers:
        assert status == 200
        (person,) = content["people"]
        assert person["score"] == 0.9
        assert person["keypoints"] == {"head": [48.5, 24.5, 0.8], "foot": [48.5, 104.5, 0.7]}


def once_started(startup, call):
    """uvicorn's start, with a call at its end."""

    async def started(server, sockets=None):
        await startup(server, sockets=sockets)
        call()

    return started


def test_a_client_may_connect_when_the_address_is_printed(served, monkeypatch):
    def run(server, sockets):
        socket.create_connection(sockets[0].getsockname(), timeout=5).close()
        served.append(server)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve.serve(Model(), "127.0.0.1", 0)
    assert len(served) == 1


def test_the_command_loads_no_web_server_for_other_work():
    assert "starlette" not in Path(cli.__file__).read_text() + Path(posepress.__file__).read_text()


# --- a real browser ----------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium, spoken to over two pipes in its DevTools protocol."""

    def __init__(self, folder):
        theirs, self.out = os.pipe()
        self.into, theirs_too = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        flags += ["--disable-dev-shm-usage", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        # The protocol is on the descriptors 3 and 4. The shell places them there by way of two that are free.
        place = f'exec 700<&{theirs} 701>&{theirs_too}; exec "$@" 3<&700 4>&701 >/dev/null 2>&1'
        words = ["bash", "-c", place, "chromium", CHROMIUM, *flags, "about:blank"]
        self.process = subprocess.Popen(words, pass_fds=(theirs, theirs_too))
        os.close(theirs)
        os.close(theirs_too)
        self.number, self.rest, self.events, self.session = 0, b"", [], {}
        page = next(one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = {"sessionId": self("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for domain in ("Runtime", "Log", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.number += 1
        os.write(self.out, json.dumps({"id": self.number, "method": method, "params": params, **self.session}).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                part = os.read(self.into, 1 << 20)
                assert part, "Chromium has ended"
                self.rest += part
            line, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(line)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, code):
        return self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)["result"].get("value")

    def until(self, code):
        end = time.monotonic() + 15
        while not self.value(code):
            assert time.monotonic() < end, (code, self.value("document.body.innerText"))
            time.sleep(0.02)

    def choose(self, file):
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("THE PAGE IS NOT TESTED: no chromium, chromium-browser or google-chrome here; apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        driver = Browser(folder)
        yield driver
        driver.close()


def test_the_page_shows_a_photo_an_error_and_the_webcam(browser, server, tmp_path):
    status, pixel = "document.getElementById('status').textContent", "document.getElementById('picture').getContext('2d')"
    (tmp_path / "photo.png").write_bytes(cv2.imencode(".png", np.zeros((96, 128, 3), np.uint8))[1].tobytes())
    (tmp_path / "text.jpg").write_bytes(b"hello")
    browser("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
    browser.until("document.getElementById('threshold')?.value === '0.30'")
    assert "demo/engine.onnx, input 96x128" in browser.value("document.body.innerText")

    browser.choose(tmp_path / "photo.png")
    browser.until(f"{status} === '2 people'")
    page = browser.value("document.body.innerText")
    for text in ("network + decoding", "reading the image", "Person 1, score 0.90, 2 of 3 keypoints"):
        assert text in page
    assert browser.value(f"{pixel}.canvas.width") == 128
    red, green, blue, _ = browser.value(f"[...{pixel}.getImageData(20, 35, 1, 1).data]")  # on the limb from head to foot
    assert (red > 200, green > 80, blue < 80) == (True, True, True)

    browser.value("(t => { t.value = '0.5'; t.dispatchEvent(new Event('change')); })(document.getElementById('threshold'))")
    browser.until(f"{status} === '1 person'")

    browser.choose(tmp_path / "text.jpg")
    browser.until(f"{status}.startsWith('the body is not a whole image (5 bytes)')")

    calls = len(server.model.calls)
    browser.value("document.getElementById('camera').click()")
    browser.until(f"{pixel}.canvas.width === 640")
    browser.until(f"document.getElementById('camera').textContent === 'Stop the webcam' && {status} === '1 person'")
    browser.value("document.getElementById('camera').click()")
    assert browser.value(status) == "The webcam is off."
    assert len(server.model.calls) > calls

    drop = """const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0))], 'photo.jpg'));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}));"""
    browser.value("{" + drop % base64.b64encode(photo()).decode() + "}")
    browser.until(f"{pixel}.canvas.width === 64 && {status} === '1 person'")
    problems = [e["params"] for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert ["422" in str(problem) for problem in problems] == [True]  # of the text; nothing breaks the policy
