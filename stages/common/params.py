"""`params.yaml`, typed and checked before any work.

Run `python -m stages.common.params` to check the file and print nothing but its problems.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stages.common.errors import ParamsError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Problem = tuple[str, str]  # the key inside its section, and what is wrong with it


class Section(BaseModel):
    """One top-level key: frozen, unknown keys and silent conversions refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def problems(self) -> Iterator[Problem]:
        """Yield the pairs of values that cannot stand together."""
        yield from ()


class FetchBase(Section):
    """Where the base model comes from."""

    origin: Literal["package", "hub", "folder"]
    name: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    file: str | None = None
    license: str | None = None

    def problems(self) -> Iterator[Problem]:
        if self.origin == "package":
            for key in ("revision", "sha256", "file"):
                if getattr(self, key) is None:
                    yield key, "is null, but origin: package needs it (or set origin: hub, origin: folder)"
        else:
            for key in ("sha256", "file"):
                if getattr(self, key) is not None:
                    yield key, "is set, but only origin: package has one; set it to null"
        if self.origin == "folder" and self.revision is not None:
            yield "revision", "is set, but a folder has none; set it to null"


class HomeIntents(Section):
    """The packaged default: requests to a smart home, expanded from templates."""

    kind: Literal["home_intents"]
    version: str
    language: str = "en"
    rows_per_template: PositiveCount = 8
    min_rows_per_intent: Count = 40
    seed: int = 7


class File(Section):
    """A file of the user's own rows."""

    kind: Literal["file"]
    path: str
    license: Annotated[str, Field(min_length=1)]
    origin: Literal["human", "template", "synthetic", "feedback"] = "human"
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    group_column: str | None = None
    tag_columns: tuple[str, ...] = ()


Source = Annotated[HomeIntents | File, Field(discriminator="kind")]


class Collect(Section):
    """What goes in."""

    system_prompt: str | None = None
    on_bad_row: Literal["reject", "stop"] = "reject"
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    def problems(self) -> Iterator[Problem]:
        for index, source in enumerate(self.sources):
            if isinstance(source, File) and not _inside_data(source.path):
                yield f"sources.{index}.path", "lies outside data/, where DVC could not see it change; move it there"


class Curate(Section):
    """Which rows are kept."""

    answer_format: Literal["json", "text"]
    min_question_chars: Count = 1
    max_question_chars: PositiveCount
    max_answer_chars: PositiveCount
    near_duplicate_threshold: Fraction
    personal_data: tuple[Literal["email", "phone", "iban", "credit_card", "ipv4", "ssn"], ...] = ()

    def problems(self) -> Iterator[Problem]:
        if self.min_question_chars > self.max_question_chars:
            yield "min_question_chars", f"is above max_question_chars ({self.max_question_chars}): no row could pass"


class Validate(Section):
    """What the curated rows must satisfy."""

    min_rows: PositiveCount
    max_rows: PositiveCount
    allowed_licenses: Annotated[tuple[str, ...], Field(min_length=1)]
    label_key: str | None = None
    min_labels: PositiveCount = 1
    max_label_share: Fraction = 1.0
    max_shown_rows: PositiveCount = 10
    expectations: tuple[dict[str, Any], ...] = ()

    def problems(self) -> Iterator[Problem]:
        if self.min_rows > self.max_rows:
            yield "min_rows", f"is above max_rows ({self.max_rows}): no table could pass"


class CheckBias(Section):
    """How balanced the rows must be."""

    label_key: str | None = None
    groups: tuple[str, ...]
    min_rows: PositiveCount
    min_representation_ratio: Fraction
    max_cramers_v: Fraction
    alpha: Fraction
    permutations: PositiveCount
    seed: int


class Split(Section):
    """Which rows are learned, and which are asked."""

    validation_fraction: Fraction
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)]
    stratify_by: str | None = None
    max_test_rows_per_group: PositiveCount
    min_train_rows: PositiveCount
    min_test_rows: PositiveCount
    near_duplicate_threshold: Fraction
    seed: int

    def problems(self) -> Iterator[Problem]:
        if self.validation_fraction + self.test_fraction >= 1.0:
            yield "test_fraction", f"and validation_fraction ({self.validation_fraction}) leave nothing to train on"


class Finetune(Section):
    """How the adapter is trained."""

    rank: PositiveCount
    alpha: Positive
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    target_modules: str | tuple[str, ...]
    learning_rate: Positive
    schedule: Literal["cosine", "linear", "constant"]
    warmup_fraction: Fraction
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Positive
    batch_size: PositiveCount
    gradient_accumulation: PositiveCount
    epochs: PositiveCount
    max_length: PositiveCount
    on_long_row: Literal["drop", "stop"]
    checkpoint_every_steps: PositiveCount
    dtype: Literal["auto", "bfloat16", "float32"]
    seed: int


class Evaluate(Section):
    """How base and tuned model are judged."""

    task: Literal["json", "text"]
    label_key: str | None = None
    max_rows: PositiveCount | None = None
    min_test_rows: PositiveCount
    batch_size: PositiveCount
    max_new_tokens: PositiveCount
    slices: tuple[str, ...] = ()
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    resamples: Annotated[int, Field(ge=100)]
    errors_shown: PositiveCount
    seed: int

    def problems(self) -> Iterator[Problem]:
        if self.max_rows is not None and self.max_rows < self.min_test_rows:
            yield "max_rows", f"is below min_test_rows ({self.min_test_rows}): the gate could never pass"
        if self.task == "text" and self.label_key is not None:
            yield "label_key", "is set, but task: text has no labels; set it to null"


class ModelCard(Section):
    """What the evidence cannot say about the model."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    license: str
    language: Annotated[tuple[str, ...], Field(min_length=1)]
    intended_use: Annotated[str, Field(min_length=1)]
    out_of_scope: Annotated[str, Field(min_length=1)]


class TrainingFlow(Section):
    """When the training flow runs."""

    cron: str | None
    timezone: str = "UTC"
    retries: Count
    retry_delay_s: Count


class Flows(Section):
    """When things happen."""

    training: TrainingFlow


class Params(Section):
    """All of `params.yaml`."""

    fetch_base: FetchBase
    collect: Collect
    curate: Curate
    validate_: Validate = Field(alias="validate")
    check_bias: CheckBias
    split: Split
    finetune: Finetune
    evaluate: Evaluate
    model_card: ModelCard
    flows: Flows


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check `params.yaml`.

    Raises:
        ParamsError: with every problem of the file: line, key, value, and the nearest right key.
    """
    path = Path(path)
    root = _parse(path)
    raw = _plain(root, str(path))
    found: list[tuple[int, str]] = list(_duplicate_keys(root))
    sections: dict[str, Section] = {}
    fields = {field.alias or name: field for name, field in Params.model_fields.items()}
    for key in raw:
        if key not in fields:
            found.append((_line(root, (key,)), f"{key}: unknown key{_nearest(str(key), fields)}"))
    for key, field in fields.items():
        if key not in raw:
            found.append((1, f"{key}: missing section"))
            continue
        try:
            sections[key] = TypeAdapter(field.annotation).validate_python(raw[key])
        except ValidationError as error:
            found.extend(_described(root, key, field.annotation, error))
        else:
            found.extend(_impossible(root, key, sections[key], raw))
    found.extend(_impossible_across(root, sections))
    if found:
        lines = "\n".join(f"{path}:{line}: {text}" for line, text in sorted(found))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ParamsError(f"{count} in {path}\n{lines}", "mend the lines above; docs/reference/params.md has every key")
    return Params.model_validate(sections)


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it: 1e-3 is a number, a version such as 2026.10.27 is text, a day is text."""


_FLOAT, _TIMESTAMP = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _TIMESTAMP)]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _parse(path: Path) -> yaml.MappingNode:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParamsError(f"{path} is not there", "run in the project's folder, where params.yaml lies") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8: byte {error.start}", "save the file as UTF-8") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}", "mend the line named above") from None
    if not isinstance(root, yaml.MappingNode):
        raise ParamsError(f"{path} holds no keys", "take params.yaml from the repository as a start")
    return root


def _plain(root: yaml.MappingNode, name: str) -> dict[str, Any]:
    constructor = _Loader("")
    constructor.name = name
    plain: dict[str, Any] = constructor.construct_document(root)
    return _tuples(plain)


def _tuples(value: Any) -> Any:
    """Lists as tuples: strict sections are immutable all the way down."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _duplicate_keys(node: yaml.Node) -> Iterator[tuple[int, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.start_mark.line + 1, f"{key.value}: given twice"
            seen.add(key.value)
            yield from _duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item)


def _described(root: yaml.MappingNode, section: str, model: Any, error: ValidationError) -> Iterator[tuple[int, str]]:
    for problem in error.errors(include_url=False):
        if problem["type"] == "too_short" and problem["input"]:
            continue  # its items are wrong, and named on lines of their own
        loc = _without_tags(root, (section, *problem["loc"]))
        key = ".".join(str(part) for part in loc)
        if problem["type"] == "extra_forbidden":
            text = f"{key}: unknown key (value {problem['input']!r}){_nearest(str(loc[-1]), _known_keys(model, problem['loc']))}"
        elif problem["type"] == "missing":
            text = f"{key}: missing"
        else:
            text = f"{key}: {_lower(problem['msg'])} (value {_shown(problem['input'])})"
        yield _line(root, loc), text


def _impossible(
    root: yaml.MappingNode, section: str, value: Section, raw: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    for key, text in value.problems():
        loc = (section, *(int(part) if part.isdigit() else part for part in key.split(".")))
        yield _line(root, loc), f"{section}.{key}: {_shown(_value_at(raw, loc))} {text}"


def _impossible_across(root: yaml.MappingNode, sections: dict[str, Section]) -> Iterator[tuple[int, str]]:
    """Pairs of keys of two stages that cannot stand together."""
    curate, evaluate, split = sections.get("curate"), sections.get("evaluate"), sections.get("split")
    if isinstance(curate, Curate) and isinstance(evaluate, Evaluate):
        if evaluate.task == "json" and curate.answer_format != "json":
            yield (
                _line(root, ("evaluate", "task")),
                "evaluate.task: 'json' needs curate.answer_format: json (value 'text'); set both alike",
            )
    if isinstance(split, Split) and isinstance(evaluate, Evaluate):
        if evaluate.min_test_rows > split.min_test_rows:
            yield (
                _line(root, ("evaluate", "min_test_rows")),
                f"evaluate.min_test_rows: {evaluate.min_test_rows} is above split.min_test_rows "
                f"({split.min_test_rows}): the split could pass and the gate refuse; set both alike",
            )


def _without_tags(root: yaml.Node, loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """Drop the parts of a pydantic location that name a union's branch and no key of the file."""
    kept: list[int | str] = []
    node: yaml.Node | None = root
    for index, part in enumerate(loc):
        child = _child(node, part)
        if child is None and index < len(loc) - 1 and node is not None:
            continue
        kept.append(part)
        node = child
    return tuple(kept)


def _child(node: yaml.Node | None, part: int | str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        found: yaml.Node = node.value[part]
        return found
    return None


def _line(root: yaml.MappingNode, loc: Sequence[int | str]) -> int:
    """The line of the key at `loc`, or of the nearest parent that the file has."""
    node: yaml.Node | None = root
    line = 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            line = next((key.start_mark.line + 1 for key, _ in node.value if key.value == part), line)
        node = _child(node, part)
        if node is None:
            break
        if isinstance(part, int):
            line = node.start_mark.line + 1
    return line


def _known_keys(model: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that `model` knows at the parent of `loc`."""
    if isinstance(model, type) and issubclass(model, Section):
        fields = model.model_fields
        if len(loc) == 1:
            return list(fields)
        if loc[0] in fields:
            return _known_keys(fields[str(loc[0])].annotation, loc[1:])
    if len(loc) > 1 and isinstance(loc[0], int):  # sources.0.file.lisense
        branch = {"home_intents": HomeIntents, "file": File}.get(str(loc[1]))
        return _known_keys(branch, loc[2:]) if branch else []
    return []


def _nearest(key: str, known: Any) -> str:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}" if known else ""


def _value_at(raw: Any, loc: Sequence[int | str]) -> Any:
    for part in loc:
        raw = raw[part]
    return raw


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _inside_data(path: str) -> bool:
    parts = Path(path).parts
    return len(parts) > 1 and parts[0] == "data" and ".." not in parts


def main() -> None:
    """Check `params.yaml` and exit 2 with all its problems, or 0."""
    try:
        load_params(*sys.argv[1:2])
    except ParamsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
