"""Low-rank adapters: directories as the PEFT library writes them."""
