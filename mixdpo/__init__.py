"""Mix-DPO and MoE-DPO (arXiv 2510.08256) in plain PyTorch: DPO with a latent mixture of experts, trained by EM.

Each file is imported by its own name; this one exports nothing. README gives the order in which to read them.
"""
