"""How the kernels are tested, with and without a GPU.

aot.py               compile for a GPU that is not there; registers, spills and instructions of the result
emulate_mma_sp.py    run a Gluon kernel's own source on the CPU, with a lane-by-lane model of `mma.sp`
compare.py           how far a result is from the truth, and where
"""
