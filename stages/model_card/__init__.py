"""Stage model_card: write the model card from the evidence."""
