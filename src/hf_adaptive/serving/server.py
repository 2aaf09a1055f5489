"""The HTTP server: `python -m hf_adaptive.serving FOLDER_OR_HUB_NAME` (extra `serve`)."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError('the server needs FastAPI and more: pip install "hf_adaptive[serve]"') from error

from ..modeling.criteria import problem_type
from ..version import __version__
from .api import BadRequestError, Limits, Question, default_function, read_question, response
from .engine import ExitsEngine
from .errors import DeadlineExceededError, EngineBrokenError, EngineClosedError, EngineFullError, NotANumberError
from .metrics import Metrics

logger = logging.getLogger("hf_adaptive.serving")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Seconds after which a refused caller may try again.
_RETRY_AFTER = "1"
_CLIENT_WENT_AWAY = 499


class Service:
    """An engine, and what is to be done when its worker dies.

    Args:
        make_engine (`Callable[[], ExitsEngine]`): Called at the start, and again if it is to be restarted.
        name (`str`): Of the model, as it was asked for.
        limits (`Limits`): Of each request.
        restarts (`bool`): Whether a dead worker is replaced; else `on_death` is called once.
        on_death (`Callable[[], None]`): Ends the process.
    """

    def __init__(
        self,
        make_engine: Callable[[], ExitsEngine],
        name: str,
        limits: Limits,
        restarts: bool = False,
        on_death: Callable[[], None] = lambda: None,
    ):
        self.make_engine = make_engine
        self.engine = make_engine()
        self.name = name
        self.limits = limits
        self.restarts = restarts
        self.on_death = on_death
        self.is_stopping = False
        self.has_died = False
        self.metrics = Metrics(lambda: self.engine.statistics())

    async def classify(self, question: Question) -> list[list[dict[str, Any]]]:
        """Answers a request; all its texts or none."""
        engine = self.engine
        asked = [asyncio.ensure_future(engine.answer(one, self.limits.timeout_ms)) for one in question.examples]
        try:
            answers = await asyncio.gather(*asked)
        except EngineBrokenError:
            self._bury(engine)
            raise
        finally:
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        config = engine.model.config
        return response(answers, question, config, default_function(problem_type(config)))

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of `GET /health`."""
        config = self.engine.model.config
        is_alive = self.engine.is_alive and not self.is_stopping
        body = {
            "status": "ok" if is_alive else "stopping" if self.is_stopping else "dead",
            "model": self.name,
            "exit_layers": list(config.exit_layers),
            "leaves_early": config.exit_thresholds is not None,
            "waiting": sum(self.engine.statistics().waiting),
            "version": __version__,
        }
        return (200 if is_alive else 503), body

    def _bury(self, engine: ExitsEngine) -> None:
        if engine is not self.engine or self.has_died:
            return
        if self.restarts:
            logger.error("the engine's worker died; a new one takes over")
            self.engine = self.make_engine()
            return
        self.has_died = True
        self.on_death()


class StoppingServer(uvicorn.Server):
    """uvicorn's server, which says that it is unhealthy from the first signal on and answers all who were let in.

    Args:
        app (`FastAPI`): What is served.
        service (`Service`): Whose health it is.
    """

    def __init__(self, app: FastAPI, service: Service):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_keep_alive=30))
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Called on SIGTERM and SIGINT."""
        self.service.is_stopping = True
        super().handle_exit(sig, frame)


def make_app(service: Service) -> FastAPI:
    """The application; closing it answers what waits and closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="hf_adaptive", version=__version__, lifespan=lifespan)

    @app.middleware("http")
    async def note(request: Request, call_next: Callable[[Request], Any]) -> Response:
        start = time.monotonic()
        request.state.id = _request_id(request)
        answer: Response = await call_next(request)
        answer.headers["X-Request-ID"] = request.state.id
        service.metrics.note_request(request.url.path, answer.status_code, time.monotonic() - start)
        return answer

    @app.post("/classify")
    @app.post("/", include_in_schema=False)
    async def classify(request: Request) -> Response:
        """Labels for a text, a pair, or a list of them, in the shape of Hugging Face's inference API."""
        return await answer_request(request, service)

    @app.get("/health")
    async def health() -> Response:
        """200 while texts are answered, else 503."""
        status, body = service.health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        """In Prometheus' text format."""
        content, kind = service.metrics.text()
        return Response(content, media_type=kind)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _error(request, error.status_code, "http", str(error.detail), dict(error.headers or {}))

    return app


async def answer_request(request: Request, service: Service) -> Response:
    """The response to `POST /classify`, whatever the body; other servers of Starlette's requests use it, too."""
    request.state.id = _request_id(request)
    try:
        question = read_question(await _body(request, service.limits), service.limits)
        return JSONResponse(await _unless_gone(request, service.classify(question)))
    except BadRequestError as error:
        return _error(request, error.status, error.kind, str(error))
    except (EngineFullError, EngineClosedError) as error:
        return _error(request, 503, "overloaded", str(error), {"Retry-After": _RETRY_AFTER})
    except DeadlineExceededError as error:
        return _error(request, 504, "timeout", str(error))
    except ClientDisconnect:
        return _error(request, _CLIENT_WENT_AWAY, "cancelled", "the client went away.")
    except (ValueError, TypeError) as error:
        # Of the row: the tokenizer or the model could not read it.
        return _error(request, 422, "unreadable", str(error))
    except (NotANumberError, EngineBrokenError) as error:
        return _error(request, 500, "model", str(error))
    except Exception:
        logger.exception("request %s failed", request.state.id)
        return _error(request, 500, "internal", "the server failed; its log says why.")


async def _body(request: Request, limits: Limits) -> bytes:
    try:
        return await asyncio.wait_for(_limited_body(request, limits.max_body_bytes), limits.read_timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        message = f"the body did not arrive within {limits.read_timeout_s:g} seconds."
        raise BadRequestError(message, 408, "timeout") from None


async def _limited_body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise BadRequestError(f"the body is larger than {most} bytes.", 413, "too_long")
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(request: Request, answer: Any) -> Any:
    """The answer; its rows give their places up when the client goes away."""
    answering = asyncio.ensure_future(answer)
    listening = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        for task in (answering, listening):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _error(
    request: Request, status: int, kind: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    body = {"error": message, "error_type": kind, "request_id": request.state.id}
    return JSONResponse(body, status, headers=headers)
