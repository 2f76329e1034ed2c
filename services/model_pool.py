"""Loaded model versions: routing requests to them, and swapping them under load."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from services import errors
from services.engines.protocol import Engine, EngineError, Sampling
from services.engines.token_bytes import TokenBytes
from services.metrics import get_metrics
from services.versions.aliases import ALIASES, Aliases, read_aliases
from services.versions.store import ModelFiles
from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.records import Message
from stages.common.task.kinds import make_task
from stages.common.task.protocol import Task

Role = Literal["champion", "challenger", "shadow"]
UNREAD = (0, 0)  # in place of the alias file's stamp before the first sync; None: there is no file
POLL_S = 0.25  # how often the alias file is checked
WARM_UP = Sampling(max_tokens=8)

logger = logging.getLogger("services.model_pool")


@dataclass(slots=True)
class LoadedModel:
    """A version in memory: its files, tokenizer and engine, and the number of requests that use it."""

    files: ModelFiles
    tokenizer: Any
    engine: Engine
    users: int = 0
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
        """The tokens that structure a prompt, which no user may write."""
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

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a raw prompt of token ids, control tokens included.

        The token that the tokenizer puts in front of any text is left out. Of a prompt longer than the
        context, which is never answered, the rest is only counted.
        """
        rest = len(ids) - self.engine.context_tokens
        shown = list(ids[: self.engine.context_tokens])
        if shown[:1] == self.tokenizer("")["input_ids"][:1]:
            del shown[0]
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return f"{text} … and {rest} more token ids" if rest > 0 else str(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; one without a system prompt gets the one of training."""
        prompt = self.files.about["system_prompt"]
        if prompt and messages[0].role != "system":
            messages = [Message("system", prompt), *messages]
        return encode_prompt(self.tokenizer, messages)


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
        """Load what the alias file names; on failure the previous versions stay."""
        self._close_retired()
        self._publish_load()
        stamp = _get_stamp(self.path)
        if stamp == self._stamp and not self._any_broken():
            return
        started = time.monotonic()
        try:
            aliases = read_aliases(self.path)
            if aliases.champion is None:
                aliases = replace(aliases, champion=self.initial)
            await self._load_aliases(aliases)
        except (InputError, EngineError, OSError) as error:
            if self.aliases.champion is None or self._is_broken(self.aliases.champion):
                self.problem = str(error).splitlines()[0]
            if self._stamp != stamp:
                logger.error("the changed %s is ignored: %s", self.path, error)
        else:
            before, after = ((one.champion, one.challenger) for one in (self.aliases, aliases))
            if self._stamp != UNREAD and before != after:
                get_metrics().switch_s.observe(time.monotonic() - started)
            self.aliases, self.problem = aliases, None
            self._publish_roles()
        self._stamp = stamp

    async def _load_aliases(self, aliases: Aliases) -> None:
        if aliases.champion is None:
            raise InputError("no version is champion", "perennial release promote TAG --first --reason TEXT")
        challengers = [aliases.challenger.tag] if aliases.challenger else []
        for tag in [*challengers, aliases.champion]:
            model = self._loaded.get(tag)
            if model is None:
                model = await self._load(tag)
            elif model.engine.broken is not None:
                logger.error("%s: the engine failed (%s); restarting it", tag, model.engine.broken)
                failed, model = model, await self._load(tag)
                self._retired.append(failed)
            self._loaded.pop(tag, None)  # moves it to the end
            self._loaded[tag] = model
        surplus = len(self._loaded) - max(self.keep_loaded, len(challengers) + 1)
        for tag in list(self._loaded)[: max(0, surplus)]:
            self._retired.append(self._loaded.pop(tag))

    async def _load(self, tag: str) -> LoadedModel:
        logger.info("loading %s …", tag)
        model = await asyncio.to_thread(self.load, tag)
        await warm_up(model)
        logger.info("%s is ready", tag)
        return model

    def _any_broken(self) -> bool:
        """Return whether the champion's or the challenger's engine has failed."""
        challenger = self.aliases.challenger
        return self._is_broken(self.aliases.champion) or (
            challenger is not None and self._is_broken(challenger.tag)
        )

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
            return "the engine failed and is restarting"
        return self.problem

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
            known = [champion.files.name, *(model.files.tag for model in models.values())]
            raise errors.model_not_found(str(name), known)
        challenger = self.aliases.challenger
        if challenger is None or not is_in_treatment(assignment_key, challenger.tag, challenger.share):
            return Route(champion, "champion")
        if challenger.mode == "canary":
            return Route(models["challenger"], "challenger")
        return Route(champion, "champion", shadow=models["challenger"])

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


def _get_stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino
