"""The section `services` of `params.yaml`: how the model is served."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import override

from stages.common.params.checked_yaml import Section
from stages.common.params.types import Count, NotNegative, Port, Positive, PositiveCount, PrivateKind, Share

MAX_MESSAGES = 2_000  # of one request that are checked one by one

Policy = Literal["enforce", "record", "off"]


class EngineSettings(Section):
    """What computes the answers, and how much at once."""

    kind: Literal["auto", "paged", "openvino", "transformers", "vllm"]
    gpus: Count
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)]
    threads: PositiveCount | None
    context_tokens: Annotated[int, Field(ge=64)]
    max_running: PositiveCount
    max_waiting: PositiveCount
    kv_cache_mib: Annotated[int, Field(ge=16)]

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.kind in ("paged", "openvino") and self.gpus:
            yield (
                "gpus",
                f"is set, but kind: {self.kind} computes on the CPU; set it to 0, or take another kind",
            )
        if self.kind == "vllm" and not self.gpus:
            yield "gpus", "is 0, but kind: vllm needs a GPU; set it to 1"
        if self.gpus > 1:
            yield (
                "gpus",
                f"is {self.gpus}, but a service computes on one GPU; set it to 1, and run more services",
            )


class Versions(Section):
    """Which models are served."""

    follow_pipeline: bool
    keep_loaded: PositiveCount


class Answers(Section):
    """Defaults for what a request omits."""

    default_max_tokens: PositiveCount
    max_tokens: PositiveCount
    above_max_tokens: Literal["clamp", "reject"]
    constrained_decoding: bool

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.default_max_tokens > self.max_tokens:
            yield (
                "default_max_tokens",
                f"is above max_tokens ({self.max_tokens}): no request could be answered",
            )


class Access(Section):
    """Who may ask, and how often."""

    keys: Literal["auto", "always"]
    keys_file: Annotated[str, Field(min_length=1)]
    hosts: tuple[Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?$")], ...]
    proxies: tuple[Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+(/\d{1,3})?$")], ...]
    requests_per_minute: PositiveCount | None
    tokens_per_day: PositiveCount | None

    @override
    def find_conflicts(self) -> Iterator[tuple[str, str]]:
        for proxy in self.proxies:
            try:
                ip_network(proxy)
            except ValueError as error:
                yield "proxies", f"{proxy!r} is neither an address nor a network: {error}"


class Guard(Section):
    """What is refused on the way in and on the way out."""

    max_body_bytes: Annotated[int, Field(ge=1024)]
    max_messages: Annotated[int, Field(ge=1, le=MAX_MESSAGES)]
    max_prompts: PositiveCount
    max_prompt_tokens: PositiveCount
    max_schema_cpu_s: Positive
    control_tokens: Policy
    prompt_injection: Policy
    toxicity: Policy
    schema_: Policy = Field(alias="schema")
    secrets: Policy
    personal_data: Policy


class Events(Section):
    """Where every request and answer is kept."""

    url: Annotated[str, Field(pattern=r"^(sqlite:///|postgresql\+psycopg://)")]
    on_failure: Literal["refuse", "drop"]
    queue_size: PositiveCount
    group_rows: PositiveCount
    group_wait_ms: NotNegative
    redact: tuple[PrivateKind, ...]
    retention_days: PositiveCount | None


class Parity(Section):
    """When a served model counts as the model that was trained."""

    max_exact_match_loss: Share
    max_rows: PositiveCount | None
    concurrency: PositiveCount


class Services(Section):
    """How the model is served."""

    host: Annotated[str, Field(min_length=1)]
    port: Port
    request_timeout_s: Positive
    body_timeout_s: Positive
    engine: EngineSettings
    versions: Versions
    answers: Answers
    access: Access
    guard: Guard
    events: Events
    parity: Parity
