"""The rows of docs/architectures.md: a class of transformers each, and what makes a tiny model of it.

Sizes are chosen so that every part of an architecture is there: a window shorter than the sequence, grouped queries,
two experts of four, a dense layer and one with experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """``model`` is a class of transformers, ``config`` what differs from the defaults of its config.

    ``inputs`` makes example inputs where ``fxquant.examples`` knows none, or larger ones. ``declines`` is a regular
    expression for the error of what cannot be done, ``prepare`` the change of the model that its error advises.
    """

    family: str
    name: str
    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] | None = None
    declines: str = ""
    prepare: Callable[[nn.Module], Any] | None = None


_OWN = ("inputs", "declines", "prepare")


def row(family: str, name: str, model: str, base: dict[str, Any] | None = None, **config: Any) -> Architecture:
    """A row whose config is ``base`` with ``config`` over it."""
    own = {key: config.pop(key) for key in _OWN if key in config}
    return Architecture(family, name, model, {**(base or {}), **config}, **own)


def build(architecture: Architecture) -> nn.Module:
    """The model in eval mode, with random weights that are the same at every call."""
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, architecture.model)
    model: nn.Module = cls(cls.config_class(**architecture.config)).eval()
    if architecture.prepare is not None:
        architecture.prepare(model)
    return model


def pixels(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))}


def tokens(length: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": torch.arange(2 * length).reshape(2, length) * 37 % 99}


TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**TEXT, "num_key_value_heads": 2}
N_EMBD = {
    "vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
EXPERTS = {**GQA, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1, "topk_group": 1,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
WAVE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32,
    "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
D, E, S, V, A = "decoder", "encoder", "encoder-decoder", "vision", "audio"
M, R = "mixture of experts", "state space"

ROWS = (
    row(D, "llama", "LlamaForCausalLM", GQA),
    row(D, "qwen2", "Qwen2ForCausalLM", GQA),
    row(D, "qwen3", "Qwen3ForCausalLM", GQA, head_dim=8),
    row(D, "mistral", "MistralForCausalLM", GQA, head_dim=8, sliding_window=8),
    row(D, "gemma", "GemmaForCausalLM", GQA, head_dim=8),
    row(D, "gemma2", "Gemma2ForCausalLM", GQA, head_dim=8, sliding_window=8),
    row(D, "gemma3_text", "Gemma3ForCausalLM", GQA, head_dim=8, sliding_window=8),
    row(D, "phi", "PhiForCausalLM", TEXT),
    row(D, "phi3", "Phi3ForCausalLM", GQA),
    row(D, "gpt2", "GPT2LMHeadModel", N_EMBD),
    row(D, "gpt_neo", "GPTNeoForCausalLM", TEXT, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8),
    row(D, "gpt_neox", "GPTNeoXForCausalLM", TEXT),
    row(D, "opt", "OPTForCausalLM", TEXT, ffn_dim=64, word_embed_proj_dim=32),
    row(D, "bloom", "BloomForCausalLM", TEXT, n_layer=2, n_head=4),
    row(D, "falcon", "FalconForCausalLM", TEXT),
    row(D, "mpt", "MptForCausalLM", vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    row(D, "stablelm", "StableLmForCausalLM", GQA),
    row(D, "olmo2", "Olmo2ForCausalLM", GQA),
    row(D, "cohere", "CohereForCausalLM", GQA),
    row(D, "granite", "GraniteForCausalLM", GQA),
    row(D, "smollm3", "SmolLM3ForCausalLM", GQA),
    row(E, "bert", "BertForMaskedLM", TEXT),
    row(E, "roberta", "RobertaForMaskedLM", TEXT),
    row(E, "xlm-roberta", "XLMRobertaForSequenceClassification", TEXT),
    row(E, "distilbert", "DistilBertForSequenceClassification", vocab_size=99, dim=32, hidden_dim=64, n_layers=2,
        n_heads=4, max_position_embeddings=64),
    row(E, "albert", "AlbertForMaskedLM", TEXT, embedding_size=16),
    row(E, "electra", "ElectraForPreTraining", TEXT, embedding_size=16),
    row(E, "deberta-v2", "DebertaV2ForSequenceClassification", TEXT, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True),
    row(E, "modernbert", "ModernBertForMaskedLM", TEXT, local_attention=8),
    row(E, "mpnet", "MPNetForMaskedLM", TEXT),
    row(E, "fnet", "FNetForMaskedLM", TEXT, declines="fft_fftn.*no complex numbers.*run the compiled program in torch"),
    row(S, "t5", "T5ForConditionalGeneration", T5),
    row(S, "bart", "BartForConditionalGeneration", SEQ2SEQ),
    row(S, "marian", "MarianMTModel", SEQ2SEQ),
    row(S, "pegasus", "PegasusForConditionalGeneration", SEQ2SEQ),
    row(S, "m2m_100", "M2M100ForConditionalGeneration", SEQ2SEQ),
    row(S, "led", "LEDForConditionalGeneration", SEQ2SEQ, attention_window=4, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        declines="led.encoder.layers.0.self_attn.*data-dependent Python control flow"),
    row(V, "vit", "ViTForImageClassification", VISION),
    row(V, "deit", "DeiTForImageClassification", VISION),
    row(V, "beit", "BeitForImageClassification", VISION),
    row(V, "dinov2", "Dinov2ForImageClassification", VISION, mlp_ratio=2),
    row(V, "dinov3_vit", "DINOv3ViTModel", VISION),
    row(V, "swin", "SwinForImageClassification", SWIN),
    row(V, "swinv2", "Swinv2ForImageClassification", SWIN),
    row(V, "convnext", "ConvNextForImageClassification", image_size=32, hidden_sizes=[16, 32], depths=[1, 1],
        num_stages=2),
    row(V, "resnet", "ResNetForImageClassification", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
        inputs=pixels(32)),
    row(V, "segformer", "SegformerForSemanticSegmentation", image_size=64, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[4, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16),
    row(V, "clip_vision_model", "CLIPVisionModel", VISION, projection_dim=16),
    row(V, "clip", "CLIPModel", text_config=TEXT, vision_config=VISION, projection_dim=16),
    row(V, "siglip", "SiglipModel", text_config=TEXT, vision_config=VISION),
    row(V, "yolos", "YolosForObjectDetection", VISION, image_size=[32, 32], num_detection_tokens=4),
    row(A, "wav2vec2", "Wav2Vec2ForCTC", WAVE),
    row(A, "hubert", "HubertForCTC", WAVE),
    row(A, "wavlm", "WavLMForCTC", WAVE),
    row(A, "whisper", "WhisperForConditionalGeneration", SEQ2SEQ, num_mel_bins=16, max_source_positions=32,
        max_target_positions=64),
    row(A, "audio-spectrogram-transformer", "ASTForAudioClassification", VISION, patch_size=8, max_length=40,
        num_mel_bins=16, frequency_stride=8, time_stride=8),
    row(A, "speech_to_text", "Speech2TextForConditionalGeneration", SEQ2SEQ, input_feat_per_channel=16,
        max_source_positions=64, max_target_positions=64, conv_channels=32, num_conv_layers=2),
    row(A, "moonshine", "MoonshineForConditionalGeneration", vocab_size=99, hidden_size=32, intermediate_size=64,
        encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
        decoder_num_attention_heads=4, encoder_num_key_value_heads=4, decoder_num_key_value_heads=4),
    row(A, "encodec", "EncodecModel", hidden_size=16, num_filters=4, codebook_dim=16, codebook_size=32,
        upsampling_ratios=[4, 2], num_residual_layers=1,
        declines="EncodecConv1d.*data-dependent Python control flow"),
    row(M, "mixtral", "MixtralForCausalLM", GQA, num_local_experts=4),
    row(M, "qwen2_moe", "Qwen2MoeForCausalLM", EXPERTS, shared_expert_intermediate_size=32),
    row(M, "qwen3_moe", "Qwen3MoeForCausalLM", EXPERTS, head_dim=8),
    row(M, "olmoe", "OlmoeForCausalLM", EXPERTS),
    row(M, "phimoe", "PhimoeForCausalLM", GQA, num_local_experts=4),
    row(M, "gpt_oss", "GptOssForCausalLM", GQA, num_local_experts=4, head_dim=8, sliding_window=8),
    # a padding token, 0 by default, is a row of zeros: all of jetmoe's experts would be equal for it
    row(M, "jetmoe", "JetMoeForCausalLM", GQA, num_local_experts=4, kv_channels=8, pad_token_id=None),
    row(M, "deepseek_v2", "DeepseekV2ForCausalLM", DEEPSEEK, n_group=1),
    row(M, "deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK, n_group=2),
    row(M, "switch_transformers", "SwitchTransformersForConditionalGeneration", T5, num_decoder_layers=2,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        declines="router.classifier.*leave out the module.to"),
    row(R, "mamba", "MambaForCausalLM", TEXT, state_size=8, inputs=tokens(8)),
    row(R, "mamba2", "Mamba2ForCausalLM", TEXT, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2,
        chunk_size=8),
    row(R, "falcon_mamba", "FalconMambaForCausalLM", TEXT, state_size=8, inputs=tokens(8)),
    row(R, "rwkv", "RwkvForCausalLM", TEXT, context_length=64, attention_hidden_size=32,
        inputs=tokens(6)),
    row(R, "recurrent_gemma", "RecurrentGemmaForCausalLM", GQA, lru_width=32, attention_window_size=4, head_dim=8,
        num_hidden_layers=3, inputs=tokens(6)),
    row(R, "jamba", "JambaForCausalLM", GQA, num_experts=2, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, inputs=tokens(8)),
    row(R, "bamba", "BambaForCausalLM", GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8),
    row(R, "lfm2", "Lfm2ForCausalLM", GQA, layer_types=["conv", "full_attention"]),
    row(R, "xlstm", "xLSTMForCausalLM", TEXT, num_heads=4, num_blocks=2, inputs=tokens(4)),
)  # fmt: skip
