"""The reference CNN: one convolution and two linear layers, 2.8 million parameters."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Classifies 28x28 grayscale images into 10 classes.

    Args:
        linear: makes the linear layers, as :class:`torch.nn.Linear` does.
    """

    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.fc1 = linear(32 * 26 * 26, 128)
        self.fc2 = linear(128, 10)

    def channels(self) -> dict[str, str]:
        """The layers whose output channels can be taken out, each with the one that reads them."""
        return {"conv1": "fc1", "fc1": "fc2"}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, 10] for images [N, 1, 28, 28] of the parameters' dtype.

        Raises ValueError for any other shape.
        """
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(f"images must have shape [N, 1, 28, 28], got {list(images.shape)}")
        x = F.relu(self.conv1(images))  # [N, 32, 26, 26]
        x = x.flatten(start_dim=1)  # [N, 32*26*26]
        x = F.relu(self.fc1(x))  # [N, 128]
        return self.fc2(x)  # [N, 10]
