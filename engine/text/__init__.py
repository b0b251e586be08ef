"""Text and token ids: tokenizers of every kind, chat templates, text as it streams."""
