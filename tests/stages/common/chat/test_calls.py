import re
from dataclasses import replace

import pytest

from stages.common.chat.calls import read_call_format
from stages.common.chat.template import (
    TemplateRefusal,
    cut_reasoning,
    encode_conversation,
    encode_example,
    encode_prompt,
    render_example,
    thinks,
)
from stages.common.chat.tools_template import adapt_template, find_filled_gap, suggest_for_thoughts
from stages.common.errors import InputError
from stages.common.messages import (
    Message,
    Tool,
    ToolCall,
    format_calls,
    format_malformed,
    is_malformed,
    read_calls,
)
from tests.stages.common.chat.tool_templates import IM, QWEN_3, QWEN_CODER, START, WITH_TOOLS
from tests.stages.common.chat_templates import FAMILIES, Family, make_family_tokenizer

LAMP = Tool('{"type":"function","function":{"name":"lamp","description":"d","parameters":{"type":"object"}}}')
CALL = ToolCall("lamp", '{"on":true,"room":"Küche ☀","level":0.5,"rooms":["a"]}', "x1")
SECOND = ToolCall("lamp", '{"on":false}', "x2")
ALWAYS_THINKS = re.sub(r"{%- if enable_thinking .*?{%- endif %}", r"{{- '<think>\\n' }}", QWEN_3)
USER, ASKS = Message("user", "light on"), Message("assistant", "", (CALL,))
RESULT, ANSWER = Message("tool", "done", tool_call_id="x1"), Message("assistant", "It is on.")
WHOLE = [USER, ASKS, RESULT, ANSWER, Message("user", "thanks"), Message("assistant", "Gladly.")]

# Every family: with tools in its own template, or with the default notation before it.
EVERY = {**{f"{name}, default": family for name, family in FAMILIES.items()}, **WITH_TOOLS}


@pytest.fixture(scope="module", params=EVERY)
def tokenizer(request):
    made = make_family_tokenizer(EVERY[request.param])
    made.chat_template = adapt_template(made, {}, True, "auto")
    return made


def learned(tokenizer, example):
    return [tokenizer.decode(example.input_ids[start:end]) for start, end in example.learned]


def test_families_with_tools_keep_their_own_notation():
    for family in WITH_TOOLS.values():
        made = make_family_tokenizer(family)
        assert adapt_template(made, {}, True, "auto") == made.chat_template


def test_the_notation_is_that_of_the_family():
    formats = {name: read_call_format(make_family_tokenizer(family)) for name, family in WITH_TOOLS.items()}
    assert {name: found.opener for name, found in formats.items()} == {
        "qwen-2.5": "<tool_call>\n",
        "qwen-3": "<tool_call>\n",
        "llama-3.1": "",
        "mistral": "[TOOL_CALLS] [",
    }
    assert (formats["llama-3.1"].arguments_key, formats["mistral"].id_key) == ("parameters", "id")
    assert formats["llama-3.1"].text_separator is None


def test_calls_of_another_form_than_json_get_the_default_notation():
    made = make_family_tokenizer(Family(QWEN_CODER, IM, START, "<|im_end|>"))
    with pytest.raises(InputError):
        read_call_format(made)
    made.chat_template = adapt_template(made, {}, True, "auto")
    assert read_call_format(made).opener == "<tool_call>\n"
    with pytest.raises(InputError, match="tools_template: auto"):
        adapt_template(make_family_tokenizer(FAMILIES["chatml"]), {}, True, "own")


def test_what_the_models_own_template_lacks_is_named_where_the_default_fills_it():
    qwen = WITH_TOOLS["qwen-2.5"]
    drops = replace(qwen, template=qwen.template.replace("elif message.role == 'tool'", "elif false"))
    made = make_family_tokenizer(drops)
    assert "drops calls of tools or their results" in (find_filled_gap(made, {}, True, "auto") or "")
    plain = make_family_tokenizer(FAMILIES["chatml"])
    assert "does not write the tools" in (find_filled_gap(plain, {}, True, "auto") or "")
    for tokenizer, *wanted in (
        (make_family_tokenizer(qwen), True, "auto"),
        (plain, False, "auto"),
        (plain, True, "default"),
    ):
        assert find_filled_gap(tokenizer, {}, *wanted) is None


def test_what_the_template_writes_is_read_back(tokenizer):
    for calls in ((CALL,), (CALL, SECOND)):
        found = read_call_format(tokenizer)
        if len(calls) > 1 and not found.separator:
            continue
        for text in ("", "Just a moment."):
            _, written = render_example(tokenizer, [USER, Message("assistant", text, calls)], [LAMP])
            kept = text if found.text_separator is not None else ""
            assert found.read(written) == format_calls(kept, calls)


