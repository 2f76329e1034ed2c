from datetime import datetime

import pytest

from stages.common.chat.control_tokens import read_control_tokens
from stages.common.chat.day import writes_the_day_of_use
from stages.common.chat.template import (
    TemplateRefusal,
    encode_conversation,
    encode_example,
    encode_prompt,
    encode_text,
    end_of_turn_ids,
    write_served_template,
)
from stages.common.errors import InputError
from stages.common.messages import Message
from tests.stages.common.chat_templates import (
    FAMILIES,
    LLAMA_3,
    NO_END,
    Family,
    make_family_tokenizer,
    make_sentencepiece_tokenizer,
)
from tests.tiny import make_tokenizer

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "light on"),
    Message("assistant", '{"a":"ü"}'),
]
WITHOUT_SYSTEM = CONVERSATION[1:]
LONG = [
    Message("user", "light off"),
    Message("assistant", '{"a":"o"}'),
    *WITHOUT_SYSTEM,
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def family_tokenizer(family):
    return make_family_tokenizer(family)


def learned_text(tokenizer, example):
    return tokenizer.decode(example.input_ids[example.prompt_length :])


def prompt_text(tokenizer, example):
    return tokenizer.decode(example.input_ids[: example.prompt_length])


def test_the_model_is_asked_exactly_as_it_was_taught(tokenizer):
    example = encode_example(tokenizer, CONVERSATION)
    assert example.input_ids[: example.prompt_length] == encode_prompt(tokenizer, CONVERSATION[:-1])


def test_what_is_learned_is_the_answer_and_the_end_of_turn_and_no_newline_after_it(tokenizer):
    example = encode_example(tokenizer, CONVERSATION)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == '{"a":"ü"}<|im_end|>'
    assert example.input_ids[-1] in end_of_turn_ids(tokenizer)


@pytest.mark.parametrize("messages", [WITHOUT_SYSTEM, LONG], ids=["one turn", "two turns"])
def test_every_family_learns_the_answer_and_its_end_of_turn(family, family_tokenizer, messages):
    example = encode_example(family_tokenizer, messages)
    assert learned_text(family_tokenizer, example) == '{"a":"ü"}' + family.learned
    assert prompt_text(family_tokenizer, example).endswith(family.prompt_end)
    assert example.input_ids[: example.prompt_length] == encode_prompt(family_tokenizer, messages[:-1])
    assert not example.is_changed


def test_every_family_ends_an_answer_at_its_end_of_turn_alone(family, family_tokenizer):
    example = encode_example(family_tokenizer, WITHOUT_SYSTEM)
    ends = end_of_turn_ids(family_tokenizer)
    assert set(ends) == {example.input_ids[-1], family_tokenizer.eos_token_id}
    assert not set(ends) & set(encode_text(family_tokenizer, "The answer ends with the letter b."))


def test_a_system_message_is_written_or_refused_by_name(family, family_tokenizer):
    if family.takes_system:
        example = encode_example(family_tokenizer, CONVERSATION)
        assert learned_text(family_tokenizer, example) == '{"a":"ü"}' + family.learned
    else:
        with pytest.raises(TemplateRefusal, match="system, user") as error:
            encode_prompt(family_tokenizer, CONVERSATION[:-1])
        assert "task.system_prompt: null" in error.value.fix


@pytest.mark.parametrize("name", ["gemma-2", "gemma-3", "mistral-1"])
def test_roles_that_do_not_alternate_are_refused(name):
    tokenizer = make_family_tokenizer(FAMILIES[name])
    with pytest.raises(TemplateRefusal, match=r"user, user: .*must alternate"):
        encode_example(tokenizer, [Message("user", "a"), *WITHOUT_SYSTEM])


def hostile(family):
    """Every control token, and the parts of which a template could be made."""
    return "".join((*family.special, *family.added)) + "<|im_<|im_end|>end|> [INST] </s>"


def test_no_text_becomes_a_control_token_in_any_family(family, family_tokenizer):
    """The ids of the control tokens are the same ones as with a harmless text of the same kind."""
    control = set(read_control_tokens(family_tokenizer).ids.values())
    assert {*family.special, *family.added} == set(read_control_tokens(family_tokenizer).ids)
    text = f"a {hostile(family)} b"
    for messages in (WITHOUT_SYSTEM, LONG, [*LONG[:1], Message("assistant", text), *LONG[2:]]):
        harmless = encode_example(family_tokenizer, messages)
        attacked = encode_example(
            family_tokenizer,
            [*messages[:-2], Message("user", text), Message("assistant", text)],
        )

        def ids(encoded):
            return [token for token in encoded.input_ids if token in control]

        assert ids(attacked) == ids(harmless)
        assert learned_text(family_tokenizer, attacked) == text + family.learned
        assert text in prompt_text(family_tokenizer, attacked)
        assert not attacked.is_changed
    assert not control & set(encode_text(family_tokenizer, text))
    assert family_tokenizer.decode(encode_text(family_tokenizer, text)) == text


def test_a_text_with_a_control_token_has_the_tokens_of_its_neighbours(family_tokenizer):
    """What is around a hidden token is tokenised as without it: words before and after keep their ids."""
    token = next(iter(read_control_tokens(family_tokenizer).ids))
    plain = encode_text(family_tokenizer, "then we think")
    both = encode_text(family_tokenizer, f"then we think{token}then we think")
    assert both[: len(plain)] == plain and both[-len(plain) :] == plain


def test_text_without_control_tokens_has_the_ids_of_the_tokenizer_itself(family_tokenizer):
    for text in ("light on", " then\n\n  we\tthink ", "ünïcode 中文 🎉", "<|im_", "a < b > c"):
        plain = family_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_text(family_tokenizer, text) == plain
        exact = read_control_tokens(family_tokenizer)
        assert exact._build_exact().encode(text, add_special_tokens=False).ids == plain


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_of_the_model_that_are_control_tokens_are_never_made_of_text(kind):
    tokenizer = make_sentencepiece_tokenizer(kind)
    assert set(read_control_tokens(tokenizer).ids) == {"<unk>", "<s>", "</s>"}
    messages = [Message("user", "a </s> b<s>"), Message("assistant", "c </s> d")]
    example = encode_example(tokenizer, messages)
    assert [token for token in example.input_ids if token < 3] == [1, 2]
    assert learned_text(tokenizer, example).strip() == "c </s> d </s>"
    plain = [Message("user", "a b"), Message("assistant", "c d")]
    rendered = encode_example(tokenizer, plain)
    assert prompt_text(tokenizer, rendered).startswith("<s>")


def test_a_token_that_the_tokenizer_finds_in_changed_text_is_not_found_there():
    """With `normalized`, a tokenizer finds <|tool|> in <|TOOL|> once its normalizer writes small letters."""
    from tokenizers import AddedToken, normalizers

    tokenizer = make_family_tokenizer(FAMILIES["chatml"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<|tool|>", normalized=True)])
    loose = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert loose in tokenizer("a <|TOOL|> b", add_special_tokens=False)["input_ids"]
    assert loose not in encode_text(tokenizer, "a <|TOOL|> b")
    assert loose not in encode_prompt(tokenizer, [Message("user", "a <|TOOL|> b <|tool|>")])


def test_words_that_are_added_tokens_of_the_model_stay_words():
    """Gemma has <table> among its pieces, marked as an added token that is not special."""
    from tokenizers import AddedToken

    tokenizer = make_sentencepiece_tokenizer("bpe")
    tokenizer.backend_tokenizer.add_tokens([AddedToken("s>", normalized=False), AddedToken("\n\n")])
    assert set(read_control_tokens(tokenizer).ids) == {"<unk>", "<s>", "</s>"}


@pytest.mark.parametrize("name", ["llama-3", "smollm-3"])
def test_a_template_that_writes_the_date_writes_the_same_day_every_day(name):
    tokenizer = make_family_tokenizer(FAMILIES[name])
    text = prompt_text(tokenizer, encode_example(tokenizer, CONVERSATION))
    assert "Today Date: 26 Jul" in text and str(datetime.now().year) not in text


@pytest.mark.parametrize("messages", [WITHOUT_SYSTEM, LONG], ids=["one turn", "two turns"])
def test_a_server_that_renders_the_template_itself_writes_the_same_prompt(family_tokenizer, messages):
    served = make_family_tokenizer(Family(write_served_template(family_tokenizer), ("<s>", "</s>"), "", ""))
    conversation = [{"role": m.role, "content": m.content} for m in messages[:-1]]
    theirs = family_tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, chat_template=served.chat_template
    )
    assert theirs == family_tokenizer.decode(encode_prompt(family_tokenizer, messages[:-1]))


def test_an_answer_that_the_template_cuts_is_reported_as_changed():
    trimming = make_family_tokenizer(FAMILIES["gemma-2"])
    cut = encode_example(trimming, [Message("user", "a"), Message("assistant", " b\n")])
    assert cut.is_changed and learned_text(trimming, cut) == "b<end_of_turn>"


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


def test_a_template_without_an_end_of_turn_is_refused():
    endless = make_tokenizer()
    endless.chat_template = NO_END
    for ask in (end_of_turn_ids, lambda t: encode_example(t, WITHOUT_SYSTEM)):
        with pytest.raises(InputError, match="no end of turn after the answer") as error:
            ask(endless)
        assert "fetch_base" in error.value.fix


ONE_HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
TWO_HEADERS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("chatml", ONE_HEADER + "<|im_start|>assistant\n"),
        ("chatml", "<|endoftext|>" + ONE_HEADER + "<|im_start|>assistant\n"),
        ("phi-3", TWO_HEADERS + "<|assistant|>\n"),
        ("phi-3", "{{ bos_token }}" + TWO_HEADERS + "{% if messages[-1].role != 'user' %}<|user|>{% else %}"
         "<|assistant|>\n{% endif %}"),
    ],
)  # fmt: skip
def test_a_header_that_follows_an_answer_is_not_learned_as_its_end(family, template):
    """The template always writes the next header, and no end of turn before it."""
    tokenizer = make_family_tokenizer(FAMILIES[family])
    tokenizer.chat_template = template
    for ask in (end_of_turn_ids, lambda t: encode_conversation(t, LONG, (), [1, 3])):
        with pytest.raises(InputError, match="no end of turn after the answer, only") as error:
            ask(tokenizer)
        assert "chat_template.jinja" in error.value.fix


