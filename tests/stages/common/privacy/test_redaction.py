import json
import random

import pytest

from stages.common.privacy.personal_data import PERSONAL_DATA, find_spans, holds
from stages.common.privacy.redaction import redact, redact_json
from tests.stages.common.privacy.test_personal_data import INNOCENT, PERSONAL


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts]
)
def test_personal_data_gives_way_to_the_name_of_its_kind(kind, text):
    redacted = redact(f"hello! {text}, thanks")
    assert f"[{kind}]" in redacted
    assert redacted.startswith("hello! ")
    assert redacted.endswith(", thanks")
    assert not any(holds(other, redacted) for other in PERSONAL_DATA)


@pytest.mark.parametrize("text", INNOCENT)
def test_other_numbers_stay(text):
    assert redact(text) == text


def test_only_the_kinds_asked_for_are_replaced():
    text = "ann@example.org or +4930123456"
    assert redact(text, ["phone"]) == "ann@example.org or [phone]"
    assert redact(text, []) == text
    assert redact(text) == "[email] or [phone]"


def test_of_overlapping_kinds_nothing_is_left():
    assert redact("pay GB29NWBK60161331926819@example.org") == "pay [email]"


def test_what_a_replaced_number_hid_is_found_too():
    assert redact("+14155550187+4930123456") == "[phone][phone]"


def test_redacting_twice_changes_nothing_more():
    dice = random.Random(7)
    known = [text for texts in PERSONAL.values() for text in texts]
    glue = ["", " ", "+", "-", ".", ",", "0", "1", "@", "a", "[", "]", "/", "(", "\n", "0 ", " 0"]
    for _ in range(5_000):
        text = "".join(dice.choice(known) + dice.choice(glue) for _ in range(dice.randint(1, 6)))
        once = redact(text)
        assert redact(once) == once, text
        assert not find_spans(once, tuple(PERSONAL_DATA)), text


