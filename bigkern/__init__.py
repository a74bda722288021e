"""Hand-written kernels that make PyTorch training and inference cheaper, as drop-in parts."""

from importlib.metadata import version

import torch  # noqa: F401  (before the compiled libraries, which need torch's)

__version__ = version("bigkern")

from bigkern import amp, backends, libraries, models, optim

__all__ = ["__version__", "amp", "backends", "libraries", "models", "optim"]
