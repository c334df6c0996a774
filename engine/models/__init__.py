"""Model families: Hugging Face directories in, logits out."""
