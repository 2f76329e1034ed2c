"""Loaded model versions: routing requests to them, and swapping them under load."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from services import errors
from services.engines.protocol import Engine, EngineError, Sampling
from services.engines.token_bytes import TokenBytes
from services.load_failures import MAX_ATTEMPTS, LoadFailures
from services.metrics import get_metrics
from services.versions.aliases import ALIASES, Aliases, read_aliases
from services.versions.store import ModelFiles
from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.messages import Message, Tool
from stages.common.task.kinds import make_task
from stages.common.task.protocol import Task
from stages.common.tools.arguments import ARGUMENT_CHANGES

Role = Literal["champion", "challenger", "shadow"]
UNREAD = (0, 0)  # in place of the alias file's stamp before the first sync; None: there is no file
POLL_S = 0.25  # how often the alias file is checked
WARM_UP = Sampling(max_tokens=8)
RESTARTING = "the engine failed and is restarting"

logger = logging.getLogger("services.model_pool")


@dataclass(slots=True)
class LoadedModel:
    """A version in memory: its files, tokenizer and engine, and the number of requests that use it."""

    files: ModelFiles
    tokenizer: Any
    engine: Engine
    users: int = 0
    failed: bool = False  # its engine has failed, and that is recorded
    token_bytes: TokenBytes = field(init=False)

    def __post_init__(self) -> None:
        self.token_bytes = TokenBytes(self.tokenizer)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the version in memory for the block."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The tokens that structure a prompt; in the text of a message they are text."""
        return tuple(self.tokenizer.all_special_tokens)

    @property
    def task(self) -> Task:
        """What the answers of this version are."""
        return make_task(self.files.about["task"])

    @property
    def answer_schema(self) -> str | None:
        """JSON schema of the training answers, as text; None where the task has none."""
        schema = self.files.about["answer_schema"]
        # Unsorted: answers are generated in the order of the keys.
        return None if schema is None else json.dumps(schema)

    @property
    def normalize(self) -> tuple[str, ...]:
        """What `curate` changed in the spelling of the training rows (`curate.normalize`)."""
        return tuple(self.files.about.get("normalize", ARGUMENT_CHANGES))  # older versions do not tell

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a raw prompt of token ids, control tokens included.

        The token that the tokenizer puts in front of any text is not counted. Of a prompt longer than the
        context, which is never answered, the rest is only counted.
        """
        rest = len(ids) - self.engine.context_tokens
        shown = list(ids[: self.engine.context_tokens])
        if shown[:1] == self.tokenizer("")["input_ids"][:1]:
            del shown[0]
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return f"{text} … and {rest} more token ids" if rest > 0 else str(text)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the token ids of a conversation; one without a system prompt gets the one of training."""
        prompt = self.files.about["system_prompt"]
        if prompt and messages[0].role != "system":
            messages = [Message("system", prompt), *messages]
        return encode_prompt(self.tokenizer, messages, tools)


@dataclass(frozen=True, slots=True)
class Route:
    """The model that answers a request, its role, and the model that answers unseen, if any."""

    model: LoadedModel
    role: Role
    shadow: LoadedModel | None = None


Loader = Callable[[str], LoadedModel]


