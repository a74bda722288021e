"""The reference models: small, whole, and readable from top to bottom."""

from bigkern.models.cnn import SimpleCNN

__all__ = ["SimpleCNN"]
