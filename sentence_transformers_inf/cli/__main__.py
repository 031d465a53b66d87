"""``python -m sentence_transformers_inf.cli``."""

from sentence_transformers_inf.cli import main

main()
