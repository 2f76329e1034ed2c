"""The service with vLLM's CPU build: this machine counts as one with a GPU."""

from services.engines import select

select._count_gpus = lambda: 1

from services.generation import Generation  # noqa: E402

__all__ = ["Generation"]
