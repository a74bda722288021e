"""Swapping models of Hugging Face's transformers."""

import copy

import pytest
import torch
from swap_helpers import OpCounter, snapshot
from torch import nn
from transformers_helpers import VOCABULARY, build, draw_tokens, transformers

import bigkern

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama():
    return build("llama", "sdpa", tie_word_embeddings=True)


def test_attention_and_linear_layers(llama):
    inputs, counts = draw_tokens("left")
    expected, before = llama(**inputs).logits, snapshot(llama)
    report = bigkern.swap(llama, attention=True, linear="int8", inputs=inputs)
    with OpCounter("bigkern::attention") as attention, OpCounter("bigkern::int8_linear") as linear:
        out = llama(**inputs).logits
    assert (attention.count, linear.count) == (2, 14)
    relative = (out - expected)[counts].norm() / expected[counts].norm()
    assert 0 < relative < 10 ** (-30 / 20)  # 35 dB a layer
    found = report.as_dict()
    assert found[""]["now"] == "LlamaForCausalLM with the attention bigkern"
    assert found["lm_head"]["reason"] == "its weight is that of model.embed_tokens too"
    report.undo()
    assert snapshot(llama) == before
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(llama(**inputs).logits, expected)


def test_a_part_of_another_model(llama):
    model = nn.ModuleDict({"text": llama, "head": nn.Linear(VOCABULARY, 3)})
    report = bigkern.swap(model, attention=True)
    assert report.as_dict()["text"]["now"] == "LlamaForCausalLM with the attention bigkern"
    assert "text.model" not in report.as_dict()
    other = llama.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="text has changed since it was swapped"):
        report.undo()
    assert llama.config._attn_implementation == other


def test_a_model_without_the_interface_is_left():
    config = transformers.FalconConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.FalconModel(config)
    report = bigkern.swap(model, attention=True, linear="int8")
    assert "doesn't use transformers' attention interface" in report.as_dict()[""]["reason"]
    assert "FalconLinear" in {module.was for module in report.modules}


def test_compare(llama):
    swapped = copy.deepcopy(llama)
    bigkern.swap(swapped, attention=True)
    found = bigkern.compare(llama, swapped, draw_tokens()[0], num_calls=1)
    assert [layer.name for layer in found.layers] == ["model"]
    assert found.layers[0].was == "LlamaModel with the attention sdpa"
    assert found.output.relative < 1e-5
