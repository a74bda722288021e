"""What tests of the INT8 layers share."""

import torch
from torch import nn

import bigkern
from bigkern import backends


def sqnr(actual, expected):
    """The signal in `expected` over the error of `actual`, in dB."""
    signal = expected.double()
    noise = actual.detach().double() - signal
    return 10 * torch.log10(signal.square().sum() / noise.square().sum()).item()


def double(module):
    """The module's results in float64."""
    wide = {name: x.detach().double() for name, x in module.state_dict().items()}
    return lambda *args: torch.func.functional_call(module, wide, tuple(x.double() for x in args))


def plain_and_packed(weight):
    """The second where the backend packs."""
    if not backends.has("pack_weight", weight.device.type):
        return (weight,)
    return weight, bigkern.pack_weight(weight)


class OutlierModel(nn.Module):
    """Two linear layers after a norm that makes some columns a hundred times as large as others, as
    those of large language models are; what reads them has small weights there."""

    COLUMNS = (3, 64, 127)

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.fc1 = nn.Linear(128, 256)
        self.fc2 = nn.Linear(256, 65)
        with torch.no_grad():
            self.norm.weight[list(self.COLUMNS)] = 100.0
            self.fc1.weight[:, self.COLUMNS] *= 0.01

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.norm(x))))
