"""Runs CUDA kernels on the CPU: the PTX that nvcc emits, together with its host code.

nvcc compiles a `.cu` to PTX and to a host object. `parse` and `translate` turn the PTX into C++,
with one rule for each instruction (`rules_*`); `build` compiles it and links it with `runtime/`,
which has a fiber for each CUDA thread and stands in for the CUDA runtime. `ops` does so for the
package's ops.

What is not as on a card: blocks run one after another; approximate instructions are exact; launches
are not limited by registers, since there is no SASS; a thread that spins on memory hangs.
"""
