"""Generation: the cache changes nothing, sampling is what it says, bad prompts have a message."""

from dataclasses import replace

import pytest
import torch
from transformer_helpers import DECODER, ENCODER, V, make

from bigkern.models.sampling import sample
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = [
    replace(DECODER, positions=positions, attention=attention)
    for positions in ("learned", "rotary")
    for attention in ("bigkern", "torch")
]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [30], [5, 5, 8]]


def config_id(config):
    return f"{config.positions}-{config.attention}"


def assert_like_uncached(config, outs, tokens):
    """Of each sequence b, the logits outs[b] [L, V] of a cached model equal those of the model over
    all its tokens."""
    baseline = make(replace(config, attention="torch"))(tokens)
    expected = make(config, torch.float64)(tokens)
    firsts = (
        torch.cat([x[b, : len(out)] for b, out in enumerate(outs)]) for x in (expected, baseline)
    )
    assert_as_accurate(torch.cat(list(outs)), *firsts)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_cached_and_uncached_logits_agree(config):
    model, tokens = make(config), torch.randint(V, (3, 20))
    with torch.no_grad():
        caches = model.new_caches(3, 20)
        outs = [model(part, caches) for part in tokens.split([7, 1, 1, 4, 1, 6], dim=1)]
    assert caches[1].lengths.tolist() == [20] * 3
    assert_like_uncached(config, torch.cat(outs, dim=1), tokens)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_sequences_of_different_length(config):
    model, whole = make(config), torch.randint(V, (3, 20))
    rows = [[], [], []]
    with torch.no_grad():
        caches = model.new_caches(3, 20)
        for cache in caches:  # what no token is in must not be read
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)
        for counts in ([5, 1, 9], [1, 1, 1], [4, 0, 3], [1, 1, 1]):
            done = caches[0].lengths.tolist()
            padded = torch.zeros(3, max(counts), dtype=torch.int64)
            for b, n in enumerate(counts):
                padded[b, :n] = whole[b, done[b] : done[b] + n]
            lengths = None if min(counts) == max(counts) else torch.tensor(counts)
            logits = model(padded, caches, lengths)
            for b, n in enumerate(counts):
                rows[b].append(logits[b, :n])
    assert [sum(map(len, parts)) for parts in rows] == [11, 3, 14]
    assert_like_uncached(config, [torch.cat(parts) for parts in rows], whole)


def greedy_without_cache(model, prompt, num):
    tokens = torch.tensor([prompt])
    for _ in range(num):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens[0]


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_greedy_tokens_are_those_without_a_cache(config):
    model = make(config)
    outs = model.generate(PROMPTS, 17, temperature=0)
    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert torch.equal(out, greedy_without_cache(model, prompt, 17))
    even = torch.randint(V, (2, 5))
    for out, prompt in zip(model.generate(even, 19, temperature=0), even.tolist(), strict=True):
        assert torch.equal(out, greedy_without_cache(model, prompt, 19))


def test_a_seed_repeats_and_no_seed_does_not():
    model = make(DECODER)

    def run(seed):
        return torch.cat(model.generate(PROMPTS, 15, seed=seed)).tolist()

    assert run(3) == run(3) != run(4)
    assert run(None) != run(None)
    torch.manual_seed(9)
    first = run(None)
    torch.manual_seed(9)
    assert run(None) == first


def test_generating_leaves_the_model_as_it_was():
    model = make(replace(DECODER, dropout=0.5))
    before = torch.get_rng_state()
    greedy = model.generate([[1, 2]], 5, temperature=0)[0]
    assert torch.equal(greedy, model.eval().generate([[1, 2]], 5, temperature=0)[0])
    assert not model.training
    assert model.train().generate([[1]], 2, seed=0)[0].numel() == 3
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_no_new_token():
    outs = make(DECODER).generate(PROMPTS, 0)
    assert [out.tolist() for out in outs] == PROMPTS


# Sampling


def frequencies(logits, **options):
    rows = torch.tensor([logits]).expand(20_000, -1)
    counts = torch.bincount(sample(rows, **options), minlength=len(logits))
    return counts / counts.sum()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 2}, [0, 1, 0, 1]),
        ({"top_k": 99}, [1, 1, 1, 1]),
        ({"top_p": 0.6}, [0, 1, 0, 1]),  # 0.5 is less, 0.8 is enough
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [1, 1, 1, 1]),
        ({"top_k": 3, "top_p": 0.9}, [1, 1, 0, 1]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1, 1, 1, 1]),
        ({"temperature": 2.0, "top_k": 3}, [1, 1, 0, 1]),
    ],
    ids=str,
)
def test_sampling_draws_by_the_probabilities_that_are_left(options, kept):
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    expected = probabilities ** (1 / (options.get("temperature") or 1.0)) * torch.tensor(kept)
    expected /= expected.sum()
    found = frequencies(probabilities.log().tolist(), **options)
    assert (found[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert ((found - expected).abs() <= 5 * deviation).all()


def test_ties_at_the_edge_of_top_k_are_kept():
    assert (frequencies([0.0, 1.0, 0.0, -1.0], top_k=2) > 0).tolist() == [True, True, True, False]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [[1] * 25]}, r"fit the context of 24 tokens, got 25 \+ 2"),
        ({"prompt": [[1], [1] * 23]}, r"fit the context of 24 tokens, got 23 \+ 2"),
        ({"prompt": []}, "at least one token, got shapes"),
        ({"prompt": [[1], []]}, r"at least one token, got shapes \[\[1\], \[0\]\]"),
        ({"prompt": [[[1]]]}, r"at least one token, got shapes \[\[1, 1\]\]"),
        ({"prompt": [[1, V]]}, f"tokens from 0 to {V - 1}, got 1 to {V}"),
        ({"prompt": [[-1]]}, f"tokens from 0 to {V - 1}, got -1 to -1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be a number from 0 up, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 up, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(DECODER).generate(**{"prompt": [[1, 2]], "max_new_tokens": 2} | arguments)


def test_only_a_language_model_generates():
    with pytest.raises(ValueError, match="this model classifies"):
        make(ENCODER).generate([[1]], 2)
    with pytest.raises(ValueError, match="caches are for a language model"):
        make(ENCODER)(torch.randn(1, 2, 7), make(ENCODER).new_caches(1, 4))


def test_more_than_the_context_is_refused():
    model = make(DECODER)
    with pytest.raises(ValueError, match="lengths needs caches"):
        model(torch.zeros(1, 2, dtype=torch.int64), lengths=torch.tensor([1]))
    caches = model.new_caches(1, 99)
    with torch.no_grad():
        model(torch.zeros(1, 20, dtype=torch.int64), caches)
        with pytest.raises(ValueError, match=r"1 to 4 tokens .* 20 are cached\), got 5"):
            model(torch.zeros(1, 5, dtype=torch.int64), caches)
