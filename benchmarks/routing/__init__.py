"""What routing by the beginning of a conversation is worth (`python -m benchmarks.routing`)."""
