"""What the engine does on an NVIDIA card: right, and how fast. One command: `python -m benchmarks.gpu`."""
