"""Serving embeddings over HTTP, and checking a server that does. Only :mod:`.app` needs the extra ``serve``."""
