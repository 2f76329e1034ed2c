"""Package the champion as a Bento: the service, its model and pinned requirements.

    perennial package [--engine auto|paged|openvino|transformers|vllm] [--output perennial.tar]

The Bento runs on machines without this repository: `bentoml serve perennial`.
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

from services.versions.aliases import ALIASES, Aliases, write_aliases
from services.versions.store import find_served, get_version
from stages.common.artifacts import write_json, write_text
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.machine.parent import end_with_parent, make_parent_variable
from stages.common.params.loading import load_params
from stages.common.repository.git import read_git
from stages.common.tag import Tag

if TYPE_CHECKING:
    from bentoml.images import Image

ENGINES = ("auto", "paged", "openvino", "transformers", "vllm")
CPU_ENGINES = ("paged", "openvino")  # need the GGUF only
SERVICE = "services.generation:Generation"
PYTHON = "3.11"
UV = "0.13.8"  # installs the packages in the image; BentoML would use the newest
# Not part of the Bento: deployment files, and the training texts of the guard.
EXCLUDED = shutil.ignore_patterns("__pycache__", "deploy", "train_*.csv", "heldout_*.csv")
REQUIREMENTS = "requirements.txt"
LOCK, GPU_LOCK = "requirements.lock", "requirements-gpu.lock"  # vLLM's pins and those of training conflict
BENTOFILE = "bentofile.yaml"  # JSON is YAML
# Runs in the folder of staged files, where no other `services` is importable, so that missing files show.
BUILD = "import sys; from services.package import build_staged; build_staged(sys.argv[1])"
PORT = 3000
READY = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{PORT}/readyz', timeout=4)"


@dataclass(frozen=True, slots=True)
class BentoSpec:
    """The contents of a Bento, apart from the staged files.

    Attributes:
        engine: the engine it runs, or `auto`.
        models: tags of the models that it includes.
        labels: metadata that `bentoml get` shows.
    """

    engine: str
    models: tuple[str, ...]
    labels: dict[str, str]
    description: str


def build_bento(root: Path, engine: str | None = None) -> str:
    """Build a Bento of the champion in BentoML's store; return its tag.

    Args:
        root: the repository.
        engine: the engine that the Bento runs; None for the one in params.yaml.

    Raises:
        InputError: there is no model, the lock lacks a package, or BentoML failed.
    """
    params = load_params(root / "params.yaml")
    settings = params.services
    engine = engine or settings.engine.kind
    champion = find_served(params.model_card.name, settings.versions.follow_pipeline)
    spec = BentoSpec(
        engine,
        _list_models(champion, engine),
        _make_labels(root, champion, engine),
        _describe(champion, engine),
    )
    with tempfile.TemporaryDirectory(prefix="perennial-bento-") as name:
        stage_files(root, Path(name), champion, engine)
        return _run_build(Path(name), spec)


def stage_files(root: Path, folder: Path, champion: str, engine: str) -> None:
    """Copy the code, parameters and requirements of the service into `folder`.

    Raises:
        InputError: the lock lacks a package that the service needs.
    """
    shutil.copytree(root / "services", folder / "services", ignore=EXCLUDED)
    shutil.copytree(root / "stages" / "common", folder / "stages" / "common", ignore=EXCLUDED)
    shutil.copy2(root / "stages" / "__init__.py", folder / "stages")
    write_aliases(folder / ALIASES, Aliases(champion))
    params = set_engine((root / "params.yaml").read_text(encoding="utf-8"), engine)
    write_text(folder / "params.yaml", params)
    load_params(folder / "params.yaml")
    write_text(folder / REQUIREMENTS, "".join(f"{line}\n" for line in resolve_requirements(root, engine)))


def resolve_requirements(root: Path, engine: str) -> list[str]:
    """Return the requirements that are installed next to BentoML, pinned to the locked versions.

    Raises:
        InputError: the lock lacks a package.
    """
    from packaging.requirements import Requirement

    wanted = read_requirements((root / "pyproject.toml").read_text(encoding="utf-8"), engine)
    name = GPU_LOCK if engine == "vllm" else LOCK
    lock = (root / name).read_text(encoding="utf-8")
    return resolve_pins(lock, [Requirement(line).name for line in wanted], name)


def set_engine(params: str, engine: str) -> str:
    """Return the text of params.yaml with `services.engine.kind` set, and a GPU for vLLM; comments stay."""
    head, section, rest = re.split(r"(?m)(^services:\n(?:[ #\n].*\n?)*)", params, maxsplit=1)
    section = re.sub(r"(?m)^(    kind: )\w+", rf"\g<1>{engine}", section, count=1)
    if engine == "vllm":
        section = re.sub(r"(?m)^(    gpus: )0\b", r"\g<1>1", section, count=1)
    return head + section + rest


def read_requirements(pyproject: str, engine: str) -> list[str]:
    """Return the requirements in pyproject.toml for serving with this engine."""
    import tomllib

    project = tomllib.loads(pyproject)["project"]
    extras = ("serve", "postgres", "gpu") if engine == "vllm" else ("serve", "postgres")
    return [
        *project["dependencies"],
        *(line for name in extras for line in project["optional-dependencies"][name]),
    ]


def resolve_pins(lock: str, roots: Iterable[str], source: str = LOCK) -> list[str]:
    """Return the pins of `roots` and all their dependencies, sorted; without BentoML, which pins itself.

    The dependency graph comes from the `# via` comments of the lock.

    Args:
        source: the lock's name, for the error.

    Raises:
        InputError: a root is not locked.
    """
    from packaging.utils import canonicalize_name

    pins, needs = read_lock(lock)
    wanted = {str(canonicalize_name(name)) for name in roots}
    if missing := sorted(wanted - pins.keys()):
        raise InputError(f"{source} has no {', '.join(missing)}", "add them: make lock")
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        found.add(name)
        wanted |= needs[name] - found
    return [pin for name in sorted(found - {"bentoml"}) for pin in pins[name]]


def read_lock(lock: str) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Return the pins of each package (several, where a marker chooses), and its dependencies."""
    pins: dict[str, list[str]] = defaultdict(list)
    needs: dict[str, set[str]] = defaultdict(set)
    name = ""
    for line in lock.splitlines():
        if found := re.match(r"([a-z0-9.-]+)==\S+", line):
            name = found[1]
            pins[name].append(line.strip())
        elif name and (reason := re.match(r"\s+#(?: via)?\s+([a-z0-9.-]+)$", line)):
            needs[reason[1]].add(name)
    return pins, needs


