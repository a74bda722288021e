"""Small Transformers that several test files share."""

from dataclasses import replace

import torch

from bigkern.models import Transformer, TransformerConfig

V, D, H, L = 37, 48, 3, 19
DECODER = TransformerConfig(V, context=24, dim=D, num_heads=H, num_blocks=2)
ENCODER = replace(DECODER, num_features=7, num_classes=5)


def make(config, dtype=torch.float32):
    """The same parameters for each dtype; larger than at the start, so that all parts matter."""
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype)