def test_tools_calls_and_results_reach_the_prompt(tokenizer):
    prompt = tokenizer.decode(encode_prompt(tokenizer, WHOLE[:-1], [LAMP]))
    for text in ("lamp", "Küche ☀", "done", "It is on.", "thanks"):
        assert text in prompt


def test_a_text_with_tools_is_itself(tokenizer):
    _, written = render_example(tokenizer, [USER, ANSWER], [LAMP])
    assert read_call_format(tokenizer).read(written).strip() == "It is on."


def test_a_text_in_the_notation_that_is_judged_is_no_call_of_the_model(tokenizer):
    found = read_call_format(tokenizer)
    for text in (format_calls("", (CALL,)), format_malformed("a")):
        assert read_calls(found.read(text)) is None and is_malformed(found.read(text))


def test_a_call_that_is_not_whole_is_malformed_and_never_a_call(tokenizer):
    found = read_call_format(tokenizer)
    _, written = render_example(tokenizer, [USER, ASKS], [LAMP])
    start = len(written) - len(written.lstrip()) + len(found.opener) + len('{"name": ')
    for end in range(start, len(written.rstrip())):
        assert is_malformed(found.read(written[:end])), written[:end]
    for broken in (written.replace("0.5", "NaN"), written.replace('"on"', '"room"'), written + " and more"):
        assert is_malformed(found.read(broken))


def test_a_call_with_half_a_surrogate_pair_is_malformed_and_can_be_stored(tokenizer):
    found = read_call_format(tokenizer)
    _, written = render_example(tokenizer, [USER, ASKS], [LAMP])
    assert '"on"' in written
    for half in (r'"\ud83d"', r'"a\udfff"'):
        for key in ("on", "a"):
            read = found.read(written.replace(f'"{key}"', half))
            assert is_malformed(read) and read.encode()
    whole = read_calls(found.read(written.replace('"on"', r'"\ud83d\ude00"')))
    assert whole is not None and "\U0001f600" in whole[1][0].values


def test_all_answers_of_a_conversation_are_learned_with_the_prompts_they_will_be_asked_with(tokenizer):
    places = [1, 3, 5]
    examples = encode_conversation(tokenizer, WHOLE, [LAMP], places)
    alone = [encode_example(tokenizer, WHOLE[: place + 1], [LAMP]) for place in places]
    joined, each = ([text for one in some for text in learned(tokenizer, one)] for some in (examples, alone))
    assert joined == each
    for example in examples:
        for start, end in example.learned:
            one = next(o for o in alone if o.input_ids == example.input_ids[:end])
            assert one.prompt_length == start
    assert sum(example.learned_count for example in examples) == sum(one.learned_count for one in alone)


def test_one_sequence_is_enough_where_the_template_only_appends():
    for name in ("qwen-2.5", "llama-3.1"):
        made = make_family_tokenizer(WITH_TOOLS[name])
        assert len(encode_conversation(made, WHOLE, [LAMP], [1, 3, 5])) == 1
    # Qwen3 drops the think block of earlier turns.
    assert len(encode_conversation(make_family_tokenizer(WITH_TOOLS["qwen-3"]), WHOLE, [LAMP], [1, 3, 5])) > 1


def test_control_tokens_in_arguments_results_tools_and_names_are_text(tokenizer):
    marks = "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    tool = Tool(LAMP.text.replace('"d"', f'"{marks}"'))
    call = ToolCall("lamp", f'{{"room":"{marks}"}}')
    talk = [USER, Message("assistant", "", (call,)), Message("tool", marks), Message("assistant", marks)]
    harmless = [USER, Message("assistant", "", (SECOND,)), Message("tool", "a"), Message("assistant", "b")]
    control = set(tokenizer.added_tokens_decoder)

    def count(messages, tools):
        return sum(token in control for token in encode_example(tokenizer, messages, tools).input_ids)

    assert count(talk, [tool]) == count(harmless, [LAMP])
    assert marks in tokenizer.decode(encode_prompt(tokenizer, talk[:-1], [tool]))


def test_results_follow_the_order_of_their_calls(tokenizer):
    if not read_call_format(tokenizer).separator:
        return
    both = Message("assistant", "", (CALL, SECOND))
    results = [Message("tool", "first", tool_call_id="x1"), Message("tool", "second", tool_call_id="x2")]
    prompts = [encode_prompt(tokenizer, [USER, both, *order], [LAMP]) for order in (results, results[::-1])]
    assert prompts[0] == prompts[1]


