"""The finished report: one JSON document, and the page that people read. No model, no tensor, no torch.

    llmprune_report.json ─► document ─► facts, measures ─► plots, sentences ─► page: report.html

document.py     the file's name, its schema number, reading it, and its JSON Schema
facts.py        the weights of one document as a grid of layers and linears, and other things that a page shows
measures.py     its evaluations, the dense model's beside the pruned one's
palette.py      the colours, for light and dark
drawing.py      figures of matplotlib as SVG whose colours follow the page
plots.py        what is drawn of one run; curves.py: of several
sentences.py    what is said of one run; words.py: numbers as people read them
page.py         one run as one self-contained HTML file
side_by_side.py several runs in one such file
command.py      `llmprune report`
"""