@dataclass(slots=True)
class ModelPool:
    """The versions in memory, kept in sync with the alias file.

    Args:
        load: loads the version of a tag; blocks, so it runs in a thread.
        keep_loaded: versions that stay in memory, so that a rollback needs no loading.
        path: the alias file.
        initial: tag of the version to serve while the file names no champion.
    """

    load: Loader
    keep_loaded: int = 2
    path: Path = ALIASES
    initial: str | None = None
    aliases: Aliases = field(default_factory=Aliases)
    problem: str | None = "the model is loading"
    stopping: bool = False  # nothing is loaded any more
    _wanted: Aliases = field(default_factory=Aliases)  # of the alias file; `aliases` are what is served
    _failures: LoadFailures = field(default_factory=LoadFailures)
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)  # by tag, least recently wanted first
    _stamp: tuple[int, int] | None = UNREAD
    _retired: list[LoadedModel] = field(default_factory=list)
    _published: set[tuple[str, str]] = field(default_factory=set)  # versions and roles known to Prometheus

    async def follow(self) -> None:
        """Keep the pool in sync with the alias file, until cancelled."""
        while True:
            await self.sync()
            await asyncio.sleep(POLL_S)

    async def sync(self) -> None:
        """Load what the alias file names; a version that cannot be loaded leaves the others as they are."""
        self._close_retired()
        self._publish_load()
        if self.stopping:
            return
        started = time.monotonic()
        changed = self._read_wanted()
        self._record_broken()
        missing = [tag for tag in self._list_wanted() if self._needs_loading(tag)]
        due = [tag for tag in missing if self._failures.may_try(tag)]
        for tag in due:
            await self._try_to_load(tag)
        if changed or due:
            self._serve_wanted(started)

    def _read_wanted(self) -> bool:
        """Read the alias file if it has changed; return whether there is something new to follow."""
        stamp = _get_stamp(self.path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            wanted = read_aliases(self.path)
            if wanted.champion is None:
                wanted = replace(wanted, champion=self.initial)
            if wanted.champion is None:
                raise InputError(
                    "no version is champion", "perennial release promote TAG --first --reason TEXT"
                )
        except (InputError, OSError) as error:
            logger.error("the changed %s is ignored: %s", self.path, error)
            if self.aliases.champion is None:
                self.problem = _first_line(error)
            return False
        self._wanted = wanted
        self._failures.forget()
        return True

    def _list_wanted(self) -> list[str]:
        """Return the tags that the alias file names, the champion's first: it waits for no challenger."""
        challenger = self._wanted.challenger
        tags = [self._wanted.champion, challenger.tag if challenger else None]
        return [tag for tag in tags if tag is not None]

    def _needs_loading(self, tag: str) -> bool:
        return tag not in self._loaded or self._is_broken(tag)

    def _record_broken(self) -> None:
        """Record each engine that has failed since the last sync."""
        for tag in self._list_wanted():
            model = self._loaded.get(tag)
            if model is None or model.failed or (reason := model.engine.broken) is None:
                continue
            model.failed = True
            self._failures.record(tag, reason, self._max_attempts(tag))
            logger.error("%s", self._failures.describe(tag))

    def _max_attempts(self, tag: str) -> float:
        """Return how often a version is tried: a challenger not for ever, as each load costs the champion."""
        return math.inf if tag == self._wanted.champion else MAX_ATTEMPTS

    async def _try_to_load(self, tag: str) -> None:
        """Load a version, in place of one whose engine has failed; record it if that is not possible."""
        former = self._loaded.get(tag)
        working = [model for model in self._loaded.values() if model.engine.broken is None]
        try:
            model = await self._load(tag)
        except Exception as error:  # of any engine and any library: only this version has failed
            # Engines may share a process. A load that ends it is not tried again.
            harmed = any(other.engine.broken is not None for other in working)
            self._failures.record(tag, _first_line(error), 0 if harmed else self._max_attempts(tag))
            expected = isinstance(error, (InputError, EngineError, OSError))
            logger.error("%s", self._failures.describe(tag), exc_info=None if expected else error)
            return
        if former is not None:
            self._retired.append(former)
        self._failures.note_loaded(tag)
        self._loaded[tag] = model

    def _serve_wanted(self, started: float) -> None:
        """Serve what the alias file names and is loaded; without its champion all stays as it is."""
        wanted, champion = self._wanted, self._wanted.champion
        if champion is None or champion not in self._loaded:
            if self.aliases.champion is None and champion is not None:
                self.problem = self._failures.describe(champion)
            return
        if wanted.challenger is not None and wanted.challenger.tag not in self._loaded:
            wanted = replace(wanted, challenger=None)
        before, after = ((one.champion, one.challenger) for one in (self.aliases, wanted))
        if self.aliases.champion is not None and before != after:
            get_metrics().switch_s.observe(time.monotonic() - started)
        self.aliases, self.problem = wanted, None
        served = [wanted.challenger.tag] if wanted.challenger else []
        for tag in (*served, champion):
            self._loaded[tag] = self._loaded.pop(tag)  # moves it to the end
        surplus = len(self._loaded) - max(self.keep_loaded, len(served) + 1)
        for tag in list(self._loaded)[: max(0, surplus)]:
            self._retired.append(self._loaded.pop(tag))
        self._publish_roles()

    async def _load(self, tag: str) -> LoadedModel:
        logger.info("loading %s …", tag)
        model = await asyncio.to_thread(self.load, tag)
        try:
            await warm_up(model)
        except BaseException:
            model.engine.close()
            raise
        logger.info("%s is ready", tag)
        return model

    def _is_broken(self, tag: str | None) -> bool:
        model = self._loaded.get(tag or "")
        return model is not None and model.engine.broken is not None

    def _close_retired(self) -> None:
        """Close retired versions that no request uses any more."""
        in_use = [model for model in self._retired if model.users]
        for model in self._retired:
            if not model.users:
                model.engine.close()
        self._retired = in_use

    def _publish_load(self) -> None:
        """Update the queue gauges; by the clock, since an idle queue sees no request."""
        loads = [model.engine.load() for model in self._loaded.values()]
        get_metrics().waiting.set(sum(load.waiting for load in loads))
        get_metrics().running.set(sum(load.running for load in loads))

    def _publish_roles(self) -> None:
        roles = {(self.champion.files.version, "champion")}
        if challenger := self.aliases.challenger:
            roles.add((self._loaded[challenger.tag].files.version, challenger.mode))
        for role in self._published | roles:
            get_metrics().served.labels(*role).set(int(role in roles))
        self._published |= roles

    @property
    def champion(self) -> LoadedModel:
        """The version that answers by default.

        Raises:
            ApiError: it is not loaded yet.
        """
        model = self._loaded.get(self.aliases.champion or "")
        if model is None:
            raise errors.not_ready(self.problem or "the model is loading")
        return model

    def get_models(self) -> dict[str, LoadedModel]:
        """Return the versions that clients can request, by alias."""
        models = {"champion": self.champion}
        if self.aliases.challenger:
            models["challenger"] = self._loaded[self.aliases.challenger.tag]
        return models

    def find_problem(self) -> str | None:
        """Return why no request can be answered, or None."""
        if self.problem is None and self._is_broken(self.aliases.champion):
            return self._failures.describe(self.aliases.champion or "") or RESTARTING
        return self.problem

    def is_dead(self) -> bool:
        """Return whether the champion's engine has failed and starting it again has failed repeatedly.

        Another process may help then, where the driver or a library of this one is at fault.
        """
        champion = self.aliases.champion or ""
        return self._is_broken(champion) and self._failures.count(champion) > MAX_ATTEMPTS

    def route(self, name: str | None, assignment_key: str) -> Route:
        """Return the model that answers a request.

        Args:
            name: None or the model's name to let the canary decide; `champion`, `challenger` or
                `name:version` for one version.
            assignment_key: of the user; equal keys get the same version for the whole canary.

        Raises:
            ApiError: that model is not served, or none is ready.
        """
        models = self.get_models()
        champion = models["champion"]
        if name not in (None, champion.files.name):
            for alias, model in models.items():
                if name in (alias, model.files.tag):
                    return Route(model, "champion" if model is champion else "challenger")
            self._check_challenger(str(name))
            known = [champion.files.name, *(model.files.tag for model in models.values())]
            raise errors.model_not_found(str(name), known)
        challenger = self.aliases.challenger
        if challenger is None or not is_in_treatment(assignment_key, challenger.tag, challenger.share):
            return Route(champion, "champion")
        if models["challenger"].engine.broken is not None:
            return Route(champion, "champion")
        if challenger.mode == "canary":
            return Route(models["challenger"], "challenger")
        return Route(champion, "champion", shadow=models["challenger"])

    def _check_challenger(self, name: str) -> None:
        """Raise ApiError if `name` is the challenger's and it could not be loaded."""
        wanted = self._wanted.challenger
        if wanted is not None and name in ("challenger", wanted.tag):
            raise errors.not_ready(self._failures.describe(wanted.tag) or "the model is loading")

    def close(self) -> None:
        """Stop every engine."""
        for model in [*self._loaded.values(), *self._retired]:
            model.engine.close()
        self._loaded.clear()
        self._retired.clear()
        self.problem = "the server is stopping"


def is_in_treatment(assignment_key: str, tag: str, share: float) -> bool:
    """Return whether the challenger `tag` answers this key: a hash assigns `share` of all keys to it."""
    digest = hashlib.blake2b(f"{tag}\0{assignment_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


async def warm_up(model: LoadedModel) -> None:
    """Generate one short answer.

    Raises:
        EngineError: the engine returns none.
    """
    prompt = model.encode_chat([Message("user", "Hello")])
    async with aclosing(model.engine.generate(prompt, WARM_UP)) as steps:  # type: ignore[type-var]
        async for step in steps:
            if step.finish_reason:
                return
    raise EngineError(f"{model.files.tag} returned no answer")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _get_stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino
