"""An Ollama Modelfile for a GGUF file: which prompt, which end, which sampling.

Ollama does not run the chat template inside a GGUF: it guesses one of its own from it. So the template is
written out in Ollama's language, from how the tokenizer renders short conversations, and only if a longer one
then comes out the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Stand-ins for contents, which no template contains.
SYSTEM, QUESTION, ANSWER, NEXT = "⟦system⟧", "⟦question⟧", "⟦answer⟧", "⟦next⟧"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a template writes before and after the content of a role."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Wrapping:
    """A chat template that puts fixed text around each turn.

    Attributes:
        without_system: what comes first in a conversation that has no system message.
    """

    system: Turn
    user: Turn
    assistant: Turn
    without_system: str

    def render(self, turns: Turns) -> str:
        """Return the prompt after which the model answers."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        start = "" if turns[0][0] == "system" else self.without_system
        body = "".join(around[role].before + content + around[role].after for role, content in turns)
        return start + body + self.assistant.before

    def in_go(self) -> str:
        """Return the same as a template of Ollama."""
        start = f"{{{{ if not .System }}}}{self.without_system}{{{{ end }}}}" if self.without_system else ""
        roles = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        branches = [
            f'if eq .Role "{role}" }}}}{turn.before}{{{{ .Content }}}}{turn.after}' for role, turn in roles
        ]
        cases = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        return f"{start}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{self.assistant.before}"


def read_wrapping(tokenizer: Any) -> Wrapping | None:
    """Return how the tokenizer's chat template wraps turns, or None if it does more than that."""
    from jinja2 import TemplateError

    def render(turns: Turns, prompt: bool = True) -> str:
        conversation = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt))

    system, question, answer, next_ = (
        ("system", SYSTEM),
        ("user", QUESTION),
        ("assistant", ANSWER),
        ("user", NEXT),
    )
    try:
        plain = render([system, question], prompt=False)
        asked = render([system, question])
        long = render([system, question, answer, next_])
        bare = render([question])
        bare_long = render([question, answer, next_])
        head, _, rest = plain.partition(SYSTEM)
        system_to_user, _, after_user = rest.partition(QUESTION)
        before_answer = asked.partition(QUESTION)[2]
        after_answer = render([system, question, answer], prompt=False).partition(ANSWER)[2]
        answer_to_user = long.partition(ANSWER)[2].partition(NEXT)[0]
    except (TemplateError, TypeError, ValueError):
        return None
    before_user = answer_to_user.removeprefix(after_answer)
    wrapping = Wrapping(
        Turn(head, system_to_user.removesuffix(before_user)),
        Turn(before_user, after_user),
        Turn(before_answer.removeprefix(after_user), after_answer),
        bare.partition(QUESTION)[0].removesuffix(before_user),
    )
    same = (
        wrapping.render([system, question, answer, next_]) == long
        and wrapping.render([question, answer, next_]) == bare_long
        and wrapping.render([question]) == bare
    )
    return wrapping if same else None


def modelfile(gguf: str, system_prompt: str | None, wrapping: Wrapping | None, stops: Sequence[str]) -> str:
    """Return the text of the Modelfile; without a wrapping Ollama guesses the template."""
    lines = [f"FROM ./{gguf}"]
    if wrapping is not None and '"""' not in wrapping.in_go():
        lines.append(f'TEMPLATE """{wrapping.in_go()}"""')
    if system_prompt is not None and '"""' not in system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    lines.append("PARAMETER temperature 0")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
