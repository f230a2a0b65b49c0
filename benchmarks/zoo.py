"""Models of `transformers`, built from configs with random weights: nothing is downloaded, and all of them are tiny.

Each entry of `MODELS` makes a model and the keyword arguments of one forward.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

Inputs = dict[str, Tensor]
VOCABULARY, LENGTH, BATCH = 64, 12, 2


def tokens(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))


def _resnet() -> tuple[nn.Module, Inputs]:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    return tf.ResNetForImageClassification(config), {"pixel_values": pixels()}


def _mobilenet() -> tuple[nn.Module, Inputs]:
    config = tf.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5, classifier_dropout_prob=0.0)
    return tf.MobileNetV2ForImageClassification(config), {"pixel_values": pixels()}


def _convnext() -> tuple[nn.Module, Inputs]:
    config = tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_labels=5)
    return tf.ConvNextForImageClassification(config), {"pixel_values": pixels()}


def _vit() -> tuple[nn.Module, Inputs]:
    config = tf.ViTConfig(**_encoder(), image_size=32, patch_size=8, num_labels=5)
    return tf.ViTForImageClassification(config), {"pixel_values": pixels()}


def _swin() -> tuple[nn.Module, Inputs]:
    config = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5,
        drop_path_rate=0.0,
    )  # fmt: skip
    return tf.SwinForImageClassification(config), {"pixel_values": pixels()}


def _encoder(**others: Any) -> dict[str, Any]:
    """What most encoders call the same."""
    return {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **others,
    }  # fmt: skip


def _bert() -> tuple[nn.Module, Inputs]:
    config = tf.BertConfig(**_encoder(), vocab_size=VOCABULARY, max_position_embeddings=32)
    return tf.BertForMaskedLM(config), {"input_ids": tokens(), "attention_mask": torch.ones(BATCH, LENGTH).long()}


def _distilbert() -> tuple[nn.Module, Inputs]:
    config = tf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=1, n_heads=2, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return tf.DistilBertForSequenceClassification(config), {"input_ids": tokens()}


def _gpt2() -> tuple[nn.Module, Inputs]:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config), {"input_ids": tokens()}


def decoder(**others: Any) -> dict[str, Any]:
    """What Llama and its descendants call the same."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, **others,
    }  # fmt: skip


def _llama() -> tuple[nn.Module, Inputs]:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**decoder())), {"input_ids": tokens()}


def _qwen2() -> tuple[nn.Module, Inputs]:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**decoder(tie_word_embeddings=True))), {"input_ids": tokens()}


def _qwen3() -> tuple[nn.Module, Inputs]:
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**decoder(), head_dim=8)), {"input_ids": tokens()}


def _mixtral() -> tuple[nn.Module, Inputs]:
    config = tf.MixtralConfig(**decoder(), num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config), {"input_ids": tokens()}


def _t5() -> tuple[nn.Module, Inputs]:
    config = tf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "decoder_input_ids": tokens(1, 7)}


def _whisper() -> tuple[nn.Module, Inputs]:
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=20, max_target_positions=16, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    features = torch.randn(BATCH, 16, 40, generator=torch.Generator().manual_seed(0))
    return tf.WhisperForConditionalGeneration(config), {"input_features": features, "decoder_input_ids": tokens(1, 7)}


def _wav2vec2() -> tuple[nn.Module, Inputs]:
    config = tf.Wav2Vec2Config(
        **{k: v for k, v in _encoder().items() if "prob" not in k}, vocab_size=VOCABULARY, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        layerdrop=0.0, mask_time_prob=0.0,
    )  # fmt: skip
    wave = torch.randn(BATCH, 400, generator=torch.Generator().manual_seed(0))
    return tf.Wav2Vec2ForCTC(config), {"input_values": wave}


def _segformer() -> tuple[nn.Module, Inputs]:
    config = tf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5, drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config), {"pixel_values": pixels()}


def _detr() -> tuple[nn.Module, Inputs]:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = tf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=5, num_labels=4, dropout=0.0,
    )  # fmt: skip
    return tf.DetrForObjectDetection(config), {"pixel_values": pixels(64)}


def _clip() -> tuple[nn.Module, Inputs]:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(
        text_config={**common, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    return tf.CLIPModel(config), {"input_ids": tokens(), "pixel_values": pixels()}


MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "ResNet": _resnet, "MobileNetV2": _mobilenet, "ConvNeXt": _convnext, "ViT": _vit, "Swin": _swin, "BERT": _bert,
    "DistilBERT": _distilbert, "GPT-2": _gpt2, "Llama": _llama, "Qwen2": _qwen2, "Qwen3": _qwen3, "Mixtral": _mixtral,
    "T5": _t5, "Whisper": _whisper, "Wav2Vec2": _wav2vec2, "SegFormer": _segformer, "DETR": _detr, "CLIP": _clip,
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The model in evaluation mode and the arguments of its forward; the same each time.

    What initialisation leaves at zero (biases, tables of relative positions) gets small values, and BatchNorms get
    statistics, frozen ones too: zeros would hide mistakes.
    """
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.02)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 0.9
        if norms:
            model.train()(**inputs)
    return model.eval(), inputs