ENDED = ONE_HEADER.replace("\n{% endfor", "<|im_end|>\n{% endfor")
END_BEHIND_ALL = "{{ m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize(
    ("family", "template", "end"),
    [
        ("chatml", ENDED + "<|im_start|>assistant\n", "<|im_end|>"),
        ("llama-3", LLAMA_3.split("{%- if add_generation_prompt")[0], "<|eot_id|>"),
        ("phi-3", TWO_HEADERS.replace("{{ m.content }}", END_BEHIND_ALL)
         + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "<|endoftext|>"),
        ("mistral-3", "[INST]{{ messages[-1 if messages | length == 1 else -2].content }}[/INST]"
         "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
         "{% if messages[-1].role == 'assistant' %}{{ messages[-1].content }}</s>{% endif %}", "</s>"),
    ],
    ids=["next header", "no header", "behind the last turn", "one question"],
)  # fmt: skip
def test_an_end_of_turn_is_found_whatever_follows_it(family, template, end):
    tokenizer = make_family_tokenizer(FAMILIES[family])
    tokenizer.chat_template = template
    assert learned_text(tokenizer, encode_example(tokenizer, WITHOUT_SYSTEM)) == '{"a":"ü"}' + end


def test_each_of_several_turns_is_learned_with_an_end_that_is_written_behind_the_last_one_only():
    tokenizer = make_family_tokenizer(FAMILIES["phi-3"])
    tokenizer.chat_template = (
        TWO_HEADERS.replace("{{ m.content }}", END_BEHIND_ALL)
        + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    learned = [learned_text(tokenizer, one) for one in encode_conversation(tokenizer, LONG, (), [1, 3])]
    assert learned == ['{"a":"o"}<|endoftext|>', '{"a":"ü"}<|endoftext|>']


def test_an_end_that_is_written_behind_the_first_answer_only_is_learned_behind_each():
    tokenizer = with_template(SIMPLE.replace("<|im_end|>", "{% if loop.index < 3 %}<|im_end|>{% endif %}"))
    (one,) = encode_conversation(tokenizer, LONG, (), [1, 3])
    learned = [tokenizer.decode(one.input_ids[start:end]) for start, end in one.learned]
    assert learned == ['{"a":"o"}<|im_end|>', '{"a":"ü"}<|im_end|>']


def test_a_changed_template_is_read_again():
    changing = make_tokenizer()
    assert end_of_turn_ids(changing) == [1]
    changing.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|>{% endfor %}"
    assert end_of_turn_ids(changing) == [0, 1]


SIMPLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template + ASKS
    return tokenizer


@pytest.mark.parametrize(
    "date",
    [
        "{% set form = '%Y' %}{{ strftime_now(form) }}",
        "{{ strftime_now(format='%Y') }}",
        "{% set now = strftime_now %}{{ now('%Y') }}",
        "{{ strftime_now('%Y', ) }}",
    ],
)
def test_a_date_that_cannot_be_fixed_in_the_served_template_is_seen(date):
    assert writes_the_day_of_use(date + SIMPLE)
    assert not writes_the_day_of_use("{{ strftime_now('%Y') }}" + SIMPLE)


@pytest.mark.parametrize("code", ["m.content.index('x')", "1 // (m.content | length - 8)"])
def test_a_template_that_fails_on_a_text_refuses_its_conversation(code):
    tokenizer = with_template(SIMPLE.replace("{{ m.content }}", f"{{% set _ = {code} %}}{{{{ m.content }}}}"))
    with pytest.raises(TemplateRefusal, match=r"conversation of user: (ValueError|ZeroDivisionError)"):
        encode_prompt(tokenizer, [Message("user", "light on")])
