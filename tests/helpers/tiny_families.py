"""A tiny model with random weights of every family of causal decoders that transformers has."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
MULTIMODAL = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

FAMILIES: list[str] = sorted({*CAUSAL, *IMAGE_TEXT, *MULTIMODAL})
"""Every model_type of a causal decoder, and of a model that reads more than text and writes text."""

NAMES: dict[int, str] = {
    64: "hidden_size n_embd d_model embed_dim embedding_dim embedding_size emb_dim hidden_dim out_hidden_size "
    "projection_dim word_embed_proj_dim encoder_hidden_size text_hidden_size lru_width vision_hidden_size "
    "projector_hidden_size output_dim output_channels hidden_size_global attention_hidden_size "
    "input_embedding_size output_embedding_size patch_embed_hidden_size vision_output_dim projector_input_dim "
    "projector_output_dim upsample_groups pronunciation_embed_dim shape_embed_dim ext_pw_out_channel "
    "depthwise_separable_out_channel nemo_conv_channels downsample_channels max_img_size max_image_size",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim dff dim_ff d_inner "
    "intermediate_size_mlp dense_intermediate_size projection_intermediate_size feed_forward_size "
    "alignment_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim "
    "moe_shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank o_lora_rank hc_lowrank "
    "image_size num_mel_bins n_mel_bins num_position_embeddings mel_vocab_size base_channels rel_extent",
    16: "head_dim swa_head_dim qk_nope_head_dim v_head_dim dim_head d_head index_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim attention_head_size kv_channels state_size "
    "ssm_state_size mamba_d_state sliding_window sliding_window_size attention_window_size window_size "
    "local_attention attention_chunk_size query_pre_attn_scalar chunk_size mamba_chunk_size "
    "hidden_size_per_layer_input num_filters codebook_dim laurel_rank router_hidden_size downsample_hidden_size "
    "adapter_rank",
    8: "qk_rope_head_dim patch_size rotary_dim mamba_dt_rank time_step_rank index_topk mamba_n_heads mamba_num_heads",
    4: "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads linear_num_key_heads "
    "linear_num_value_heads linear_num_heads mm_tokens_per_image image_seq_length video_seq_length index_kpool "
    "zero_expert_num",
    2: "num_hidden_layers n_layer n_layers num_layers layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok "
    "moe_topk moe_k",
    1: "depth first_k_dense_replace n_group topk_group n_groups num_dense_layers resampler_depth",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length position_bias_max_distance",
    256: "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size codebook_size num_embeddings "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
}
"""Names of fields in configs, by size."""

SIZES: dict[str, int] = {name: size for size, names in NAMES.items() for name in names.split()}
"""What fields are set to by their names, if they are larger."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers", "layers")
"""Fields that may hold a number of decoder layers."""

TOKENS: dict[str, int] = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "image": 255, "video": 254, "audio": 253}
"""Tokens by what they stand for. Any other special token is number 252."""

# Overrides of several families, and long ones.

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}

COHERE_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
}

GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}

GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}

LLAMA4 = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "moe_layers": [1]}

MINIMAX_M3 = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse"],
    "index_block_size": 4,
    "index_topk_blocks": 2,
}

QWEN4 = {
    "eos_token_id": 2,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
    "ple_layer_ids": [2],
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

VIBEVOICE = {"num_filters": 8, "depths": [1, 1, 1], "downsampling_ratios": [2, 2]}

VQ = {"channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 16}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 255, "IMGIMGA#": 254}, "vq_config": VQ},
    "cohere2_moe": {
        "mlp_layer_types": ["dense", "sparse"],
        "prefix_dense_intermediate_size": 96,
        "num_shared_experts": 1,
    },
    "cohere_compass": {"text_config": COHERE_COMPASS},
    "cohere_compass_text": COHERE_COMPASS,
    "cosmos3_edge": {"text_config": {"rope_parameters": MROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 255, "<|extra_200|>": 254}, "vq_config": VQ},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": MROPE}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fast_vlm": {"vision_config": {"model_type": "siglip_vision_model"}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": {"global_head_dim": 32}},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_mm_model": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "janus": {"vq_config": VQ},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "llama4": {"text_config": LLAMA4},
    "llama4_text": LLAMA4,
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "minimax_m3_vl": {"text_config": MINIMAX_M3},
    "minimax_m3_vl_text": MINIMAX_M3,
    "mistral4": {"first_k_dense_replace": 1},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 48),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "step3p7": {
        "text_config": {
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        }
    },
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": VIBEVOICE, "semantic_tokenizer_encoder_config": VIBEVOICE},
    "xlm": {"causal": True, "pad_index": 0, "bos_index": 1, "eos_index": 2},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
    },
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 16},
}
"""What the sizes by name cannot give, by family; a dict in a dict is for a config in the config."""

PIXELS = "its forward pass needs an image besides the text"
TIMM = "its vision tower is a model of timm, which is not installed, and it loads no other"
TALKS = "it has no forward pass of its own: it only generates, with its thinker, that is a family, and its talker"
ENCODER = "it is an encoder-decoder: with input_ids alone only its encoder reads them"
WHOLE = "AutoModelForCausalLM gives the config of the whole model to the class of its decoder, which fails"
DRAFTS = "it drafts for another model, whose hidden states and keys and values its forward pass needs"

