"""bigkern's attention in Hugging Face models, against their own ("eager")."""

from unittest import mock

import pytest
import torch
from transformers_helpers import (
    ENCODER_DECODERS,
    LAYERS,
    Calls,
    build,
    draw_tokens,
    masking_utils,
    transformers,
    with_attention,
)

from bigkern.integrations import transformers as integration
from bigkern.testing import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")

PADDINGS = [None, "left", "right"]
CAUSAL = ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"]
CASES = [(name, padding) for name in [*CAUSAL, "bert", *ENCODER_DECODERS] for padding in PADDINGS]


def draw_inputs(name, padding=None, **sizes):
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16)}, torch.ones(3, dtype=torch.bool)
    inputs, keep = draw_tokens(padding, **sizes)
    if name in ENCODER_DECODERS:
        decoder_inputs, keep = draw_tokens(None, length=7)
        inputs["decoder_input_ids"] = decoder_inputs["input_ids"]
    return inputs, keep


def run(model, inputs, keep):
    """Logits of the tokens that count, and the gradients of all parameters, one after another."""
    dtype = next(model.parameters()).dtype
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    logits = model(**inputs).logits[keep]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (logits * weights.to(dtype)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return logits, torch.cat([grad.flatten() for grad in grads])


def softmax_as_it_comes(x, dim, dtype=None):
    """In float64: models ask for float32, in which a row of masked scores is NaN."""
    return x.softmax(dim)


def assert_like_eager(model, inputs, keep, dtype=torch.float32):
    """Returns the calls of the kernel."""
    model = with_attention(model, "eager", dtype)
    with Calls() as calls:
        logits, grads = run(with_attention(model, "bigkern"), inputs, keep)
    plain_logits, plain_grads = run(model, inputs, keep)
    with mock.patch("torch.nn.functional.softmax", softmax_as_it_comes):
        exact_logits, exact_grads = run(with_attention(model, "eager", torch.float64), inputs, keep)
    assert_as_accurate(logits, exact_logits, plain_logits)
    assert_as_accurate(grads, exact_grads, plain_grads, factor=3.0)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "padding"), [*CASES, ("vit", None)])
def test_logits_and_gradients(name, padding, dtype):
    calls = assert_like_eager(build(name), *draw_inputs(name, padding), dtype)
    layers = 3 * LAYERS if name in ENCODER_DECODERS else LAYERS
    assert len(calls.forward) == calls.num_backward == layers


def test_masks_are_taken_apart():
    """Keys of fewer heads, no mask where the window says it all, and else padding alone."""
    for name, window in (("llama", (-1, 0)), ("mistral", (4, 0))):
        model = build(name, "bigkern")
        for padding in (None, "left"):
            inputs, keep = draw_tokens(padding)
            with torch.no_grad(), Calls() as calls:
                model(**inputs)
            for call in calls.forward:
                assert (call["window_left"], call["window_right"]) == window
                assert call["query"].shape == (3, 4, 11, 8)
                assert call["key"].shape == (3, 2, 11, 8)
                if padding is None:
                    assert call["attn_mask"] is None
                else:
                    assert torch.equal(call["attn_mask"][:, 0, 0], keep)
    with torch.no_grad(), Calls() as calls:
        build("bert", "bigkern")(**inputs)
    assert calls.forward[0]["attn_mask"].stride(2) == 0


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_windows_longer_than_tiles(name):
    inputs, keep = draw_tokens("left", length=300)
    assert_like_eager(build(name, sliding_window=140), inputs, keep)


def test_masks_of_the_user():
    """Prefixes whose tokens see one another; sequences one after another, by their positions."""
    inputs, keep = draw_tokens()
    prefix = torch.arange(11) < 4
    allowed = torch.ones(11, 11, dtype=torch.bool).tril() | (prefix & prefix[:, None])
    for model in (build("llama"), build("mistral")):
        bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min).expand(3, 1, 11, 11)
        assert_like_eager(model, inputs | {"attention_mask": bias}, keep)
        model.config.use_cache = False  # with which positions aren't looked at
        packed = {"position_ids": torch.tensor([[*range(4), *range(7)]])}
        assert_like_eager(model, inputs | packed, keep)


