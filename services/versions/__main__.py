"""Which files an alias stands for.

Every version that is served lies in BentoML's model store, under a tag `name:version`;
`.perennial/aliases.json` says which tag is the champion, which the challenger, and which were champions
before. One function, `resolve`, turns an alias or a tag into files. A running service reads the file again
when it changes.

    python -m services.versions list
    python -m services.versions add                     # the newest model of the pipeline, into the store
    python -m services.versions champion TAG
    python -m services.versions challenger TAG --share 0.1 --mode canary
    python -m services.versions challenger --none
    python -m services.versions rollback

Once a release was made (`python -m flows.release`) the file is managed: only releases, which read the
gate's verdict, move its aliases, and the commands above that would move them say so.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.common.artifacts import STATE, artifacts, missing, read_json, reports, write_json
from stages.common.errors import InputError
from stages.common.locks import file_lock
from stages.common.logs import set_quiet_environment
from stages.common.params.loading import load_params

log = logging.getLogger("services.versions")

ALIASES = STATE / "aliases.json"
HISTORY = 20  # former champions that a rollback can reach
Mode = Literal["canary", "shadow"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one version.

    Attributes:
        name: what clients ask for.
        version: content hash, 12 hex digits.
        tokenizer: folder with the tokenizer and its chat template.
        gguf: the tuned model in one file, for engines on the CPU; None if the pipeline wrote none.
        base, adapter: folders of safetensors, for the other engines; None where they were left out.
        about: what the pipeline's stage `export` says of the model (`serving.json`).
    """

    name: str
    version: str
    tokenizer: Path
    gguf: Path | None
    base: Path | None
    adapter: Path | None
    about: dict[str, Any]

    @property
    def tag(self) -> str:
        """Name and version, as the model store writes them."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True, slots=True)
class Challenger:
    """A version on trial: `share` of the users get its answers (canary) or are copied to it (shadow)."""

    tag: str
    share: float
    mode: Mode


@dataclass(frozen=True, slots=True)
class Aliases:
    """Who is served.

    Attributes:
        history: the former champions, the latest last.
        managed: only releases move the aliases (`take_over`).
    """

    champion: str | None = None
    challenger: Challenger | None = None
    history: tuple[str, ...] = ()
    managed: bool = False


def read_aliases(path: Path = ALIASES) -> Aliases:
    """Read the alias file; without one, nobody is served yet."""
    if not path.exists():
        return Aliases()
    values = read_json(path)
    try:
        challenger = values["challenger"]
        return Aliases(
            values["champion"],
            Challenger(**challenger) if challenger else None,
            tuple(values["history"]),
            values.get("managed", False) is True,
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path} is no alias file ({error})", "remove it, and name the champion again"
        ) from None


def resolve(alias: str, path: Path = ALIASES) -> ModelFiles:
    """Return the files that `champion`, `challenger` or a tag `name:version` stands for.

    Raises:
        InputError: nothing bears that alias, or the store has no such model.
    """
    aliases = read_aliases(path)
    tag = {
        "champion": aliases.champion,
        "challenger": aliases.challenger.tag if aliases.challenger else None,
    }.get(alias, alias)
    if tag is None:
        raise InputError(
            f"no model is {alias}", f"name one: python -m services.versions {alias} TAG (list shows the tags)"
        )
    return stored(tag)


def stored(tag: str) -> ModelFiles:
    """Return the files of a model in the store.

    Raises:
        InputError: the store has no such model, or the model was not put there by us.
    """
    import bentoml

    try:
        model = bentoml.models.get(tag)
    except (bentoml.exceptions.NotFound, bentoml.exceptions.BentoMLException, ValueError):
        raise InputError(
            f"the model store has no {tag}", "see python -m services.versions list; add puts the newest there"
        ) from None
    base_tag = str(model.info.metadata.get("base") or "")
    folder = Path(model.path)
    if not (folder / "export" / "serving.json").exists():
        raise InputError(f"{tag} in the model store is not a model of this pipeline", "choose another")
    base = Path(bentoml.models.get(base_tag).path) if base_tag and _is_stored(base_tag) else None
    return _files(folder / "export", base, folder / "adapter")


def _files(export: Path, base: Path | None, adapter: Path) -> ModelFiles:
    about = read_json(export / "serving.json")
    gguf = export / "model.gguf"
    return ModelFiles(
        about["name"],
        about["version"],
        export,
        gguf if gguf.exists() else None,
        base,
        adapter if adapter.exists() else None,
        about,
    )


def add_pipeline_output(root: Path = Path()) -> str:
    """Put the newest model of the pipeline into the store, if it is not there; return its tag.

    The store holds copies: the pipeline can write anew while its last model is served.

    Raises:
        InputError: the pipeline has made no model yet.
    """
    export, base, adapter = (root / artifacts(stage) for stage in ("export", "fetch_base", "finetune"))
    for needed in (export / "serving.json", base / "config.json", adapter / "adapter_config.json"):
        if not needed.exists():
            raise missing(needed.relative_to(root) if root.parts else needed)
    files = _files(export, base, adapter)
    if _is_stored(files.tag):
        return files.tag
    base_tag = f"{files.name}-base:{_sha256(base)[:12]}"
    if not _is_stored(base_tag):
        _store(base_tag, {".": base}, {})
    _store(files.tag, {"export": export, "adapter": adapter}, {"base": base_tag})
    return files.tag


def _sha256(folder: Path) -> str:
    """Return the hash of a folder's files, which several versions share a base by."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _store(tag: str, folders: dict[str, Path], metadata: dict[str, Any]) -> None:
    import bentoml

    with bentoml.models.create(tag, metadata=metadata, labels={"made-by": "perennial"}) as model:
        for name, source in folders.items():
            shutil.copytree(source, Path(model.path) / name, dirs_exist_ok=True)


