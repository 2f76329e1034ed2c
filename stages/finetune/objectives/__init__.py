"""What is optimized: the loss that a batch has, by `finetune.method`."""
