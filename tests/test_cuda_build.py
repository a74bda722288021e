"""What the CUDA compiler made of csrc/cuda, read from the built library without a GPU."""

import re

import pytest

ARCHITECTURES = ("sm_80", "sm_90a")


def test_every_kernel_is_there_for_each_architecture(cuda_kernels):
    names = [{k.name for k in cuda_kernels if k.arch == arch} for arch in ARCHITECTURES]
    assert names[0] == names[1]
    assert len(cuda_kernels) == sum(map(len, names))


def test_no_kernel_spills_registers(cuda_kernels):
    assert [k.name for k in cuda_kernels if k.spills or k.stack_bytes] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_has_a_kernel_for_each_variant(cuda_kernels, arch):
    names = [kernel.base_name for kernel in cuda_kernels if kernel.arch == arch]
    # 6 pairs of dtypes, 4 of them with or without master weights; each with or without amsgrad
    assert names.count("adam_kernel") == (2 + 4 * 2) * 2
    assert names.count("sum_of_squares_kernel") == 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adam_streams_16_bytes_an_access(cuda_kernels, arch):
    streams = ("adam_kernel", "sum_of_squares_kernel")
    for kernel in (k for k in cuda_kernels if k.arch == arch and k.base_name in streams):
        opcodes = [i.opcode for i in kernel.instructions]
        loads = sum(opcode.startswith("LDG.E.128") for opcode in opcodes)
        if kernel.base_name == "adam_kernel":
            assert loads, kernel.name
            assert any(opcode.startswith("STG.E.128") for opcode in opcodes), kernel.name
        else:
            assert loads >= 4, kernel.name  # so many at once in flight
        local_or_generic = [o for o in opcodes if re.match(r"(LDL|STL|LD\.E|ST\.E)\b", o)]
        assert local_or_generic == [], kernel.name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_products_keep_tensor_cores_busy(cuda_kernels, arch):
    """The loop over K: products, what loads their operands, and few instructions else."""
    of_arch = [k for k in cuda_kernels if k.arch == arch]
    products = [k for k in of_arch if k.base_name == "int8_gemm_kernel"]
    assert len(products) == 8  # 3 tiles for either order of B in memory, 2 for convolutions
    for kernel in products:
        assert kernel.count("LDGSTS"), kernel.name
        loop = [i.opcode for i in kernel.main_loop]
        share = sum(opcode.startswith("IMMA.16832.S8.S8") for opcode in loop) / len(loop)
        assert share > (0.15 if "64, 64" in kernel.name else 0.35), f"{kernel.name}: {share}"
    for kernel in of_arch:
        if kernel.base_name == "int8_gemv_kernel":
            opcodes = [i.opcode for i in kernel.instructions]
            assert any(o.startswith("LDG.E.EF.128") for o in opcodes), kernel.name
            assert kernel.count("IDP"), kernel.name
