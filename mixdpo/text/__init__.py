"""Text, conversations and records become token ids."""
