"""A finished run behind an OpenAI-compatible endpoint, and a local page where its experts answer side by side.

    trunks       the models that requests pass through, and each policy as (trunk, adapter, head)
    policies     ServedRun: what a run offers; ids of a prompt, weights, margins, scores
    decoder      the rows that decode together on one trunk
    engine       continuous batching: requests join and leave the running batch at every token
"""
