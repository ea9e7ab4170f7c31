"""Text: preference records, conversations and tokenizers."""
