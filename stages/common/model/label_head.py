"""A linear layer over the labels of a task, in the place of a model's output layer (method head).

It reads the last hidden state of the last token of the prompt, with which the model begins its answer. So
the labels are what words are to other models: the same training, the same loss, the softmax for
probabilities. The answer is a label's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.common.chat.template import Encoded
from stages.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def put_head(model: Any, labels: Sequence[str]) -> Any:
    """Give a model a new output layer, one row of zeros for each label, in float32; return the layer.

    Zeros make all labels alike likely; the loss is convex, so nothing is gained by another start.
    """
    import torch

    hidden = model.config.get_text_config().hidden_size
    head: Any = torch.nn.Linear(hidden, len(labels), dtype=torch.float32, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.register_forward_pre_hook(_widen)
    head.labels = tuple(labels)
    model.set_output_embeddings(head)
    return head


def _widen(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].to(head.weight.dtype),)


def find_labels(model: Any) -> tuple[str, ...]:
    """Return the labels of a model with a head; none for a model that writes text."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "labels", ())


def check_labels(labels: Sequence[str]) -> None:
    """Check that a head has labels to choose from.

    Raises:
        InputError: there is one, whose probability is 1 before anything is learned.
    """
    if len(labels) < 2:
        raise InputError(
            f"finetune.method: head learns which label an answer is, and the task has {len(labels)}: "
            f"{', '.join(labels) or 'none'}",
            "add rows with another label (collect.sources), and run the stages from collect on again",
        )


def count_head_weights(config: Any, labels: int) -> int:
    """Return how many weights the head of a base model has."""
    return labels * (int(config.get_text_config().hidden_size) + 1)


def find_place(label: str, labels: Sequence[str]) -> int:
    """Return the place of an answer among the labels.

    Raises:
        InputError: it is none of them.
    """
    try:
        return labels.index(label.strip())
    except ValueError:
        raise InputError(
            f"the answer {label[:60]!r} is none of the {len(labels)} labels of the task",
            "run the stages from curate on again: they leave such rows out",
        ) from None


def encode_label(example: Encoded, answer: str, labels: Sequence[str]) -> Encoded:
    """Return a row whose last answer is the number of its label instead of the label's tokens."""
    start, _ = example.learned[-1]
    return Encoded([*example.input_ids[:start], find_place(answer, labels)], start)
