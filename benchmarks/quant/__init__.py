"""What weights, keys and values in few bits cost in precision, and what they gain in speed and memory."""
