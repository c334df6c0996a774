"""Webhooks: an end of a batch told to the address that its owner gave, signed, until it is heard."""
