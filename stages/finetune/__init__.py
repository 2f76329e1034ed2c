"""Stage finetune: train a LoRA adapter on the base model."""
