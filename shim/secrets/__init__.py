"""Secrets that must be read again (webhooks, signing keys): encrypted under a master key that the store never holds."""

from aiexport_edge.shim.secrets.box import SecretBox
from aiexport_edge.shim.secrets.master_keys import MasterKey, MasterKeys, SecretError

__all__ = ["MasterKey", "MasterKeys", "SecretBox", "SecretError"]
