"""The studies that a practitioner needs: `make study NAME=...`, one file each, a page each in docs/studies."""

import importlib

NAMES = ("fixed", "separation", "gate", "collapse", "ood", "noise", "experts", "data", "peers", "synth", "parity",
         "privacy", "audit", "starts", "conflict", "rankings", "auto")


def study_of(name: str):
    """The study of this name (data/studies/study.py)."""
    return importlib.import_module(f"data.studies.{'amount' if name == 'data' else name}").STUDY
