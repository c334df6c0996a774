"""Low-rank adapters: directories as the PEFT library writes them, and which of them this engine serves."""
