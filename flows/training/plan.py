"""Plan a run: the stages of DVC's graph in order, each with what changed since its last run.

`dvc.yaml` is the only graph; this module reads it and never writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.common.errors import InputError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

MAX_NAME_LENGTH = 100
MAX_CHANGES_NAMED = 3

Kind = Literal["never run", "params", "code", "data", "command", "output"]


@dataclass(frozen=True)
class Change:
    """A reason for a stage to run again."""

    kind: Kind
    what: str  # the parameter with its old and new value, the path, or the stage


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it waits for, and what changed since it last ran (nothing: empty).

    Attributes:
        all_cores: it computes on all cores (`meta` in dvc.yaml); two such stages together take far longer
            than one after the other.
    """

    name: str
    upstream: tuple[str, ...]
    changes: tuple[Change, ...]
    all_cores: bool = False


@dataclass(frozen=True)
class Plan:
    """The stages in the order that `dvc repro` takes them."""

    stages: tuple[StagePlan, ...]

    def stale(self) -> frozenset[str]:
        """Return the stages that may have to run: changed ones, and all that follow from them."""
        stale: set[str] = set()
        for stage in self.stages:
            if stage.changes or stale.intersection(stage.upstream):
                stale.add(stage.name)
        return frozenset(stale)

    def run_name(self, *, forced: bool = False) -> str:
        """Return a short name for the run: what changed since the last one."""
        if forced:
            return "forced"
        stale = self.stale()
        # A change downstream of another change is mostly its consequence.
        first = [stage for stage in self.stages if stage.changes and not stale.intersection(stage.upstream)]
        if not stale:
            return "nothing changed"
        if all(_never_run(stage) for stage in self.stages):
            return "first run"
        own = [change for stage in first for change in stage.changes]
        own += [
            change
            for stage in self.stages
            if stage not in first and not _never_run(stage)
            for change in stage.changes
            if change.kind in ("params", "code", "command")
        ]
        return _shortened(list(dict.fromkeys(own)))


def _never_run(stage: StagePlan) -> bool:
    return any(change.kind == "never run" for change in stage.changes)


def _shortened(changes: Sequence[Change]) -> str:
    # What a person changed explains the missing outputs of the same run.
    shown = [change for change in changes if change.kind != "output"] or list(changes)
    words = {"never run": "unfinished", "data": "new data", "output": "rebuild"}
    parts = [f"{words.get(change.kind, change.kind)} {change.what}" for change in shown[:MAX_CHANGES_NAMED]]
    if len(shown) > MAX_CHANGES_NAMED:
        parts.append(f"{len(shown) - MAX_CHANGES_NAMED} more")
    name = ", ".join(parts)
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"


def make_plan(root: Path, until: str | None = None) -> Plan:
    """Read the graph of the checkout at `root` and ask DVC what changed.

    Args:
        root: the folder with `dvc.yaml`, and the current one: DVC names things from there.
        until: plan this stage and what it needs; None for all stages.

    Raises:
        InputError: there is no graph, DVC cannot read it, or it has no stage `until`.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo
    from dvc.repo.reproduce import get_active_graph, plan_repro
    from dvc.scm import SCMError

    try:
        with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
            graph = get_active_graph(repo.index.graph)
            targets = _targets(repo, until)
            ordered = [stage for stage in plan_repro(graph, targets) if stage.addressing]
            made_by = {str(out): stage for stage in graph for out in stage.outs}
            return Plan(
                tuple(
                    StagePlan(
                        stage.addressing,
                        tuple(sorted(needed.addressing for needed in graph.successors(stage))),
                        tuple(_changes(stage, made_by)),
                        bool((stage.meta or {}).get("all_cores")),
                    )
                    for stage in ordered
                )
            )
    except SCMError:
        raise InputError(
            f"{root} is not a git repository, and DVC needs one",
            "clone it with git, or run: git init",
        ) from None
    except DvcException as error:
        raise InputError(
            f"DVC cannot read the pipeline in {root}: {error}", "fix dvc.yaml; `dvc dag` checks it"
        ) from None


def _targets(repo: Repo, until: str | None) -> list[Any] | None:
    if until is None:
        return None
    known = {stage.addressing: stage for stage in repo.index.stages}
    if until not in known:
        raise InputError(f"dvc.yaml has no stage {until!r}", f"use one of: {', '.join(sorted(known))}")
    return [known[until]]


def _changes(stage: PipelineStage, made_by: dict[str, Any]) -> Iterator[Change]:
    status = stage.status().get(stage.addressing, [])
    if status and stage.outs and not any(out.hash_info for out in stage.outs):
        yield Change("never run", stage.addressing)
        return
    for entry in status:
        if isinstance(entry, str):  # "changed command", "always changed"
            yield Change("command", stage.addressing)
            continue
        for path, how in entry.get("changed deps", {}).items():
            yield from _dependency_changes(stage, path, how, made_by)
        for path in entry.get("changed outs", {}):
            # A stage without a command is a file that the user gave to `dvc add`.
            yield Change("output" if stage.cmd else "data", path)


def _dependency_changes(
    stage: PipelineStage, path: str, how: Any, made_by: dict[str, Any]
) -> Iterator[Change]:
    if isinstance(how, dict):
        yield from _parameter_changes(stage, path, how)
    elif path in made_by:
        yield Change("output", path)
    elif path.endswith(".py") or Path(path).parts[0] == "stages":
        # The name of the stage for its own module or folder, the path for what stages share.
        own = stage.addressing in Path(path).with_suffix("").parts
        yield Change("code", stage.addressing if own else path)
    else:
        yield Change("data", stage.addressing)


def _parameter_changes(stage: PipelineStage, path: str, keys: dict[str, str]) -> Iterator[Change]:
    for dependency in stage.deps:
        if str(dependency) != path or not keys:
            continue
        old, new = dependency.hash_info.value or {}, dependency.read_params()
        for key in keys:
            for name, before, after in _differences(key, old.get(key), new.get(key)):
                yield Change("params", f"{name} {_short(before)}→{_short(after)}")


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
        yield key, f"{len(old)} entries", f"{len(new)} entries"
    elif isinstance(old, list) and isinstance(new, list):
        for position, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{key}.{position}", before, after)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = "none" if value is None else " ".join(str(value).split())
    return text if len(text) <= 24 else text[:23] + "…"


def lock_order(root: Path) -> tuple[str, ...]:
    """Return the stages in `dvc.lock`, in the order of the file; none if there is no file."""
    from dvc.utils.serialize import load_yaml

    path = root / "dvc.lock"
    return tuple(load_yaml(str(path)).get("stages", {})) if path.exists() else ()


def sort_lock(root: Path, before: Sequence[str], plan: Plan) -> None:
    """Sort the stages that a run added to `dvc.lock` in the order of the plan.

    Stages that run side by side are added as they end; this gives the very bytes that `dvc repro`
    writes, which takes them one after the other.
    """
    from dvc.utils.serialize import modify_yaml

    now = lock_order(root)
    added = [stage.name for stage in plan.stages if stage.name in now and stage.name not in before]
    wanted = [*(name for name in now if name not in added), *added]
    if list(now) == wanted:
        return
    with modify_yaml(str(root / "dvc.lock")) as data:
        for name in wanted:
            data["stages"][name] = data["stages"].pop(name)
