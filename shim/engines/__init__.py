"""Clients of the engines: sessions, routing, resume."""
