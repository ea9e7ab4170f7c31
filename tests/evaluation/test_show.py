"""mixdpo/evaluation/show.py: what each test catches stands in its docstring."""

import json

import pytest
import tinyjob
from letters import GOOD, Letters, read, write
from raising import raises_at

from mixdpo.evaluation.show import main, show
from mixdpo.preferences import collate
from mixdpo.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("eos", [256, 0])
def test_show_tells_the_parts_apart(tmp_path, eos):
    """Caught: EOS shown as padding where their ids are equal; a cut response as finished; raw control characters."""
    tokenizer, record = Letters(eos=eos), {"prompt": "a\n", "chosen": "b\x1b", "rejected": "cdefgh"}
    pairs = read(tmp_path, record, tokenizer=tokenizer, max_response=5, report=str)
    batch = collate(pairs, [0])
    assert show(batch, tokenizer).splitlines() == [
        "pair 0 (group 0)",
        f"  chosen   prompt 'a\\n' response 'b\\x1b' EOS <{eos}> padding 0 x 2",
        "  rejected prompt 'a\\n' response 'cdefg'",
    ]
    legend, _, chosen, _ = show(batch, tokenizer, colour=True).splitlines()
    assert all(name in legend for name in ("prompt", "response", "EOS", "padding"))
    parts = ["\033[36ma\\n\033[0m", "\033[1;32mb\\x1b\033[0m", f"\033[30;43m<{eos}>\033[0m", "\033[90m0 x 2\033[0m"]
    assert chosen == "  chosen   " + "".join(parts)


def test_command_prints_a_batch_with_a_real_tokenizer(tmp_path, capsys):
    """Caught: a fake tokenizer unlike the real one; the name of EOS in a text read as EOS, or not counted; FILE
    ignored."""
    letters = {c: i for i, c in enumerate("abcdehinost<|>Ġ")} | {"th": 15}
    tokens = [{"id": 16, "content": "<|eos|>", "special": True}]
    document = {
        "model": {"type": "BPE", "vocab": letters, "merges": ["t h"]},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": tokens,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    path = write(tmp_path, {"prompt": "cat", "chosen": "hi <|eos|>", "rejected": "the bath"})
    main([str(path), "--model", str(tmp_path), "--max-response", "20"])
    counted, *shown = capsys.readouterr().out.splitlines()
    assert counted.startswith(f"{path}: ") and counted.endswith(": 1 (first: line 1)")
    assert shown == [
        "pair 0 (group 0)",
        "  chosen   prompt 'cat' response 'hi <|eos|>' EOS <16>",
        "  rejected prompt 'cat' response 'the bath' EOS <16> padding 0 x 4",
    ]
    write(tmp_path, *({"prompt": "cat", "chosen": letter, "rejected": "a"} for letter in "xb"))
    with raises_at("'x'", "position 0", file=path, line=1):
        main(["--data", str(path), "--model", str(tmp_path)])
    main([str(path), "--model", str(tmp_path), "--drop", "true"])
    assert capsys.readouterr().out.startswith(f"{path}: dropped, no token for a character: 1 (line 1)\npair 0")


def test_a_special_token_and_its_name_are_told_apart(tmp_path):
    """A conversation, and a text with the template written out. Catches: both shown alike."""
    tokenizer = load_tokenizer("smollm2")
    turns = [{"role": role, "content": text} for role, text in (("system", "S"), ("user", "Hi"), ("assistant", "a"))]
    template = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns[:2])
    rows = [{"prompt": turns[:2], "chosen": turns[2:], "rejected": [turns[2] | {"content": "b"}]},
            {"prompt": template + "<|im_start|>assistant\n", "chosen": "a<|im_end|>", "rejected": "b"}]
    batch = collate(read(tmp_path, *rows, tokenizer=tokenizer, max_prompt=99, report=str), [0, 1])
    plain, coloured = show(batch, tokenizer).splitlines(), show(batch, tokenizer, colour=True).splitlines()
    turn = " <|im_start|> '{}\\n{}' <|im_end|> '\\n'".format
    assert plain[1].startswith(f"  chosen   prompt{turn('system', 'S')}{turn('user', 'Hi')} <|im_start|> "
                               "'assistant\\n' response 'a' EOS <2> padding")
    prompt = template.replace("\n", "\\n")
    assert plain[4].startswith(f"  chosen   prompt '{prompt}<|im_start|>assistant\\n' response 'a<|im_end|>' EOS")
    assert "\033[30;45mspecial\033[0m" in coloured[0] and coloured[2].count("\033[30;45m<|im_end|>\033[0m") == 2
    assert "\033[30;45m" not in coloured[5] and "<|im_end|>" in coloured[5]


@pytest.mark.parametrize("pairs", [0, -1])
def test_at_least_one_pair_is_shown(tmp_path, pairs):
    """Catches: a ValueError of max() for --pairs 0."""
    with raises_at(pairs, option="pairs"):
        main([str(write(tmp_path, GOOD)), "--pairs", str(pairs)])


def test_a_jobs_own_model_and_lengths_are_taken(tmp_path, capsys):
    """Of a job with a tuned reference, and of one on a model as it is, with conversations. Catches: SmolLM2's tokenizer
    and 64 ids for every job, which refuse a longer conversation, or for the first of several files; a traceback for a
    dataset.json of somebody else."""
    special = ("<|im_end|>", "<|im_start|>")
    model = tinyjob.make_model(tmp_path / "model", context=256, special=special)
    row = {"prompt": [{"role": "user", "content": "x" * 90}]}
    row |= {side: [{"role": "assistant", "content": side * 12}] for side in ("chosen", "rejected")}
    path = write(tmp_path, row)
    (tmp_path / "dataset.json").write_text(json.dumps({"max_prompt": 150, "max_new": 5}))
    (tmp_path / "job.json").write_text(json.dumps({"model": str(model)}))
    main([str(path)])
    shown = capsys.readouterr().out
    assert "<|im_start|> 'user\\n" + "x" * 90 + "' <|im_end|> '" in shown and "response 'chose'\n" in shown
    (tmp_path / "job.json").write_text(json.dumps({"model": "none such"}))
    tinyjob.make_model(tmp_path / "reference", context=256, special=special)
    main([str(path)])
    assert capsys.readouterr().out == shown
    more = write(tmp_path, row, name="more.jsonl")
    main([f"{path},{more}"])
    assert capsys.readouterr().out.count("response 'chose'") == 2
    for foreign in ('[{"prompt": "a"}]', "{"):
        (tmp_path / "dataset.json").write_text(foreign)
        main([str(path), "--max-prompt", "150", "--max-response", "5"])
        assert capsys.readouterr().out == shown