MASKS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(5),
    "sliding by fewer": masking_utils.sliding_window_causal_mask_function(4),
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(5),
    "chunked": masking_utils.chunked_causal_mask_function(5, torch.zeros(3, dtype=torch.long)),
    "causal or prefix": masking_utils.or_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: k < 4
    ),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("q_length", "q_offset", "kv_length", "kv_offset"),
    [(11, 0, 11, 0), (4, 7, 11, 0), (1, 10, 11, 0), (4, 7, 8, 3), (11, 0, 16, 0), (4, 2, 11, 0)],
    ids=["first", "later", "one", "sliding cache", "static cache", "static, later"],
)
@pytest.mark.parametrize("skips", [True, False])
def test_masks_mean_what_torchs_do(name, padding, q_length, q_offset, kv_length, kv_offset, skips):
    attention_mask = draw_tokens(padding)[1] if padding else None
    is_causal = "both" not in name and name != "bidirectional"
    arguments = {
        "batch_size": 3,
        "q_length": q_length,
        "q_offset": q_offset,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": MASKS[name],
        "attention_mask": attention_mask,
        "local_size": 5 if "sliding" in name or name == "chunked" else None,
        "allow_is_causal_skip": is_causal and skips and "or" not in name,
        "allow_is_bidirectional_skip": not is_causal and skips,
        "use_vmap": False,
    }
    torchs = transformers.AttentionInterface()["sdpa"]
    theirs, mine = masking_utils.sdpa_mask(**arguments), integration.mask(**arguments)
    assert (mine is None) == (theirs is None)
    assert mine is None or torch.equal(mine, theirs)

    module = torch.nn.Module()
    module.is_causal = is_causal
    query = torch.randn(3, 4, q_length, 8)
    key, value = torch.randn(2, 3, 4, kv_length, 8).unbind()
    out, _ = integration.attention(module, query, key, value, mine)
    inputs = (query, key, value)
    exact, _ = torchs(module, *(x.double() for x in inputs), theirs)
    plain, _ = torchs(module, *inputs, theirs)
    assert out.is_contiguous()
    assert_as_accurate(out, exact, plain)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("L", "S"), [(5, 5), (5, 9), (9, 5), (1, 9)])
def test_causal_without_a_mask(L, S, biased):
    """To the top left; a single query meets all keys."""
    module = torch.nn.Module()
    inputs = [torch.randn(2, 4, n, 8) for n in (L, S, S)]
    bias = {"position_bias": torch.randn(1, 4, L, S)} if biased else {}
    out, _ = integration.attention(module, *inputs, None, **bias)
    torchs = transformers.AttentionInterface()["sdpa"]
    wide = {name: x.double() for name, x in bias.items()}
    exact, _ = torchs(module, *(x.double() for x in inputs), None, **wide)
    assert_as_accurate(out, exact, torchs(module, *inputs, None, **bias)[0])


@pytest.mark.parametrize(("is_causal", "offset"), [(True, 0), (True, 4), (False, 0)])
def test_window_without_a_mask(is_causal, offset):
    """As FlashAttention takes it."""
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    allowed = (distance < 3) & (distance >= 0 if is_causal else distance > -3)
    query, allowed = query[:, :, 2 * offset :], allowed[2 * offset :]
    arguments = {"is_causal": is_causal, "sliding_window": 3}
    out, _ = integration.attention(None, query, key, value, None, **arguments)
    assert torch.equal(out, integration.attention(None, query, key, value, allowed)[0])


def test_inference_mode():
    """Whose tensors don't tell whether they were written into."""
    model = build("mistral", "bigkern")
    inputs, keep = draw_tokens("left")
    with torch.no_grad():
        expected = model(**inputs).logits
    with torch.inference_mode(), Calls() as calls:
        assert_as_accurate(model(**inputs).logits[keep], expected[keep].double(), expected[keep])
    assert len(calls.forward) == LAYERS


def test_a_changed_mask_is_taken_as_it_is():
    module = torch.nn.Module()
    query, key, value = torch.randn(3, 3, 4, 11, 8).unbind()
    mask = integration.mask(3, 11, 11, attention_mask=draw_tokens("left")[1])
    whole = integration.attention(module, query, key, value, mask)[0]
    cut = integration.attention(module, query[:, :, :6], key, value, mask[:, :, :6])[0]
    torch.testing.assert_close(cut, whole[:, :6])
    mask[:, :, :, 5] = False
    key[:, :, 5], value[:, :, 5] = 9.0, 9.0
    changed = integration.attention(module, query, key, value, mask)[0]
    key[:, :, 5], value[:, :, 5] = -9.0, -9.0
    assert torch.equal(integration.attention(module, query, key, value, mask)[0], changed)


def generate(model, inputs, **options):
    with torch.no_grad(), Calls() as calls:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
    return tokens, len(calls.forward)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODERS])
