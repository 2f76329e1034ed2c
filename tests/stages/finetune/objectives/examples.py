"""Pairs and rated answers of a few tokens."""

from stages.common.chat.preferences import Pair, RatedAnswer
from stages.common.chat.template import Encoded
from stages.finetune.objectives.protocol import Start
from stages.finetune.shared_prefix import lay_out
from tests.stages.finetune.project import rows


def arrange(sequences):
    return lay_out(sequences, 1, share_prefix=False)


def start(folder, plan=((0, 1), (2,))):
    return Start(plan, arrange, folder, "sdpa")


def answer(prompt, *tokens):
    return Encoded([*prompt, *tokens], len(prompt))


def make_pairs():
    """Return pairs of which prompts and answers have different lengths."""
    prompts = ([5, 6, 7], [5, 9], [5, 6, 7, 8, 9, 10])
    answers = (((20, 1), (30, 31, 32, 1)), ((21, 22, 23, 1), (33, 1)), ((24, 25, 1), (34, 35, 1)))
    return [
        Pair(row, answer(prompt, *chosen), answer(prompt, *rejected))
        for row, prompt, (chosen, rejected) in zip(rows(3), prompts, answers, strict=True)
    ]


def make_ratings():
    """Return the answers of `make_pairs`, each with its rating."""
    return [
        RatedAnswer(pair.row, one, one is pair.chosen)
        for pair in make_pairs()
        for one in (pair.chosen, pair.rejected)
    ]
