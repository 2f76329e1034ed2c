"""Prefect, MLflow and Evidently behind a secret, for their own hosts and origin: factories for Uvicorn.

    python -m uvicorn --factory flows.common.guarded_pages:make_prefect --port 4200

Read from the environment: PERENNIAL_PAGE_SECRET; PERENNIAL_PAGE_HOSTS, the names that a server is called by
besides those of this machine, with commas between them; and what each factory names.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.common.page_secret import PageSecret, make_auth_string
from services.api.same_origin import LOOPBACK_NAMES, SameOrigin

SECRET = "PERENNIAL_PAGE_SECRET"
HOSTS = "PERENNIAL_PAGE_HOSTS"
WORKSPACE = "PERENNIAL_EVIDENTLY_WORKSPACE"


def make_command(factory: str, host: str, port: int) -> tuple[str, ...]:
    """Return the command that serves a factory of this module; it logs no requests: one holds the secret."""
    return (
        *(sys.executable, "-m", "uvicorn", "--factory", f"flows.common.guarded_pages:{factory}"),
        *("--host", host, "--port", str(port), "--log-level", "warning", "--no-access-log"),
        *("--no-proxy-headers", "--no-server-header", "--lifespan", "on"),
    )


def make_prefect() -> ASGIApp:
    """Return Prefect's server. Its websockets ask for the secret in their first message."""
    secret = _read_secret()
    os.environ["PREFECT_SERVER_API_AUTH_STRING"] = make_auth_string(secret)
    os.environ.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "")
    from prefect.server.api.server import create_app

    app = _PrefectLogin(create_app(final=True))
    return _guard(app, secret, ("/api/health", "/api/ready"))


def make_mlflow() -> ASGIApp:
    """Return MLflow's server; it stores at MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION."""
    secret, store = _read_secret(), os.environ["MLFLOW_BACKEND_STORE_URI"]
    # Read by MLflow while it is imported.
    os.environ |= {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_list_patterns()),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else eight processes more
        "_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex,
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    from mlflow.server import constants

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: store,
        constants.REGISTRY_STORE_URI_ENV_VAR: store,
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: os.environ["MLFLOW_ARTIFACTS_DESTINATION"],
    }
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(store, store, "mlflow-artifacts:/")
    from mlflow.server.fastapi_app import app

    return _guard(app, secret, ("/health", "/version"))


def make_evidently() -> ASGIApp:
    """Return Evidently's server, on the workspace at PERENNIAL_EVIDENTLY_WORKSPACE."""
    secret = _read_secret()
    os.environ.pop("EVIDENTLY_SECRET", None)  # asked for here, for reading too
    from evidently.ui.service.app import create_app, get_config

    app = create_app(get_config(workspace=os.environ[WORKSPACE]))
    return _guard(app, secret, ("/api/version",))


def _guard(app: Any, secret: str, open_paths: tuple[str, ...]) -> ASGIApp:
    return SameOrigin(PageSecret(app, secret, open_paths), _list_hosts(), setting=HOSTS)


def _read_secret() -> str:
    secret = os.environ.get(SECRET, "")
    if len(secret) < 16:
        sys.exit(f"error: {SECRET} has {len(secret)} characters\n  fix: set it to a secret of 16 or more")
    return secret


def _list_hosts() -> tuple[str, ...]:
    return tuple(filter(None, os.environ.get(HOSTS, "").split(",")))


def _list_patterns() -> list[str]:
    names = [name.replace("[", "[[]", 1) for name in (*LOOPBACK_NAMES, *_list_hosts())]
    return [*names, *(f"{name}:*" for name in names)]


class _PrefectLogin:
    """Tell Prefect's page that no login is needed: who gets the page has the secret's cookie or password."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; change one field of one answer."""
        if scope["type"] != "http" or not scope["path"].endswith("/ui-settings"):
            return await self._app(scope, receive, send)
        start: Message = {}
        pieces: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                pieces.append(message.get("body", b""))

        # Compressed, it could not be read here.
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self._app({**scope, "headers": headers}, receive, keep)
        body = b"".join(pieces)
        if start["status"] == 200:
            body = json.dumps({**json.loads(body), "auth": None}).encode()
        others = [(name, value) for name, value in start["headers"] if name != b"content-length"]
        await send({**start, "headers": [*others, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": body})
        return None