def test_generates_the_same_tokens(name, padding):
    model = build(name)
    inputs, _ = draw_tokens(padding)
    expected, _ = generate(model, inputs)
    tokens, calls = generate(with_attention(model, "bigkern"), inputs)
    assert torch.equal(tokens, expected)
    assert calls >= 8 * LAYERS


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generates_from_a_static_cache(name, padding):
    model = build(name)
    inputs, _ = draw_tokens(padding)
    expected, _ = generate(model, inputs)
    static = {"cache_implementation": "static", "disable_compile": True}
    tokens, calls = generate(with_attention(model, "bigkern"), inputs, **static)
    assert torch.equal(tokens, expected)
    assert calls == 8 * LAYERS


def test_several_tokens_after_others():
    """As in assisted decoding: more than one query, and more keys."""
    model = build("llama", "bigkern").double()
    tokens = draw_tokens()[0]["input_ids"]
    with torch.no_grad():
        whole = model(tokens).logits
        past = model(tokens[:, :6]).past_key_values
        with Calls() as calls:
            rest = model(tokens[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(rest, whole[:, 6:])
    assert [call["attn_mask"] for call in calls.forward] == [None] * LAYERS


def test_attention_weights():
    """Where the window is part of the mask, and beside softcap, too."""
    inputs, keep = draw_tokens("left")
    for name in ("llama", "gemma2", "bert"):
        model = build(name)
        with torch.no_grad():
            outs = [
                with_attention(model, attention)(**inputs, output_attentions=True)
                for attention in ("bigkern", "eager")
            ]
        for mine, theirs in zip(*(out.attentions for out in outs), strict=True):
            rows = keep[:, None, :, None]
            torch.testing.assert_close(mine * rows, theirs * rows)
            assert mine.shape == (3, 4, 11, 11)


def test_dropout_when_training():
    model = build("bert", "bigkern", attention_probs_dropout_prob=0.5)
    inputs, _ = draw_tokens()
    kept = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, kept)
    model.train()
    with Calls() as calls:
        assert not torch.equal(model(**inputs).logits, kept)
    assert [call["dropout_p"] for call in calls.forward] == [0.5] * LAYERS


def test_autocast():
    """Rotated queries are float32 there, and values bfloat16."""
    model = build("llama")
    inputs, _ = draw_tokens("right")
    outs = []
    for attention, dtype in (("bigkern", None), ("eager", torch.float64), ("eager", None)):
        copied = with_attention(model, attention, dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            outs.append(copied(**inputs).logits[inputs["attention_mask"].bool()])
    assert_as_accurate(*outs)


@pytest.mark.parametrize("name", ["sinks", "indices", "block_indices"])
def test_what_it_lacks_is_an_error(name):
    query, key, value = torch.randn(3, 1, 2, 3, 8).unbind()
    arguments = (torch.nn.Module(), query, key, value, None)
    with pytest.raises(NotImplementedError, match=rf"\({name}\); use attn_implementation="):
        integration.attention(*arguments, **{name: torch.ones(1)})
    with pytest.raises(NotImplementedError, match="weights beside attention sinks"):
        integration.attention(*arguments, s_aux=torch.ones(2), output_attentions=True)


def test_loads_a_model_with_it(tmp_path):
    model = build("llama", "bigkern")
    model.save_pretrained(tmp_path)
    assert "bigkern" not in (tmp_path / "config.json").read_text()
    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path, attn_implementation="bigkern")
    inputs, _ = draw_tokens("left")
    with torch.no_grad(), Calls() as calls:
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert len(calls.forward) == 2 * LAYERS
    assert load(tmp_path).config._attn_implementation == "sdpa"


def build_clip():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": LAYERS}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=sizes | tokens | {"vocab_size": 61},
        vision_config=sizes | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    return transformers.CLIPModel(config).eval()


def test_enable_and_undo():
    model = build_clip()
    configs = [model.config, model.text_model.config, model.vision_model.config]
    before = [config._attn_implementation for config in configs]
    assert before == ["sdpa", "eager", "sdpa"]
    inputs = draw_tokens("right")[0] | {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = model(**inputs).logits_per_text
        undo = integration.enable(model)
        assert [config._attn_implementation for config in configs] == ["bigkern"] * 3
        with Calls() as calls:
            logits = model(**inputs).logits_per_text
        assert len(calls.forward) == 2 * LAYERS
        torch.testing.assert_close(logits, expected)
        undo()
        assert [config._attn_implementation for config in configs] == before
        assert torch.equal(model(**inputs).logits_per_text, expected)


def test_enable_refuses_what_it_cant():
    with pytest.raises(
        TypeError, match=r"model must be a transformers\.PreTrainedModel, got <class"
    ):
        integration.enable(torch.nn.Linear(2, 2))
    config = transformers.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.FalconModel(config)
    before = config._attn_implementation
    with pytest.raises(NotImplementedError, match="FalconModel doesn't use transformers'"):
        integration.enable(model)
    assert config._attn_implementation == before
