"""KVCache and attention_with_cache against attention over the whole sequences at once."""

import math

import pytest
import torch

from bigkern import KVCache, attention_with_cache
from bigkern.ops import reference
from bigkern.testing import assert_as_accurate

DEVICES = ["cpu", "emulated", "cuda"]
B, H, E, EV, CAPACITY = 3, 4, 16, 24, 21


def tokens(num, dtype=torch.float32, Hkv=2, device="cpu"):
    """Queries, keys and values of `num` tokens for each sequence."""
    shapes = (B, H, num, E), (B, Hkv, num, E), (B, Hkv, num, EV)
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def make_cache(dtype=torch.float32, Hkv=2, device="cpu"):
    cache = KVCache(B, Hkv, CAPACITY, E, EV, dtype=dtype, device=device)
    for buffer in (cache.keys, cache.values):
        buffer.fill_(torch.nan)  # what no token is in must not be read
    return cache


def assert_like_whole(outs, q, k, v, *, scale=None, window=None, softcap=None, alibi_slopes=None):
    """`outs` are those of all tokens of the sequences q, k, v, whose ends in `outs` may lack."""
    options = {
        "scale": 1 / math.sqrt(E) if scale is None else scale,
        "window_left": window[0] if window else -1,
        "window_right": 0,
        "softcap": softcap or 0.0,
        "alibi_slopes": alibi_slopes,
    }
    expected = reference.attention(q.double(), k.double(), v.double(), **options)[0]
    baseline = reference.attention(q, k, v, **options)[0]
    num = outs.size(2)
    assert_as_accurate(outs, expected[:, :, :num], baseline[:, :, :num])


def snapshot(cache):
    return [t.clone() for t in (cache.keys, cache.values, cache.lengths)]


def assert_unchanged(cache, before):
    for t, old in zip(snapshot(cache), before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3, "window": (5, 0)},
        {"window": (0, -1)},
        {"softcap": 1.5},
        {"alibi_slopes": 2.0 ** -torch.arange(1.0, H + 1)},
        {"alibi_slopes": torch.linspace(0, 1, B * H).view(B, H), "softcap": 3.0, "window": (7, 0)},
    ],
    ids=lambda options: "+".join(options),
)
def test_prompt_and_steps_equal_the_whole(options, dtype, Hkv, device):
    options = {k: x.to(device) if torch.is_tensor(x) else x for k, x in options.items()}
    q, k, v = tokens(20, dtype, Hkv, device)
    cache = make_cache(dtype, Hkv, device)
    outs, start = [], 0
    for num in (7, 3, *[1] * 10):
        new = (x[:, :, start : start + num] for x in (q, k, v))
        outs.append(attention_with_cache(*new, cache, **options))
        start += num
        assert cache.lengths.tolist() == [start] * B
    assert_like_whole(torch.cat(outs, dim=2), q, k, v, **options)


# Over Triton too, whose kernels take seconds to compile.
ON_A_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "cuda triton")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": (3, 0), "softcap": 2.0}])
@pytest.mark.parametrize("device", ["cpu", "emulated", "triton", *ON_A_GPU], indirect=True)
@pytest.mark.sanitize
def test_sequences_of_different_length(options, dtype, device):
    q, k, v = tokens(20, dtype, device=device)
    cache = make_cache(dtype, device=device)
    outs = [[] for _ in range(B)]
    done = [0] * B
    for num, added in [(9, [5, 0, 9]), (1, None), (1, None), (4, [0, 4, 1]), (2, None)]:
        new = [torch.full_like(x[:, :, :num], torch.nan) for x in (q, k, v)]  # padding
        counts = added or [num] * B
        for b, n in enumerate(counts):
            for x, padded in zip((q, k, v), new, strict=True):
                padded[b, :, :n] = x[b, :, done[b] : done[b] + n]
        lengths = None if added is None else torch.tensor(added)
        out = attention_with_cache(*new, cache, lengths=lengths, **options)
        for b, n in enumerate(counts):
            outs[b].append(out[b, :, :n])
            assert (out[b, :, n:] == 0).all()
            done[b] += n
        assert cache.lengths.tolist() == done
    for b in range(B):
        whole = (x[b : b + 1] for x in (q, k, v))
        assert_like_whole(torch.cat(outs[b], dim=1)[None], *whole, **options)


def test_lengths_that_meet_again():
    q, k, v = tokens(12)
    cache = make_cache()
    first = torch.tensor([1, 4, 6], dtype=torch.int32)
    cache.append(k[:, :, :6], v[:, :, :6], first)
    rest = [torch.stack([x[b, :, n : n + 5] for b, n in enumerate(first)]) for x in (k, v)]
    cache.append(*rest, 6 - first)
    assert cache.lengths.tolist() == [6] * B
    out = attention_with_cache(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], cache)
    assert torch.equal(cache.keys[:, :, :12], k)
    assert torch.equal(cache.values[:, :, :12], v)
    filled = make_cache()
    filled.append(k[:, :, :6], v[:, :, :6])
    assert torch.equal(out, attention_with_cache(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], filled))


def test_strided_input_is_taken_as_it_is():
    packed = torch.randn(B, 5, 3, H, E)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    outs = [
        attention_with_cache(*new, KVCache(B, H, 5, E))
        for new in ((q, k, v), [x.contiguous() for x in (q, k, v)])
    ]
    assert torch.equal(*outs)
    assert outs[0].transpose(1, 2).is_contiguous()  # in the order of the query


