"""How quantized checkpoints lie in their files: what is read, what is refused."""
