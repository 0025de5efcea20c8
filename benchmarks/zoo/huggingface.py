"""Hugging Face transformers: one small random model for each architecture, over language, vision, speech, video and
several of them at once.

A row is: name of the class, what it is fed, options of its configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo.case import Built, Case

ZOO = "huggingface"
LAYERS, WIDTH, HEADS, VOCABULARY = 3, 32, 4, 96
LENGTH, SIDE, PATCH = 12, 32, 8
SAMPLES = 4000

Options = dict[str, Any]
Feed = Callable[[], dict[str, Any]]
_SPECIAL: Options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT: Options = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
}
_TEXT: Options = {**_BERT, "vocab_size": VOCABULARY}
_LLAMA: Options = {**_TEXT, "num_key_value_heads": 2, **_SPECIAL}
_GPT: Options = {
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE: Options = {**_BERT, "image_size": SIDE, "patch_size": PATCH}
_MOE: Options = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}
_SEQ2SEQ: Options = {
    **{
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", 64))
    },
    "d_model": WIDTH,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 2,
    **_SPECIAL,
}
_T5: Options = {
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
}
_WAVE: Options = {
    **_BERT,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (10, 4),
    "num_feat_extract_layers": 2,
    "vocab_size": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
_STAGES: Options = {"depths": [2, 3], "num_heads": [2, 4]}


# -- what models are fed -----------------------------------------------------------------------------------------------


def _ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, length))


def _padding(rows: int = 2, length: int = LENGTH) -> Tensor:
    """A mask whose last row is a quarter padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, length - length // 4 :] = 0
    return mask


def _text() -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": _padding()}


def _padded_text(length: int) -> dict[str, Any]:
    return {"input_ids": _ids(length=length), "attention_mask": _padding(length=length)}


def _padded_pair(length: int) -> dict[str, Any]:
    return {**_padded_text(length), "decoder_input_ids": _ids(length=8)}


def _only_ids() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _pair() -> dict[str, Any]:
    return {**_text(), "decoder_input_ids": _ids(length=8), "decoder_attention_mask": _padding(length=8)}


def _image(side: int = SIDE) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, side, side)}


def _clip(frames: int = 4) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, frames, 3, SIDE, SIDE)}


def _video() -> dict[str, Any]:
    return {"pixel_values_videos": torch.randn(1, 4, 3, SIDE, SIDE)}


def _features() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 40, 20), "attention_mask": _padding(length=40)}


def _wave() -> dict[str, Any]:
    mask = torch.ones(2, SAMPLES, dtype=torch.long)
    mask[-1, SAMPLES // 2 :] = 0
    return {"input_values": torch.randn(2, SAMPLES), "attention_mask": mask}


def _image_text() -> dict[str, Any]:
    return {**_text(), **_image()}


def _llava(image_token: int, patches: int) -> dict[str, Any]:
    """One image in a prompt: as many places for it as it has patches."""
    ids = _ids(rows=1, length=patches + 6)
    ids[0, 2 : 2 + patches] = image_token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}


def _grid_image() -> dict[str, Any]:
    """One image of 4 x 4 patches of two frames, merged two by two, as flat patches and a grid."""
    flat, grid = torch.randn(16, 3 * 2 * PATCH * PATCH), torch.tensor([[1, 4, 4]])
    text = _llava(3, 4)
    return {**text, "pixel_values": flat, "image_grid_thw": grid, "mm_token_type_ids": (text["input_ids"] == 3).long()}


# -- configurations with parts -----------------------------------------------------------------------------------------


