"""The Ollama Modelfile of a GGUF file: template, system prompt, stop tokens, sampling.

Ollama does not run the chat template in a GGUF file, but guesses a similar one of its own. So the template
is translated to Ollama's language, from how the tokenizer renders short conversations, and used only if it
renders a longer one identically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.chat.template import write_served_template
from stages.common.errors import InputError

# Placeholders for message contents; no template contains them.
SYSTEM, QUESTION, ANSWER, NEXT = "⟦system⟧", "⟦question⟧", "⟦answer⟧", "⟦next⟧"

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class TurnFormat:
    """The text before and after the content of a turn."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A chat template that puts fixed text around each turn.

    Attributes:
        without_system: the text at the start of a conversation without a system message.
        opening: the text after which the model answers; mostly that before an answer.
    """

    system: TurnFormat
    user: TurnFormat
    assistant: TurnFormat
    without_system: str
    opening: str

    def render(self, turns: Turns) -> str:
        """Return the prompt after which the model answers."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        start = "" if turns[0][0] == "system" else self.without_system
        body = "".join(around[role].before + content + around[role].after for role, content in turns)
        return start + body + self.opening

    def to_ollama(self) -> str:
        """Return the format as an Ollama template."""
        start = f"{{{{ if not .System }}}}{self.without_system}{{{{ end }}}}" if self.without_system else ""
        roles = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        branches = [
            f'if eq .Role "{role}" }}}}{turn.before}{{{{ .Content }}}}{turn.after}' for role, turn in roles
        ]
        cases = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        return f"{start}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{self.opening}"


def read_chat_format(tokenizer: Any) -> ChatFormat | None:
    """Return the format of a tokenizer's chat template, or None if it is more than text around each turn."""
    from jinja2 import TemplateError

    try:
        template = write_served_template(tokenizer)
    except InputError:  # a template that no model can be taught with
        return None

    def render(turns: Turns, prompt: bool = True) -> str:
        conversation = [{"role": role, "content": content} for role, content in turns]
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        )

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
        opening = asked.partition(QUESTION)[2]
        before_answer = long.partition(QUESTION)[2].partition(ANSWER)[0]
        after_answer = render([system, question, answer], prompt=False).partition(ANSWER)[2]
        answer_to_user = long.partition(ANSWER)[2].partition(NEXT)[0]
    except (TemplateError, TypeError, ValueError):
        return None
    before_user = answer_to_user.removeprefix(after_answer)
    chat_format = ChatFormat(
        TurnFormat(head, system_to_user.removesuffix(before_user)),
        TurnFormat(before_user, after_user),
        TurnFormat(before_answer.removeprefix(after_user), after_answer),
        bare.partition(QUESTION)[0].removesuffix(before_user),
        opening.removeprefix(after_user),
    )
    same = (
        chat_format.render([system, question, answer, next_]) == long
        and chat_format.render([question, answer, next_]) == bare_long
        and chat_format.render([question]) == bare
    )
    return chat_format if same else None


def format_modelfile(
    gguf: str, system_prompt: str | None, chat_format: ChatFormat | None, stops: Sequence[str]
) -> str:
    """Return the text of the Modelfile; without a chat format Ollama guesses the template."""
    lines = [f"FROM ./{gguf}"]
    if chat_format is not None and '"""' not in chat_format.to_ollama():
        lines.append(f'TEMPLATE """{chat_format.to_ollama()}"""')
    if system_prompt is not None and '"""' not in system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    lines.append("PARAMETER temperature 0")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
