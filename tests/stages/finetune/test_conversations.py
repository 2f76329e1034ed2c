"""Conversations with calls of tools, from rows to a tuned model's judged answers, with the tiny model."""

import pytest
import torch

from services.engines.detokenizer import IncrementalDetokenizer
from stages.common.chat.calls import find_shown_ids, read_answer
from stages.common.chat.fitting import encode_fitting
from stages.common.chat.tools_template import adapt_template
from stages.common.chat.turns import unroll
from stages.common.messages import Message, Tool, ToolCall
from stages.common.model.generation import answer_questions, encode_questions
from stages.common.records import make_row
from stages.finetune.answer_loss import sum_cross_entropy
from stages.finetune.shared_prefix import lay_out
from tests.stages.common.chat.tool_templates import WITH_TOOLS
from tests.stages.common.chat_templates import make_family_tokenizer
from tests.tiny import make_model, make_tokenizer

TOOL = Tool('{"type":"function","function":{"name":"lamp","parameters":{"type":"object"}}}')
TALK = make_row(
    [
        Message("user", "on"),
        Message("assistant", "", (ToolCall("lamp", '{"on":true}'),)),
        Message("tool", "ok"),
        Message("assistant", "It is on."),
        Message("user", "off"),
        Message("assistant", "Wait.", (ToolCall("lamp", '{"on":false}'),)),
    ],
    "toy",
    "mit",
    tools=[TOOL],
)


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = adapt_template(made, {}, True, "auto")
    return made


def test_a_model_that_learned_a_conversation_answers_every_turn_of_it_right(tokenizer):
    model = make_model(hidden_size=64, intermediate_size=128, max_position_embeddings=1024)
    ((_, example),), misfits = encode_fitting(tokenizer, [TALK], 1000, learned_turns="all")
    assert not misfits and len(example.learned) == 3
    batch = lay_out([example], 1, share_prefix=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for _ in range(250):
        loss = sum_cross_entropy(batch.answer_logits(model), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turns = list(unroll([TALK], "all"))
    answers = answer_questions(model.eval(), tokenizer, encode_questions(tokenizer, turns), 4, 200)
    assert [answer.text for answer in answers] == [turn.answer for turn in turns]
    assert turns[2].answer == '{"content":"Wait.","tool_calls":[{"name":"lamp","arguments":{"on":false}}]}'


def test_an_answer_without_tools_shows_added_tokens_that_are_not_special_as_the_server_does():
    family = WITH_TOOLS["qwen-2.5"]
    made = make_family_tokenizer(family)
    ids = made("<tool_call>a</tool_call><|im_start|>", add_special_tokens=False)["input_ids"]
    assert read_answer(made, ids, has_tools=False) == "<tool_call>a</tool_call>"


def test_a_call_behind_a_special_token_without_a_role_is_read():
    made = make_family_tokenizer(WITH_TOOLS["mistral"])
    text = '[TOOL_CALLS] [{"name": "lamp", "arguments": {}, "id": "call00001"}]'
    ids = made(text, add_special_tokens=False)["input_ids"]
    opener = made.convert_tokens_to_ids("[TOOL_CALLS]")
    assert opener in ids and opener not in made.all_special_ids
    assert opener in find_shown_ids(made, has_tools=True)
    assert read_answer(made, ids, has_tools=True) == '{"tool_calls":[{"name":"lamp","arguments":{}}]}'
    shown = IncrementalDetokenizer(made, shown=find_shown_ids(made, has_tools=True))
    assert shown.push(ids) + shown.finish() == text


def test_the_same_text_is_a_call_only_where_there_are_tools(tokenizer):
    ids = tokenizer('<tool_call>\n{"name": "lamp", "arguments": {}}\n</tool_call>')["input_ids"]
    assert read_answer(tokenizer, ids, has_tools=True) == '{"tool_calls":[{"name":"lamp","arguments":{}}]}'
    assert read_answer(tokenizer, ids, has_tools=False).startswith("<tool_call>")
