"""Check before the costly stages whether a machine's memory holds what `finetune` keeps all the time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stages.common.errors import InputError
from stages.common.machine.memory import format_bytes, read_total_memory
from stages.common.machine.training_memory import count_state_bytes
from stages.common.model.adapter import REPLACED_METHODS, SHARDED_METHODS
from stages.common.model.loading import pick_device, pick_dtype
from stages.common.model.nf4 import NF4_BYTES

if TYPE_CHECKING:
    from stages.common.params.finetune import Finetune


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained.

    Attributes:
        parameters: weights of the base model.
        trained_parameters: weights that training changes or adds.
        reach: share of the transformer blocks that a backward pass goes through.
        quantized_parameters: of the base model, those that are held in 4 bits.
        teacher_parameters: weights of the teacher, if there is one.
    """

    method: str
    parameters: int
    trained_parameters: int
    reach: float
    quantized_parameters: int = 0
    teacher_parameters: int = 0

    def describe(self) -> dict[str, Any]:
        """Return it as evidence."""
        return asdict(self)


def find_memory_problems(training: Training, finetune: Finetune) -> list[InputError]:
    """Return whether weights, gradients and averages alone are more than the memory of this machine.

    On a Ray cluster others train; each refuses then what its own memory cannot hold.
    """
    if finetune.launcher == "ray":
        return []
    device = pick_device()
    needed = count_own_bytes(training, finetune)
    has = measure_memory(device.type) * count_sharing(finetune, device.type)
    if needed <= has or (can_be_shared(finetune) and finetune.launcher != "local"):
        return []  # how many hosts there will be is not known here
    return [
        InputError(
            f"finetune.method {training.method} needs {format_bytes(needed)} for weights, gradients and "
            f"averages of {training.trained_parameters:,} trained weights, and this machine has "
            f"{format_bytes(has)} of memory",
            "train fewer weights (finetune.method: lora, or fewer finetune.trained_modules), or choose a "
            "smaller base model",
        )
    ]


def count_own_bytes(training: Training, finetune: Finetune) -> int:
    """Return the bytes of a model's weights, and of gradients and averages of what is trained."""
    element_bytes = pick_dtype(pick_device(), finetune.dtype).itemsize
    replaced = training.method in REPLACED_METHODS
    needed = count_state_bytes(training.parameters, training.trained_parameters, element_bytes, replaced)
    return needed - int(training.quantized_parameters * (element_bytes - NF4_BYTES))


def find_memory_problems_of_teacher(
    weights: int, finetune: Finetune, training: Training | None
) -> list[InputError]:
    """Return whether a teacher is more than the memory of this machine holds.

    One that teaches its logits stays beside the model that learns; one that answers leaves before it comes.

    Args:
        weights: of the teacher.
    """
    if finetune.launcher == "ray":
        return []
    device = pick_device()
    needed = weights * pick_dtype(device, finetune.dtype).itemsize
    has = measure_memory(device.type)
    what = f"the weights of the teacher {finetune.taught_by} take {format_bytes(needed)}"
    fix = "choose a smaller teacher"
    if training and finetune.distill == "logits":
        own = count_own_bytes(training, finetune)
        what += f" beside {format_bytes(own)} of the model that learns, its gradients and averages"
        fix += ", or distill its answers (finetune.distill: answers)"
        needed += own
    if needed <= has:
        return []
    return [InputError(f"{what}, and this machine has {format_bytes(has)} of memory", fix)]


def can_be_shared(finetune: Finetune) -> bool:
    """Return whether several processes may share the model; with a teacher each has the whole of both."""
    return finetune.sharding != "none" and finetune.method in SHARDED_METHODS and finetune.taught_by is None


def count_sharing(finetune: Finetune, kind: str) -> int:
    """Return how many GPUs of this machine can share the model; on a CPU all processes have one memory."""
    if kind != "cuda" or not can_be_shared(finetune):
        return 1
    import torch

    wanted = finetune.devices
    return min(torch.cuda.device_count(), finetune.batch_size) if wanted == "auto" else wanted


def measure_memory(device: str) -> int:
    """Return the bytes of memory of the GPU, or of the machine."""
    if device != "cuda":
        return read_total_memory()
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)
