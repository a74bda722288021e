"""Attention under torch's transformations: autocast, compile, func, checkpoint, export."""

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import Case
from torch.func import grad, vmap
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import bigkern
from bigkern import scaled_dot_product_attention, varlen_attention
from bigkern.ops.attention import attention_with_weights

OPTIONS = {
    "plain": {},
    "dropout and lse": {"dropout_p": 0.3, "return_lse": True},
    "all": {
        "window": (3, 2),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(2, 4),
        "dropout_p": 0.3,
        "return_lse": True,
    },
}
STARTS = [torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 2, 5], [0, 3, 4, 4])]


def problem(*lead, L=5, S=7, E=8, **options):
    return [torch.randn(*lead, n, E, **options) for n in (L, S, S)]


def with_gradients(function, *leaves):
    torch.manual_seed(1)
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), leaves)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compile_without_graph_breaks(options):
    torch._dynamo.reset()  # there is a limit to how often a function is compiled

    def function(*tensors):
        return scaled_dot_product_attention(*tensors, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [*problem(2, 4, requires_grad=True), torch.randn(1, 5, 7, requires_grad=True)]
    assert_same(with_gradients(compiled, *leaves), with_gradients(function, *leaves))
    for has_grad, inputs in ((False, leaves), (True, [x.detach() for x in leaves])):
        with torch.set_grad_enabled(has_grad):
            torch.manual_seed(1)
            actual = compiled(*inputs)
            torch.manual_seed(1)
            assert_same(actual, function(*inputs))


def test_compile_of_other_layouts_and_sizes():
    """Sizes that change, and heads as a projection leaves them: inside."""

    def function(*tensors):
        return scaled_dot_product_attention(*tensors, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for B, L in ((2, 5), (3, 9), (4, 33)):
        leaves = [torch.randn(B, L, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
        actual = with_gradients(compiled, *leaves)
        assert_same(actual, with_gradients(function, *leaves))
        assert actual[0].transpose(1, 2).is_contiguous()


def test_compile_to_code():
    def function(*tensors):
        out, lse = scaled_dot_product_attention(*(2 * x for x in tensors), return_lse=True)
        return out + 1, lse

    leaves = [torch.randn(2, 5, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    compiled = torch.compile(function, fullgraph=True)
    for actual, expected in zip(
        with_gradients(compiled, *leaves), with_gradients(function, *leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_compile_of_packed_sequences_and_weights():
    def packed(*tensors):
        return varlen_attention(*tensors, *STARTS, 3, 3, 0.2, return_lse=True)

    leaves = [torch.randn(n, 2, 8, requires_grad=True) for n in (5, 4, 4)]
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    finite = [(lambda *x, f=f: f(*x)[0]) for f in (compiled, packed)]
    assert_same(*(with_gradients(f, *leaves) for f in finite))

    def weights(*tensors):
        return attention_with_weights(*tensors, dropout_p=0.2, average_heads=True)

    leaves = problem(2, 4, requires_grad=True)
    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    assert_same(with_gradients(compiled, *leaves), with_gradients(weights, *leaves))


@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_compile_with_causal_bias(variant):
    def function(*tensors):
        return scaled_dot_product_attention(*tensors, variant(5, 7))

    tensors = problem(2, 4)
    compiled = torch.compile(function, backend="aot_eager")
    assert torch.equal(compiled(*tensors), function(*tensors))


def loss(*tensors, **options):
    outs = scaled_dot_product_attention(*tensors, **options)
    return sum(x.square().sum() for x in (outs if isinstance(outs, tuple) else (outs,)))


def test_func_grad():
    tensors = [*problem(2, 4), torch.randn(5, 7)]
    options = {"softcap": 2.0, "return_lse": True}
    actual = grad(loss, (0, 1, 2, 3))(*tensors, **options)
    leaves = [x.requires_grad_() for x in tensors]
    assert_same(actual, torch.autograd.grad(loss(*leaves, **options), leaves))


IN_DIMS = [
    (0, 0, 0, None),
    (0, None, None, None),
    (None, 1, 1, None),
    (0, 0, 0, 0),
    (2, 0, None, 1),
    (None, None, None, 0),
]


def each(function, in_dims, *tensors):
    """vmap by a loop."""
    V = next(x.size(d) for x, d in zip(tensors, in_dims, strict=True) if d is not None)
    results = [
        function(
            *(x if d is None else x.select(d, v) for x, d in zip(tensors, in_dims, strict=True))
        )
        for v in range(V)
    ]
    if isinstance(results[0], torch.Tensor):
        return [torch.stack(results)]
    return [torch.stack(xs) for xs in zip(*results, strict=True)]


def batched(in_dims, tensors, V=3):
    return [
        x if d is None else torch.randn(V, *x.shape).movedim(0, d)
        for x, d in zip(tensors, in_dims, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_lse": True, "softcap": 2.0},
        {"alibi_slopes": torch.rand(4)},
        {"alibi_slopes": torch.rand(2, 4)},
    ],
)
@pytest.mark.parametrize("mask_shape", [(5, 7), (2, 1, 5, 7), (4, 1, 1)])
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap(in_dims, mask_shape, options):
    tensors = batched(in_dims, [*problem(2, 4), torch.randn(mask_shape)])

    def function(*tensors):
        return scaled_dot_product_attention(*tensors, **options)

    actual = vmap(function, in_dims)(*tensors)
    actual = actual if isinstance(actual, tuple) else (actual,)
    assert_same(actual, each(function, in_dims, *tensors))


@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap_of_grad(in_dims):
    """A gradient for each sample, of the mask too."""
    tensors = batched(in_dims, [*problem(2, 4), torch.randn(4, 1, 7)])
    function = grad(loss, (0, 1, 2, 3))
    assert_same(vmap(function, in_dims)(*tensors), each(function, in_dims, *tensors))
    without_mask = grad(loss, (0, 1, 2))
    assert_same(vmap(without_mask, in_dims)(*tensors), each(without_mask, in_dims, *tensors))


def test_grad_of_vmap():
    leaves = [x.requires_grad_() for x in problem(3, 2, 4)]
    grads = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves)
    assert_same(grads, each(grad(loss, (0, 1, 2)), (0, 0, 0), *leaves))


def test_nested_vmap():
    tensors = problem(2, 3, 2, 4)
    actual = vmap(vmap(scaled_dot_product_attention))(*tensors)
    assert torch.equal(actual, scaled_dot_product_attention(*tensors))


def test_vmap_with_dropout():
    tensors = problem(3, 2, 4)

    def function(*tensors):
        return scaled_dot_product_attention(*tensors, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(*tensors)
    torch.manual_seed(1)
    same = vmap(function, randomness="same")(*tensors)
    for actual, *sample in zip(same, *tensors, strict=True):
        torch.manual_seed(1)
        assert torch.equal(actual, function(*sample))
    equal = [x[:1].expand(3, *x.shape[1:]) for x in tensors]
    different = vmap(function, randomness="different")(*equal)
    assert not torch.equal(different[0], different[1])
    assert (
        vmap(grad(lambda *x: function(*x).sum()), randomness="different")(*equal).isfinite().all()
    )


def test_vmap_of_packed_sequences_and_weights():
    tensors = [torch.randn(3, n, 2, 8) for n in (5, 4, 4)]

    def packed(*tensors):
        return varlen_attention(*tensors, *STARTS, 3, 3)

    assert_same([vmap(packed)(*tensors)], each(packed, (0, 0, 0), *tensors))
    tensors = problem(3, 2, 4)
    assert_same(
        vmap(attention_with_weights)(*tensors), each(attention_with_weights, (0, 0, 0), *tensors)
    )

    def loss_of_weights(*tensors):
        return attention_with_weights(*tensors, average_heads=True)[1].square().sum()

    function = grad(loss_of_weights, (0, 1))
    for actual, expected in zip(
        vmap(function)(*tensors), each(function, (0, 0, 0), *tensors), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    def function(*tensors):
        return scaled_dot_product_attention(*tensors, dropout_p=0.5)

    def checkpointed(*tensors):
        return checkpoint(function, *tensors, use_reentrant=use_reentrant)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.manual_seed(1)
        out = function(*leaves)
        out.square().sum().backward()
        return [out, *(x.grad for x in leaves)]

    inputs = problem(2, 4)
    assert_same(run(checkpointed), run(function))


class Module(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, mask, softcap=3.0, return_lse=True)


def test_export():
    tensors = [*problem(2, 4), torch.randn(5, 7)]
    batch = torch.export.Dim("batch")
    shapes = {"q": {0: batch}, "k": {0: batch}, "v": {0: batch}, "mask": None}
    program = torch.export.export(Module(), tuple(tensors), dynamic_shapes=shapes)
    assert any("bigkern.attention" in str(node.target) for node in program.graph.nodes)
    more = [*problem(5, 4), tensors[3]]
    assert_same(program.module()(*more), Module()(*more))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_autocast(dtype, mask):
    tensors = problem(2, 4, dtype=dtype, requires_grad=True)
    tensors += [torch.randn(5, 7, dtype=dtype, requires_grad=True)] if mask else []
    with torch.autocast("cpu", torch.bfloat16):
        dtype_of_torch = F.scaled_dot_product_attention(*tensors).dtype
        out = scaled_dot_product_attention(*tensors)
    assert out.dtype == dtype_of_torch
    assert torch.equal(out, scaled_dot_product_attention(*(x.to(out.dtype) for x in tensors)))
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [g.dtype for g in grads] == [dtype] * len(tensors)


def test_autocast_of_mixed_and_packed_inputs():
    q, k, v = problem(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert scaled_dot_product_attention(q.bfloat16(), k, v.half()).dtype == torch.bfloat16
        packed = [torch.randn(n, 2, 8) for n in (5, 4, 4)]
        assert varlen_attention(*packed, *STARTS, 3, 3).dtype == torch.bfloat16


CASES = [
    Case(),
    Case(torch.bfloat16, H=4, Hkv=2, layout="BLHE", mask="bool", causal=True, dropout=0.3),
    Case(mask="float", mask_dims=(False, True, False, True), softcap=2.0, alibi="BH", seqlens=True),
    Case(torch.float64, layout="strided", mask="float32", window=(2, 1), alibi="H"),
]


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    ops = torch.ops.bigkern
    inputs, tensors, options = case.inputs(), case.tensors(), case.raw_options()
    outs = ops.attention(*inputs, *tensors, **options)
    torch.library.opcheck(ops.attention, (*inputs, *tensors), options)
    grad_out, grad_lse = torch.randn_like(outs[0]), torch.randn_like(outs[1])
    needs_mask_grad = {"needs_mask_grad": case.mask.startswith("float")}
    torch.library.opcheck(
        ops.attention_backward,
        (grad_out, grad_lse, *inputs, *outs, *tensors),
        options | needs_mask_grad,
    )
    for average_heads in (False, True):
        torch.library.opcheck(
            ops.attention_weights,
            (*inputs[:2], *outs[1:], *tensors),
            options | {"average_heads": average_heads},
        )


def test_opcheck_of_packed_sequences():
    packed = [torch.randn(n, 2, 8) for n in (5, 4, 4)]
    tensors = (None, None, None, *STARTS)
    options = {"scale": 0.3, "max_seqlen_q": 3, "max_seqlen_k": 3}
    torch.library.opcheck(torch.ops.bigkern.attention, (*packed, *tensors), options)
    outs = torch.ops.bigkern.attention(*packed, *tensors, **options)
    torch.library.opcheck(
        torch.ops.bigkern.attention_backward, (outs[0], None, *packed, *outs, *tensors), options
    )


def test_forced_backend():
    tensors = problem(2, 4)
    with bigkern.backends.use("native"):
        assert torch.equal(
            scaled_dot_product_attention(*tensors), scaled_dot_product_attention(*tensors)
        )
    with (
        bigkern.backends.use("triton"),
        pytest.raises(NotImplementedError, match="attention has no triton backend on cpu"),
    ):
        scaled_dot_product_attention(*tensors)