def _is_stored(tag: str) -> bool:
    import bentoml

    try:
        bentoml.models.get(tag)
    except bentoml.exceptions.NotFound:
        return False
    return True


def stored_tags(name: str) -> list[str]:
    """Return the tags of a model's versions in the store, the oldest first."""
    import bentoml

    models = [model for model in bentoml.models.list() if model.tag.name == name]
    return [str(model.tag) for model in sorted(models, key=lambda model: model.info.creation_time)]


def check_parity(tag: str, root: Path = Path()) -> None:
    """Refuse a version that was compared with its trainer and does not answer as it did.

    Raises:
        InputError: the verdict of services.parity on this version is that they do not agree.
    """
    verdict = root / reports("parity") / f"{tag.rpartition(':')[2]}.json"
    if not verdict.exists():
        return
    found = read_json(verdict)
    if not found["agrees"]:
        raise InputError(
            f"{tag} does not answer as it was trained to: {'; '.join(found['reasons'])}",
            f"see {verdict}; serve another version, or mend the cause and compare again: make parity",
        )


def set_champion(tag: str, path: Path = ALIASES) -> Aliases:
    """Make a stored version the champion; the former one can be gone back to.

    Raises:
        InputError: the store has no such version, parity speaks against it, or releases manage the file.
    """
    stored(tag)
    check_parity(tag)
    with _changing(path) as aliases:
        _check_unmanaged(aliases, path)
        former = aliases.champion
        if former == tag:
            return aliases
        history = (*aliases.history, former)[-HISTORY:] if former else aliases.history
        challenger = None if aliases.challenger and aliases.challenger.tag == tag else aliases.challenger
        return _write(path, Aliases(tag, challenger, history))


def set_challenger(tag: str | None, share: float, mode: Mode, path: Path = ALIASES) -> Aliases:
    """Put a stored version on trial, or end the trial with None.

    Raises:
        InputError: the version is the champion, or is not in the store, or releases manage the file.
    """
    if not 0.0 <= share <= 1.0:
        raise InputError(f"a share of {share} is not between 0 and 1", "give the share of the users, as 0.1")
    if tag is not None:
        stored(tag)
    with _changing(path) as aliases:
        _check_unmanaged(aliases, path)
        if tag is not None and tag == aliases.champion:
            raise InputError(f"{tag} is the champion", "a challenger is another version")
        challenger = Challenger(tag, share, mode) if tag else None
        return _write(path, Aliases(aliases.champion, challenger, aliases.history))


def roll_back(path: Path = ALIASES) -> Aliases:
    """Make the former champion the champion again.

    Raises:
        InputError: there was none, the store has lost it, or releases manage the file.
    """
    with _changing(path) as aliases:
        _check_unmanaged(aliases, path)
        if not aliases.history:
            raise InputError(
                "no version was champion before", "name one: python -m services.versions champion"
            )
        tag = aliases.history[-1]
        stored(tag)
        return _write(path, Aliases(tag, aliases.challenger, aliases.history[:-1]))


