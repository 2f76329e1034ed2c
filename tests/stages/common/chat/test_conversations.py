from stages.common.chat.conversations import (
    find_known_answers,
    find_rows_that_answer,
    join_conversations,
)
from stages.common.messages import Message, ToolCall
from stages.common.records import make_row


def talk(name, turns, first=0, **more):
    """A conversation of its own, from the turn `first` on."""
    messages = [
        Message(role, f"{name} {role} {n}") for n in range(first, turns) for role in ("user", "assistant")
    ]
    return make_row(messages, "toy", "mit", **more)


def greet(name, **more):
    """A conversation that begins with what all begin with."""
    hello = [Message("user", "Hello!"), Message("assistant", "Hi, how can I help?")]
    return make_row([*hello, *talk(name, 1).messages], "toy", "mit", **more)


def number(groups):
    return [groups.index(group) for group in groups]


def test_a_row_a_turn_is_one_conversation():
    rows = [talk(name, turns) for name in "abc" for turns in (1, 2, 3)]
    assert number(join_conversations(rows)) == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_windows_of_turns_are_one_conversation():
    rows = [talk("a", last, first=last - 2) for last in (2, 3, 4)] + [talk("b", 2)]
    assert number(join_conversations(rows)) == [0, 0, 0, 3]


def test_spelling_and_the_system_message_hide_no_conversation():
    one, two = talk("a", 1), talk("a", 2)
    hidden = [Message(m.role, m.content.upper().replace(" ", "\u200b  \t") + "!") for m in two.messages]
    rows = [one, make_row([Message("system", "s"), *hidden], "toy", "mit")]
    assert number(join_conversations(rows)) == [0, 0]


def test_a_greeting_makes_no_conversation():
    rows = [greet(name) for name in "abcdefg"]
    assert number(join_conversations(rows)) == list(range(7))


def test_groups_that_the_data_name_are_joined_as_a_whole():
    rows = [
        talk("a", 1, group="g"),
        talk("b", 1, group="g"),
        talk("a", 2, group="h"),
        talk("c", 1, group="h"),
    ]
    assert join_conversations(rows) == ["g"] * 4


def test_feedback_joins_no_groups_of_other_rows():
    own = [talk("a", 2), talk("b", 2)]
    both = make_row([*own[0].messages, *own[1].messages], "toy", "mit", origin="feedback")
    more = [
        talk("a", 3, origin="feedback"),
        both,
        talk("new", 1, origin="feedback"),
        talk("new", 2, origin="feedback"),
    ]
    groups = join_conversations([*own, *more])
    assert groups[:2] == join_conversations(own) == [r.group for r in own]
    assert number(groups) == [0, 1, 0, 0, 4, 4]


def test_an_answer_in_an_earlier_turn_is_known():
    hello = make_row(greet("a").messages[:2], "toy", "mit")
    learned = [greet("a"), talk("b", 3), talk("c", 1)]
    asked = [hello, talk("b", 2), talk("b", 3), talk("c", 1), talk("d", 1)]
    assert find_known_answers(asked, learned) == {0, 1}
    assert find_rows_that_answer(learned, asked[:1]) == {0}
    assert find_rows_that_answer(learned, asked[3:]) == set()


def use(*asked, answers=None, result="done"):
    """A conversation in which each question is answered by a call, its result, and a text."""
    messages = []
    for number, question in enumerate(asked):
        call = ToolCall("do", f'{{"what":"{question}"}}')
        answer = "Done." if answers is None else answers[number]
        messages += [
            Message("user", question),
            Message("assistant", "", (call,)),
            Message("tool", result),
            Message("assistant", answer),
        ]
    return messages


def as_row(messages):
    return make_row(messages, "toy", "mit")


def test_turns_of_a_session_with_tools_are_one_conversation():
    session, other = use("lamp on", "and the fan"), use("doors", "windows")
    rows = [as_row(session[:n]) for n in (2, 4, 6, 8)] + [as_row(other)]
    assert number(join_conversations(rows)) == [0, 0, 0, 0, 4]


def test_a_common_first_request_with_a_common_result_joins_no_sessions():
    rows = [as_row(use("lamp on", f"then {name}")) for name in "abcdefg"]
    assert number(join_conversations(rows)) == list(range(7))


def test_one_call_for_different_questions_makes_no_conversation():
    rows = [as_row([Message("user", f"{name} on"), *use("x", "y")[1:], *use(name)]) for name in "abcdefg"]
    assert number(join_conversations(rows)) == list(range(7))


def test_a_question_whose_call_is_learned_within_a_conversation_is_known():
    session = use("lamp on", "and the fan")
    asked = [as_row(session[:2]), as_row(session[:4]), as_row(use("doors")[:2]), as_row(use("lamp on")[:2])]
    assert find_known_answers(asked, [as_row(session)]) == {0, 1, 3}
    # An equal result of another call is no known answer.
    assert find_known_answers([as_row(use("doors"))], [as_row(session)]) == set()
