"""Files: fetched with a checksum, and written completely or not at all."""
