"""Runs ops by Triton's interpreter, and checks them against the native ones: started by
test_triton_interpreter.py with TRITON_INTERPRET=1, which Triton reads when kernels are defined.

python tests/interpreted.py NAME
"""

import contextlib
import sys

import torch

from bigkern import backends, triton_ops
from bigkern.ops import adam_, grad_norm


def adam():
    params = [torch.randn(n) for n in (1, 7, 127, 1000, 0)]
    grads = [torch.randn_like(p) for p in params]
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for name in ("native", "triton"):
        with backends.use(name):
            lists = [[p.clone() for p in params], grads]
            lists += [[torch.zeros_like(p) for p in params] for _ in range(2)]
            lists += [[], [torch.zeros(()) for _ in params]]
            for _ in range(3):
                adam_(*lists, **options, max_grad_norm=1.0)
            results.append([*lists[0], *lists[2], grad_norm(grads)])
    for native, interpreted in zip(*results, strict=True):
        torch.testing.assert_close(interpreted, native)


if __name__ == "__main__":
    kept = triton_ops.implement("CPU", lambda args: contextlib.nullcontext())
    backends.refresh("triton")
    globals()[sys.argv[1]]()
