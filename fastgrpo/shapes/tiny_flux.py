"""A FLUX pipeline of about a million parameters: diffusers' and transformers' own classes, a closed vocabulary.

`FluxPipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fastgrpo.errors import ConfigError
from fastgrpo.settings import Section

# The end-of-text id must not be 2: CLIPTextModel then takes a legacy branch that pools at the largest token id.
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "</s>")
PAD, START, UNKNOWN, END = range(4)


class TinyFluxSizes(Section):
    """Sizes of the tiny FLUX; the defaults are those of the shipped weights."""

    image_size: int = 32
    text_length: int = 10
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    attention_heads: int = 4
    attention_head_dim: int = 24
    rope_axes: list[int] = Field(default_factory=lambda: [4, 10, 10])
    double_layers: int = 1
    single_layers: int = 4
    text_width: int = 64
    text_layers: int = 2
    shift: float = 3.0

    @model_validator(mode="after")
    def _check(self) -> "TinyFluxSizes":
        if sum(self.rope_axes) != self.attention_head_dim:
            raise ConfigError(
                f"sizes.rope_axes: {self.rope_axes} sums to {sum(self.rope_axes)}; "
                f"it must sum to sizes.attention_head_dim, {self.attention_head_dim}"
            )
        if self.text_width % 16:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 16, the width of a head")
        return self


def build_tokenizer(words: tuple[str, ...], length: int, start: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word, padded to `length`; `start` puts a start token before the text (CLIP)."""
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL_TOKENS, *words))}, unk_token=SPECIAL_TOKENS[UNKNOWN])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[START],
        unk_token=SPECIAL_TOKENS[UNKNOWN],
        eos_token=SPECIAL_TOKENS[END],
    )


def build_autoencoder(sizes: TinyFluxSizes) -> AutoencoderKL:
    """An untrained AutoencoderKL: `image_size` pixels to `image_size / 4` latents; set its scale after training."""
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        block_out_channels=tuple(sizes.vae_channels),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=8,
        sample_size=sizes.image_size,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _text_encoders(sizes: TinyFluxSizes, vocabulary: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    heads = sizes.text_width // 16
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.text_width,
        projection_dim=sizes.text_width,
        intermediate_size=2 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=heads,
        max_position_embeddings=sizes.text_length,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    t5 = T5Config(
        vocab_size=vocabulary,
        d_model=sizes.text_width,
        d_kv=16,
        d_ff=2 * sizes.text_width,
        num_layers=sizes.text_layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


def build_pipeline(words: tuple[str, ...], sizes: TinyFluxSizes, seed: int) -> FluxPipeline:
    """An untrained FluxPipeline in float32 whose tokenizers know `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    clip, t5 = _text_encoders(sizes, len(SPECIAL_TOKENS) + len(words))
    vae = build_autoencoder(sizes)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.double_layers,
        num_single_layers=sizes.single_layers,
        attention_head_dim=sizes.attention_head_dim,
        num_attention_heads=sizes.attention_heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=True,
        axes_dims_rope=tuple(sizes.rope_axes),  # pyright: ignore[reportArgumentType]
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=sizes.shift, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=build_tokenizer(words, sizes.text_length, start=True),  # pyright: ignore[reportArgumentType]
        text_encoder_2=t5,
        tokenizer_2=build_tokenizer(words, sizes.text_length, start=False),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
    )
    for module in (clip, t5, vae, transformer):
        module.eval()
    return pipeline
