"""Pictures in requests: read from a body, fetched from a URL, handed to an engine."""
