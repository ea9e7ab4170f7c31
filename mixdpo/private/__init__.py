"""Differential privacy: secret keys, the accountant, DP-SGD, the budget of a run."""
