import pytest

from stages.common.messages import Message
from stages.preflight.changed_text import find_left_out
from tests.tiny import make_tokenizer

SIMPLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (SIMPLE, None),
        (SIMPLE.replace("m.content", "m.content | trim"), None),
        (SIMPLE.replace("in messages", "in messages if m.role != 'system'"), "system"),
        (SIMPLE.replace("m.content", "(m.content if m.role != 'user' else m.content[:4])"), "user"),
    ],
)
def test_a_text_that_a_template_leaves_out_of_the_prompt_is_found(template, left_out):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    asked = [Message("system", "Be brief."), Message("user", " light on ")]
    found = find_left_out(tokenizer, asked, ())
    assert (found and found.role) == left_out
