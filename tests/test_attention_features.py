"""What attention must keep to, whatever the numbers are."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import DTYPES, SEEDS, Case, draw, run_function
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import bigkern
from bigkern import backends, scaled_dot_product_attention, varlen_attention
from bigkern.ops import reference
from bigkern.ops.attention import attention_with_weights
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "emulated", "cuda"]

lengths = st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 33, 64, 65, 100, 129]))


def problem(B=16, H=4, L=5, S=7, E=8, Ev=8, **options):
    return [torch.randn(B, H, n, e, **options) for n, e in ((L, E), (S, E), (S, Ev))]


@draw
@given(lengths, lengths, st.booleans(), st.sampled_from([0.0, 3.0]))
def test_weights_of_a_row_sum_to_one(L, S, is_causal, softcap):
    q, k, v = problem(L=L, S=S)
    ones = torch.ones_like(v)
    out = scaled_dot_product_attention(q, k, ones, is_causal=is_causal, softcap=softcap)
    plain = reference.attention(q, k, ones, scale=8**-0.5, is_causal=is_causal, softcap=softcap)[0]
    assert_as_accurate(out, torch.ones_like(out), plain)


@draw
@given(lengths, st.integers(0, 200))
def test_causal_output_ignores_the_future(length, cut):
    cut = min(cut, length - 1)
    q, k, v = problem(L=length, S=length)
    before = scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, :, cut + 1 :], v[:, :, cut + 1 :] = 1e4, -1e4
    after = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, : cut + 1], after[:, :, : cut + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_mask_hides_does_not_matter(dtype):
    """Neither in the output nor in the gradients."""
    q, k, v = (x.to(dtype) for x in problem(L=40, S=70))
    keep = torch.rand(70) > 0.3
    k[:, :, ~keep], v[:, :, ~keep] = 3.0, 5.0
    for mask in (keep, torch.zeros(70).masked_fill(~keep, -math.inf)):
        for hidden in (-7.0, 0.0):
            k2, v2 = k.clone(), v.clone()
            k2[:, :, ~keep], v2[:, :, ~keep] = hidden, hidden
            results = []
            for tensors in ((q, k, v), (q, k2, v2)):
                leaves = [x.clone().requires_grad_() for x in tensors]
                out = scaled_dot_product_attention(*leaves, mask)
                results.append([out, *torch.autograd.grad(out.sum(), leaves)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert (results[0][2][:, :, ~keep] == 0).all()
            assert (results[0][3][:, :, ~keep] == 0).all()


def _as_accurate_as_plain(actual, q, k, v, mask=None):
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), None if mask is None else mask.double()
    )
    assert_as_accurate(actual, expected, F.scaled_dot_product_attention(q, k, v, mask))


@draw
@given(lengths, lengths, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(L, S, random):
    q, k, v = problem(L=L, S=S)
    mask = torch.randn(16, 1, L, S)
    order = random.sample(range(S), S)
    out = scaled_dot_product_attention(q, k[:, :, order], v[:, :, order], mask[..., order])
    _as_accurate_as_plain(out, q, k, v, mask)


@draw
@given(lengths, lengths, st.integers(1, 70))
def test_padding_does_not_matter(L, S, padding):
    q, k, v = problem(L=L, S=S)
    padded = [F.pad(x, (0, 0, 0, padding), value=9.0) for x in (q, k, v)]
    keep = torch.arange(S + padding) < S
    out = scaled_dot_product_attention(*padded, keep)[:, :, :L]
    _as_accurate_as_plain(out, q, k, v)


@draw
@given(lengths, lengths, st.integers(0, 129))
def test_merging_halves_by_the_log_sum_exp(L, S, cut):
    q, k, v = problem(L=L, S=S)
    cut = min(cut, S)
    outs, lses = zip(
        *(
            scaled_dot_product_attention(q, k[:, :, part], v[:, :, part], return_lse=True)
            for part in (slice(cut), slice(cut, None))
        ),
        strict=True,
    )
    shares = torch.softmax(torch.stack(lses), 0)[..., None]
    _as_accurate_as_plain((torch.stack(outs) * shares).sum(0), q, k, v)


def test_windows():
    q, k, v = problem(L=50, S=50)
    causal = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(scaled_dot_product_attention(q, k, v, window=(-1, 0)), causal)
    whole = scaled_dot_product_attention(q, k, v)
    assert torch.equal(scaled_dot_product_attention(q, k, v, window=(50, 2**40)), whole)
    alone = scaled_dot_product_attention(q, k, v, window=(0, 0))
    assert_as_accurate(alone, v.double(), v)
    # Bottom right: the last query meets the last key, as in FlashAttention from 2.1 on.
    last = scaled_dot_product_attention(q[:, :, -1:], k, v, window=(-1, 0))
    torch.testing.assert_close(last, causal[:, :, -1:])


@pytest.mark.parametrize(("L", "S"), [(5, 5), (5, 9), (9, 5)])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias_of_torch(L, S):
    q, k, v = problem(L=L, S=S)
    for bias in (causal_upper_left(L, S), causal_lower_right(L, S)):
        expected = F.scaled_dot_product_attention(q, k, v, bias)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, bias), expected)
    both = scaled_dot_product_attention(q, k, v, causal_lower_right(L, S), window=(1, 3))
    assert torch.equal(both, scaled_dot_product_attention(q, k, v, window=(1, 0)))


LEADING = [
    [(), (), ()],
    [(4,), (4,), (4,)],
    [(4,), (1,), (1,)],
    [(2, 4), (1, 4), (1, 4)],
    [(2, 4), (2, 1), (2, 1)],
    [(2, 4), (2, 1), (2, 4)],
    [(1, 4), (2, 4), (2, 4)],
    [(2, 1), (2, 4), (2, 4)],
    [(2, 4), (4,), ()],
    [(4,), (2, 4), (2, 1)],
    [(2, 3, 4), (2, 3, 4), (2, 3, 4)],
    [(2, 3, 4), (3, 1), (2, 1, 4)],
    [(2, 1, 3, 4), (5, 3, 4), (1, 1, 1, 4)],
]


@pytest.mark.parametrize("leads", LEADING)
def test_leading_dimensions_as_in_torch(leads):
    q, k, v = (
        torch.randn(*lead, *last)
        for lead, last in zip(leads, [(5, 8), (7, 8), (7, 6)], strict=True)
    )
    expected = F.scaled_dot_product_attention(q, k, v)
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    assert out.shape == expected.shape
    assert lse.shape == expected.shape[:-1]
    torch.testing.assert_close(out, expected)
    for shape in {expected.shape[:-1], (1,) * len(expected.shape[:-2]) + (5,), (5,)}:
        mask = torch.randn(*shape, 7)
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, v, mask),
            F.scaled_dot_product_attention(q, k, v, mask),
        )


@pytest.mark.parametrize(
    "leads",
    [
        [(2, 6), (2, 3), (2, 3)],
        [(2, 6), (2, 3), (2, 1)],
        [(6,), (2,), (2,)],
        [(2, 1, 6), (2, 2), (1, 2)],
    ],
)
def test_shared_heads_as_in_torch(leads):
    q, k, v = (
        torch.randn(*lead, *last)
        for lead, last in zip(leads, [(5, 8), (7, 8), (7, 6)], strict=True)
    )
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    )


def test_a_slope_for_each_head_and_sequence():
    """In (2, 3, H, L, E), sequences are numbered through."""
    q, k, v = (torch.randn(2, 3, 4, n, 8) for n in (5, 7, 7))
    slopes = torch.rand(6, 4)
    out = scaled_dot_product_attention(q, k, v, alibi_slopes=slopes)
    flat = scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), alibi_slopes=slopes)
    assert torch.equal(out.flatten(0, 1), flat)
    distance = (torch.arange(7) - torch.arange(5)[:, None] - 2).abs()
    bias = -slopes.view(2, 3, 4, 1, 1) * distance
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "float"])
def test_bits_do_not_depend_on_threads(dtype, mask):
    case = Case(dtype, 2, 4, 2, 130, 300, 40, 40, mask=mask, mask_dims=(False, True, True, True))
    case.dropout, case.softcap = 0.3, 5.0

    def run(threads):
        torch.set_num_threads(threads)
        leaves = [x.requires_grad_() for x in case.inputs()]
        tensors = case.tensors()
        if mask == "float":
            leaves.append(tensors[0].requires_grad_())
        outs = run_function(case, leaves[:3], tensors)
        return [*outs, *torch.autograd.grad([x.sum() for x in outs], leaves)]

    one = run(1)
    try:
        for threads in (2, 5):
            assert all(torch.equal(a, b) for a, b in zip(one, run(threads), strict=True))
    finally:
        torch.set_num_threads(2)


def _kept(B=1, H=1, L=64, S=256, p=0.3, seed=0, **options):
    """Which weights are kept: values are unit vectors, so that the output is the weights."""
    q = torch.zeros(B, H, L, 1)
    k = torch.zeros(B, H, S, 1)
    v = torch.eye(S).expand(B, H, S, S)
    generator = torch.Generator().manual_seed(seed)
    return scaled_dot_product_attention(q, k, v, dropout_p=p, generator=generator, **options) > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_mean(p):
    kept = _kept(2, 4, 64, 256, p).double()
    sigma = (p * (1 - p)) ** 0.5
    # Each of rate, rows, columns and neighbours' correlation is normal; 5 sigma: 1 in 3 million.
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / kept.numel() ** 0.5
    for dim in range(4):
        means = kept.transpose(dim, -1).flatten(0, -2).mean(0)
        deviation = (means - (1 - p)) * (kept.numel() / means.numel()) ** 0.5 / sigma
        assert deviation.abs().max() < 5
    z = (kept - (1 - p)) / sigma
    for dim in range(4):
        neighbours = z.narrow(dim, 1, z.size(dim) - 1) * z.narrow(dim, 0, z.size(dim) - 1)
        assert abs(neighbours.mean()) < 5 / neighbours.numel() ** 0.5

    q, k, v = problem(L=128, S=256)
    out = scaled_dot_product_attention(q, k, torch.ones_like(v), dropout_p=p)
    assert abs(out.mean() - 1) < 5 * out[..., 0].std() / out[..., 0].numel() ** 0.5


def test_dropout_of_none_and_all():
    q, k, v = problem()
    assert torch.equal(
        scaled_dot_product_attention(q, k, v, dropout_p=1e-6), scaled_dot_product_attention(q, k, v)
    )
    assert (scaled_dot_product_attention(q, k, v, dropout_p=1.0) == 0).all()


def test_generators_steer_dropout():
    q, k, v = problem()

    def run(**options):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5, **options)

    torch.manual_seed(5)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert torch.equal(run(generator=torch.Generator().manual_seed(5)), first)
    torch.manual_seed(6)
    assert not torch.equal(run(), first)


@pytest.mark.parametrize("seed_offset", SEEDS)
def test_the_mask_of_dropout_is_the_documented_one(seed_offset, device):
    ops = backends.select("attention", device)
    B, H, L, S, p = 2, 3, 9, 133, 0.4
    philox = torch.tensor(seed_offset, device=device)
    q, k = (torch.zeros(B, H, n, 1, device=device) for n in (L, S))
    v = torch.eye(S, device=device).expand(B, H, S, S)
    options = {"philox": philox, "dropout_p": p, "scale": 1.0}
    expected = reference.dropout_factors(philox, (B, H, L, S), p)
    out, *stats = ops.attention(q, k, v, **options)
    assert torch.equal(out > 0, expected > 0)
    weights = ops.attention_weights(q, k, *stats, **options)
    assert torch.equal(weights > 0, expected > 0)
    # dV = W^T dO, so that unit vectors show the mask of the backward.
    grad_out = torch.eye(L, device=device).expand(B, H, L, L)
    value = torch.zeros(B, H, S, L, device=device)
    out, *stats = ops.attention(q, k, value, **options)
    grad_value = ops.attention_backward(grad_out, None, q, k, value, out, *stats, **options)[2]
    assert torch.equal(grad_value.mT > 0, expected > 0)


def test_the_mask_of_dropout_depends_on_nothing_else():
    whole = _kept(2, 3, 64, 256)
    assert torch.equal(_kept(2, 3, 64, 256, is_causal=True), whole.tril())
    assert torch.equal(_kept(2, 3, 10, 100), whole[:, :, :10, :100])
    assert torch.equal(_kept(1, 3, 64, 256), whole[:1])


def test_packed_is_padded():
    """The same bits of dropout too, and a gradient for each."""
    L, S = [3, 0, 70, 5], [9, 4, 0, 65]
    starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (L, S)]
    packed = [torch.randn(sum(n), 2, 8, requires_grad=True) for n in (L, S, S)]
    out = varlen_attention(
        *packed, *starts, max(L), max(S), 0.4, generator=torch.Generator().manual_seed(1)
    )
    philox = torch.randint(-(2**63), 2**63 - 1, (2,), generator=torch.Generator().manual_seed(1))
    padded = [
        torch.nn.utils.rnn.pad_sequence(x.split(n), batch_first=True).transpose(1, 2)
        for x, n in zip(packed, (L, S, S), strict=True)
    ]
    raw, *_ = torch.ops.bigkern.attention(
        *(x.detach() for x in padded),
        philox=philox,
        seqlens_q=torch.tensor(L, dtype=torch.int32),
        seqlens_k=torch.tensor(S, dtype=torch.int32),
        scale=8**-0.5,
        dropout_p=0.4,
    )
    for b, (part, n) in enumerate(zip(out.split(L), L, strict=True)):
        torch.testing.assert_close(part.transpose(0, 1), raw[b, :, :n])
        assert (raw[b, :, n:] == 0).all()
    assert (out[3:73] == 0).all()  # its sequence has no keys
    grads = torch.autograd.grad(out.sum(), packed)
    assert (grads[0][3:73] == 0).all()
    assert (grads[2][9:13] == 0).all()  # keys that have no query


@pytest.mark.parametrize("average_heads", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (3, 2, 4)])
def test_weights(lead, average_heads):
    q, k, v = (torch.randn(*lead, n, 8) for n in (5, 7, 7))
    mask = torch.randn(5, 7)
    for dropout_p in (0.0, 0.5):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        out, weights = attention_with_weights(
            q, k, v, mask, dropout_p, average_heads=average_heads, generator=generators[0]
        )
        assert torch.equal(
            out,
            scaled_dot_product_attention(q, k, v, mask, dropout_p, generator=generators[1]),
        )
        if not average_heads:
            torch.testing.assert_close(weights @ v, out)
        elif dropout_p == 0:
            softmax = torch.softmax(q @ k.mT * 8**-0.5 + mask, -1)
            torch.testing.assert_close(weights, softmax.mean(-3) if lead else softmax)


def test_deterministic_is_heeded():
    q, k, v = problem(requires_grad=True)
    calls = []
    original = bigkern.ops.attention_autograd._once

    def spy(function, *tensors):
        calls.append(function.keywords["deterministic"])
        return original(function, *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bigkern.ops.attention_autograd, "_once", spy)
        scaled_dot_product_attention(q, k, v).sum().backward()
        scaled_dot_product_attention(q, k, v, deterministic=True).sum().backward()
        torch.use_deterministic_algorithms(True)
        try:
            scaled_dot_product_attention(q, k, v).sum().backward()
            scaled_dot_product_attention(q, k, v, deterministic=False).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    assert calls == [False, True, True, False]
