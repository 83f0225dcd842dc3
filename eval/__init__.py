"""Numbers about a causal language model, with error bars. Each measure can be run by hand.

perplexity.py    how well it predicts a text: python -m llmprune.eval.perplexity --help
losses.py        cross-entropies of windows in bounded memory
"""
