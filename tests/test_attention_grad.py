"""Gradients of attention against finite differences in float64, for all that can have one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigkern import scaled_dot_product_attention, varlen_attention
from bigkern.ops.attention import attention_with_weights

pytestmark = pytest.mark.usefixtures("one_thread")

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


def problem(B=2, H=2, Hkv=2, L=3, S=4, E=3, Ev=2):
    shapes = [(B, H, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev)]
    return [torch.randn(s, **DOUBLE) for s in shapes]


def seeded(function, *args, **options):
    """A function for gradcheck that drops the same weights at each call."""

    def run(*tensors):
        generator = torch.Generator().manual_seed(3)
        return function(*tensors, *args, **options, generator=generator)

    return run


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "window": {"window": (1, 1)},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25])},
    "alibi of each sequence": {"alibi_slopes": torch.rand(2, 2)},
    "dropout": {"dropout_p": 0.4},
    "all": {
        "window": (2, 1),
        "softcap": 1.5,
        "alibi_slopes": torch.tensor([0.5, 0.25]),
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_query_key_value(options, return_lse):
    function = seeded(scaled_dot_product_attention, **options, return_lse=return_lse)
    assert gradcheck(function, problem())


def test_lse_alone():
    def lse(*tensors):
        return scaled_dot_product_attention(*tensors, return_lse=True)[1]

    q, k, v = problem()
    assert gradcheck(lambda q, k: lse(q, k, v.detach()), (q, k))
    assert torch.equal(torch.autograd.grad(lse(q, k, v).sum(), v)[0], torch.zeros_like(v))


def test_shared_heads():
    function = seeded(scaled_dot_product_attention, enable_gqa=True, dropout_p=0.2)
    assert gradcheck(function, problem(H=4, Hkv=2))


MASKS = [(3, 4), (1, 4), (3, 1), (4,), (2, 3, 4), (2, 1, 1, 4), (2, 2, 3, 4), (1, 1, 1, 1)]


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "dropout_p": 0.3, "window": (-1, 0)}])
@pytest.mark.parametrize("shape", MASKS)
def test_mask(shape, options):
    mask = torch.randn(shape, **DOUBLE)
    function = seeded(scaled_dot_product_attention, **options, return_lse=True)
    assert gradcheck(function, (*problem(), mask))


def test_expanded_mask():
    """As a view of something smaller, and as a leaf."""
    small = torch.randn(2, 1, 1, 4, **DOUBLE)
    assert gradcheck(
        lambda *x: scaled_dot_product_attention(*x[:3], x[3].expand(2, 2, 3, 4)),
        (*problem(), small),
    )
    inputs = problem()
    masks = [small.detach().expand(2, 2, 3, 4), small.detach().repeat(1, 2, 3, 1)]
    grads = []
    for mask in masks:
        out = scaled_dot_product_attention(*inputs, mask.requires_grad_())
        grads += torch.autograd.grad(out.square().sum(), mask)
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 3, 4), (2, 1, 2, 1, 4), (3, 1, 3, 1)])
def test_mask_of_folded_dimensions(shape):
    """(2, 3, H, L, E): a mask may vary along some of them."""
    inputs = [torch.randn(2, 3, 2, n, 1, **DOUBLE) for n in (3, 4, 4)]
    mask = torch.randn(shape, **DOUBLE)
    assert gradcheck(scaled_dot_product_attention, (*inputs, mask))


def test_broadcast_inputs():
    shapes = [(2, 1, 3, 2), (2, 4, 2), (1, 1, 4, 3)]
    assert gradcheck(scaled_dot_product_attention, [torch.randn(s, **DOUBLE) for s in shapes])


def test_different_heads_of_keys_and_values():
    q, k, v = (torch.randn(1, h, 3, 2, **DOUBLE) for h in (4, 2, 1))
    assert gradcheck(seeded(scaled_dot_product_attention, enable_gqa=True), (q, k, v))


@pytest.mark.parametrize("options", [{}, OPTIONS["all"], {"is_causal": True}])
def test_packed(options):
    lengths_q, lengths_k = (
        torch.tensor(n, dtype=torch.int32) for n in ([0, 2, 2, 5], [0, 3, 4, 4])
    )
    shapes = [(5, 2, 3), (4, 2, 3), (4, 2, 2)]
    function = seeded(varlen_attention, lengths_q, lengths_k, 3, 3, **options, return_lse=False)
    assert gradcheck(function, [torch.randn(s, **DOUBLE) for s in shapes])


@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 1, 4)])
def test_weights(shape, dropout_p, average_heads):
    mask = torch.randn(shape, **DOUBLE)
    function = seeded(attention_with_weights, dropout_p=dropout_p, average_heads=average_heads)
    assert gradcheck(function, (*problem(), mask))


def test_weights_of_shared_heads():
    assert gradcheck(seeded(attention_with_weights, enable_gqa=True), problem(H=4, Hkv=2))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys_have_zero_gradients(kind):
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (3, 5, 5))
    mask = torch.tensor([True, False, True])[:, None].expand(3, 5)
    leaves = [q, k, v]
    if kind == "float":
        mask = torch.zeros(3, 5).masked_fill(~mask, -math.inf).requires_grad_()
        leaves.append(mask)
    out, lse = scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert torch.equal(out[:, :, 1], torch.zeros(1, 2, 4))
    assert (lse[:, :, 1] == -math.inf).all()
    grads = torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.ones_like(lse)])
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][:, :, 1], torch.zeros(1, 2, 4))
    if kind == "float":
        assert torch.equal(grads[3][1], torch.zeros(5))


@pytest.mark.parametrize("function", [scaled_dot_product_attention, attention_with_weights])
def test_double_backward_is_refused(function):
    q, k, v = problem()
    outs = function(q, k, v)
    loss = sum(x.square().sum() for x in (outs if isinstance(outs, tuple) else [outs]))
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once, not twice: .*SDPBackend\.MATH"):
        grad.sum().backward()


def test_what_the_refusal_names_works():
    q, k, v = problem()
    with sdpa_kernel(SDPBackend.MATH):
        (grad,) = torch.autograd.grad(
            F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True
        )
    grad.sum().backward()
    assert q.grad is not None


def test_frozen_inputs():
    q, k, v = problem()
    out = scaled_dot_product_attention(q.detach(), k, v.detach())
    (grad,) = torch.autograd.grad(out.sum(), k)
    assert grad.shape == k.shape
    assert not scaled_dot_product_attention(*(x.detach() for x in (q, k, v))).requires_grad
