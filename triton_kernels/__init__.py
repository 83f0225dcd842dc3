"""Kernels for sparse weights on a GPU: torch and triton only, nothing of llmprune.

A linear layer is y (M, N) = x (M, K) · W (N, K)ᵀ + bias, with M tokens, N outputs and K inputs.

pack_24.py        a 2:4 weight as values and index bits; the index words that sparse tensor cores read
matmul_24.py      multiply with a 2:4 weight: sparse tensor cores, or portable kernels where those do not fit
decompress_24.py  a 2:4 weight back to a dense one, into a buffer that all layers can share
configs_24.py     which kernel and with which settings: candidates for timing, and a choice without
*_sell.py         the same for unstructured sparsity and up to 4 tokens
*_bitmap.py       the same for unstructured sparsity and more tokens, and for every other N:M
sparsegpt_sweep.py  no product, but a step of pruning itself: SparseGPT's columns, a block at a time
testing/          compile without a GPU and count instructions; run an `mma.sp` kernel without one; compare results

Each public operation checks its arguments and launches a kernel that stands in a file behind it
(`_matmul_24_mma_kernel.py`); its twin in plain torch (`matmul_24_torch`) stands beside it and says what is right.
Importing this package loads neither triton nor a CUDA context: a kernel's file is imported when it is first launched.
"""
