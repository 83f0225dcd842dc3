"""Checkpoints: files, and the Hub.

    check_output ─► [work] ─► publish: write ─► report ─► verify ─► rename into place ─► push

target.py       the place of the output: checked before the work, filled beside it, renamed into it in one step
save.py         a model, its tokenizer and what belongs to them, as files that transformers loads
carry.py        what save_pretrained leaves behind in the source: licences, code, tensors that the class does not load
layout.py       names, axes and bytes of the tensors on disk, whatever the modules store
provenance.py   versions, machine, model, moment and command, without anybody's secrets
report.py       what was done to every tensor, and what each holds, as one JSON file beside the weights
probe.py        one question to the model before it is saved, which the reloaded one must answer alike
verify.py       the files against that report, at any time and without the source
packed.py       a tensor without its zeros: what it is on disk, there and back
convert.py      whole checkpoints packed and unpacked
shards.py       files of weights whose tensors come one by one, and a hollow model as such files
partial.py      what a run has finished so far
stream.py       a checkpoint rewritten with one tensor in memory at a time
rescue.py       the bitmask checkpoints of compressed-tensors ≤ 0.14, which nothing else reads any more
base_card.py    what the base model's card says of licence and language
card.py         the checkpoint's own card, README.md; card_facts.py what it says
hub.py          may I push there
push.py         the push, and the proof that it arrived (arrival.py)
refusal.py      one sentence for every way in which the Hub's client fails
"""
