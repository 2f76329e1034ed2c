"""Adapters on disk, and `artifacts/initial_adapter`: the adapter that training starts from.

An adapter is what training adds to the base model, in one of two formats: peft's (LoRA, virtual tokens), or
weights that replace the base model's own (methods full and partial) or its output layer (method head).
`find_files` names the files of a folder's adapter.

A flow, or a user, puts the initial adapter there. The folder always has a README.md (DVC needs an existing
path as a dependency), and may have an adapter:

    the configuration and the weights                as in `artifacts/finetune`
    origin.json                                      {"version": ..., "base_sha256": ...}
    trained_row_ids.txt                              ids of the rows it was trained on; may be missing

`version` is the version of the model that the adapter belongs to, and `base_sha256` the hash of the weights
of its base model, both as in `artifacts/export/serving.json`. `origin.json` is written last and removed
first, so an adapter without it is incomplete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.common.artifacts import artifacts, atomic_write, read_json, reports, write_json, write_text
from stages.common.errors import InputError

PREFERENCE_METHODS = ("dpo", "orpo", "kto")
OTHER_OBJECTIVES = (*PREFERENCE_METHODS, "distill", "grpo")  # what they train is an adapter of lora
STARTED_METHODS = ("dpo", "kto", "grpo")  # which improve a model that has learned the answers
PLAIN_METHODS = ("lora", "qlora", *OTHER_OBJECTIVES)  # whose adapters are those of lora
LORA_METHODS = ("rslora", "dora", *PLAIN_METHODS)
PROMPT_METHODS = ("prompt_tuning", "prefix_tuning")  # which learn virtual tokens before the text
PEFT_METHODS = (*LORA_METHODS, *PROMPT_METHODS)  # whose adapters peft loads
REPLACED_METHODS = ("full", "partial")  # which train weights of the base model itself
TAUGHT_METHODS = ("distill", *REPLACED_METHODS)  # which learn from a teacher, if there is one
HEAD = "head"  # which trains a new output layer over the labels of the task
VLLM_METHODS = ("lora", "rslora", "qlora", *OTHER_OBJECTIVES)  # whose adapters vLLM loads
SHARDED_METHODS = ("lora", "rslora", "dora", *REPLACED_METHODS)  # whose model several processes can share
MERGED_METHODS = (*LORA_METHODS, *REPLACED_METHODS)  # whose result is weights, as a GGUF has them

ORIGIN = "origin.json"
TRAINED_IDS = "trained_row_ids.txt"
PAGE = "README.md"
FOLDER = artifacts("initial_adapter")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The names of the files of an adapter: its configuration and its weights."""

    config: str
    weights: str


PEFT = AdapterFiles("adapter_config.json", "adapter_model.safetensors")
REPLACED = AdapterFiles("replaced_config.json", "replaced_weights.safetensors")


class AdapterRecipe(Protocol):
    """The settings of `finetune` that an adapter must share with the one that training starts from."""

    @property
    def method(self) -> str:
        """Return the method of training."""
        ...

    @property
    def rank(self) -> int:
        """Return the rank of LoRA's matrices."""
        ...

    @property
    def alpha(self) -> float:
        """Return LoRA's scaling."""
        ...

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        """Return the modules that get an adapter."""
        ...

    @property
    def trained_modules(self) -> int | tuple[str, ...]:
        """Return what the method partial trains."""
        ...

    @property
    def num_virtual_tokens(self) -> int:
        """Return how many virtual tokens are learned."""
        ...


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    """An adapter to start training from, the version of its model, and the hash of its base model."""

    folder: Path
    version: str
    base_sha256: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide the result of the training."""
        names = find_files(self.folder) or PEFT
        return self.folder / names.config, self.folder / names.weights

    def read_trained_ids(self) -> frozenset[str]:
        """Return the ids of the rows that it was trained on; none if they are not recorded."""
        return read_trained_ids(self.folder)


def find_files(adapter: Path) -> AdapterFiles | None:
    """Return the names of the files of the adapter in a folder, one of which may be missing; None without."""
    for names in (PEFT, REPLACED):
        if (adapter / names.config).is_file() or (adapter / names.weights).is_file():
            return names
    return None


def find_weights(adapter: Path) -> Path:
    """Return the path of the weights of the adapter in a folder; peft's where it has none."""
    return adapter / (find_files(adapter) or PEFT).weights


