"""The decoder that all models share, and one short file per Hugging Face model_type, found by its name."""