@pytest.mark.timeout(120)  # quadratic time would be hours
@pytest.mark.parametrize("part", ["+14155550187", "a.", "a@b.co ", "030 1234 5678 ", "4111 1111 1111 1111 "])
def test_a_long_text_takes_linear_time_and_is_clean_after(part):
    redacted = redact(part * (1_000_000 // len(part)))
    assert not any(holds(kind, redacted) for kind in PERSONAL_DATA)


def test_json_stays_json():
    messages = [
        {"role": "user", "content": 'I am "Ann" <ann@example.org>\n+4930123456'},
        {"role": "assistant", "content": None, "1@a.org": [True, 2.5, 4111111111111111]},
    ]
    assert json.loads(redact_json(json.dumps(messages), redact)) == [
        {"role": "user", "content": 'I am "Ann" <[email]>\n[phone]'},
        {"role": "assistant", "content": None, "[email]": [True, 2.5, "[credit_card]"]},
    ]


def test_keys_that_redaction_makes_equal_stay_apart():
    text = '{"a@perennial-mail.net": 1, "b@perennial-mail.net": 2, "[email]": 3, "[email] 2": 4}'
    assert sorted(json.loads(redact_json(text, redact)).values()) == [1, 2, 3, 4]


def test_of_equal_keys_every_value_is_looked_at():
    redacted = redact_json('{"to": "ann@perennial-mail.net", "to": "nobody"}', redact)
    assert json.loads(redacted) == {"to": "nobody"} and "ann" not in redacted


def test_json_in_a_string_of_json_is_looked_into():
    schema = json.dumps({"properties": {"a": {"const": "ann@perennial-mail.net"}}}).replace("@", "\\u0040")
    redacted = json.loads(redact_json(json.dumps({"json_schema": schema, "stop": ["+4930123456"]}), redact))
    assert json.loads(redacted["json_schema"]) == {"properties": {"a": {"const": "[email]"}}}
    assert redacted["stop"] == ["[phone]"]


def test_a_value_is_what_its_key_says():
    text = json.dumps({"password": "hunter2hunter2", "phone": 6641234, "note": "hunter2hunter2"})
    assert json.loads(redact_json(text, redact)) == {
        "password": "[secret]",
        "phone": "[phone]",
        "note": "hunter2hunter2",
    }


PASSWORD, KEY, NUMBER = "hunter2hunter2", "a1b2c3d4e5f6a7b8", "6641234567"


@pytest.mark.parametrize(
    ("value", "private"),
    [
        ({"password": [PASSWORD]}, PASSWORD),
        ({"password": {"value": PASSWORD}}, PASSWORD),
        ({"password": [[{"a": {"b": PASSWORD}}]]}, PASSWORD),
        ({"name": "password", "value": PASSWORD}, PASSWORD),
        ({"value": [PASSWORD], "Key": "db_password"}, PASSWORD),
        ({"headers": [["X-Api-Key", KEY]]}, KEY),
        ({"headers": {"X-Api-Key": [KEY]}}, KEY),
        ({"Authorization": ["Basic dXNlcjpodW50ZXIy"]}, "dXNlcjpodW50ZXIy"),
        ({"phone": [NUMBER]}, NUMBER),
        ({"phone": {"home": int(NUMBER)}}, NUMBER),
        ({"pin": "493817"}, "493817"),
        ({"pin_code": 493817}, "493817"),
        ({"pwd": 'a1"b2c3d4'}, "b2c3d4"),
        ({"db_pass": PASSWORD}, PASSWORD),
        *(
            ({"properties": {"password": {"type": "string", key: value}}}, PASSWORD)
            for key, value in (("default", PASSWORD), ("const", PASSWORD), ("enum", [PASSWORD]))
        ),
        ({"properties": {"password": {"examples": [PASSWORD]}}}, PASSWORD),
    ],
)
def test_a_name_tells_what_every_value_within_is(value, private):
    redacted = redact_json(json.dumps(value), redact)
    assert private not in redacted and json.loads(redacted)
    assert redact_json(redacted, redact) == redacted


@pytest.mark.parametrize(
    "value",
    [
        {"note": [PASSWORD], "name": "note", "value": PASSWORD},
        {"properties": {"password": {"type": "string", "minLength": 12, "description": "at least 1 digit"}}},
        {"token": ["tokens", 12345], "password": [True, None, "none"]},
        {
            "tool_calls": [
                {"id": "call_1a2b3c4d5e6f", "name": "get_token", "arguments": {"room": "hall-1st-floor"}}
            ]
        },
    ],
)
def test_a_name_alone_makes_nothing_private(value):
    assert redact_json(json.dumps(value), redact) == json.dumps(value)


@pytest.mark.parametrize(
    "text",
    [
        f"DB_PASS={PASSWORD}",
        f"export TOKEN={PASSWORD}",
        f"password -> {PASSWORD}",
        f"password → {PASSWORD}",
    ],
)
def test_a_secret_that_is_assigned_is_found(text):
    redacted = redact(text)
    assert PASSWORD not in redacted and "[secret]" in redacted


@pytest.mark.parametrize(
    "text",
    [
        "my key is sk-proj-" + "a1B2" * 12,
        'password = "hunter2hunter2"',
        "perennial-" + "a" * 43,
        "AKIAIOSFODNN7" + "EXAMPLQ",
        "-----BEGIN RSA "
        + "PRIVATE KEY-----\n"
        + ("a1B2" * 16 + "\n") * 3
        + "a1B2==\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_nothing_is_left_of_a_secret(text):
    redacted = redact(f"please: {text} and then")
    assert redacted.startswith("please: ") and redacted.endswith(" and then") and "[secret]" in redacted
    assert not any(part in redacted for part in ("a1B2", "hunter2", "aaaa", "AKIA"))


def test_an_escaped_address_is_found():
    assert json.loads(redact_json('["ann\\u0040example.org"]', redact)) == ["[email]"]


@pytest.mark.parametrize(
    "text", ['{"a":  1}', '{"a": 1, "a": 2}', '["\\u00e9 7"]', "", "4", "NaN", "[1e400]"]
)
def test_json_without_personal_data_stays_byte_for_byte(text):
    assert redact_json(text, redact) == text


@pytest.mark.parametrize(
    "text", ['{"to": "ann@example.org"', "[" * 200_000 + "ann@example.org", "ann@example.org"]
)
def test_what_is_no_json_is_redacted_as_text(text):
    assert redact_json(text, redact) == text.replace("ann@example.org", "[email]")


def test_a_number_too_long_to_read_is_redacted_as_text():
    assert "ann@" not in redact_json(f'{{"n": {"9" * 5000}, "to": "ann@example.org"}}', redact)
