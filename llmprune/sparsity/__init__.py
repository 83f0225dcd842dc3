"""Sparsity on tensors: patterns, masks and the statistics that methods need. Knows nothing of models.

pattern.py      which zeros are allowed, and how people write it
masks.py        scores to masks with exact counts
statistics.py   streaming sums over a linear's inputs
pack.py         a weight without its zeros: values and a bitmap
"""
