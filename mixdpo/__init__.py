"""Mix-DPO and MoE-DPO (arXiv 2510.08256) in plain PyTorch: DPO with a latent mixture of K experts, trained by EM.

The names below are the public interface; their docstrings give shapes and units. README gives the reading order.
"""

from mixdpo.dpo import dpo_loss, margins
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.gates import Gate
from mixdpo.logprob import token_logps, token_logps_reference
from mixdpo.mixture import e_step, elbo, expert_loss, gate_loss, log_marginal, mixture_logp
from mixdpo.models.weights import load_model, save_model
from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer

__all__ = ["Adapters", "Gate", "Heads", "Models", "dpo_loss", "e_step", "elbo", "expert_loss", "gate_loss",
           "load_model", "load_tokenizer", "log_marginal", "margins", "mixture_logp", "read_preferences", "save_model",
           "token_logps", "token_logps_reference"]
