"""Remakes the golden files beside this script: tiny random models of transformers, their logits, greedy continuations.

    python tests/golden/make.py [DIRECTORY]         with transformers 5: all of a case but the file below
    python tests/golden/make.py [DIRECTORY]         with transformers 4.57: config-4.json of each case, the older form

A case is a folder: config.json and the weights as from_pretrained's counterpart save_pretrained writes them (one in
shards), and golden.safetensors with

    ids     (2, T)       logits (2, T, V)
    prompt  (2, P)       greedy (2, G)          what generate(do_sample=False) appends to each prompt

Matrices have a gain near one and biases and norms are random too: at transformers' own initialisation (std 0.02) the
blocks add next to nothing to the residual stream, and most faults in them would go unseen. Imports nothing of mixdpo.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

FOUR = transformers.__version__.startswith("4.")

COMMON = dict(attention_dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def llama3(theta, **scaling):
    """rope's settings in the form of the version that runs."""
    scaling = dict(rope_type="llama3", **scaling)
    if FOUR:
        return dict(rope_theta=theta, rope_scaling=scaling)
    return dict(rope_parameters=dict(rope_theta=theta, **scaling))


def plain(theta):
    return dict(rope_theta=theta) if FOUR else dict(rope_parameters=dict(rope_theta=theta, rope_type="default"))


# Name -> (T, configuration). Odd sizes wherever a size is free.
CASES = {
    "gpt2": (23, GPT2Config(vocab_size=51, n_positions=40, n_embd=20, n_layer=2, n_head=4,
                            bos_token_id=50, eos_token_id=50, pad_token_id=50)),
    "gpt2-inner": (17, GPT2Config(vocab_size=37, n_positions=30, n_embd=15, n_layer=3, n_head=3, n_inner=29,
                                  layer_norm_epsilon=1e-3, bos_token_id=36, eos_token_id=36, pad_token_id=36)),
    # As SmolLM2: 3 query heads a key head, tied.
    "llama-tied": (29, LlamaConfig(vocab_size=53, max_position_embeddings=64, hidden_size=18, intermediate_size=37,
                                   num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3, head_dim=2,
                                   rms_norm_eps=1e-3, tie_word_embeddings=True, **plain(1000.0), **COMMON)),
    # Heads wider than C / H, one key head, an unembedding of its own; saved in shards.
    "llama-untied": (21, LlamaConfig(vocab_size=47, max_position_embeddings=48, hidden_size=21, intermediate_size=26,
                                     num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=10,
                                     rms_norm_eps=1e-5, tie_word_embeddings=False, **plain(10000.0), **COMMON)),
    # As Llama 3.2: of its 8 frequencies some are kept, some blended, some divided; rows longer than the old context.
    "llama3-scaling": (61, LlamaConfig(
        vocab_size=41, max_position_embeddings=256, hidden_size=24, intermediate_size=23, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True,
        **llama3(300.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        **COMMON)),
    # As Qwen2.5: q, k and v with a bias, a window that is not used.
    "qwen2": (27, Qwen2Config(vocab_size=43, max_position_embeddings=64, hidden_size=20, intermediate_size=27,
                              num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-4,
                              tie_word_embeddings=True, **plain(2000.0), **COMMON)),
    # As Qwen3: heads wider than C / H, each with its norm.
    "qwen3": (27, Qwen3Config(vocab_size=45, max_position_embeddings=64, hidden_size=18, intermediate_size=25,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                              rms_norm_eps=1e-3, tie_word_embeddings=False, **plain(3000.0), **COMMON)),
    # As Mistral 0.3: no window.
    "mistral": (25, MistralConfig(vocab_size=39, max_position_embeddings=64, hidden_size=20, intermediate_size=23,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                                  sliding_window=None, rms_norm_eps=1e-5, tie_word_embeddings=False, **plain(1000.0),
                                  **COMMON)),
    # As SmolLM3: every third layer without rope (SmolLM3: every fourth).
    "smollm3": (31, SmolLM3Config(vocab_size=42, max_position_embeddings=64, hidden_size=16, intermediate_size=23,
                                  num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                  no_rope_layer_interval=3, rms_norm_eps=1e-5, tie_word_embeddings=True, **plain(700.0),
                                  **COMMON)),
    # As OLMo 2: norms behind attention and MLP, and of all heads of q or k at once.
    "olmo2": (23, Olmo2Config(vocab_size=44, max_position_embeddings=64, hidden_size=24, intermediate_size=22,
                              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3,
                              tie_word_embeddings=False, **plain(1500.0), **COMMON)),
}
SHARDED = {"llama-untied": "12KB"}


def random_model(config, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        noise = torch.randn_like(p)
        if p.dim() == 2:
            p.data = noise / p.shape[-1] ** 0.5 * 1.5
        else:
            p.data = 0.3 * noise + (p.data.mean() > 0.5)            # norms near 1, biases near 0
    return model


@torch.no_grad()
def make(name, folder, seed):
    tokens, config = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if FOUR:
        config.to_json_file(folder / "config-4.json")
        return
    model = random_model(config, seed)
    model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids, prompt = torch.randint(config.vocab_size, (2, tokens)), torch.randint(config.vocab_size, (2, 5))
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None,
                            max_new_tokens=12)[:, 5:].contiguous()
    best = model(torch.cat((prompt, greedy), 1)).logits[:, 4:-1].topk(2).values       # (2, G, 2)
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, f"{name}: two tokens are nearly tied; take another seed"
    save_file({"ids": ids, "logits": model(ids).logits, "prompt": prompt, "greedy": greedy},
              folder / "golden.safetensors", metadata={"transformers": transformers.__version__})


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for number, case in enumerate(CASES):
        make(case, root / case, number)
        print(case, json.dumps({p.name: p.stat().st_size for p in sorted((root / case).iterdir())}))
