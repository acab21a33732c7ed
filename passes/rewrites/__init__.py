"""Rewrites of the normal form, each a function ``(graph, node) -> the replacement, or None``."""
