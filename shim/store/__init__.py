"""The durable store: workspaces, keys, usage."""
