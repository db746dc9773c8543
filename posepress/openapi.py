"""The interface of the web service: its OpenAPI document, and a page that shows it."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posepress.image_headers import MOST_PIXELS

STEPS = ("receiving", "waiting", "reading", "predicting")  # whose times an answer holds


def mebibytes(size: int) -> str:
    """A size in bytes as text in MiB."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size} bytes"


_PEOPLE = {
    "type": "object",
    "required": ["people", "width", "height", "milliseconds"],
    "properties": {
        "people": {"type": "array", "items": {"$ref": "#/components/schemas/Person"}},
        "width": {"$ref": "#/components/schemas/Pixels"},
        "height": {"$ref": "#/components/schemas/Pixels"},
        "milliseconds": {"$ref": "#/components/schemas/Milliseconds"},
    },
    "description": "Result of a pose network. The image's size is the one after its EXIF rotation.",
}
_SCHEMAS: Mapping[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string", "description": "What is wrong, then what to do."}},
    },
    "Pixels": {"type": "integer", "minimum": 1, "description": "A length in pixels."},
    "Box": {
        "type": "array",
        "items": {"type": "number"},
        "minItems": 4,
        "maxItems": 4,
        "description": "x and y of the upper left corner, width and height, in pixels of the image.",
    },
    "Keypoint": {
        "type": ["array", "null"],
        "items": {"type": "number"},
        "minItems": 3,
        "maxItems": 3,
        "description": "x and y in pixels of the image, and the keypoint's score; null for a missing keypoint.",
    },
    "Person": {
        "type": "object",
        "required": ["score", "keypoints"],
        "properties": {
            "score": {"type": "number"},
            "keypoints": {
                "type": "object",
                "additionalProperties": {"$ref": "#/components/schemas/Keypoint"},
                "description": "The keypoints by name; /model lists the names.",
            },
            "box": {"$ref": "#/components/schemas/Box"},
        },
    },
    "Detection": {
        "type": "object",
        "required": ["box"],
        "properties": {"box": {"$ref": "#/components/schemas/Box"}, "score": {"type": "number"}},
    },
    "Milliseconds": {
        "type": "object",
        "required": [*STEPS, "total"],
        "properties": {
            "receiving": {"type": "number", "description": "Arrival of the body."},
            "waiting": {"type": "number", "description": "Wait for a free worker."},
            "reading": {"type": "number", "description": "Decoding of the image file to pixels."},
            "predicting": {"type": "number", "description": "Framing, network and decoding of its outputs."},
            "total": {"type": "number", "description": "All steps together."},
        },
    },
    "People": _PEOPLE,
    "Boxes": {
        "type": "object",
        "required": ["boxes", "width", "height", "milliseconds"],
        "properties": {
            "boxes": {"type": "array", "items": {"$ref": "#/components/schemas/Detection"}},
            "width": {"$ref": "#/components/schemas/Pixels"},
            "height": {"$ref": "#/components/schemas/Pixels"},
            "milliseconds": {"$ref": "#/components/schemas/Milliseconds"},
        },
        "description": "Result of a detection network. The image's size is the one after its EXIF rotation.",
    },
    "Model": {
        "type": "object",
        "required": ["names", "limbs", "resolution", "threshold", "engine", "needs_boxes", "most_bytes"],
        "properties": {
            "names": {"type": "array", "items": {"type": "string"}, "description": "The keypoints, or the classes."},
            "limbs": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
                "description": "Pairs of indices of keypoints, counted from 0.",
            },
            "resolution": {
                "type": "object",
                "required": ["height", "width"],
                "properties": {
                    "height": {"$ref": "#/components/schemas/Pixels"},
                    "width": {"$ref": "#/components/schemas/Pixels"},
                },
                "description": "The network's input.",
            },
            "threshold": {"type": "number", "description": "Least score where a request names none."},
            "engine": {"type": "string", "description": "The engine's folder and file."},
            "needs_boxes": {"type": "boolean", "description": "Whether a detector finds the people first."},
            "most_bytes": {"type": "integer", "description": "Largest image file, in bytes."},
        },
    },
}


_HOST = "The header Host is no name of this machine. The server checks it on a loopback address."


