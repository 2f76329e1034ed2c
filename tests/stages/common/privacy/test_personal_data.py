import random
import re
from typing import get_args

import pytest

from benchmarks.private_data import measure, read_cases
from stages.common.params.types import PrivateKind
from stages.common.privacy.personal_data import PERSONAL_DATA, RECOGNISERS, find_emails, find_spans, holds
from stages.common.privacy.redaction import redact

PERSONAL = {
    "email": ["write to ann.lee+x@mail.example.co.uk now"],
    "phone": [
        "call +49 30 1234567",
        "call (243) 664-7665",
        "243-664-7665",
        "+12436640187",
        "ring 020 7946 0958",
    ],
    "iban": ["pay DE89 3704 0044 0532 0130 00 today", "GB29NWBK60161331926819"],
    "credit_card": ["card 4111 1111 1111 1111", "5500-0000-0000-0004"],
    "ipv4": ["from 8.8.8.8."],
    "ssn": ["my number is 123-45-6789"],
}
INNOCENT = [
    "set a timer for 12 hours 30 minutes and 45 seconds",
    "play 1999 at 50 percent",
    "version 2026.10.27 of the package",
    "on 2024-05-17 at 10:30:00",
    "meet @ noon",
    "the sum is 1234567890123456",
    "card 4111 1111 1111 1112",
    "DE00 3704 0044 0532 0130 00",
    "192.168.1.10 and 127.0.0.1 and 300.1.1.1",
    "000-45-6789",
    "3.14159 26535 89793",
    "from 100 200 to 300 400",
]
NO_PERSON = [  # the form of personal data, and no person's
    "call (212) 555-0187",
    "mail ann@example.org or bob@mail.example.com or root@localhost.localdomain.test",
    "git@github.com:perennial/perennial.git",
    "write to john.doe@company.com",
    "icon@2x.png",
]


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts]
)
def test_personal_data_is_found_by_its_kind_and_no_other(kind, text):
    assert [other for other in PERSONAL_DATA if holds(other, text)] == [kind]


@pytest.mark.parametrize("text", INNOCENT)
def test_other_numbers_are_no_personal_data(text):
    assert [kind for kind in PERSONAL_DATA if holds(kind, text)] == []


@pytest.mark.parametrize("text", NO_PERSON)
def test_documentation_and_machines_are_no_persons(text):
    assert [kind for kind in PERSONAL_DATA if holds(kind, text)] == []
    assert find_spans(text, tuple(PERSONAL_DATA)), "the event store redacts by form"


@pytest.mark.parametrize(
    ("text", "kind", "seen"),
    [
        (
            "IBAN DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
            "iban",
            "DE89\u00a03704\u00a00044\u00a00532\u00a00130\u00a000",
        ),
        ("card ４１１１ １１１１ １１１１ １１１１!", "credit_card", "４１１１ １１１１ １１１１ １１１１"),
        ("an\u200bn@perennial-mail.net,", "email", "an\u200bn@perennial-mail.net"),
        ("ring +49\u201130\u20111234567.", "phone", "+49\u201130\u20111234567"),
    ],
)
def test_other_blanks_dashes_digits_and_invisible_characters_hide_nothing(text, kind, seen):
    assert holds(kind, text)
    assert [text[start:end] for start, end, _ in find_spans(text, [kind])] == [seen]


def test_the_parameters_name_every_recogniser():
    assert get_args(PrivateKind) == tuple(RECOGNISERS)


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("to ann@example.org, bob@example.org.", ["ann@example.org", "bob@example.org"]),
        ("..ann@example.org", ["ann@example.org"]),
        ("a@b.co.x@d.org", ["a@b.co", "x@d.org"]),
        ("a@b@c.org", ["b@c.org"]),
        ("...@c.org", []),
    ],
)
def test_a_span_is_the_address_and_nothing_else(text, addresses):
    found = [text[start:end] for start, end in find_emails(text)]
    assert found == addresses


def test_an_address_is_found_where_the_plain_pattern_finds_one():
    """The plain pattern defines an address; it takes quadratic time, so the finder has another one."""
    plain = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}\b")
    dice = random.Random(7)
    for _ in range(20_000):
        text = "".join(dice.choices("ab1_.+-@@ é", k=dice.randint(1, 14)))
        assert holds("email", text) == bool(plain.search(text)), text


@pytest.mark.timeout(60)  # quadratic time would be hours
@pytest.mark.parametrize(
    "part", ["a.", "a@", "a@b.1.", "+1 ", "+14155550187", "0", "4 ", "4-", "AB12 ", "1.", "123-45-", "\u0660"]
)
def test_a_long_text_takes_linear_time(part):
    text = part * (1_000_000 // len(part))
    for kind in RECOGNISERS:
        holds(kind, text)
        holds(kind, "a@b" + text)


def test_what_is_personal_is_found_in_labelled_texts_and_little_else():
    """The bounds that the project promises; `benchmarks/private_data.py` prints the figures."""
    cases = read_cases()
    rates = measure(cases)
    assert len(cases) >= 300 and all(rate.true >= 30 for rate in rates.values())
    assert {kind: rate.recall for kind, rate in rates.items() if rate.recall < 0.97} == {}
    assert {kind: rate.false_alarms for kind, rate in rates.items() if rate.false_alarms > 0.05} == {}
    assert {kind: rate.precision for kind, rate in rates.items() if rate.precision < 0.95} == {}


def test_nothing_that_is_found_in_labelled_texts_is_left_by_redaction():
    left = [case.text for case in read_cases() for kind in RECOGNISERS if holds(kind, redact(case.text))]
    assert left == []
