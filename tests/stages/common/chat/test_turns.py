from stages.common.chat.turns import list_learned, unroll
from stages.common.messages import Message, ToolCall
from stages.common.records import make_row


def talk(*weights):
    messages = []
    for number, weight in enumerate(weights):
        messages += [Message("user", f"q{number}"), Message("assistant", f"a{number}", is_learned=weight)]
    return make_row(messages, "toy", "mit", group="g", tags={"a": "b"})


def test_all_turns_are_learned_but_those_of_weight_0():
    assert list_learned(talk(None, False, True, None).messages, "all") == [1, 5, 7]


def test_the_last_turn_alone_or_those_with_a_weight():
    row = talk(None, True, None)
    assert list_learned(row.messages, "last") == [5]
    assert list_learned(row.messages, "weight") == [3]
    assert list_learned(talk(None, None).messages, "weight") == [1, 3]


def test_one_question_with_one_answer_is_its_own_row():
    row = talk(None)
    assert list(unroll([row], "all")) == [row]


def test_each_learned_turn_becomes_a_row_with_the_turns_before_it():
    first, second = unroll([talk(None, False, None)], "all")
    assert (first.answer, second.answer) == ("a0", "a2")
    assert [message.content for message in second.messages] == ["q0", "a0", "q1", "a1", "q2", "a2"]
    assert second.tags == {"a": "b", "turn": "3"}
    assert (first.group, second.group) == ("g", "g")
    assert first.id == make_row(first.messages, "toy", "mit").id


def test_a_call_and_the_answer_after_its_result_are_two_rows():
    call = Message("assistant", "", (ToolCall("lamp", "{}"),))
    row = make_row(
        [Message("user", "q"), call, Message("tool", "done"), Message("assistant", "It is on.")], "toy", "mit"
    )
    assert [one.answer for one in unroll([row], "all")] == [call.answer, "It is on."]