def _content(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _failure(text: str) -> dict[str, Any]:
    return {"description": text, **_content("application/json", {"$ref": "#/components/schemas/Error"})}


def _predict(seconds: float, most_bytes: int) -> dict[str, Any]:
    """The operation POST /predict; the arguments are those of `document`."""
    result = {"oneOf": [{"$ref": "#/components/schemas/People"}, {"$ref": "#/components/schemas/Boxes"}]}
    retry = {"Retry-After": {"description": "Seconds after which to send the request again.", "schema": {"type": "integer"}}}
    megapixels = MOST_PIXELS // 10**6
    return {
        "summary": "Predict the people in an image",
        "operationId": "predict",
        "parameters": [
            {
                "name": "threshold",
                "in": "query",
                "required": False,
                "schema": {"type": "number", "minimum": 0},
                "description": "Least score of a person or box. Without it, the model's own threshold applies.",
            }
        ],
        "requestBody": {
            "required": True,
            "description": f"The bytes of a JPEG, PNG, BMP or WebP file, without a form: at most {mebibytes(most_bytes)} and "
            f"{megapixels} megapixels. The Content-Type is not read.",
            **_content("application/octet-stream", {}),
        },
        "responses": {
            "200": {"description": "The result, in pixels of the upright image", **_content("application/json", result)},
            "400": _failure("The connection ended within the body."),
            "408": _failure(f"The body did not arrive within {seconds:g} s."),
            "413": _failure(f"The body has more than {mebibytes(most_bytes)}, or the image more than {megapixels} megapixels."),
            "421": _failure(_HOST),
            "422": _failure("The body is not a whole image, the model cannot use it, or a parameter is wrong."),
            "500": _failure("The server failed; its log says more."),
            "503": {
                **_failure(f"The prediction takes longer than {seconds:g} s, or too many requests or bytes wait."),
                "headers": retry,
            },
        },
    }


def document(seconds: float, most_bytes: int) -> dict[str, Any]:
    """The OpenAPI document of the application.

    Args:
        seconds: longest time of one prediction.
        most_bytes: largest body of a request, in bytes.
    """

    def reading(summary: str, name: str, kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        success = {"description": summary, **_content(kind, schema)}
        return {"get": {"summary": summary, "operationId": name, "responses": {"200": success, "421": _failure(_HOST)}}}

    page = {"type": "string"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Posepress",
            "version": "1.0.0",
            "summary": "Predictions of one loaded engine",
            "description": "Images are held in memory while they are predicted, and nothing is stored. Each error is "
            '{"error": message}.',
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/": reading("The page for photos and a webcam", "page", "text/html", page),
            "/model": reading("The loaded model", "model", "application/json", {"$ref": "#/components/schemas/Model"}),
            "/predict": {"post": _predict(seconds, most_bytes)},
            "/openapi.json": reading("This document", "document", "application/json", {"type": "object"}),
            "/docs": reading("This document as a page", "docs", "text/html", page),
        },
        "components": {"schemas": dict(_SCHEMAS)},
    }


_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 50rem; margin: auto; padding: 1rem; }
code, pre { font-size: .9rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: .5rem; }
h2 code { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 1rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid #8886; }
"""


def manual(document: Mapping[str, Any]) -> str:
    """A page that shows an OpenAPI document."""
    info, parts = document["info"], []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {path}</code></h2><p>{html.escape(operation['summary'])}.</p>")
            given = [(one["name"], one["description"]) for one in operation.get("parameters", ())]
            if "requestBody" in operation:
                given.append(("body", operation["requestBody"]["description"]))
            parts += [_table(("parameter", "meaning"), given)] if given else []
            parts.append(_table(("status", "meaning"), [(k, one["description"]) for k, one in operation["responses"].items()]))
    parts.append("<h2>Types</h2>")
    for name, schema in document["components"]["schemas"].items():
        text = html.escape(json.dumps(schema, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    example = "curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?threshold=0.5'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(info["title"])}: the interface</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(info["title"])}: the interface</h1>
<p>{html.escape(info["description"])} <a href="openapi.json">The OpenAPI document</a>; <a href=".">the page</a>.</p>
<pre>{html.escape(example)}</pre>
{"".join(parts)}
</body>
</html>
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table><thead>{line('th', head)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