def _list_models(champion: str, engine: str) -> tuple[str, ...]:
    """Return the tags of the models to include: the champion, and its base if the engine may need it."""
    import bentoml

    if engine in CPU_ENGINES and get_version(champion).gguf is None:
        raise InputError(
            f"{champion} has no GGUF, which the engine {engine} needs",
            "set export.gguf: true, or use another engine",
        )
    base = bentoml.models.get(champion).info.metadata.get("base")
    return (champion,) if engine in CPU_ENGINES or not base else (champion, str(base))


def _make_labels(root: Path, champion: str, engine: str) -> dict[str, str]:
    """Return the labels; a value may have at most 63 letters, digits and `-_.`."""
    tag = Tag.parse(champion)
    return {
        "engine": engine,
        "git_revision": read_revision(root),
        "made-by": "perennial",
        "model": tag.name,
        "version": tag.version,
    }


def read_revision(root: Path) -> str:
    """Return the commit of the code, with `-changed` if files differ from it; `unknown` without git."""
    form = ("--always", "--abbrev=40", "--exclude=*", "--dirty=-changed")
    return read_git(root, "describe", *form) or "unknown"


def _describe(champion: str, engine: str) -> str:
    about = get_version(champion).about
    return (
        f"# {champion}\n\n"
        f"Fine-tuned from `{about['base_model']}`. Engine: {engine}.\n\n"
        "Start it with `bentoml serve`: an OpenAI-compatible API under `/v1`, a playground at `/`, "
        "probes at `/livez` and `/readyz`, metrics at `/metrics`.\n\n"
        "`PERENNIAL_EVENTS_URL` sets the event store and `PERENNIAL_KEYS_FILE` the file of API keys; the "
        "defaults are in `params.yaml`, next to the code.\n"
    )


