"""The playground of sentence-transformers-inf; written by `inf-embed space`."""

from sentence_transformers_inf.playground.page import build_page, launch

launch(build_page(model=None, compare=None, corpus="mini"))
