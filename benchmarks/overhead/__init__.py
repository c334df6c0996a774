"""`python -m benchmarks.overhead`: what the stack costs by itself, with a core that computes nothing."""
