"""The dashboard's web app: `uvicorn --factory flows.dashboard.app:make_guarded_app`, or `make up`.

It only reads. A thread looks at everything every few seconds, and a request is answered with what was seen
last: nothing that is slow or down can hold the page up.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.types import ASGIApp

from flows.common import guarded_pages
from flows.common.page_secret import PageSecret
from flows.dashboard.charts import draw_charts
from flows.dashboard.status import StatusCache, read_status
from monitoring.report_texts import PAGE_POLICY
from monitoring.verdicts import WATCH
from services.api.same_origin import SameOrigin
from services.peers.own_user import OwnUser
from stages.common.errors import InputError
from stages.common.page.shared import PAGE_FILES
from stages.common.params.loading import load_params
from stages.common.tag import Tag, parse_version

PAGE = Path(__file__).parent / "page"
LOOK_EVERY_S = 5.0
FIRST_LOOK_WITHIN_S = 10.0
STALE_S = 60.0  # older than this, the page shows a warning
FILES = {path.name: path for path in (PAGE / "dashboard.css", PAGE / "dashboard.js", *PAGE_FILES.iterdir())}
POLICY = "; ".join(
    (
        "default-src 'none'",
        *("script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
REPORT_POLICY = f"{PAGE_POLICY}; frame-ancestors 'none'"

logger = logging.getLogger("flows.dashboard")


class Watcher:
    """Refresh the status every few seconds in a background thread.

    Args:
        root: of the checkout; params.yaml is read again when it changes.
    """

    def __init__(self, root: Path, every_s: float = LOOK_EVERY_S) -> None:
        self._root, self._every_s = root, every_s
        self._stop = threading.Event()
        self._first = threading.Event()
        self._status: dict[str, Any] | None = None
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def latest(self) -> dict[str, Any]:
        """Return the latest status.

        Raises:
            InputError: nothing was seen yet, and why.
        """
        self._first.wait(FIRST_LOOK_WITHIN_S)
        if self._status is None:
            raise InputError(
                self._problem or "the status is being read for the first time", "reload in a moment"
            )
        age_s = time.time() - float(self._status["now"])
        return self._status | {"problem": self._problem, "age_s": age_s, "stale": age_s > STALE_S}

    def _run(self) -> None:
        cache = StatusCache()
        while not self._stop.is_set():
            try:
                params = load_params(self._root / "params.yaml")
                self._status = read_status(self._root, params, cache)
                self._problem = None
            except InputError as error:
                self._problem = error.what
            except Exception as error:  # shown on the page; the thread must not end silently
                logger.exception("the dashboard could not read the status")
                self._problem = f"{type(error).__name__}: {error}"
            self._first.set()
            self._stop.wait(self._every_s)


def make_app(root: Path, every_s: float = LOOK_EVERY_S) -> FastAPI:
    """Return the app that shows the checkout at `root`."""
    watcher = Watcher(root, every_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        yield
        watcher.stop()

    app = FastAPI(title="Perennial dashboard", lifespan=lifespan, docs_url=None, redoc_url=None)
    template = _environment().get_template("dashboard.html")

    @app.get("/")
    def page() -> HTMLResponse:
        try:
            seen, problem = watcher.latest(), None
        except InputError as error:
            seen, problem = None, str(error)
        html = template.render(status=seen, problem=problem, drawing=_drawing(seen) if seen else None)
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    @app.get("/api/status")
    def status() -> JSONResponse:
        try:
            return JSONResponse(watcher.latest(), headers={"Cache-Control": "no-store"})
        except InputError as error:
            return JSONResponse({"problem": error.what}, 503)

    @app.get("/healthz")
    def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok")

    @app.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404)
        return FileResponse(FILES[name], headers={"Cache-Control": "no-cache"})

    @app.get("/reports/watch/{window}")
    def report(window: str) -> Response:
        # Only what is there is compared: no name of a request becomes a path.
        for path in (root / WATCH).glob("*/report.html"):
            if path.parent.name == window:
                headers = {"Content-Security-Policy": REPORT_POLICY}
                return FileResponse(path, media_type="text/html", headers=headers)
        raise HTTPException(404)

    return app


def _drawing(status: dict[str, Any]) -> dict[str, Markup] | None:
    traffic = status["traffic"]
    if not traffic or not traffic["bins"]:
        return None
    drawn = draw_charts(traffic, status["verdicts"], status["releases"])
    return {name: Markup(svg) for name, svg in drawn.items()}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "clock": format_time,
        "machine_time": lambda at: datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds"),
        "duration": format_duration,
        "version": parse_version,
        "model_name": lambda tag: Tag.parse(tag).name,
        "number": format_number,
    }
    return environment


def format_time(at: float) -> str:
    """Format a time (unix s) in the machine's time zone."""
    then, now = datetime.fromtimestamp(at), datetime.now()
    if then.date() == now.date():
        return then.strftime("%H:%M:%S" if (now - then).total_seconds() < 3600 else "%H:%M")
    return then.strftime("%d %b %H:%M" if then.year == now.year else "%d %b %Y")


def format_duration(seconds: float) -> str:
    """Format a duration with its one or two largest units."""
    left = max(0, round(seconds))
    words: list[str] = []
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, left = divmod(left, length)
        if count or (unit == "s" and not words):
            words.append(f"{count} {unit}")
        elif words:
            break
        if len(words) == 2:
            break
    return " ".join(words)


def format_number(value: float | None) -> str:
    """Format a number with at most four decimals; None is a dash."""
    return "–" if value is None else f"{value:.4f}".rstrip("0").rstrip(".").replace("-", "−")


def make_guarded_app() -> ASGIApp:
    """Return the app of the checkout in this folder, for its own hosts and origin.

    It only reads, and asks the user who runs it for no secret; a browser that brings the one of `make up`
    gets the cookie that opens the pages it links to, and this one to another user.
    """
    app: ASGIApp = make_app(Path())
    own = OwnUser(app, open_paths=("/healthz",), fix="open the link that `make up` printed when it started")
    secret = os.environ.get(guarded_pages.SECRET)
    return SameOrigin(PageSecret(app, secret, otherwise=own) if secret else own)
