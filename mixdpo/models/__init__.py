"""GPT-2 and Llama by hand, and the files that hold their weights."""
