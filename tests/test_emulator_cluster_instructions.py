"""Each instruction on another block's shared memory that the emulator translates, alone."""

import numpy as np
import pytest
import torch
from emulator import build
from emulator.parse import PtxError
from emulator.translate import translate
from emulator_helpers import Kernels
from instruction_cases import TYPES
from instruction_cases_clusters import CASES

THREADS = 32


def source() -> str:
    header = build.HERE / "kernels/clusters.cuh"
    text = f'// A kernel for each case: a block works on what the other has.\n#include "{header}"\n'
    for number, case in enumerate(CASES):
        kind, constraint, dtype = TYPES[case.type]
        values = ", ".join(
            f'"{constraint}"(value[threadIdx.x * {case.values} + {i}])' for i in range(case.values)
        )
        size = case.values * np.dtype(dtype).itemsize
        text += f'''
extern "C" __global__ void case_{number}(const {kind}* old, const {kind}* value, {kind}* out) {{
  __shared__ __align__(16) {kind} cells[{THREADS * case.values}];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {{
    init_barrier(&full, 1);
    arrive_and_expect(&full, {THREADS * size * case.is_async});
  }}
  for (int i = threadIdx.x; i < {THREADS * case.values}; i += {THREADS}) cells[i] = old[i];
  cluster_sync();
  if (cluster_rank() == 0) {{
    const uint32_t to = map_address(&cells[threadIdx.x * {case.values}], 1);
    const uint32_t barrier = map_address(&full, 1);
    asm volatile("{case.text}" :: "r"(to), {values}, "r"(barrier) : "memory");
  }} else if ({int(case.is_async)}) {{
    wait_cluster(&full, 0);
  }}
  cluster_sync();
  if (cluster_rank() == 0) return;
  for (int i = threadIdx.x; i < {THREADS * case.values}; i += {THREADS}) out[i] = cells[i];
}}
'''
    return text


@pytest.fixture(scope="module")
def kernels():
    path = build.keep_source("cluster_instructions.cu", source())
    run = Kernels("cluster_instructions", path, architectures=["90a"])
    run.controls.find_races(True)
    return run


@pytest.mark.parametrize("schedule", ["asc", "desc", "random"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: CASES[n].text)
def test_instruction(kernels, number, schedule):
    kernels.controls.set_schedule(schedule)
    case, generator = CASES[number], np.random.default_rng(number)
    dtype = np.dtype(TYPES[case.type][2])
    shape = THREADS * case.values
    if dtype.kind == "f":
        old, value = generator.standard_normal((2, shape)).astype(dtype)
    else:
        info = np.iinfo(dtype)
        old, value = generator.integers(info.min, info.max, (2, shape), dtype=dtype, endpoint=True)
        old[:8] = [0, 0, 1, 1, 5, 5, 5, 6]
        value[:8] = [0, 3, 0, 1, 4, 5, 6, 6]
    out = np.zeros_like(old)
    tensors = [torch.from_numpy(a.view(a.dtype.str.replace("u", "i"))) for a in (old, value, out)]
    launch = {"grid": (2, 1, 1), "block": (THREADS, 1, 1), "cluster": (2, 1, 1)}
    kernels(f"case_{number}", *tensors, **launch)
    np.testing.assert_array_equal(out, case.expected(old, value).astype(dtype))


PTX = """
.version 9.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 p) {}
{{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    .reg .b16 %h<4>;
    .loc 1 17 3
    {}
    ret;
}}
.file 1 "/somewhere/some.cu"
"""
TO_BARRIER = "mbarrier::complete_tx::bytes"


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("mapa.shared::cluster.u32 %r1, %r2, %r3;", "mapa.shared::cta.u32 %r1, %r2, %r3;"),
        ("getctarank.u64 %r1, %rd1;", "getctarank.global.u64 %r1, %rd1;"),
        ("barrier.cluster.arrive.relaxed;", "barrier.cluster.arrive.acquire;"),
        ("barrier.cluster.wait.acquire.aligned;", "barrier.cluster.wait.relaxed;"),
        (
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];",
            "mbarrier.arrive.release.cluster.shared::cluster.b64 %rd1, [%r1];",
        ),
        (
            "mbarrier.try_wait.acquire.cluster.shared::cta.b64 _, [%r1], %rd1;",
            "mbarrier.try_wait.acquire.cluster.shared::cluster.b64 _, [%r1], %rd1;",
        ),
        (
            f"st.async.shared::cluster.{TO_BARRIER}.v2.b64 [%r1], {{%rd1, %rd2}}, [%r2];",
            f"st.async.shared::cluster.{TO_BARRIER}.v4.b64 "
            "[%r1], {%rd1, %rd1, %rd1, %rd1}, [%r2];",
        ),
        (
            f"red.async.relaxed.cluster.shared::cluster.{TO_BARRIER}.add.u64 [%r1], %rd1, [%r2];",
            f"red.async.relaxed.cluster.shared::cluster.{TO_BARRIER}.min.u64 [%r1], %rd1, [%r2];",
        ),
        (
            f"cp.async.bulk.shared::cluster.shared::cta.{TO_BARRIER} [%r1], [%r2], %r3, [%r3];",
            f"cp.async.bulk.shared::cta.shared::cluster.{TO_BARRIER} [%r1], [%r2], %r3, [%r3];",
        ),
        (
            f"cp.async.bulk.shared::cluster.global.{TO_BARRIER}.multicast::cluster "
            "[%r1], [%rd1], %r3, [%r3], %h1;",
            f"cp.async.bulk.shared::cta.global.{TO_BARRIER}.multicast::cluster "
            "[%r1], [%rd1], %r3, [%r3], %h1;",
        ),
    ],
)
def test_what_is_unknown_is_an_error_with_its_line(known, unknown):
    translate([PTX.format("", known)], "register")
    with pytest.raises(PtxError, match=r"some.cu:17: no rule for "):
        translate([PTX.format("", unknown)], "register")


def test_blocks_that_are_clusters_are_unknown():
    translate([PTX.format(".explicitcluster .reqnctapercluster 2, 1, 1", "")], "register")
    with pytest.raises(PtxError, match=r"kernel: no rule for \.blocksareclusters"):
        translate([PTX.format(".blocksareclusters .reqnctapercluster 2, 1, 1", "")], "register")
