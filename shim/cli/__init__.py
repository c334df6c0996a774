"""The `aiexport-edge` command line."""
