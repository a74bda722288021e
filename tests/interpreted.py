"""Runs ops by Triton's interpreter, and checks them against the native ones: started by
test_triton_interpreter.py with TRITON_INTERPRET=1, which Triton reads when kernels are defined.

python tests/interpreted.py NAME
"""

import contextlib
import sys

import torch

import bigkern
from bigkern import backends, scaled_dot_product_attention, triton_ops
from bigkern.ops import adam_, grad_norm
from bigkern.testing import assert_as_accurate


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


def attention():
    """Of float32: the interpreter's products of bfloat16 are wrong."""
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 40, 40))
    mask = torch.randn(5, 40, requires_grad=True)
    options = {"dropout_p": 0.3, "softcap": 2.0, "window": (30, 0)}
    results = []
    for name in ("native", "triton"):
        with backends.use(name):
            generator = torch.Generator().manual_seed(0)
            out, lse = scaled_dot_product_attention(
                q, k, v, mask, return_lse=True, generator=generator, **options
            )
            grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, mask))
            plain = scaled_dot_product_attention(q, k, v, is_causal=True)
            results.append([out, lse, *grads, plain])
    for native, interpreted in zip(*results, strict=True):
        torch.testing.assert_close(interpreted, native)


def int8():
    x, bias = torch.randn(5, 70), torch.randn(33)
    a, b = (torch.randint(-128, 128, n, dtype=torch.int8) for n in ((5, 70), (70, 33)))
    scale = torch.rand(33)
    results = []
    for name in ("native", "triton"):
        with backends.use(name):
            values, row_scale = bigkern.quantize_rows(x)
            linear = bigkern.int8_linear(x, b.T, scale, bias, activation="gelu")
            weight_only = bigkern.weight_only_linear(x, b.T, scale, bias)
            results.append([bigkern.int8_mm(a, b), values, row_scale, linear, weight_only])
    for native, interpreted in zip(results[0][:-1], results[1][:-1], strict=True):
        torch.testing.assert_close(interpreted, native)
    expected = x.double() @ (b * scale.double()) + bias
    assert_as_accurate(results[1][-1], expected, x @ (b * scale) + bias)


if __name__ == "__main__":
    kept = triton_ops.implement("CPU", lambda args: contextlib.nullcontext())
    backends.refresh("triton")
    globals()[sys.argv[1]]()
