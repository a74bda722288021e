"""Tiny Hugging Face models of random weights, and what their attention hands to the kernel."""

import copy
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

from transformers import masking_utils  # noqa: E402, F401  (of which tests take it)

import bigkern.integrations.transformers  # noqa: E402, F401  (registers the attention)

VOCABULARY, LAYERS = 61, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSES = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    # Every other layer slides.
    "gemma2": (
        "Gemma2ForCausalLM",
        GROUPED
        | {"sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8}
        | {"attn_logit_softcapping": 2.0},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        GROUPED
        | {"sliding_window": 5, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
        | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0},
    ),
    "bert": ("BertForMaskedLM", SIZES | NO_DROPOUT),
    "vit": (
        "ViTForImageClassification",
        SIZES | NO_DROPOUT | {"image_size": 16, "patch_size": 4, "num_labels": VOCABULARY},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "dropout": 0.0, "pad_token_id": 0}
        | {f"{side}_layers": LAYERS for side in ("encoder", "decoder")}
        | {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
        | {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        | {"forced_eos_token_id": None},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
        | {"num_layers": LAYERS, "dropout_rate": 0.0, "pad_token_id": 0}
        | {"decoder_start_token_id": 1},
    ),
}
NAMES = ("query", "key", "value", "attn_mask")
ENCODER_DECODERS = ("bart", "t5")


def build(name, attention="eager", **changes):
    """Weights are large enough for attention to prefer some tokens."""
    class_name, options = CLASSES[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**options | changes)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # serves float64 too
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) / p.size(-1) ** 0.5)
    return model


def with_attention(model, attention, dtype=None):
    """A copy."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    return model


def draw_tokens(padding=None, batch=3, length=11):
    """Inputs of a model, and which of the tokens count."""
    tokens = torch.randint(3, VOCABULARY, (batch, length))
    if padding is None:
        return {"input_ids": tokens}, torch.ones_like(tokens, dtype=torch.bool)
    keep = torch.arange(length) < torch.tensor([length, length - 4, 3])[:, None]
    keep = keep.flip(1) if padding == "left" else keep
    return {"input_ids": tokens * keep, "attention_mask": keep.long()}, keep


class Calls(TorchDispatchMode):
    """Keeps the arguments of the kernel's calls, and counts those of its backward."""

    def __init__(self):
        super().__init__()
        self.forward, self.num_backward = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.bigkern.attention.default:
            arguments = {"attn_mask": None, "window_left": -1, "window_right": -1}  # if not given
            self.forward.append(arguments | dict(zip(NAMES, args, strict=False)) | kwargs)
        self.num_backward += function is torch.ops.bigkern.attention_backward.default
        return function(*args, **kwargs)
