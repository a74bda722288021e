"""Runs CUDA kernels on the CPU: the PTX that nvcc emits, together with its host code.

nvcc compiles a `.cu` to PTX and to a host object. `parse` and `translate` turn the PTX into C++,
with one rule for each instruction (`rules_*`); `build` compiles it and links it with `runtime/`,
which has a fiber for each CUDA thread and stands in for the CUDA runtime. `ops` does so for the
package's ops.

What it finds, besides wrong results: accesses outside of known memory, divergent barriers,
deadlocks, whatever isn't awaited (its bytes and sums are NaN until then), device memory touched by
host code, shared memory of a block of the cluster that has exited; under `find_races`, accesses
that nothing orders and missing proxy fences, whichever the schedule. `set_schedule` chooses who
goes first, and when asynchronous work is done; `take_launches` has counts of what a launch did.

It doesn't see accesses that leave one tensor and hit another. What is not as on a card: clusters
run one after another (blocks, where a launch has none); fences order for everybody, whatever their
scope, and `fence.mbarrier_init` orders as much as any; approximate instructions are exact; launches
are not limited by registers, since there is no SASS; a thread that spins on memory, and doesn't
sleep meanwhile, hangs.
"""
