"""Secret keys: every bit counts, no two draws share a key, and no key remains after the run."""

import numpy as np
import pytest
import tinyjob
import torch

from mixdpo.private.dp_sgd import Noise
from mixdpo.private.keys import Key, identities


def noise(key):
    return Noise(1.0, 1.0, 1.0, key).release([torch.zeros(8, 4)], 0)[0]


def test_every_bit_of_the_secret_counts():
    """Fault: a generator that takes the low 32 bits of its seed, as torch's does on a CPU."""
    secret = Key.fresh().secret
    assert len(secret) == 32 and Key.fresh() != Key.fresh()
    for bit in range(256):
        turned = (int.from_bytes(secret, "little") ^ 1 << bit).to_bytes(32, "little")
        assert not torch.equal(noise(Key(secret)), noise(Key(turned))), bit
    assert torch.equal(noise(Key(secret)), noise(Key(secret)))


def test_each_purpose_step_and_example_has_a_generator_of_its_own():
    """Faults: published rows drawn from the key of the noise; steps that share a generator; keys made by
    adding or shifting, which meet ("a", 11) and ("a1", 1)."""
    key = Key.public(1)
    names = [("noise", 0), ("noise", 1), ("noise", "1"), ("sampling", "1"), ("rows",), ("look",), ("a", 11), ("a1", 1),
             ("a", "1", "1"), ("start", "user", "u"), ("start", "pair", "u")]
    states = [key.generator(*name).bit_generator.state["state"]["key"].tolist() for name in names]
    assert len(set(map(tuple, states))) == len(names)
    assert all(len(state) == 2 and min(state) > 2**32 for state in states)  # 128 bits, both words of them
    draws = np.stack([key.generator(*name).standard_normal(4000) for name in names])
    assert np.abs(np.corrcoef(draws) - np.eye(len(names))).max() < 0.08


def test_a_key_does_not_show_itself():
    assert "secret" not in repr(Key.fresh()) and len(repr(Key.fresh())) < 10


def test_names_belong_to_contents_and_copies_are_numbered():
    """Faults: names by position in the file; copies of one content with the same draws."""
    whole = identities(["a", "b", "a", ("a",), b"a", "a"])
    assert len(set(whole)) == 6
    assert identities(["b", "a", "a"]) == [whole[1], whole[0], whole[2]] and identities(["a"]) == whole[:1]


@pytest.mark.parametrize("options", [{}, {"experts": 1}])
def test_no_file_and_no_line_that_stays_holds_the_secret(tmp_path, capsys, monkeypatch, options):
    """Fault: the secret, or anything that determines it, in options, checkpoints or logs."""
    secret = Key.fresh()
    monkeypatch.setattr(Key, "fresh", classmethod(lambda cls: secret))
    model = tinyjob.make_model(tmp_path / "model")
    out = tinyjob.run(tmp_path, model, tinyjob.make_records(), epsilon=2.0, save_minutes=0.0, **options)
    assert not (out / "noise-key").exists()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    printed = "".join(capsys.readouterr()).encode()
    for form in (secret.secret, secret.secret.hex().encode(), str(int.from_bytes(secret.secret, "little")).encode()):
        assert form not in kept + printed
