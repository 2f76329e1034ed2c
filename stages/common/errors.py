"""Errors that a user can cause and fix; each names the problem, the value and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(Exception):
    """A file, a row, a model, a parameter or the machine is not as required.

    Args:
        what: the problem and the value seen; one line per problem.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"


class ParamsError(InputError):
    """`params.yaml` is invalid; the message lists every problem of the file."""

    exit_code = 2


class TransientError(InputError):
    """A temporary failure, such as a network that does not answer; the training flow retries the stage.

    The code is EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
    """

    exit_code = 75


def raise_problems(problems: Sequence[InputError]) -> None:
    """Raise one InputError with all problems, if there are any."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    raise InputError(
        f"{len(problems)} problems, found before training\n" + "\n".join(f"- {p.what}" for p in problems),
        "\n".join(f"- {fix}" for fix in dict.fromkeys(p.fix for p in problems)),
    )
