"""A run: its options, checkpoints, logs, reference and memory; experts taken over; finished runs read back."""