def read_settings(adapter: Path) -> dict[str, Any]:
    """Return the method of an adapter and its settings, in the words of `params.yaml`.

    Raises:
        InputError: the folder has no adapter.
    """
    names = find_files(adapter)
    if names is None:
        raise InputError(f"{adapter} contains no adapter", "run the stage that writes it: dvc repro finetune")
    config = read_json(adapter / names.config)
    if names is REPLACED and config.get("method") == HEAD:
        return {"method": HEAD, "labels": tuple(config.get("labels") or ())}
    if names is REPLACED:
        return {name: _sort(config.get(name)) for name in ("method", "trained_modules")}
    if (method := str(config.get("peft_type")).lower()) in PROMPT_METHODS:
        return {"method": method, "num_virtual_tokens": config.get("num_virtual_tokens")}
    return {
        "method": "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora",
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "target_modules": _sort(config.get("target_modules")),
    }


def name_adapter(method: str) -> str:
    """Return the method by whose name an adapter is known: other objectives, and 4 bits, train the same."""
    return "lora" if method in PLAIN_METHODS else method


def list_settings(recipe: AdapterRecipe, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `read_settings` returns of an adapter of this recipe, as far as it follows from that.

    Args:
        labels: of the task, for the method head.
    """
    if recipe.method in LORA_METHODS:
        found = {"method": name_adapter(recipe.method), "rank": recipe.rank, "alpha": recipe.alpha}
        targets = recipe.target_modules
        return found if isinstance(targets, str) else {**found, "target_modules": _sort(targets)}
    if recipe.method in PROMPT_METHODS:
        return {"method": recipe.method, "num_virtual_tokens": recipe.num_virtual_tokens}
    if recipe.method == HEAD:
        return {"method": HEAD, "labels": tuple(labels)}
    modules = _sort(recipe.trained_modules) if recipe.method == "partial" else None
    return {"method": recipe.method, "trained_modules": modules}


def count_virtual_tokens(adapter: Path) -> int:
    """Return how many virtual tokens an adapter puts before every text; they take positions of the model."""
    return int(read_settings(adapter).get("num_virtual_tokens") or 0)


def _sort(modules: Any) -> Any:
    return tuple(sorted(modules)) if isinstance(modules, list | tuple | set) else modules


def read_initial_adapter(folder: Path = FOLDER) -> InitialAdapter | None:
    """Return the adapter in `folder`, or None if there is none.

    Raises:
        InputError: a file is missing, or origin.json has no version or base_sha256.
    """
    files = find_files(folder)
    if files is None and not (folder / ORIGIN).is_file():
        return None
    files = files or PEFT
    absent = [name for name in (files.config, files.weights, ORIGIN) if not (folder / name).is_file()]
    if absent:
        raise InputError(
            f"the adapter in {folder} is incomplete: it lacks {', '.join(absent)}", _how_to_empty(folder)
        )
    origin = read_json(folder / ORIGIN)
    values = [origin.get(key) if isinstance(origin, dict) else None for key in ("version", "base_sha256")]
    version, base_sha256 = values
    if not (isinstance(version, str) and version and isinstance(base_sha256, str) and base_sha256):
        raise InputError(
            f"{folder / ORIGIN} has no version and base_sha256: {origin}",
            f"write both as artifacts/export/serving.json has them, or {_how_to_empty(folder)}",
        )
    return InitialAdapter(folder, version, base_sha256)


def put_initial_adapter(
    adapter: Path, version: str, base_sha256: str, folder: Path = FOLDER
) -> InitialAdapter:
    """Copy the adapter in the folder `adapter` to `folder`, replacing the one there.

    Raises:
        InputError: `adapter` is not an adapter's folder; then nothing is changed.
    """
    files = find_files(adapter) or PEFT
    for name in (files.config, files.weights):
        if not (adapter / name).is_file():
            raise InputError(
                f"{adapter} contains no adapter: {name} does not exist",
                "use the folder of an adapter, such as artifacts/finetune",
            )
    other = REPLACED if files is PEFT else PEFT
    for name in (ORIGIN, TRAINED_IDS, other.weights, other.config):
        (folder / name).unlink(missing_ok=True)
    for name in list_adapter_files(adapter):
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(adapter / name, temporary)
    write_json(folder / ORIGIN, {"version": version, "base_sha256": base_sha256})
    return InitialAdapter(folder, version, base_sha256)


def clear_initial_adapter(folder: Path = FOLDER) -> None:
    """Remove the adapter from `folder`, but not its README.md: training starts with a new adapter."""
    names = [name for files in (PEFT, REPLACED) for name in (files.weights, files.config)]
    for name in (ORIGIN, TRAINED_IDS, *names):
        (folder / name).unlink(missing_ok=True)


def list_adapter_files(adapter: Path) -> list[str]:
    """Return the names of the files of an adapter that are kept with it; the weights are last."""
    files = find_files(adapter) or PEFT
    return [name for name in (files.config, TRAINED_IDS, files.weights) if (adapter / name).is_file()]


def read_trained_ids(adapter: Path) -> frozenset[str]:
    """Return the ids of the rows that an adapter was trained on; none if they are not recorded."""
    path = adapter / TRAINED_IDS
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else frozenset()


def write_trained_ids(ids: Iterable[str], adapter: Path) -> None:
    """Write the ids of the rows that an adapter was trained on, one a line."""
    write_text(adapter / TRAINED_IDS, "".join(f"{one}\n" for one in sorted(ids)))


def check_base(initial: InitialAdapter, base_sha256: str) -> None:
    """Check that an adapter was trained on this base model.

    Raises:
        InputError: with both hashes.
    """
    if initial.base_sha256 != base_sha256:
        raise InputError(
            f"the adapter in {initial.folder} ({initial.version}) was trained on a base model with the "
            f"sha256\n  {initial.base_sha256}, and artifacts/fetch_base has\n  {base_sha256}",
            f"{_how_to_empty(initial.folder)}, or fetch the base model that it belongs to",
        )


def check_weights_file(adapter: Path, fix: str) -> None:
    """Check that the file of an adapter's weights is whole, by its header; the weights are not read.

    Args:
        fix: what can be done about a damaged one.

    Raises:
        InputError: it is cut, or is no file of weights.
    """
    from safetensors import SafetensorError, safe_open

    path = find_weights(adapter)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix) from None


def check_alike(initial: InitialAdapter) -> None:
    """Check that all modules of an adapter have one rank and one scaling, as those that are trained here.

    peft has both by module for adapters made elsewhere. Their tensors can have the same shapes: the training
    would go on from another model than the adapter's. Of experts it writes both itself: two matrices in one
    tensor have twice the rank and twice the alpha, so the scaling of all.

    Raises:
        InputError: some modules have their own.
    """
    if find_files(initial.folder) is not PEFT:
        return
    config = read_json(initial.folder / PEFT.config)
    experts = config.get("target_parameters") or ()
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}

    def is_of_experts(pattern: str) -> bool:
        rank, alpha = ranks.get(pattern, 0), alphas.get(pattern, 0)
        return pattern.rpartition(".")[2] in experts and rank * config["lora_alpha"] == alpha * config["r"]

    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    if odd := [name for name, found in patterns.items() if not all(map(is_of_experts, found))]:
        raise InputError(
            f"some modules of the adapter in {initial.folder} ({initial.version}) have a rank or a scaling "
            f"of their own: {', '.join(f'{name}: {config[name]}' for name in odd)}",
            f"start from one without, or {_how_to_empty(initial.folder)}",
        )


def check_settings(initial: InitialAdapter, wanted: Mapping[str, Any]) -> None:
    """Check that an adapter has these settings, so that training can start from it.

    Args:
        wanted: from `list_settings`.

    Raises:
        InputError: with each setting that differs, here and there.
    """
    found = read_settings(initial.folder)
    different = [name for name in wanted if wanted[name] != found.get(name)]
    if "method" in different:
        different = ["method"]  # other methods have other settings
    if different:
        lines = "\n".join(f"  {name}: {wanted[name]} here, {found[name]} there" for name in different)
        keys = ", ".join("task.labels" if name == "labels" else f"finetune.{name}" for name in different)
        raise InputError(
            f"the adapter in {initial.folder} ({initial.version}) differs from the recipe:\n{lines}",
            f"set {keys} to what the adapter has, or {_how_to_empty(initial.folder)}",
        )


def find_start(
    folder: str | None, recipe: AdapterRecipe, labels: Sequence[str] = ()
) -> InitialAdapter | None:
    """Return the adapter to start from, checked against the base model and the recipe; None for a new one.

    Args:
        folder: `finetune.warm_start_from`.
        labels: of the task, for the method head.

    Raises:
        InputError: it is incomplete or damaged, or does not fit the base model or the recipe.
    """
    initial = read_initial_adapter(Path(folder)) if folder else None
    if initial:
        check_base(initial, str(read_json(reports("fetch_base") / "metrics.json").get("sha256")))
        check_weights_file(initial.folder, f"write it again, or {_how_to_empty(initial.folder)}")
        check_alike(initial)
        check_settings(initial, list_settings(recipe, labels))
    return initial


def describe_unsharded() -> str:
    """Return which methods can train a model that several processes share."""
    return f"a model is shared by several processes for the methods {', '.join(SHARDED_METHODS)}"


def describe_missing_start(method: str) -> str:
    """Return a warning where a method that improves a trained model starts from the base model."""
    return (
        f"finetune.method: {method} starts from the base model, which has not learned the answers: it may "
        "only make bad ones less likely, or never be right. Train with method: lora first, and start from "
        f"its adapter (copy it to {FOLDER}), unless the base model is tuned already; orpo learns both at once"
    )


def _how_to_empty(folder: Path) -> str:
    return f"empty {folder} (all but {PAGE}) to train a new adapter"
