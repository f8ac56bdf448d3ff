"""transformers: models of many families with tiny configurations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo import operators
from zoo.entry import Entry, Inputs, tokens

# Set where a configuration has an attribute of that name.
_TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dim": 32,
    "hidden_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 4,
}


def _words() -> Inputs:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return (), {"input_ids": tokens(), "attention_mask": mask}


def _only_words() -> Inputs:
    return (), {"input_ids": tokens()}


def _pairs() -> Inputs:
    return (), {**_words()[1], "decoder_input_ids": tokens(length=7)}


def _pixels(size: int = 32) -> Inputs:
    return (), {"pixel_values": torch.randn(2, 3, size, size)}


def _both() -> Inputs:
    return (), {**_words()[1], **_pixels()[1]}


def _sound(length: int = 2000) -> Inputs:
    return (), {"input_values": torch.randn(2, length)}


def _mel() -> Inputs:
    return (), {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(length=7)}


def _large() -> Inputs:
    return _pixels(64)


_CNN = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "embedding_size": 8}
_WAVE = {
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
_SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "patch_size": 4,
    "num_attention_heads": None,
    "num_hidden_layers": None,
    "num_layers": None,
}
_DETR = {
    "use_timm_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
    "num_queries": 5,
    "backbone": None,
    "use_pretrained_backbone": False,
}
_MOE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}
_TWO = {
    "text_config": {k: v for k, v in _TINY.items() if k not in ("image_size", "patch_size")},
    "vision_config": {k: v for k, v in _TINY.items() if k != "vocab_size"},
    "projection_dim": 16,
}

# Class of the model -> its inputs, and what its configuration has beside the values above; None
# for a value that it does not take.
_MODELS: dict[str, tuple[Callable[[], Inputs], dict[str, Any]]] = {
    "BertForSequenceClassification": (_words, {}),
    "RobertaForTokenClassification": (_words, {}),
    "DistilBertForSequenceClassification": (_words, {}),
    "AlbertModel": (_words, {}),
    "ElectraModel": (_words, {}),
    "DebertaV2Model": (_words, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "DebertaModel": (_words, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "MobileBertModel": (
        _words,
        {"embedding_size": 32, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "SqueezeBertModel": (_words, {}),
    "FNetModel": (_only_words, {}),
    "ConvBertModel": (_words, {}),
    "MPNetModel": (_words, {}),
    "RoFormerModel": (_words, {}),
    "XLNetModel": (_words, {"d_inner": 64, "max_position_embeddings": None}),
    "LongformerModel": (_words, {"attention_window": [4, 4], "pad_token_id": 1}),
    "BigBirdModel": (_words, {"attention_type": "original_full"}),
    "FunnelModel": (
        _words,
        {
            "block_sizes": [1, 1],
            "d_head": 8,
            "d_inner": 64,
            "num_decoder_layers": 1,
            "num_hidden_layers": None,
            "num_layers": None,
        },
    ),
    "LayoutLMModel": (_words, {}),
    "ModernBertModel": (_words, {"cls_token_id": 1, "sep_token_id": 2}),
    "EsmModel": (_words, {}),
    "GPT2LMHeadModel": (_words, {}),
    "GPTNeoForCausalLM": (_words, {"attention_types": [[["global", "local"], 1]]}),
    "GPTNeoXForCausalLM": (_words, {}),
    "GPTJForCausalLM": (_words, {"rotary_dim": 4}),
    "CodeGenForCausalLM": (_words, {"rotary_dim": 4}),
    "OPTForCausalLM": (_words, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "BloomForCausalLM": (_words, {}),
    "FalconForCausalLM": (_words, {"head_dim": None}),
    "MptForCausalLM": (_words, {"max_seq_len": 64}),
    "LlamaForCausalLM": (_words, {}),
    "MistralForCausalLM": (_words, {"sliding_window": 8}),
    "MixtralForCausalLM": (_words, _MOE),
    "Qwen2ForCausalLM": (_words, {}),
    "Qwen3ForCausalLM": (_words, {}),
    "Qwen2MoeForCausalLM": (_words, _MOE | {"shared_expert_intermediate_size": 32}),
    "GemmaForCausalLM": (_words, {}),
    "Gemma2ForCausalLM": (_words, {"query_pre_attn_scalar": 8}),
    "PhiForCausalLM": (_words, {"partial_rotary_factor": 0.5}),
    "Phi3ForCausalLM": (_words, {}),
    "StableLmForCausalLM": (_words, {}),
    "Olmo2ForCausalLM": (_words, {}),
    "CohereForCausalLM": (_words, {}),
    "GraniteForCausalLM": (_words, {}),
    "MambaForCausalLM": (_only_words, {"state_size": 4, "time_step_rank": 4}),
    "RwkvForCausalLM": (_only_words, {"attention_hidden_size": 32}),
    "XGLMForCausalLM": (_words, {"ffn_dim": 64, "attention_heads": 4}),
    "BioGptForCausalLM": (_words, {}),
    "T5ForConditionalGeneration": (_pairs, {}),
    "MT5ForConditionalGeneration": (_pairs, {"feed_forward_proj": "gated-gelu"}),
    "BartForConditionalGeneration": (_pairs, {}),
    "MBartForConditionalGeneration": (_pairs, {}),
    "PegasusForConditionalGeneration": (_pairs, {}),
    "MarianMTModel": (_pairs, {"decoder_vocab_size": 99}),
    "M2M100ForConditionalGeneration": (
        _pairs,
        {"decoder_layerdrop": 0.3, "encoder_layerdrop": 0.3},
    ),
    "BlenderbotForConditionalGeneration": (_pairs, {}),
    "LEDForConditionalGeneration": (
        _pairs,
        {"attention_window": 4, "max_encoder_position_embeddings": 64},
    ),
    "ViTForImageClassification": (_pixels, {}),
    "DeiTForImageClassification": (_pixels, {}),
    "BeitForImageClassification": (_pixels, {}),
    "Dinov2Model": (_pixels, {}),
    "SwinForImageClassification": (_pixels, _SWIN),
    "Swinv2ForImageClassification": (_pixels, _SWIN),
    "ConvNextForImageClassification": (
        _pixels,
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4},
    ),
    "ConvNextV2ForImageClassification": (
        _pixels,
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4},
    ),
    "ResNetForImageClassification": (_large, _CNN),
    "RegNetForImageClassification": (_large, _CNN | {"groups_width": 8}),
    "MobileNetV2ForImageClassification": (_large, {}),
    "MobileViTForImageClassification": (
        _large,
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
            "patch_size": 2,
        },
    ),
    "PoolFormerForImageClassification": (
        _large,
        {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1], "patch_size": 7},
    ),
    "SegformerForSemanticSegmentation": (
        _large,
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
    ),
    "LevitForImageClassification": (
        _large,
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "patch_size": 16,
        },
    ),
    "PvtV2ForImageClassification": (
        _large,
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
    "FocalNetForImageClassification": (
        _pixels,
        {
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "patch_size": 4,
        },
    ),
    "YolosForObjectDetection": (_pixels, {"image_size": [32, 32], "num_detection_tokens": 5}),
    "DetrForObjectDetection": (_large, _DETR),
    "ConditionalDetrForObjectDetection": (_large, _DETR),
    "DPTForDepthEstimation": (
        _pixels,
        {
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
        },
    ),
    "CLIPModel": (_both, _TWO),
    "SiglipModel": (_both, _TWO),
    "BlipModel": (_both, _TWO),
    "ViltModel": (_both, {}),
    "Wav2Vec2ForCTC": (_sound, _WAVE),
    "HubertForCTC": (_sound, _WAVE),
    "WavLMModel": (_sound, _WAVE),
    "WhisperForConditionalGeneration": (_mel, {"num_mel_bins": 16, "max_source_positions": 20}),
    "ASTForAudioClassification": (
        lambda: ((), {"input_values": torch.randn(2, 40, 16)}),
        {"num_mel_bins": 16, "max_length": 40, "patch_size": 8},
    ),
    "PerceiverModel": (
        lambda: ((), {"inputs": torch.randn(2, 12, 16)}),
        {
            "d_latents": 32,
            "d_model": 16,
            "num_latents": 6,
            "num_self_attends_per_block": 2,
            "num_cross_attention_heads": 4,
            "num_self_attention_heads": 4,
        },
    ),
    "TimesformerModel": (
        lambda: ((), {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
        {"num_frames": 4},
    ),
    "VideoMAEModel": (
        lambda: ((), {"pixel_values": torch.randn(2, 4, 3, 32, 32)}),
        {"num_frames": 4},
    ),
}


def _make(name: str, **keys: Any) -> nn.Module:
    kind: Any = getattr(importlib.import_module("transformers"), name)
    default = kind.config_class()
    chosen = {key: value for key, value in _TINY.items() if hasattr(default, key)} | keys
    chosen = {key: value for key, value in chosen.items() if value is not None}
    made: nn.Module = kind(kind.config_class(**chosen))
    return made


def entries() -> list[Entry]:
    operators.declare()  # and imports, once for all processes
    importlib.import_module("transformers.modeling_utils")
    return [
        Entry(f"transformers/{name}", functools.partial(_make, name, **keys), inputs)
        for name, (inputs, keys) in _MODELS.items()
    ]
