import pytest

from stages.common.chat import encode_example, encode_prompt, end_of_turn_ids
from stages.common.errors import InputError
from stages.common.records import Message
from tests.tiny import make_tokenizer

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "light on"),
    Message("assistant", '{"a":"ü"}'),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_model_is_asked_exactly_as_it_was_taught(tokenizer):
    example = encode_example(tokenizer, CONVERSATION)
    assert example.input_ids[: example.prompt_length] == encode_prompt(tokenizer, CONVERSATION[:-1])


def test_what_is_learned_is_the_answer_and_the_end_of_turn_and_no_newline_after_it(tokenizer):
    example = encode_example(tokenizer, CONVERSATION)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == '{"a":"ü"}<|im_end|>'
    assert example.input_ids[-1] in end_of_turn_ids(tokenizer)


def test_a_base_model_without_a_chat_template_is_refused(tokenizer):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(bare, CONVERSATION[:-1])


def test_a_template_that_rewrites_the_prompt_is_refused():
    rewriting = make_tokenizer()
    rewriting.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match="writes the prompt differently"):
        encode_example(rewriting, CONVERSATION)
