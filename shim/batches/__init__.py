"""Batches: taken in as they arrive, executed below interactive work, each request answered and billed once."""
