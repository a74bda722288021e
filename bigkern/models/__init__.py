"""The reference models: small, whole, and readable from top to bottom."""

from bigkern.models.cnn import SimpleCNN
from bigkern.models.transformer import Transformer, TransformerConfig

__all__ = ["SimpleCNN", "Transformer", "TransformerConfig"]
