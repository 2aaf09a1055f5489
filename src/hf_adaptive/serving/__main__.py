"""Serves a checkpoint over HTTP.

python -m hf_adaptive.serving FOLDER_OR_HUB_NAME --port 8000

curl http://127.0.0.1:8000/classify -d '{"inputs": "A masterpiece."}'
"""

import argparse
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from .api import Limits
from .engine import ExitsEngine
from .loading import load_for_serving
from .monitor import ACTIONS

logger = logging.getLogger("hf_adaptive.serving")

_BACKLOG = 2048


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the server until SIGTERM or SIGINT; returns the process's exit status."""
    asked = _parser().parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        from .server import Service, StoppingServer, make_app
    except ImportError as error:
        return _refused(str(error))
    try:
        listener = _listener(asked.host, asked.port)
        model, tokenizer = load_for_serving(asked.model, asked.revision, asked.device, asked.trust_remote_code)
        limits = Limits(asked.max_texts, asked.max_characters, asked.max_body_bytes, asked.timeout_ms)
        service = Service(
            lambda: ExitsEngine(model, **_engine_settings(asked), tokenizer=tokenizer),
            asked.model,
            limits,
            restarts=asked.when_worker_dies == "restart",
        )
    except (OSError, ValueError, TypeError) as error:
        return _refused(str(error))
    server = StoppingServer(make_app(service), service)

    def stop(*_: object) -> None:
        server.should_exit = True

    service.on_death = stop
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        # uvicorn has handlers of its own while it runs, and raises the signal once more when it is done.
        signal.signal(signal_, stop)
    # What is there now stays: Python need not look through it again and again while requests wait.
    gc.collect()
    gc.freeze()
    _announce(service, listener)
    server.run(sockets=[listener])
    return 1 if service.has_died else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m hf_adaptive.serving", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a classifier with exits or a cascade")
    parser.add_argument("--revision", help="of a Hub name")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, ...")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--max-waiting", type=int, default=10_000, help="texts in the engine; more are refused (503)")
    parser.add_argument("--timeout-ms", type=float, default=Limits.timeout_ms)
    parser.add_argument("--max-texts", type=int, default=Limits.max_texts, help="of one request")
    parser.add_argument("--max-characters", type=int, default=Limits.max_characters, help="of one text")
    parser.add_argument("--max-body-bytes", type=int, default=Limits.max_body_bytes)
    parser.add_argument("--audit-share", type=float, default=0.01, help="of the answers, when the machine is idle")
    parser.add_argument("--when-broken", choices=tuple(ACTIONS), default="warn", help="if the audit finds too many")
    parser.add_argument("--when-worker-dies", choices=("exit", "restart"), default="exit")
    return parser


def _engine_settings(asked: argparse.Namespace) -> dict[str, Any]:
    names = ("max_batch_size", "max_wait_ms", "max_waiting", "audit_share", "when_broken")
    return {name: getattr(asked, name) for name in names}


def _listener(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that a port in use is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # Whoever calls before the model is loaded waits.
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port} ({error}). Choose another --port, or 0 for any.") from None
    return listener


def _announce(service: Any, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    if service.engine.model.config.exit_thresholds is None:
        logger.warning("the checkpoint has no exit_thresholds: nothing leaves early. Run calibrate_exits, and save.")
    print(f"Serving {service.name} at http://{host}:{port}", flush=True)


def _refused(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
