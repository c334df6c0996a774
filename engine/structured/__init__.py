"""Structured output: JSON by construction. Grammars, the document as it grows, and the shortest way to its end."""
