"""`python -m benchmarks.proxies`: this stack beside LiteLLM's proxy, each before something that answers at once."""
