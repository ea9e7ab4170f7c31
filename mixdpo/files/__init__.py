"""Files: downloads with a checksum, and atomic writes."""