def take_over(aliases: Aliases, path: Path = ALIASES) -> None:
    """Write who is served, as a release decided it; for production only `flows.release` calls this.

    It holds the release's lock, has read the gate's verdict, and knows what stood in the file before.
    """
    with _changing(path):
        _write(path, aliases)


def _check_unmanaged(aliases: Aliases, path: Path) -> None:
    if aliases.managed:
        raise InputError(
            f"{path} is managed by releases: no alias moves without the gate's verdict",
            "python -m flows.release promote|try|rollback TAG --why TEXT (status shows who is served)",
        )


@contextmanager
def _changing(path: Path) -> Iterator[Aliases]:
    """Hold the file's lock, so that two who change it take turns."""
    with file_lock(path.with_suffix(".lock")):
        yield read_aliases(path)


def _write(path: Path, aliases: Aliases) -> Aliases:
    write_json(path, asdict(aliases))
    return aliases


def newest_as_champion(follow_pipeline: bool, path: Path = ALIASES) -> str:
    """Return the champion's tag at start: the pipeline's newest model, or who was named.

    Without a pipeline beside it, as inside a Bento, and once releases manage the file, the named champion
    stays.

    Raises:
        InputError: there is no model at all.
    """
    aliases = read_aliases(path)
    champion, newest = aliases.champion, artifacts("export") / "serving.json"
    if champion is not None and (not follow_pipeline or aliases.managed or not newest.exists()):
        stored(champion)
        if aliases.managed and newest.exists() and read_json(newest)["version"] not in champion:
            log.info("the pipeline's newest model is another one; it is served once it is released")
        return champion
    tag = add_pipeline_output()
    try:
        set_champion(tag, path)
    except InputError as error:
        if champion is None:
            raise
        log.error("the pipeline's newest model does not become champion: %s", error)
        return champion
    return tag


def main(arguments: Sequence[str] | None = None) -> int:
    """Show or change who is served; return the exit code."""
    set_quiet_environment()
    options = _parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perennial versions", description="Which model versions are served."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the stored versions, and who is served")
    commands.add_parser("add", help="put the pipeline's newest model into the store")
    champion = commands.add_parser("champion", help="serve this version")
    champion.add_argument("tag")
    challenger = commands.add_parser("challenger", help="put a version on trial, or end the trial")
    which = challenger.add_mutually_exclusive_group(required=True)
    which.add_argument("tag", nargs="?")
    which.add_argument("--none", action="store_true")
    challenger.add_argument("--share", type=float, help="of the users; services.versions.challenger_share")
    challenger.add_argument("--mode", choices=("canary", "shadow"), help="services.versions.challenger_mode")
    commands.add_parser("rollback", help="serve the former champion again")
    return parser


def _list(_: argparse.Namespace) -> None:
    aliases = read_aliases()
    name = load_params().model_card.name
    for tag in stored_tags(name):
        marks = [
            "champion" if tag == aliases.champion else "",
            _trial(aliases.challenger) if aliases.challenger and aliases.challenger.tag == tag else "",
        ]
        _say(" ".join([tag, *filter(None, marks)]))
    if not stored_tags(name):
        _say(f"no version of {name} is stored; add one: python -m services.versions add")


def _trial(challenger: Challenger) -> str:
    return f"challenger ({challenger.mode}, {challenger.share:.0%})"


def _set_challenger(options: argparse.Namespace) -> None:
    defaults = load_params().services.versions
    share = defaults.challenger_share if options.share is None else options.share
    aliases = set_challenger(
        None if options.none else options.tag, share, options.mode or defaults.challenger_mode
    )
    trial = aliases.challenger
    _say(f"{trial.tag} is {_trial(trial)}" if trial else "there is no challenger")


_COMMANDS = {
    "list": _list,
    "add": lambda _: _say(f"{add_pipeline_output()} is in the store"),
    "champion": lambda options: _say(f"{set_champion(options.tag).champion} is champion"),
    "challenger": _set_challenger,
    "rollback": lambda _: _say(f"{roll_back().champion} is champion again"),
}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
