"""Numbers about a causal language model, with error bars. Each measure can be run by hand.

perplexity.py    how well it predicts a text: python -m llmprune.eval.perplexity --help
divergence.py    how far its predictions are from the dense model's on the same tokens
zero_shot.py     tasks of the lm-evaluation-harness (harness.py), from the Hub or from files (tasks.py)
generation.py    what it writes after a prompt, beside the dense model
measure.py       all of these on one model, and on others beside the dense one
compare.py       several checkpoints in one table: llmprune compare; command.py: llmprune eval
losses.py        what a model makes of windows, in bounded memory
"""
