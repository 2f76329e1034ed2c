"""A folder in which the real service starts: params.yaml, and a tiny model as the pipeline leaves one."""

import json
import shutil
from pathlib import Path

from tests.services.serving import ROOT
from tests.tiny import make_model, save_model


def make_checkout(root: Path, changes: dict[str, str] | None = None, **shape) -> Path:
    """Fill `root`; each key of `changes` occurs once in params.yaml and is replaced; `shape` is a model's."""
    from peft import LoraConfig, get_peft_model

    text = (ROOT / "params.yaml").read_text()
    for old, new in {"kind: auto #": "kind: transformers #", **(changes or {})}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (root / "params.yaml").write_text(text)
    base, adapter, export = (root / "artifacts" / name for name in ("fetch_base", "finetune", "export"))
    save_model(base, **shape)
    get_peft_model(make_model(**shape), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(adapter)
    shutil.copytree(base, export, ignore=shutil.ignore_patterns("*.safetensors"))
    about = {
        "name": "tiny",
        "version": "c" * 12,
        "base_model": "tiny",
        "system_prompt": None,
        "task": {"kind": "text", "label_key": None, "labels": None},
        "answer_schema": None,
        "adapter_sha256": "",
        "context_tokens": 512,
    }
    (export / "serving.json").write_text(json.dumps(about))
    return root