CANNOT: dict[str, str] = {
    "blip": PIXELS,
    "blip-2": PIXELS,
    "diffusion_gemma": "its logits are of a canvas of random tokens that it fills, not of the tokens of input_ids",
    "evolla": "its config class is registered under a second name, so that no Auto class finds its model",
    "florence2": ENCODER,
    "gemma3n": TIMM,
    "gemma4_assistant": DRAFTS,
    "gemma4_unified_assistant": DRAFTS,
    "idefics": PIXELS,
    "instructblip": PIXELS,
    "instructblipvideo": PIXELS,
    "kosmos-2": PIXELS,
    "kyutai_speech_to_text": "its input_ids have a third axis, of text and audio codes",
    "musicgen": WHOLE,
    "musicgen_melody": WHOLE,
    "perception_lm": TIMM,
    "pi0": "its forward pass needs the state of a robot",
    "pix2struct": PIXELS,
    "pp_formulanet": PIXELS,
    "qwen2_5_omni": TALKS,
    "qwen3_omni_moe": TALKS,
    "t5gemma2": ENCODER,
    "udop": "it is an encoder-decoder, whose encoder needs where on a page the words are",
    "vision-encoder-decoder": PIXELS,
    "voxtral_realtime": "its forward pass needs audio besides the text",
}
"""Families that cannot be built, or that do not run with input_ids alone on a CPU, and why."""

SAVES_WRONGLY: dict[str, str] = {
    "shieldgemma2": "it is saved with the names of another class of the family, and loads with random weights",
}
"""Families whose model is not the same after saving and loading, and what happens."""

NOT_CAUSAL: dict[str, str] = {
    "cpmant": "it takes all of the input for context, in which each token sees all others",
    "paligemma": "without token_type_ids it takes all of the input for the prefix, in which each token sees all others",
    "reformer": "it sorts tokens by their hashes into chunks, so that later ones change which tokens are in a chunk",
}
"""Families whose logits depend on later tokens, and why."""


def tiny_model(model_type: str) -> PreTrainedModel:
    """A tiny model of a family, in float32 on the CPU, whose weights are the same each time."""
    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[model_type], deepcopy(OVERRIDES.get(model_type, {})))
    model = auto_class(model_type).from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # as of routers that families leave at zero
            torch.nn.init.normal_(weight, std=0.02)
    return model


def auto_class(model_type: str) -> Any:
    """The Auto class that builds and loads models of a family."""
    if model_type in IMAGE_TEXT:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM if model_type in MULTIMODAL else AutoModelForCausalLM


def shrunk(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """A tiny config of a class, and of the configs in it. Overrides win over what fields are set to by their names."""
    parts = {name: CONFIG_MAPPING[part["model_type"]] for name, part in overrides.items() if is_part(part)}
    default = kind(**{name: part() for name, part in parts.items()})
    names = [field.name for field in fields(kind)]
    values = {name: small(name, value_of(default, name)) for name in names} | of_layers(default, names)
    if "kv_lora_rank" in names:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "mrope_section" in getattr(kind, "ignore_keys_at_rope_validation", ()):
        values["rope_parameters"] = sections(value_of(default, "rope_parameters"))
    values = {name: value for name, value in values.items() if value is not None} | overrides
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            values[name] = shrunk(type(value), overrides.get(name, {}))
    values.pop("model_type", None)
    return kind(**values)


def value_of(config: PretrainedConfig, name: str) -> Any:
    """What a field of a config holds for all layers."""
    return vars(config).get(config.attribute_map.get(name, name))


def sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings of three sections, for heads of the tiny size."""
    half = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
    return rope | {"mrope_section": [half - half // 4 - (half - half // 4) // 2, (half - half // 4) // 2, half // 4]}


def is_part(value: Any) -> bool:
    """Whether an override is a config of a class of its own."""
    return isinstance(value, dict) and "model_type" in value


def small(name: str, value: Any) -> Any:
    """What a field is set to by its name and its default; nothing where it stays as it is."""
    if isinstance(value, (list, tuple)) and (name in SIZES or name == "eos_token_id"):
        return type(value)(small(name, item) for item in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return {"is_decoder": True, "head_dim": SIZES["head_dim"]}.get(name)
    if name.endswith(("_token_id", "_token_index")):
        return TOKENS.get(name.rsplit("_", 2)[0], 252)
    return min(value, SIZES[name]) if name in SIZES else None


def of_layers(default: PretrainedConfig, names: list[str]) -> dict[str, Any]:
    """The number of layers, at least two and one of each kind, and the lists that say of which kind each is."""
    counts = {name: value_of(default, name) for name in LAYERS if name in names}
    counts = {name: count for name, count in counts.items() if isinstance(count, int)}
    if not counts:
        return {}
    (name, count), *_ = counts.items()
    lists = {name: value_of(default, name) for name in names}
    lists = {name: kinds for name, kinds in lists.items() if isinstance(kinds, list) and len(kinds) == count}
    lists = {name: kinds for name, kinds in lists.items() if all(isinstance(kind, str) for kind in kinds)}
    firsts = {kinds: i for i, kinds in reversed([*enumerate(zip(*lists.values(), strict=True))])}
    chosen = sorted(firsts.values()) if len(firsts) > 1 else [*range(min(2, count))]
    return {name: len(chosen)} | {name: [kinds[i] for i in chosen] for name, kinds in lists.items()}
