"""Triton's PTX in the emulator: another author's idea of layouts, swizzles and descriptors."""

import re

import pytest
import torch
from emulator import build
from emulator_helpers import Kernels

triton = pytest.importorskip("triton", reason="torch for CPUs comes without Triton")

import triton_kernels  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

BLOCKS = {"BM": 64, "BN": 32, "BK": 64}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8"}
SUMS = {"fp32": triton.language.float32, "i32": triton.language.int32}


@pytest.fixture(scope="module", autouse=True)
def own_cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(build.CACHE / "triton"))
        yield


def compiled(function, arch, kinds, aligned):
    """The compiler's output, and the library of its PTX."""
    sums = kinds[2].strip("*").removeprefix("tensordesc<").split("[")[0]
    signature = dict(zip("abc", kinds, strict=True)) | dict.fromkeys("MNK", "i32")
    signature |= dict.fromkeys([*BLOCKS, "ACC"], "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(function, signature, BLOCKS | {"ACC": SUMS[sums]}, attributes)
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})
    name = "_".join(["triton", function.__name__, str(arch), *re.findall(r"\w+", kinds[0])])
    return kernel, Kernels(name, ptx=[build.keep_source(f"{name}.ptx", kernel.asm["ptx"])])


def operands(dtype, M, N, K):
    a, b = (torch.randint(-9, 9, (rows, K)).to(dtype) for rows in (M, N))
    c = torch.zeros(M, N, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    return a, b, c, (a.double() @ b.double().T).to(c.dtype)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_products(arch, instruction, dtype):
    sums = "i32" if dtype == torch.int8 else "fp32"
    kinds = [f"*{NAMES[dtype]}", f"*{NAMES[dtype]}", f"*{sums}"]
    kernel, run = compiled(triton_kernels.matmul, arch, kinds, aligned=(0, 1, 2, 5))
    assert instruction in kernel.asm["ptx"]
    run.controls.find_races(True)
    for M, N, K in ((64, 64, 64), (100, 72, 192), (1, 7, 128)):
        a, b, c, expected = operands(dtype, M, N, K)
        for schedule in ("asc", "desc", "random"):
            run.controls.set_schedule(schedule)
            c.zero_()
            run(
                "matmul",
                *(a, b, c, M, N, K),
                *[bytes(8)] * 2,  # scratch memory
                grid=(-(-M // 64), -(-N // 32), 1),
                block=(128, 1, 1),
                smem=kernel.metadata.shared,
            )
            assert torch.equal(c, expected)


def test_products_of_what_bulk_copies_bring():
    boxes = ("fp16[64,64]", "fp16[32,64]", "fp32[64,32]")
    kinds = [f"tensordesc<{box}>" for box in boxes]
    kernel, run = compiled(triton_kernels.matmul_of_descriptors, 90, kinds, aligned=())
    assert "cp.async.bulk.tensor.2d.global.shared::cta" in kernel.asm["ptx"]
    run.controls.find_races(True)
    M, N, K = 100, 72, 192
    a, b, c, expected = operands(torch.float16, M, N, K)
    arguments = []
    for i, (x, meta) in enumerate(zip((a, b, c), kernel.metadata.tensordesc_meta, strict=True)):
        run.controls.add_buffer(x.data_ptr(), x.nbytes, f"tensor {i}")
        rows, columns = x.shape
        strides = [columns * x.element_size()]
        box = meta["block_size"][::-1]
        arguments += [
            run.controls.tensor_map(
                meta["elem_type"], x.data_ptr(), [columns, rows], strides, box, meta["swizzle"]
            ),
            *(rows, columns),
            *(size.to_bytes(8, "little") for size in (columns, 1)),
        ]
    for schedule in ("asc", "desc", "random"):
        run.controls.set_schedule(schedule)
        c.zero_()
        run(
            "matmul_of_descriptors",
            *arguments,
            *(M, N, K),
            *[bytes(8)] * 2,
            grid=(2, 3, 1),
            block=(128, 1, 1),
            smem=kernel.metadata.shared,
        )
        assert torch.equal(c, expected)
    for x in (a, b, c):
        run.controls.remove_buffer(x.data_ptr())