_CLIP: Options = {
    "text_config": {**_TEXT, "max_position_embeddings": 32, **_SPECIAL},
    "vision_config": _IMAGE,
    "projection_dim": WIDTH,
}
_PATCHES = (SIDE // PATCH) ** 2
_LLAVA: Options = {
    "text_config": {"model_type": "llama", **_LLAMA},
    "vision_config": {"model_type": "clip_vision_model", **_IMAGE},
    "image_token_index": 3,
}
_QFORMER: Options = {**_TEXT, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 2}

# -- the table ---------------------------------------------------------------------------------------------------------

_ENCODERS: dict[str, tuple[Feed, Options]] = {
    "BertModel": (_text, _TEXT),
    "RobertaModel": (_text, _TEXT),
    "AlbertModel": (_text, {**_TEXT, "embedding_size": 16, "num_hidden_layers": 4}),
    "DistilBertModel": (_text, {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64, "vocab_size": VOCABULARY}),
    "ElectraModel": (_text, {**_TEXT, "embedding_size": 16}),
    "DebertaModel": (_text, {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}),
    "DebertaV2Model": (_text, {**_TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}),
    "MPNetModel": (_text, _TEXT),
    "XLNetModel": (_text, {"d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 64, "vocab_size": VOCABULARY}),
    "XLMModel": (_text, {"emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "n_words": VOCABULARY}),
    "LongformerModel": (partial(_padded_text, 16), {**_TEXT, "attention_window": 8}),
    "BigBirdModel": (partial(_padded_text, 64), {**_TEXT, "attention_type": "original_full"}),
    "FNetModel": (_only_ids, {**_TEXT, "tpu_short_seq_length": LENGTH}),
    "FunnelModel": (_text, {"d_model": WIDTH, "n_head": HEADS, "d_head": 8, "d_inner": 64, "block_sizes": [2, 2], "vocab_size": VOCABULARY}),
    "ModernBertModel": (_text, {**_TEXT, "num_hidden_layers": 4, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2}),
    "ConvBertModel": (_text, {**_TEXT, "embedding_size": WIDTH, "num_attention_heads": 4}),
    "MobileBertModel": (_text, {**_TEXT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "SqueezeBertModel": (_text, {**_TEXT, "embedding_size": WIDTH}),
    "NystromformerModel": (_text, {**_TEXT, "num_landmarks": LENGTH, "segment_means_seq_len": LENGTH}),
    "RoFormerModel": (_text, {**_TEXT, "embedding_size": WIDTH}),
    "CanineModel": (partial(_padded_text, 64), {**_BERT, "local_transformer_stride": 32, "num_hash_buckets": 64}),
    "ReformerModel": (partial(_padded_text, 64), {
        "attn_layers": ["local", "lsh", "local"], "hidden_size": WIDTH, "num_attention_heads": HEADS, "attention_head_size": 8,
        "feed_forward_size": 64, "vocab_size": VOCABULARY, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8],
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4, "hash_seed": 0,
    }),
    "EsmModel": (_text, {**_TEXT, "pad_token_id": 0, "mask_token_id": 4, "position_embedding_type": "rotary"}),
    "LayoutLMModel": (_text, _TEXT),
    "MegatronBertModel": (_text, _TEXT),
}  # fmt: skip

_DECODERS: dict[str, tuple[Feed, Options]] = {
    "GPT2LMHeadModel": (_text, _GPT),
    "OpenAIGPTModel": (_text, _GPT),
    "GPTNeoForCausalLM": (
        _text,
        {
            "hidden_size": WIDTH,
            "num_layers": 4,
            "num_heads": HEADS,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "vocab_size": VOCABULARY,
            **_SPECIAL,
        },
    ),
    "GPTNeoXForCausalLM": (_text, {**_TEXT, **_SPECIAL}),
    "GPTJForCausalLM": (_text, {**_GPT, "rotary_dim": 4}),
    "CodeGenForCausalLM": (_text, {**_GPT, "rotary_dim": 4}),
    "CTRLModel": (_text, {**_GPT, "dff": 64}),
    "OPTForCausalLM": (_text, {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": WIDTH, **_SPECIAL}),
    "BloomForCausalLM": (
        _text,
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY, **_SPECIAL},
    ),
    "MptForCausalLM": (
        _text,
        {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCABULARY, "expansion_ratio": 2},
    ),
    "BioGptForCausalLM": (_text, {**_TEXT, **_SPECIAL}),
    "XGLMForCausalLM": (
        _text,
        {"d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 64, "vocab_size": VOCABULARY},
    ),
    "FalconForCausalLM": (_text, {**_TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, **_SPECIAL}),
    "LlamaForCausalLM": (_text, _LLAMA),
    "MistralForCausalLM": (_text, {**_LLAMA, "sliding_window": 4}),
    "Qwen2ForCausalLM": (_text, _LLAMA),
    "Qwen3ForCausalLM": (_text, {**_LLAMA, "head_dim": 8}),
    "GemmaForCausalLM": (_text, {**_LLAMA, "head_dim": 8}),
    "Gemma2ForCausalLM": (_text, {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "Gemma3ForCausalLM": (_text, {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "PhiForCausalLM": (_text, _LLAMA),
    "Phi3ForCausalLM": (_text, _LLAMA),
    "StableLmForCausalLM": (_text, _LLAMA),
    "Olmo2ForCausalLM": (_text, _LLAMA),
    "CohereForCausalLM": (_text, _LLAMA),
    "GraniteForCausalLM": (_text, {**_LLAMA, "residual_multiplier": 0.5}),
    "GlmForCausalLM": (_text, {**_LLAMA, "head_dim": 8}),
    "NemotronForCausalLM": (_text, _LLAMA),
}

_EXPERTS: dict[str, tuple[Feed, Options]] = {
    "MixtralForCausalLM": (_text, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2MoeForCausalLM": (_text, {**_MOE, "shared_expert_intermediate_size": WIDTH}),
    "Qwen3MoeForCausalLM": (_text, {**_MOE, "head_dim": 8}),
    "OlmoeForCausalLM": (_text, _MOE),
    "DeepseekV3ForCausalLM": (_text, {
        **_MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": HEADS,
    }),
    "GptOssForCausalLM": (_text, {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "SwitchTransformersModel": (_pair, {**_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
}  # fmt: skip

_STATE_SPACES: dict[str, tuple[Feed, Options]] = {
    "MambaForCausalLM": (_only_ids, {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "state_size": 4}),
    "Mamba2ForCausalLM": (_only_ids, {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "state_size": 8, "num_heads": 8, "head_dim": 8,
        "n_groups": 1, "chunk_size": 4,
    }),
    "JambaForCausalLM": (_text, {
        **_LLAMA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    }),
    "RecurrentGemmaForCausalLM": (_only_ids, {**_LLAMA, "lru_width": WIDTH, "attention_window_size": 8, "head_dim": 8}),
    "RwkvForCausalLM": (_only_ids, {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "attention_hidden_size": WIDTH}),
    "FalconH1ForCausalLM": (_text, {
        **_LLAMA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4,
    }),
    "BambaForCausalLM": (_text, {
        **_LLAMA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4,
        "attn_layer_indices": [1],
    }),
    "Lfm2ForCausalLM": (_text, {**_LLAMA, "layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 64, "block_multiple_of": 8}),
    "Qwen3NextForCausalLM": (_text, {
        **_MOE, "head_dim": 8, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "shared_expert_intermediate_size": WIDTH,
    }),
}  # fmt: skip

_ENCODER_DECODERS: dict[str, tuple[Feed, Options]] = {
    "T5Model": (_pair, _T5),
    "LongT5Model": (_pair, {**_T5, "local_radius": 3}),
    "BartModel": (_pair, _SEQ2SEQ),
    "MBartModel": (_pair, _SEQ2SEQ),
    "PegasusModel": (_pair, _SEQ2SEQ),
    "MarianModel": (_pair, _SEQ2SEQ),
    "BlenderbotModel": (_pair, _SEQ2SEQ),
    "M2M100Model": (_pair, _SEQ2SEQ),
    "LEDModel": (partial(_padded_pair, 16), {**_SEQ2SEQ, "attention_window": 8}),
    "FSMTModel": (_pair, {**_SEQ2SEQ, "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]}),
    "ProphetNetModel": (_pair, {
        "hidden_size": WIDTH, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_encoder_attention_heads": HEADS,
        "num_decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, **_SPECIAL,
    }),
}  # fmt: skip

_VISION: dict[str, tuple[Feed, Options]] = {
    "ViTModel": (_image, _IMAGE),
    "DeiTModel": (_image, _IMAGE),
    "BeitModel": (_image, {**_IMAGE, "use_relative_position_bias": True}),
    "Data2VecVisionModel": (_image, {**_IMAGE, "use_shared_relative_position_bias": True}),
    "Dinov2Model": (_image, _IMAGE),
    "DINOv3ViTModel": (_image, _IMAGE),
    "ViTMSNModel": (_image, _IMAGE),
    "ViTMAEModel": (_image, {**_IMAGE, "decoder_hidden_size": WIDTH, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": HEADS}),
    "YolosModel": (_image, {**_IMAGE, "image_size": [SIDE, SIDE], "num_detection_tokens": 4}),
    "VitDetModel": (_image, {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": SIDE, "pretrain_image_size": SIDE,
        "patch_size": PATCH, "window_size": 2, "window_block_indices": [0, 2], "residual_block_indices": [1],
        "use_relative_position_embeddings": True,
    }),
    "DPTModel": (_image, {**_IMAGE, "backbone_out_indices": [0, 1, 2, 2]}),
    "SwinModel": (_image, {**_STAGES, "image_size": SIDE, "patch_size": 2, "embed_dim": 16, "window_size": 4}),
    "Swinv2Model": (_image, {**_STAGES, "image_size": SIDE, "patch_size": 2, "embed_dim": 16, "window_size": 4}),
    "Swin2SRModel": (_image, {**_STAGES, "image_size": SIDE, "embed_dim": 16, "window_size": 4}),
    "HieraModel": (_image, {
        "image_size": [SIDE, SIDE], "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "num_query_pool": 1,
        "masked_unit_size": [4, 4], "masked_unit_attention": [True, False],
    }),
    "FocalNetModel": (_image, {"image_size": SIDE, "embed_dim": 16, "hidden_sizes": [16, 32], "depths": [2, 3], "focal_levels": [2, 2], "focal_windows": [3, 3]}),
    "SegformerModel": (partial(_image, 64), {"hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [2, 2, 2, 2]}),
    "GLPNModel": (partial(_image, 64), {"hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2], "depths": [2, 2, 2, 2]}),
    "PvtModel": (partial(_image, 64), {"image_size": 64, "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2]}),
    "PvtV2Model": (partial(_image, 64), {"image_size": 64, "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 2]}),
    "CvtModel": (partial(_image, 64), {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [2, 2, 3]}),
    "MobileViTModel": (partial(_image, 64), {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 16, 16, 16, 16]}),
    "MobileViTV2Model": (partial(_image, 64), {"image_size": 64}),
    "SwiftFormerModel": (partial(_image, 64), {"image_size": 64, "depths": [2, 2, 2, 2], "embed_dims": [16, 24, 32, 48]}),
    "LevitModel": (partial(_image, 64), {
        "image_size": 64, "hidden_sizes": [32, 32, 48], "num_attention_heads": [2, 2, 3], "depths": [2, 2, 2], "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 4, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    }),
    "PoolFormerModel": (partial(_image, 64), {"hidden_sizes": [16, 32, 32, 32]}),
    "ConvNextModel": (partial(_image, 64), {"hidden_sizes": [16, 32, 32, 32], "depths": [2, 2, 3, 2]}),
    "ConvNextV2Model": (partial(_image, 64), {"hidden_sizes": [16, 32, 32, 32], "depths": [2, 2, 3, 2]}),
    "ResNetModel": (partial(_image, 64), {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [3, 3, 3, 2]}),
    "RegNetModel": (partial(_image, 64), {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [3, 3, 3, 2], "groups_width": 8}),
    "BitModel": (partial(_image, 64), {"embedding_size": 16, "hidden_sizes": [32, 32, 32, 32], "depths": [3, 3, 3, 2], "num_groups": 4}),
    "MobileNetV2Model": (partial(_image, 64), {"depth_multiplier": 0.35}),
    "EfficientNetModel": (partial(_image, 64), {"width_coefficient": 0.25, "hidden_dim": 320, "image_size": 64}),
    "DepthAnythingForDepthEstimation": (partial(_image, 28), {
        "backbone_config": {"model_type": "dinov2", **_IMAGE, "image_size": 28, "patch_size": 7, "num_hidden_layers": 4, "reshape_hidden_states": False, "out_indices": [1, 2, 3, 4]},
        "reassemble_hidden_size": WIDTH, "patch_size": 7, "neck_hidden_sizes": [8, 16, 16, 16], "fusion_hidden_size": 16,
    }),
    "SamVisionModel": (_image, {
        "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": 4, "window_size": 4,
        "global_attn_indexes": [1, 3], "output_channels": 16, "num_pos_feats": 16, "mlp_dim": 64,
    }),
}  # fmt: skip

_VIDEO: dict[str, tuple[Feed, Options]] = {
    "VideoMAEModel": (_clip, {**_IMAGE, "num_frames": 4}),
    "TimesformerModel": (_clip, {**_IMAGE, "num_frames": 4}),
    "VivitModel": (_clip, {**_IMAGE, "num_frames": 4, "tubelet_size": [2, PATCH, PATCH]}),
    "VJEPA2Model": (_video, {
        **_IMAGE, "crop_size": SIDE, "frames_per_clip": 4, "pred_hidden_size": 24, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": LAYERS, "hidden_size": 48,
    }),
}  # fmt: skip

_SPEECH: dict[str, tuple[Feed, Options]] = {
    "Wav2Vec2Model": (_wave, _WAVE),
    "HubertModel": (_wave, {**_WAVE, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "WavLMModel": (_wave, {**_WAVE, "num_buckets": 8, "max_bucket_distance": 16}),
    "UniSpeechModel": (_wave, _WAVE),
    "Data2VecAudioModel": (_wave, {**_WAVE, "num_conv_pos_embeddings": 3}),
    "SEWModel": (_wave, {**_WAVE, "squeeze_factor": 1}),
    "Wav2Vec2ConformerModel": (_wave, {**_WAVE, "conv_depthwise_kernel_size": 7}),
    "Wav2Vec2BertModel": (_features, {**_BERT, "feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 7, "apply_spec_augment": False}),
    "ASTModel": (lambda: {"input_values": torch.randn(2, 32, 16)}, {**_BERT, "patch_size": 4, "max_length": 32, "num_mel_bins": 16}),
    "WhisperModel": (
        lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _ids(length=8)},
        {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
    ),
    "Speech2TextModel": (
        lambda: {"input_features": torch.randn(2, 40, 16), "attention_mask": _padding(length=40), "decoder_input_ids": _ids(length=8)},
        {**_SEQ2SEQ, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 40, "max_target_positions": 20},
    ),
    "MoonshineModel": (
        lambda: {"input_values": torch.randn(2, SAMPLES), "decoder_input_ids": _ids(length=8)},
        {
            **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("num_hidden_layers", LAYERS), ("num_attention_heads", 4))},
            "hidden_size": WIDTH, "intermediate_size": 64, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
            "vocab_size": VOCABULARY,
        },
    ),
    "EncodecModel": (lambda: {"input_values": torch.randn(1, 1, SAMPLES)}, {"num_filters": 8, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 16}),
}  # fmt: skip

_SEVERAL: dict[str, tuple[Feed, Options]] = {
    "CLIPModel": (_image_text, _CLIP),
    "SiglipModel": (_image_text, {k: v for k, v in _CLIP.items() if k != "projection_dim"}),
    "AltCLIPModel": (_image_text, {**_CLIP, "text_config": {**_CLIP["text_config"], "project_dim": WIDTH}}),
    "BlipModel": (_image_text, _CLIP),
    "GroupViTModel": (_image_text, {
        **_CLIP, "projection_intermediate_dim": 32,
        "vision_config": {**_IMAGE, "depths": [2, 2, 2], "num_hidden_layers": 6, "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]},
    }),
    "XCLIPModel": (lambda: {**_text(), **_clip()}, {
        **_CLIP, "prompt_num_attention_heads": HEADS,
        "vision_config": {**_IMAGE, "mit_hidden_size": WIDTH, "mit_intermediate_size": 64, "mit_num_attention_heads": 4, "num_frames": 4},
    }),
    "ViltModel": (_image_text, {**_TEXT, "image_size": SIDE, "patch_size": PATCH}),
    "GitModel": (_image_text, {**_TEXT, "vision_config": _IMAGE, **_SPECIAL}),
    "FlavaModel": (_image_text, {f"{part}_config": {**_IMAGE, "vocab_size": VOCABULARY} for part in ("text", "image", "multimodal")} | {"hidden_size": WIDTH}),
    "VisualBertModel": (lambda: {**_text(), "visual_embeds": torch.randn(2, 6, 20)}, {**_TEXT, "visual_embedding_dim": 20}),
    "LxmertModel": (
        lambda: {**_text(), "visual_feats": torch.randn(2, 6, 20), "visual_pos": torch.rand(2, 6, 4)},
        {**_TEXT, "l_layers": 3, "x_layers": 3, "r_layers": 3, "visual_feat_dim": 20},
    ),
    "LlavaForConditionalGeneration": (partial(_llava, 3, _PATCHES), _LLAVA),
    "PaliGemmaForConditionalGeneration": (partial(_llava, 3, _PATCHES), {
        "text_config": {"model_type": "gemma", **_LLAMA, "head_dim": 8}, "vision_config": {"model_type": "siglip_vision_model", **_IMAGE},
        "image_token_index": 3, "projection_dim": WIDTH, "hidden_size": WIDTH,
    }),
    "Blip2ForConditionalGeneration": (partial(_llava, 3, 4), {
        "vision_config": _IMAGE, "qformer_config": _QFORMER, "text_config": {"model_type": "opt", **_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
        "num_query_tokens": 4, "image_token_index": 3,
    }),
    "Qwen2VLForConditionalGeneration": (_grid_image, {
        "text_config": {**_LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": HEADS, "patch_size": PATCH},
        "image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 1, "vision_end_token_id": 2,
    }),
    "DecisionTransformerModel": (
        lambda: {
            "states": torch.randn(2, 6, 5), "actions": torch.randn(2, 6, 3), "rewards": torch.randn(2, 6, 1),
            "returns_to_go": torch.randn(2, 6, 1), "timesteps": torch.arange(6).repeat(2, 1), "attention_mask": _padding(length=6),
        },
        {**{k: v for k, v in _GPT.items() if k != "n_embd"}, "hidden_size": WIDTH, "state_dim": 5, "act_dim": 3},
    ),
    "PatchTSTModel": (
        lambda: {"past_values": torch.randn(2, 32, 3)},
        {"d_model": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": 64, "context_length": 32, "patch_length": 4,
         "num_input_channels": 3, "patch_stride": 4},
    ),
    "PerceiverModel": (
        lambda: {"inputs": torch.randn(2, 20, 16)},
        {"d_model": 16, "d_latents": WIDTH, "num_latents": 8, "num_blocks": 2, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
         "num_cross_attention_heads": 4},
    ),
}  # fmt: skip

_ROWS = {
    **_ENCODERS,
    **_DECODERS,
    **_EXPERTS,
    **_STATE_SPACES,
    **_ENCODER_DECODERS,
    **_VISION,
    **_VIDEO,
    **_SPEECH,
    **_SEVERAL,
}


def cases(everything: bool = False) -> list[Case]:
    """Every row of the table; ``everything`` adds nothing to them."""
    return [Case(name, ZOO, partial(_build, name)) for name in _ROWS]


def _build(name: str) -> Built:
    import transformers

    feed, options = _ROWS[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**copy.deepcopy(options)))
    return Built(model.train(), feed())
