"""The versions in memory, who of them answers whom, and changing them while requests run."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services import errors
from services.engines.protocol import Engine, EngineError, Sampling
from services.metrics import get_metrics
from services.versions.__main__ import ALIASES, Aliases, ModelFiles, read_aliases
from stages.common.chat import encode_prompt
from stages.common.errors import InputError
from stages.common.records import Message

Role = Literal["champion", "challenger", "shadow"]
POLL_S = 0.25  # how soon a changed alias file is noticed
WARM_UP = Sampling(max_tokens=8)

logger = logging.getLogger("services.model_pool")


@dataclass(slots=True)
class Served:
    """One version in memory: its files, tokenizer and engine, and how many requests use it."""

    files: ModelFiles
    tokenizer: Any
    engine: Engine
    users: int = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the version in memory while a request needs it."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers a request, and who is asked the same without being shown."""

    served: Served
    role: Role
    shadow: Served | None = None


Loader = Callable[[str], Served]


@dataclass(slots=True)
class Fleet:
    """What is in memory.

    Args:
        load: makes the version of a tag ready to answer; blocks, so it runs beside the event loop.
        keep_loaded: versions that stay in memory, so that going back is instant.
        path: the alias file that is followed.
    """

    load: Loader
    keep_loaded: int = 2
    path: Path = ALIASES
    aliases: Aliases = field(default_factory=Aliases)
    problem: str | None = "the model is being loaded"
    _loaded: dict[str, Served] = field(default_factory=dict)  # by tag, the last wanted last
    _seen: tuple[int, int] | None = None
    _retired: list[Served] = field(default_factory=list)
    _shown: set[tuple[str, str]] = field(default_factory=set)  # versions and roles that Prometheus knows

    async def follow(self) -> None:
        """Load what the alias file names, and follow its changes, until cancelled."""
        while True:
            await self.catch_up()
            await asyncio.sleep(POLL_S)

    async def catch_up(self) -> None:
        """Bring what is served in line with the alias file; on trouble the old versions stay."""
        self._close_retired()
        self._show_load()
        stamp = _stamp(self.path)
        if stamp == self._seen and not self._broken():
            return
        started = time.monotonic()
        try:
            aliases = read_aliases(self.path)
            await self._take(aliases)
        except (InputError, EngineError, OSError) as error:
            if self.aliases.champion is None or self._is_broken(self.aliases.champion):
                self.problem = str(error).splitlines()[0]
            if self._seen != stamp:
                logger.error("the change of %s is not followed: %s", self.path, error)
        else:
            if self._seen is not None and self.aliases != aliases:
                get_metrics().switch_s.observe(time.monotonic() - started)
            self.aliases, self.problem = aliases, None
            self._show()
        self._seen = stamp

    async def _take(self, aliases: Aliases) -> None:
        if aliases.champion is None:
            raise InputError("no model is champion", "name one: perennial versions champion TAG")
        wanted = [aliases.challenger.tag] if aliases.challenger else []
        for tag in [*wanted, aliases.champion]:
            served = self._loaded.get(tag)
            if served is None:
                served = await self._ready(tag)
            elif served.engine.broken is not None:
                logger.error("%s: the engine broke (%s); it is started anew", tag, served.engine.broken)
                broken, served = served, await self._ready(tag)
                self._retired.append(broken)
            self._loaded.pop(tag, None)  # the last wanted goes last
            self._loaded[tag] = served
        surplus = len(self._loaded) - max(self.keep_loaded, len(wanted) + 1)
        for tag in list(self._loaded)[: max(0, surplus)]:
            self._retired.append(self._loaded.pop(tag))

    async def _ready(self, tag: str) -> Served:
        logger.info("loading %s …", tag)
        served = await asyncio.to_thread(self.load, tag)
        await warm_up(served)
        logger.info("%s is ready", tag)
        return served

    def _broken(self) -> bool:
        """Return whether an engine that users meet has broken: the champion's, or the challenger's."""
        trial = self.aliases.challenger
        return self._is_broken(self.aliases.champion) or (trial is not None and self._is_broken(trial.tag))

    def _is_broken(self, tag: str | None) -> bool:
        served = self._loaded.get(tag or "")
        return served is not None and served.engine.broken is not None

    def _close_retired(self) -> None:
        """Let go of versions that nobody uses any more."""
        waiting = [served for served in self._retired if served.users]
        for served in self._retired:
            if not served.users:
                served.engine.close()
        self._retired = waiting

    def _show_load(self) -> None:
        """Tell Prometheus how long the queues are: by the clock, since an idle queue sees no request."""
        loads = [served.engine.load() for served in self._loaded.values()]
        get_metrics().waiting.set(sum(load.waiting for load in loads))
        get_metrics().running.set(sum(load.running for load in loads))

    def _show(self) -> None:
        roles = {(self.champion.files.version, "champion")}
        if trial := self.aliases.challenger:
            roles.add((self._loaded[trial.tag].files.version, trial.mode))
        for role in self._shown | roles:
            get_metrics().served.labels(*role).set(int(role in roles))
        self._shown |= roles

    @property
    def champion(self) -> Served:
        """The version that answers where nothing else is said.

        Raises:
            ApiError: none is ready yet.
        """
        served = self._loaded.get(self.aliases.champion or "")
        if served is None:
            raise errors.not_ready(self.problem or "the model is being loaded")
        return served

    def served(self) -> dict[str, Served]:
        """Return the versions that can be asked for, by alias."""
        found = {"champion": self.champion}
        if self.aliases.challenger:
            found["challenger"] = self._loaded[self.aliases.challenger.tag]
        return found

    def health(self) -> str | None:
        """Return why no request can be answered, or None."""
        if self.problem is None and self._is_broken(self.aliases.champion):
            return "the engine broke and is being started anew"
        return self.problem

    def pick(self, model: str | None, sticky: str) -> Choice:
        """Return who answers.

        Args:
            model: None, the model's name or `champion` for whom traffic decides; `challenger`,
                or `name:version`, for one version.
            sticky: who asks; the same asker meets the same version for as long as the trial lasts.

        Raises:
            ApiError: that model is not served, or none is ready.
        """
        versions = self.served()
        champion = versions["champion"]
        if model not in (None, champion.files.name):
            for alias, served in versions.items():
                if model in (alias, served.files.tag):
                    return Choice(served, "champion" if served is champion else "challenger")
            known = [champion.files.name, *(served.files.tag for served in versions.values())]
            raise errors.model_not_found(str(model), known)
        trial = self.aliases.challenger
        if trial is None or not takes_part(sticky, trial.tag, trial.share):
            return Choice(champion, "champion")
        challenger = versions["challenger"]
        if trial.mode == "canary":
            return Choice(challenger, "challenger")
        return Choice(champion, "champion", shadow=challenger)

    def close(self) -> None:
        """End every engine."""
        for served in [*self._loaded.values(), *self._retired]:
            served.engine.close()
        self._loaded.clear()
        self._retired.clear()
        self.problem = "the server is ending"


def takes_part(asker: str, trial: str, share: float) -> bool:
    """Return whether an asker is in a trial: the same for the same two, and `share` of all askers are."""
    digest = hashlib.blake2b(f"{trial}\0{asker}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


async def warm_up(served: Served) -> None:
    """Ask the model once.

    Raises:
        EngineError: it gives no answer.
    """
    prompt: Sequence[int] = encode_prompt(served.tokenizer, [Message("user", "Hello")])
    async with aclosing(served.engine.generate(prompt, WARM_UP)) as steps:  # type: ignore[type-var]
        async for step in steps:
            if step.finish_reason:
                return
    raise EngineError(f"{served.files.tag} gave no answer")


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


async def run_forever(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` again and again: what it raises is logged, and does not end it."""
    while True:
        try:
            await work()
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("following the aliases failed; it is tried again")
            await asyncio.sleep(1.0)
