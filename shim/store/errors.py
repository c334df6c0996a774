"""What can go wrong with the store, each a sentence for a person that says what to do."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot do what was asked."""


class Missing(StoreError):
    """No such workspace or key."""


class NameTaken(StoreError):
    """A workspace of that name exists."""


class InvalidValue(StoreError):
    """A name, plan, scope or limit that can't be."""


class NotAllowed(StoreError):
    """More than who asks may give."""


class TooMany(StoreError):
    """There are as many of these as there may be."""


class WrongSchema(StoreError):
    """The database was made by another version of the product."""
