"""Running sparse weights: packed checkpoints load, and every packed linear multiplies without becoming dense.

    packed files ─► transformers_plugin ─► SparseLinear ─► dispatch ─► a path: CPU kernel, GPU kernel, or dense

import_hook.py          acts when transformers is imported, so that importing llmprune need not import it
registration.py         has transformers know the plugin
transformers_plugin.py  `quant_method: "llmprune"` for from_pretrained and save_pretrained
placement.py            where each packed tensor of a checkpoint goes in a model
no_gradient.py          what asks a packed model for a gradient is told that there is none
unpack_on_load.py       what no sparse product can use (fused experts) becomes dense while it is loaded
sparsify.py             a dense model's sparse linears packed in memory, and back

sparse_linear.py        the module that stands in place of nn.Linear
weight.py               a packed weight, and what paths derive from it once
dispatch.py             which path a product takes, by device, pattern, tokens and shape
timing.py               what `llmprune tune` measured on this machine
paths.py                the ways to multiply: CPU kernel, expand and multiply, held dense
paths_cuda.py           the ways on a GPU
scratch.py              one dense buffer that all layers share
cpu.py                  the CPU kernel, compiled at first use by cpu_build.py: torch operators in cpu_kernel.cpp, rows
                        in cpu_rows.cpp, instructions in cpu_vectors.h

opening.py              a model to run, packed or dense, and its tokenizer
generate.py             `llmprune generate`
bench.py, peak.py       `llmprune bench`
tune.py                 `llmprune tune`
"""