def _run_build(folder: Path, spec: BentoSpec) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", BUILD, json.dumps(asdict(spec))]
    clean |= make_parent_variable()
    built = subprocess.run(command, cwd=folder, env=clean, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        raise InputError(
            "BentoML could not build the Bento; see its output above", "fix the cause, and package again"
        )
    return built.stdout.split()[-1]


def build_staged(spec_json: str) -> None:
    """Build the Bento from the working directory, and print its tag."""
    end_with_parent()
    set_quiet_environment()
    import bentoml

    from services.generation import Generation

    spec = BentoSpec(**json.loads(spec_json))
    service: Any = Generation
    service.image = make_image(spec.engine, REQUIREMENTS)
    write_json(Path(BENTOFILE), make_bentofile(spec))
    bento = bentoml.bentos.build_bentofile(BENTOFILE, build_ctx=".")
    sys.stdout.write(f"\n{bento.tag}\n")


def make_bentofile(spec: BentoSpec) -> dict[str, Any]:
    """Return BentoML's build options."""
    return {
        "service": SERVICE,
        "labels": spec.labels,
        "description": spec.description,
        "models": list(spec.models),
        "python": {"lock_packages": False},  # pinned already, to the tested versions
        "envs": [{"name": name, "value": value} for name, value in make_environment(spec.engine).items()],
    }


def make_image(engine: str, requirements: str) -> Image:
    """Return the image that `bentoml containerize` builds: slim Debian, BentoML's user, a health check.

    Not one of BentoML's distributions: its Debian installs compilers and git, which only vLLM needs (Triton
    compiles at start).

    Args:
        requirements: a path below the working directory; BentoML accepts no other.
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
    # BentoML has no option for a health check: this ends its RUN and starts an instruction of our own.
    check = "HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 CMD"
    slim.run(f'true\n\n{check} ["/app/.venv/bin/python", "-c", "{READY}"]')
    return slim.requirements_file(requirements)


def make_environment(engine: str) -> dict[str, str]:
    """Return the environment variables of the image."""
    # Loopback is not reachable from outside a container; the port is the one that the image exposes.
    values = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOST": "0.0.0.0", "BENTOML_PORT": str(PORT)}
    if engine in CPU_ENGINES:
        values["UV_TORCH_BACKEND"] = "cpu"  # the other builds include several GB of CUDA
    if engine == "vllm":
        values["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Package the champion; return the exit code."""
    set_quiet_environment()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="perennial package", description="Package the champion as a Bento.")
    parser.add_argument("--engine", choices=ENGINES, help="engine to run (default: services.engine.kind)")
    parser.add_argument(
        "--output", type=Path, help="also export it to this file, to copy it to another machine"
    )
    options = parser.parse_args(arguments)
    try:
        tag = build_bento(Path(), options.engine)
        lines = [f"{tag} is in BentoML's store: bentoml serve {tag}"]
        if options.output is not None:
            lines.append(
                f"exported to {export_bento(tag, options.output)}: run bentoml import on the other machine"
            )
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


def export_bento(tag: str, path: Path) -> str:
    """Export a Bento with its models to a file; return its path."""
    import bentoml

    path.parent.mkdir(parents=True, exist_ok=True)
    return str(bentoml.export_bento(tag, str(path)))


if __name__ == "__main__":
    sys.exit(main())
