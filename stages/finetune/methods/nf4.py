"""A base model in 4 bits by bitsandbytes (method qlora): its linear layers as NF4, the rest as it is.

Dettmers et al. 2023, "QLoRA: Efficient finetuning of quantized LLMs": the scales are quantized again, and
products are computed in the dtype of the training from weights that are widened for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stages.common.model.loading import read_config
from stages.common.model.nf4 import check_nf4


def load_nf4(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the base model of a folder with its linear layers, but the output layer, in 4 bits.

    Raises:
        InputError: bitsandbytes is missing, the device is none of its own, or the weights are quantized.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    check_nf4(read_config(folder), device.type)
    from bitsandbytes.nn import Linear4bit

    logging.disable_progress_bar()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, quantization_config=settings, device_map={"": device}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with bfloat16 bitsandbytes would rewrite the weights when the model is first asked,
            # with rounded scales, and no gradient would pass them from then on.
            module.support_avx512bf16_for_cpu = False
    return model.eval()
