"""Load as clients make it, and whether it is served well enough: `make load`."""