@pytest.mark.parametrize("lengths", [[4, 4, 4], [2, 6, 3]])
def test_reorder_continues_as_the_other_beam(lengths):
    _, k, v = tokens(6)
    cache, expected = make_cache(), make_cache()
    cache.append(k, v, torch.tensor(lengths))
    beams = torch.tensor([2, 0, 2])
    expected.append(k[beams], v[beams], torch.tensor(lengths)[beams])
    keys = cache.keys
    cache.reorder_(beams)
    assert cache.keys is keys
    new = tokens(3)
    out = attention_with_cache(*new, cache)
    assert torch.equal(out, attention_with_cache(*new, expected))
    assert torch.equal(cache.lengths, expected.lengths)


def test_reorder_makes_room_where_the_longest_is_dropped():
    cache = make_cache()
    cache.append(*tokens(CAPACITY)[1:], torch.tensor([CAPACITY, 2, 2]))
    with pytest.raises(ValueError, match=f"capacity of {CAPACITY}, got {CAPACITY + 1} tokens"):
        cache.append(*tokens(1)[1:])
    cache.reorder_(torch.tensor([1, 2, 1]))
    cache.append(*tokens(CAPACITY - 2)[1:])
    assert cache.lengths.tolist() == [CAPACITY] * B


def test_reset_is_a_new_cache():
    cache, new = make_cache(), tokens(5)
    attention_with_cache(*tokens(7), cache, lengths=torch.tensor([3, 7, 0]))
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
    assert torch.equal(attention_with_cache(*new, cache), attention_with_cache(*new, make_cache()))


def test_padding_needs_no_room():
    cache, (q, k, v) = make_cache(), tokens(CAPACITY + 5)
    attention_with_cache(q, k, v, cache, lengths=torch.tensor([CAPACITY, 1, 2]))
    assert cache.lengths.tolist() == [CAPACITY, 1, 2]
    assert torch.equal(cache.keys[0], k[0, :, :CAPACITY])


@pytest.mark.parametrize("first", [None, [3, 8, 5]])
@pytest.mark.parametrize("lengths", [None, [0, CAPACITY - 7, 0]])
def test_overflow_changes_nothing(first, lengths):
    cache = make_cache()
    cache.append(*tokens(8)[1:], None if first is None else torch.tensor(first))
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"must fit a capacity of {CAPACITY}, got .* tokens"):
        attention_with_cache(
            *tokens(CAPACITY - 7), cache, lengths=lengths and torch.tensor(lengths)
        )
    assert_unchanged(cache, before)
    cache.append(*tokens(CAPACITY - 8)[1:])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("query", torch.ones(B, H, 2), r"query must have shape \[3, a multiple of 2, L, 16\]"),
        ("query", torch.ones(B, 3, 2, E), r"\[3, a multiple of 2, 2, 16\], got \[3, 3, 2, 16\]"),
        ("query", torch.ones(B, H, 2, 8), r"query .* \[3, 4, 2, 16\], got \[3, 4, 2, 8\]"),
        ("query", torch.ones(B, H, 2, E).double(), "query must have dtype torch.float32, the c"),
        ("k_new", torch.ones(B, 2, 3, E), r"k_new .* \[3, 2, 2, 16\], got \[3, 2, 3, 16\]"),
        ("k_new", torch.ones(B, 2, 2, E).half(), "k_new must have dtype .* got torch.float16"),
        ("v_new", torch.ones(B, 2, 2, E), r"v_new .* \[3, 2, 2, 24\], got \[3, 2, 2, 16\]"),
        ("v_new", torch.ones(B, 2, 2, EV, device="meta"), "device cpu, the cache's, got meta"),
        ("lengths", torch.ones(2).long(), r"lengths must be int32 or int64 of shape \[3\], got"),
        ("lengths", torch.ones(B), "got torch.float32 of shape"),
        ("lengths", torch.tensor([0, 3, 1]), r"lengths must be from 0 to 2, got \[0, 3, 1\]"),
        ("lengths", torch.tensor([0, -1, 1]), r"lengths must be from 0 to 2, got \[0, -1, 1\]"),
        ("window", (-2, 0), r"window must be .* got \(-2, 0\)"),
        ("window", (4, 1), r"window must be \(left, 0\), since .* got \(4, 1\)"),
        ("softcap", -1.0, "softcap must be .* got -1.0"),
        ("alibi_slopes", torch.ones(2), r"must have shape \[4\] or \[3, 4\], got \[2\]"),
        ("alibi_slopes", torch.ones(H).double(), "alibi_slopes must be .* got torch.float64"),
    ],
)
def test_bad_input_changes_nothing(name, wrong, message):
    cache = make_cache()
    cache.append(*tokens(1)[1:])
    before = snapshot(cache)
    arguments = dict(zip(("query", "k_new", "v_new"), tokens(2), strict=True))
    with pytest.raises(ValueError, match=message):
        attention_with_cache(**arguments | {name: wrong}, cache=cache)
    assert_unchanged(cache, before)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"sizes must be at least 1, got \(2, 1, 0, 4, 4\)"):
        KVCache(2, 1, 0, 4)
    with pytest.raises(
        ValueError, match=r"indices must be int32 or int64 of shape \[3\], got .* \[2\]"
    ):
        make_cache().reorder_(torch.tensor([0, 1]))
    with pytest.raises(IndexError):
        make_cache().reorder_(torch.tensor([0, 1, B]))


def test_is_for_inference():
    cache, (q, k, v) = make_cache(), tokens(1)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"query requires grad; use torch.no_grad\(\)"):
        attention_with_cache(q, k, v, cache)
    with pytest.raises(RuntimeError, match="v_new requires grad"):
        cache.append(k, v.clone().requires_grad_())
    with torch.no_grad():
        out = attention_with_cache(q, k, v, cache)
    with torch.inference_mode():
        again = attention_with_cache(q, k, v, make_cache())
    assert torch.equal(out, again)
