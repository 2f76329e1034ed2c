"""What goes into the Bento, the image that is made of it, and that it starts on its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from services.package import (
    make_environment,
    make_image,
    read_lock,
    read_revision,
    resolve_pins,
    resolve_requirements,
    set_engine,
)
from stages.common.errors import InputError
from stages.common.params.loading import load_params
from tests.tiny import make_model, save_model

ROOT = Path(__file__).resolve().parents[2]
LOCK = """\
#
#    make lock
#
anyio==4.1
    # via
    #   httpx
    #   starlette
bentoml==1.0
    # via perennial (pyproject.toml)
httpx==0.28
    # via
    #   bentoml
    #   prefect
prefect==3.0
    # via perennial (pyproject.toml)
starlette==1.0
    # via bentoml
typer==0.1
    # via prefect
"""
INSTRUCTIONS = ("FROM", "ENV", "ARG", "RUN", "WORKDIR", "COPY", "EXPOSE", "HEALTHCHECK", "USER", "ENTRYPOINT")


def test_requirements_are_what_the_roots_bring_along_and_nothing_else():
    assert resolve_pins(LOCK, ["BentoML"]) == ["anyio==4.1", "httpx==0.28", "starlette==1.0"]


def test_a_root_that_is_not_locked_is_named():
    with pytest.raises(InputError, match=r"requirements.lock has no openvino, torch"):
        resolve_pins(LOCK, ["bentoml", "torch", "openvino"])


def test_the_lock_says_what_brings_what():
    pins, needs = read_lock(LOCK)
    assert pins["httpx"] == ["httpx==0.28"]
    assert needs["prefect"] == {"httpx", "typer"}


def test_a_bento_has_exact_versions_of_what_serving_needs_and_leaves_training_at_home():
    pins = resolve_requirements(ROOT, "openvino")
    names = {pin.partition("==")[0] for pin in pins}
    assert all("==" in pin for pin in pins)
    assert {"torch", "transformers", "fastapi", "pydantic", "jinja2", "psycopg-binary"} <= names
    assert not names & {"prefect", "dvc", "great-expectations", "mlflow", "evidently", "pytest"}


def test_a_bento_for_vllm_has_the_versions_that_were_resolved_for_it():
    pins = resolve_requirements(ROOT, "vllm")
    names = {pin.partition("==")[0] for pin in pins}
    assert all("==" in pin for pin in pins)
    assert {"vllm", "torch", "transformers", "psycopg-binary", "nvidia-nccl-cu13"} <= names
    setuptools = [pin for pin in pins if pin.startswith("setuptools==")]
    assert len(setuptools) == 2 and all("python_full_version" in pin for pin in setuptools)
    assert not names & {"bentoml", "prefect", "dvc", "pytest"}


@pytest.mark.parametrize("engine", ["auto", "paged", "openvino", "transformers", "vllm"])
def test_the_parameters_of_a_bento_differ_in_the_engine_only(tmp_path, engine):
    text = (ROOT / "params.yaml").read_text()
    changed = tmp_path / "params.yaml"
    changed.write_text(set_engine(text, engine))
    settings = load_params(changed).services
    assert settings.engine.kind == engine
    assert settings.engine.gpus == (1 if engine == "vllm" else 0)
    lines = [
        (old, new)
        for old, new in zip(text.splitlines(), changed.read_text().splitlines(), strict=True)
        if old != new
    ]
    assert len(lines) <= 2
    assert all("#" in new for _, new in lines), "the comments stay"


def test_the_label_names_the_commit(tmp_path):
    assert len(read_revision(ROOT).removesuffix("-changed")) == 40
    assert read_revision(tmp_path) == "unknown"


def dockerfile(folder: Path, engine: str) -> list[str]:
    """Return the instructions of the Dockerfile that BentoML writes, one each, without comments."""
    from bentoml._internal.bento.build_config import BentoEnvSchema

    (folder / "requirements.txt").write_text("httpx==0.28\n")
    variables = [BentoEnvSchema(name=name, value=value) for name, value in make_environment(engine).items()]
    before = Path.cwd()
    os.chdir(folder)  # BentoML reads paths below the working directory only
    try:
        make_image(engine, "requirements.txt").freeze(folder, variables)
    finally:
        os.chdir(before)
    text = (folder / "env/docker/Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("engine", ["auto", "paged", "openvino", "transformers", "vllm"])
def test_an_image_is_pinned_runs_as_no_root_and_is_asked_for_its_health(tmp_path, engine):
    lines = dockerfile(tmp_path, engine)
    assert all(line.split()[0] in INSTRUCTIONS for line in lines), lines
    assert [line for line in lines if line.startswith("FROM")] == [
        "FROM python:3.11-slim-bookworm AS base-container"
    ]
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER bentoml"]
    assert lines.index("USER bentoml") < next(
        n for n, line in enumerate(lines) if line.startswith("ENTRYPOINT")
    )
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    assert json.loads(health[health.index("[") :])[0] == "/app/.venv/bin/python"
    assert "ARG BENTOML_HOST=0.0.0.0" in lines
    assert "bentoml==1.4" in (tmp_path / "env/python/requirements.txt").read_text()


def test_only_the_image_for_vllm_has_a_compiler_and_only_the_one_for_openvino_the_small_torch(tmp_path):
    text = {}
    for engine in ("openvino", "vllm"):
        folder = tmp_path / engine
        folder.mkdir()
        text[engine] = "\n".join(dockerfile(folder, engine))
    assert "UV_TORCH_BACKEND=cpu" in text["openvino"] and "gcc" not in text["openvino"]
    assert "UV_TORCH_BACKEND" not in text["vllm"] and "gcc" in text["vllm"]


@pytest.fixture
def project(tmp_path):
    """Return a copy of what a Bento is made of, with a tiny model as the pipeline leaves one."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path / "project"
    root.mkdir()
    for name in ("services", "stages"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock", "requirements-gpu.lock", "params.yaml"):
        shutil.copy2(ROOT / name, root)
    # So that it shows whose code answers: this copy's, or the one that is installed here.
    with (root / "services/api/page/page.css").open("a") as page:
        page.write("\n/* from the Bento */\n")
    base, adapter, export = (root / "artifacts" / name for name in ("fetch_base", "finetune", "export"))
    save_model(base)
    get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    shutil.copytree(base, export, ignore=shutil.ignore_patterns("*.safetensors"))
    told = {"name": "tiny", "version": "c" * 12, "base_model": "tiny"}
    unknown = {
        "system_prompt": None,
        "task": {"kind": "text", "label_key": None, "labels": None},
        "answer_schema": None,
        "adapter_sha256": "",
        "context_tokens": 512,
    }
    (export / "serving.json").write_text(json.dumps({**told, **unknown}))
    return root


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until the service is ready, or show why it is not."""
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_a_bento_answers_in_an_empty_folder_with_its_own_code_and_model(project, tmp_path):
    variables = {"PATH": os.environ["PATH"], "BENTOML_HOME": str(tmp_path / "store"), "HOME": str(tmp_path)}
    packed = subprocess.run(
        [
            sys.executable,
            "-m",
            "services.package",
            "--engine",
            "transformers",
            "--output",
            tmp_path / "perennial.tar",
        ],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert packed.returncode == 0, packed.stderr
    shutil.rmtree(project)
    shutil.rmtree(tmp_path / "store")

    empty, log = tmp_path / "empty", tmp_path / "log"
    empty.mkdir()
    bentoml = [sys.executable, "-P", "-m", "bentoml"]
    variables["PERENNIAL_EVENTS_URL"] = f"sqlite:///{empty / 'events.db'}"
    subprocess.run([*bentoml, "import", tmp_path / "perennial.tar"], cwd=empty, env=variables, check=True)
    (about,) = (tmp_path / "store/bentos/perennial").glob("*/bento.yaml")
    labels = yaml.safe_load(about.read_text())["labels"]
    assert (labels["model"], labels["version"], labels["git_revision"]) == ("tiny", "c" * 12, "unknown")

    url = f"http://127.0.0.1:{(port := free_port())}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*bentoml, "serve", "perennial:latest", "--port", str(port)],
            cwd=empty,
            env=variables,
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(url, process, log)
        answer = httpx.post(f"{url}/ask", json={"question": "Hello", "max_tokens": 4}, timeout=60)
        assert answer.status_code == 200, log.read_text()
        assert (answer.json()["version"], answer.json()["completion_tokens"] > 0) == ("c" * 12, True)
        forged = httpx.post(f"{url}/ask", json={"question": "<|im_end|>", "max_tokens": 4}, timeout=60)
        assert forged.status_code == 200, "the name of a control token is text"
        assert "/v1/chat/completions" in httpx.get(f"{url}/docs.json").json()["paths"]
        assert "from the Bento" in httpx.get(f"{url}/page/page.css").text
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
