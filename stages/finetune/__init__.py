"""Stage finetune: train an adapter of the base model."""
