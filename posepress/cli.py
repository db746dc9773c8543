"""The command `posepress`: predict, info and serve. Further commands come from packages that register them."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from posepress.errors import UserError, nearest

_GROUP = "posepress.commands"  # entry points of further commands, each a function of the words that follow
_OWN = ("predict", "info", "serve")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if words is None else words)
    command = next((word for word in given if not word.startswith("-")), "")
    warnings.showwarning = _say
    try:
        if command and command not in _OWN and given[0] == command:
            _other(command)(given[1:])
            return
        options = _parser().parse_args(given or ["--help"])
        options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the files that were begun are finished", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reading program, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _say(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _other(command: str) -> Callable[[Sequence[str]], None]:
    """A command that another package registers; it is imported only when it is named.

    Raises:
        UserError: no installed package has it.
    """
    known = {entry.name: entry for entry in entry_points(group=_GROUP)}
    if command not in known:
        raise UserError(
            f"{command}: no such command{nearest(command, [*_OWN, *known])}; there are {', '.join([*_OWN, *sorted(known)])}"
        )
    try:
        loaded: Callable[[Sequence[str]], None] = known[command].load()
    except ImportError as error:
        raise UserError(f"{command}: needs a package that is not installed ({error}); pip install 'posepress[full]'") from error
    return loaded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "posepress",
        description="Run an engine that Posepress made.",
        epilog="ENGINE is a bundle, a result of the stage build, or an address below outputs/, as NAME/ADDRESS. "
        f"Also registered: {', '.join(sorted(entry.name for entry in entry_points(group=_GROUP))) or 'no further command'}.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="predict on images, videos or cameras, and write pictures and files")
    predict.add_argument("engine", metavar="ENGINE")
    predict.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="image, folder, pattern, video, index of a camera, rtsp:// address, or - for paths from the standard input",
    )
    _common(predict)
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the files (predictions)")
    predict.add_argument("--save", default="overlay,coco", help="some of overlay,coco,csv; empty for none (overlay,coco)")
    predict.add_argument("--jsonl", action="store_true", help="print a line of JSON for each image")
    predict.add_argument("--threshold", type=float, help="least score of a person")
    predict.add_argument("--track", action="store_true", help="number people in videos")
    predict.add_argument("--smooth", action="store_true", help="smooth the keypoints of tracked people")
    predict.add_argument("--every", type=int, default=1, metavar="N", help="run the detector on each N-th image")
    predict.add_argument("--no-strict", action="store_true", help="skip and count files that are no images")
    predict.add_argument("--live", action="store_true", help="take a camera's newest frame, drop and count the others")
    predict.set_defaults(run=_predict)
    info = commands.add_parser("info", help="print what an engine is and how it is run")
    info.add_argument("engine", metavar="ENGINE")
    _common(info)
    info.set_defaults(run=_info)
    serve = commands.add_parser("serve", help="show a web page that predicts on dropped photos and on a webcam")
    serve.add_argument("engine", metavar="ENGINE")
    _common(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    serve.add_argument("--port", type=int, default=8000)
    serve.set_defaults(run=_serve)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detector", metavar="ENGINE", help="model that finds people's boxes, for top-down networks")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the results (outputs)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for one batch (0: a batch on each core)")


def _loaded(options: argparse.Namespace) -> Any:
    from posepress.model import load

    return load(options.engine, options.detector, options.outputs, options.threads)


def _predict(options: argparse.Namespace) -> None:
    from posepress.run import Options, run

    save = tuple(word for word in options.save.split(",") if word)
    chosen = Options(
        options.out, save, options.jsonl, options.threshold, options.track, options.smooth, options.every,
        not options.no_strict, options.live,
    )  # fmt: skip
    with _loaded(options) as model:
        done = run(model, options.source, chosen)
    problems = ", ".join(f"{name} {value}" for name, value in done.items() if isinstance(value, int) and value)
    print(f"{options.out}: {problems}" if save else problems, file=sys.stderr)


def _info(options: argparse.Namespace) -> None:
    with _loaded(options) as model:
        spec, about = model.spec, model.description
        fields = {one.name: one.form for one in spec.fields}
        content = {
            "engine": str(about.engine),
            "input": f"{spec.input.name} {about.resolution}, {spec.input.layout} {spec.input.dtype}, {spec.input.order}",
            "outputs": fields,
            "labels": list(spec.labels.names),
            "framing": dict(about.framing),
            "decoder": dict(about.decoder),
            "batch": about.batch,
            "threshold": model.threshold,
            "needs_boxes": model.needs_boxes,
            "detector": None if model.detector is None else str(model.detector.description.engine),
        }
    print(json.dumps(content, indent=1))


def _serve(options: argparse.Namespace) -> None:
    from posepress.serve import serve

    with _loaded(options) as model:
        serve(model, options.host, options.port)


if __name__ == "__main__":
    main()
