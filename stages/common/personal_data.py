"""Find personal data in a text: `curate` rejects rows with it, the event store redacts it.

Each finder yields the spans of one kind, from left to right, and takes time linear in the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

Span = tuple[int, int]

# A run of characters that may precede an @, with the rest of the address if there is one. The run matches
# with and without an @: starting again within it would take quadratic time on "a.a.a.a".
EMAIL = re.compile(r"([\w.+-]++)(?:@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}\b)?")
PHONES = (
    re.compile(r"(?<![\w+])\+\d(?:[ ().-]{0,2}\d){7,13}(?!\w)"),
    re.compile(r"(?<![\w.-])(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"),
    re.compile(r"(?<![\w.,-])(?<!\d )0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}(?![\w-]| \d)"),
)
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
CREDIT_CARD = re.compile(r"(?<![\d.-])[2-6](?:[ -]?\d){12,18}(?![\d-])")
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")


def find_emails(text: str) -> Iterator[Span]:
    """Yield the spans of e-mail addresses."""
    if "@" not in text:
        return
    for match in EMAIL.finditer(text):
        run = match.group(1)
        local = run.lstrip(".+-")  # an address begins with a letter or a digit
        if local and match.end() > match.end(1):
            yield match.start() + len(run) - len(local), match.end()


def find_phones(text: str) -> Iterator[Span]:
    """Yield the spans of phone numbers in a common notation.

    With a country code, in North American groups, or with a leading 0; a bare run of digits may be anything.
    """
    for pattern in PHONES:
        for match in pattern.finditer(text):
            yield match.span()


def find_ibans(text: str) -> Iterator[Span]:
    """Yield the spans of IBANs with valid check digits (ISO 13616, mod 97)."""
    for match in IBAN.finditer(text):
        number = match.group().replace(" ", "")
        digits = "".join(str(int(c, 36)) for c in number[4:] + number[:4])
        if 15 <= len(number) <= 34 and int(digits) % 97 == 1:
            yield match.span()


def find_credit_cards(text: str) -> Iterator[Span]:
    """Yield the spans of payment card numbers with a valid check digit (Luhn)."""
    for match in CREDIT_CARD.finditer(text):
        digits = [int(c) for c in match.group() if c.isdigit()]
        doubled = sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
        if (doubled + sum(digits[-1::-2])) % 10 == 0:
            yield match.span()


def find_ipv4_addresses(text: str) -> Iterator[Span]:
    """Yield the spans of public IPv4 addresses; private ranges identify no one."""
    for match in IPV4.finditer(text):
        try:
            public = ipaddress.IPv4Address(match.group()).is_global
        except ValueError:
            continue
        if public:
            yield match.span()


def find_ssns(text: str) -> Iterator[Span]:
    """Yield the spans of US social security numbers of the ranges in use."""
    for match in SSN.finditer(text):
        yield match.span()


PERSONAL_DATA: dict[str, Callable[[str], Iterator[Span]]] = {
    "email": find_emails,
    "phone": find_phones,
    "iban": find_ibans,
    "credit_card": find_credit_cards,
    "ipv4": find_ipv4_addresses,
    "ssn": find_ssns,
}


def holds(kind: str, text: str) -> bool:
    """Return whether `text` contains personal data of `kind`, a key of `PERSONAL_DATA`."""
    return any(True for _ in PERSONAL_DATA[kind](text))