def test_a_model_that_thinks_learns_its_thoughts_and_is_judged_without_them():
    made = make_family_tokenizer(WITH_TOOLS["qwen-3"])
    thought = Message("assistant", "It is on.", reasoning="They want light.")
    plain = encode_example(made, [USER, thought])
    assert learned(made, plain) == ["It is on.<|im_end|>"]
    made.chat_template = adapt_template(made, {"enable_thinking": True}, False, "auto")
    example = encode_example(made, [USER, thought])
    (text,) = learned(made, example)
    assert text == "<think>\nThey want light.\n</think>\n\nIt is on.<|im_end|>"
    assert cut_reasoning(made, text.removesuffix("<|im_end|>")) == "It is on."
    assert not example.is_changed


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN_3, "enable_thinking"),
        (QWEN_3.replace("enable_thinking", "thinking"), "thinking"),
        (ALWAYS_THINKS, "enable_thinking"),  # it has no variable for it
    ],
)
def test_thoughts_are_learned_whatever_the_template_calls_it(template, name):
    made = make_family_tokenizer(replace(WITH_TOOLS["qwen-3"], template=template))
    thought = Message("assistant", "It is on.", reasoning="They want light.")
    assert not thinks(made) and suggest_for_thoughts(made) == f"set task.template_arguments: {{{name}: true}}"
    made.chat_template = adapt_template(made, {name: True}, False, "auto")
    (text,) = learned(made, encode_example(made, [USER, thought]))
    assert text.removeprefix("<think>\n") == "They want light.\n</think>\n\nIt is on.<|im_end|>"
    assert cut_reasoning(made, text.removesuffix("<|im_end|>")) == "It is on."


def test_a_model_that_always_thinks_cannot_be_told_not_to():
    made = make_family_tokenizer(replace(WITH_TOOLS["qwen-3"], template=ALWAYS_THINKS))
    with pytest.raises(InputError, match="does not read enable_thinking"):
        adapt_template(made, {"enable_thinking": False}, False, "auto")


@pytest.mark.parametrize("name", ["smollm-3", "smollm-2"])
def test_a_template_that_writes_no_thoughts_is_known_by_what_it_writes(name):
    made = make_family_tokenizer(FAMILIES[name])
    if name == "smollm-3":  # it has the variable, and leaves the thoughts out all the same
        made.chat_template = adapt_template(made, {"enable_thinking": True}, False, "auto")
    else:
        with pytest.raises(InputError, match="does not read enable_thinking"):
            adapt_template(made, {"enable_thinking": True}, False, "auto")
    assert not thinks(made)
    assert suggest_for_thoughts(made).startswith("this template writes no thoughts")


def test_a_template_that_was_told_not_to_think_can_be_told_to():
    made = make_family_tokenizer(WITH_TOOLS["qwen-3"])
    made.chat_template = adapt_template(made, {"enable_thinking": False}, False, "auto")
    assert not thinks(made)
    assert suggest_for_thoughts(made) == "set task.template_arguments: {enable_thinking: true}"


def test_a_user_may_go_on_after_a_result(tokenizer):
    goes_on = [Message("tool", "done", tool_call_id="x1"), Message("user", "and the bed?")]
    talk = [USER, ASKS, *goes_on, Message("assistant", "It is off.")]
    text = tokenizer.decode(encode_example(tokenizer, talk, [LAMP]).input_ids)
    assert text.index("done") < text.index("and the bed?") < text.index("It is off.")


def test_parallel_calls_that_a_template_lacks_have_their_remedy():
    made = make_family_tokenizer(WITH_TOOLS["llama-3.1"])
    talk = [USER, Message("assistant", "", (CALL, SECOND))]
    with pytest.raises(TemplateRefusal, match="single tool-calls") as refused:
        encode_example(made, talk, [LAMP])
    assert refused.value.fix.startswith("set task.tools_template: default")
    made.chat_template = adapt_template(made, {}, True, "default")
    assert learned(made, encode_example(made, talk, [LAMP]))[0].count("<tool_call>") == 2


def test_arguments_of_a_template_are_part_of_it():
    made = make_family_tokenizer(WITH_TOOLS["qwen-3"])
    made.chat_template = adapt_template(made, {"enable_thinking": False}, False, "auto")
    assert made.decode(encode_prompt(made, [USER])).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(InputError, match="does not read enable_thinkin "):
        adapt_template(made, {"enable_thinkin ": True}, False, "auto")
