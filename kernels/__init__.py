"""Triton kernels, one file an op, importable as ``bigkern.kernels``."""

if __name__ != "bigkern.kernels":
    raise ImportError(
        "this folder is bigkern.kernels; to import another package 'kernels', leave the repository"
    )
