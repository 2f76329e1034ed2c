"""Pack the champion into a Bento: the service, its model and exact requirements, as one thing to carry away.

    perennial package [--engine auto|paged|openvino|transformers|vllm] [--output perennial.tar]

The Bento starts on a machine that has neither this repository nor its history: `bentoml serve perennial`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.versions.__main__ import ALIASES, Aliases, newest_as_champion, stored
from stages.common.artifacts import write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.params.loading import load_params

if TYPE_CHECKING:
    from bentoml.images import Image

ENGINES = ("auto", "paged", "openvino", "transformers", "vllm")
ON_CPU = ("paged", "openvino")  # computed from the GGUF alone
SERVICE = "services.generation:Generation"
PYTHON = "3.11"
UV = "0.13.8"  # installs the packages in the image; BentoML would take the newest
# The code of the service, without what stays at home: how it is deployed, and texts that train the guard.
LEFT_OUT = shutil.ignore_patterns("__pycache__", "deploy", "train_*.csv", "heldout_*.csv")
REQUIREMENTS = "requirements.txt"
BENTOFILE = "bentofile.yaml"  # JSON is YAML
# Run in the staged folder, by a Python that sees no other `services`: what is missing there shows here.
BUILD = "import sys; from services.package import build_staged; build_staged(sys.argv[1])"
PORT = 3000
READY = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/readyz', timeout=4)"

log = logging.getLogger("package")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the Bento is made of, beside the staged files.

    Attributes:
        engine: `auto`, or the one engine that it will run.
        models: tags of the model store that go with it.
        labels: what `bentoml get` shows of it.
    """

    engine: str
    models: tuple[str, ...]
    labels: dict[str, str]
    description: str


def package(root: Path, engine: str | None = None) -> str:
    """Build a Bento of the champion into BentoML's store; return its tag.

    Args:
        root: the repository.
        engine: what the Bento will run; None: what params.yaml says.

    Raises:
        InputError: there is no model, the lock lacks a package, or BentoML refused.
    """
    settings = load_params(root / "params.yaml").services
    engine = engine or settings.engine.kind
    champion = newest_as_champion(settings.versions.follow_pipeline)
    plan = Plan(
        engine, _models(champion, engine), _labels(root, champion, engine), _describe(champion, engine)
    )
    with tempfile.TemporaryDirectory(prefix="perennial-bento-") as name:
        stage(root, Path(name), champion, engine)
        return _build(Path(name), plan)


def stage(root: Path, folder: Path, champion: str, engine: str) -> None:
    """Copy into `folder` what the service needs beside its model.

    Raises:
        InputError: the lock lacks a package that the service needs.
    """
    shutil.copytree(root / "services", folder / "services", ignore=LEFT_OUT)
    shutil.copytree(root / "stages" / "common", folder / "stages" / "common", ignore=LEFT_OUT)
    shutil.copy2(root / "stages" / "__init__.py", folder / "stages")
    write_json(folder / ALIASES, asdict(Aliases(champion)))
    params = with_engine((root / "params.yaml").read_text(encoding="utf-8"), engine)
    write_text(folder / "params.yaml", params)
    load_params(folder / "params.yaml")
    write_text(folder / REQUIREMENTS, "".join(f"{line}\n" for line in requirements(root, engine)))


def requirements(root: Path, engine: str) -> list[str]:
    """Return what pip shall install beside BentoML: exact versions, as they were tested.

    vLLM's pins exclude those of the lock, and it has an environment of its own: there pyproject.toml's
    ranges hold, and vLLM's pins within them.

    Raises:
        InputError: the lock lacks a package.
    """
    from packaging.requirements import Requirement

    asked = asked_for((root / "pyproject.toml").read_text(encoding="utf-8"), engine)
    if engine == "vllm":
        return [line for line in asked if Requirement(line).name != "bentoml"]
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    return closure(lock, [Requirement(line).name for line in asked])


def with_engine(params: str, engine: str) -> str:
    """Return the text of params.yaml with `services.engine.kind` changed; vLLM also gets a GPU.

    Comments stay: who deploys the Bento reads them.
    """
    head, section, rest = re.split(r"(?m)(^services:\n(?:[ #\n].*\n?)*)", params, maxsplit=1)
    section = re.sub(r"(?m)^(    kind: )\w+", rf"\g<1>{engine}", section, count=1)
    if engine == "vllm":
        section = re.sub(r"(?m)^(    gpus: )0\b", r"\g<1>1", section, count=1)
    return head + section + rest


def asked_for(pyproject: str, engine: str) -> list[str]:
    """Return the lines of pyproject.toml that say what serving with this engine needs."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    extras = ("serve", "postgres", "gpu") if engine == "vllm" else ("serve", "postgres")
    return [
        *project["dependencies"],
        *(line for name in extras for line in project["optional-dependencies"][name]),
    ]


def closure(lock: str, roots: Iterable[str]) -> list[str]:
    """Return the pins of the lock that `roots` need, themselves included, sorted.

    The lock says for each package what it is there for (`# via`): that is the graph, read backwards.
    BentoML adds its own pin.

    Raises:
        InputError: a root is not locked.
    """
    from packaging.utils import canonicalize_name

    pins, needs = read_lock(lock)
    wanted = {str(canonicalize_name(name)) for name in roots}
    if missing := sorted(wanted - pins.keys()):
        raise InputError(f"requirements.lock has no {', '.join(missing)}", "lock them: make lock")
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        wanted |= needs[name] - found
    return [pins[name] for name in sorted(found - {"bentoml"})]


def read_lock(lock: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Return the pins by package, and what each package brings along."""
    pins: dict[str, str] = {}
    needs: dict[str, set[str]] = defaultdict(set)
    name = ""
    for line in lock.splitlines():
        if found := re.match(r"([a-z0-9.-]+)==\S+", line):
            name = found[1]
            pins[name] = line.strip()
        elif name and (reason := re.match(r"\s+#(?: via)?\s+([a-z0-9.-]+)$", line)):
            needs[reason[1]].add(name)
    return pins, needs


