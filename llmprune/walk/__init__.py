"""How a model runs: its layers one by one, and every batch of a layer in step with the others.

recorder.py   what each decoder layer is called with, and the proof that calling it by itself is the same
products.py   where a layer multiplies activations with its parameters, whatever modules it is made of
survey.py     which weights a layer meets, in what order, which share an input, and what a paused batch holds
lockstep.py   the walk through one layer: batches pause, weights are handed out and replaced, batches go on
mapped.py     hidden states in files in place of memory
resident.py   a layer on the device that computes, for the time of its turn
"""
