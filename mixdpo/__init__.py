"""Mix-DPO and MoE-DPO (arXiv 2510.08256) in plain PyTorch: Direct Preference Optimization with a latent mixture of experts, trained by EM.

The reading order is the path of the data: preferences, gpt2 and llama, logprob, dpo, mixture, experts; then train.py and eval.py.
Importing this package runs nothing and exports nothing: each file is imported by its own name.
"""