def _models(champion: str, engine: str) -> tuple[str, ...]:
    """Return the tags to take along: the model, and its base where an engine may read it."""
    import bentoml

    if engine in ON_CPU and stored(champion).gguf is None:
        raise InputError(
            f"{champion} has no GGUF, which OpenVINO reads", "set export.gguf: true, or take another engine"
        )
    base = bentoml.models.get(champion).info.metadata.get("base")
    return (champion,) if engine in ON_CPU or not base else (champion, str(base))


def _labels(root: Path, champion: str, engine: str) -> dict[str, str]:
    """Return what the Bento says of itself. A label is at most 63 letters, digits and `-_.`."""
    name, _, version = champion.partition(":")
    return {
        "engine": engine,
        "git_revision": revision(root),
        "made-by": "perennial",
        "model": name,
        "version": version,
    }


def revision(root: Path) -> str:
    """Return the commit of the code, with `-changed` where files differ from it; `unknown` without git."""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=40",
        "--exclude=*",
        "--dirty=-changed",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _describe(champion: str, engine: str) -> str:
    about = stored(champion).about
    return (
        f"# {champion}\n\n"
        f"Tuned from `{about['base_model']}`. Engine: {engine}.\n\n"
        "Start it with `bentoml serve`: an OpenAI-compatible API under `/v1`, a page for trying at `/`, "
        "probes at `/livez` and `/readyz`, figures at `/metrics`.\n\n"
        "Events go where `PERENNIAL_EVENTS_URL` says, keys are read from `PERENNIAL_KEYS_FILE`; without them "
        "`params.yaml` beside the code decides.\n"
    )


def _build(folder: Path, plan: Plan) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, json.dumps(asdict(plan))]
    built = subprocess.run(command, cwd=folder, env=clean, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise InputError("BentoML built no Bento; its reasons are above", "mend them, and pack again")
    return built.stdout.split()[-1]


def build_staged(plan_json: str) -> None:
    """Build the Bento out of the working directory, and write its tag to standard output."""
    set_quiet_environment()
    import bentoml

    from services.generation import Generation

    plan = Plan(**json.loads(plan_json))
    service: Any = Generation
    service.image = image(plan.engine, REQUIREMENTS)
    write_json(Path(BENTOFILE), bentofile(plan))
    bento = bentoml.bentos.build_bentofile(BENTOFILE, build_ctx=".")
    sys.stdout.write(f"\n{bento.tag}\n")


def bentofile(plan: Plan) -> dict[str, Any]:
    """Return BentoML's build options."""
    return {
        "service": SERVICE,
        "labels": plan.labels,
        "description": plan.description,
        "models": list(plan.models),
        "python": {"lock_packages": False},  # they are pinned by our lock, to what the tests ran with
        "envs": [{"name": name, "value": value} for name, value in environment(plan.engine).items()],
    }


def image(engine: str, requirements: str) -> Image:
    """Return how `bentoml containerize` makes an image: slim Debian, BentoML's own user, a health check.

    Args:
        requirements: a path below the working directory; BentoML takes no other.

    BentoML's list of distributions is gone round: its Debian installs compilers and git, which only the
    GPU engines need (Triton compiles when it starts).
    """
    from bentoml.images import Image

    slim = Image(
        base_image=f"python:{PYTHON}-slim-bookworm",
        distro="none",
        python_version=PYTHON,
        lock_python_packages=False,
    )
    slim.run(f"pip install --quiet --no-cache-dir uv=={UV}")
    if engine == "vllm":
        packages = "apt-get install -q -y --no-install-recommends gcc libc6-dev"
        slim.run(f"apt-get update && {packages} && rm -rf /var/lib/apt/lists/*")
    # BentoML has no word for a health check: this one ends its RUN and begins an instruction of its own.
    check = "HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 CMD"
    slim.run(f'true\n\n{check} ["/app/.venv/bin/python", "-c", "{READY}"]')
    return slim.requirements_file(requirements)


def environment(engine: str) -> dict[str, str]:
    """Return the variables of the image; they do not matter where no image is made of the Bento."""
    # A container's loopback is its own. The port is what the image exposes, and its health check asks.
    values = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOST": "0.0.0.0", "BENTOML_PORT": str(PORT)}
    if engine in ON_CPU:
        values["UV_TORCH_BACKEND"] = "cpu"  # the other builds bring several GB of CUDA
    if engine == "vllm":
        values["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack the champion; return the exit code."""
    set_quiet_environment()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="perennial package", description="Pack the champion into a Bento.")
    parser.add_argument("--engine", choices=ENGINES, help="what it will run; services.engine.kind without")
    parser.add_argument(
        "--output", type=Path, help="also write it to this file, to be carried to another machine"
    )
    options = parser.parse_args(arguments)
    try:
        tag = package(Path(), options.engine)
        lines = [f"{tag} is in the store: bentoml serve {tag}"]
        if options.output is not None:
            lines.append(f"and in {export(tag, options.output)}: bentoml import it, where it shall run")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def export(tag: str, path: Path) -> str:
    """Write a Bento with its models to a file; return where it is."""
    import bentoml

    path.parent.mkdir(parents=True, exist_ok=True)
    return str(bentoml.export_bento(tag, str(path)))


if __name__ == "__main__":
    sys.exit(main())
