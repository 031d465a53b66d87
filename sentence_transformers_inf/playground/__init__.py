"""The playground: a page on which a ranking moves with its instruction (``inf-embed playground``).

What it shows is made without a browser: the passages and examples (``corpus``), the rankings (``ranking``), the case in
words (``words``) and the HTML (``render``). ``page`` puts Gradio around it.
"""
