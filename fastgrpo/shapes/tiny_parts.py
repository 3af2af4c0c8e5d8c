"""What the tiny pipelines have in common: a closed vocabulary's tokenizer, text encoders, the small autoencoder."""

from collections.abc import Sequence
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

# The end-of-text id must not be 2: CLIPTextModel then takes a legacy branch that pools at the largest token id.
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "</s>")
PAD, START, UNKNOWN, END = range(4)
# A word of small letters, or any other character by itself: quoted text is spelled.
WORD_TOKEN = r"[a-z]+|[^\sa-z]"
# A token of a template: a marker, a word, a number, a sign or a line's end.
TEMPLATE_TOKEN = r"<\|[a-z_]+\|>|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]|\n"
# What Qwen 3's chat template writes for one message of a user's, with an answer to come: {} is the message. Without
# thinking, an empty thought stands before the answer.
QWEN3_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QWEN3_NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def build_tokenizer(words: tuple[str, ...], length: int, start: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word of small letters, or other character, padded to `length`.

    start: whether a start token stands before the text (CLIP).
    """
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL_TOKENS, *words))}, unk_token=SPECIAL_TOKENS[UNKNOWN])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_TOKEN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", START), ("</s>", END)]
    )
    return _with_special_tokens(tokenizer, length)


def build_template_tokenizer(words: tuple[str, ...], length: int, template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word or sign, that knows a `template`'s too and adds nothing; None: <s> … </s>.

    The published templates of HunyuanVideo and Qwen-Image then have exactly as many tokens as their pipelines cut off.
    """
    split = pre_tokenizers.Split(Regex(TEMPLATE_TOKEN), behavior="removed", invert=True)
    pieces = (piece for piece, _ in split.pre_tokenize_str(template or ""))
    known = dict.fromkeys([*SPECIAL_TOKENS, *words, *pieces])
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token=SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.pre_tokenizer = split
    if template is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", END)]
        )
    return _with_special_tokens(tokenizer, length)


def build_chat_tokenizer(words: tuple[str, ...], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word or sign, with Qwen 3's chat template for a message."""
    tokenizer = build_template_tokenizer(words, length, QWEN3_TEMPLATE + QWEN3_NO_THOUGHT)
    tokenizer.chat_template = QWEN3_CHAT
    return tokenizer


def _with_special_tokens(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[START],
        unk_token=SPECIAL_TOKENS[UNKNOWN],
        eos_token=SPECIAL_TOKENS[END],
    )


def build_autoencoder(image_size: int, latent_channels: int, channels: Sequence[int]) -> AutoencoderKL:
    """An untrained AutoencoderKL, each level after the first halving the sides; set its scale after training."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        block_out_channels=tuple(channels),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip_config(width: int, layers: int, length: int, vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=length,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )


def build_clip(width: int, layers: int, length: int, vocabulary: int) -> CLIPTextModel:
    """An untrained CLIP text encoder of heads of 16."""
    return CLIPTextModel(_clip_config(width, layers, length, vocabulary))


def build_projected_clip(width: int, layers: int, length: int, vocabulary: int) -> CLIPTextModelWithProjection:
    """An untrained CLIP text encoder whose pooled output is projected (SDXL, SD3)."""
    return CLIPTextModelWithProjection(_clip_config(width, layers, length, vocabulary))


def build_t5(width: int, layers: int, vocabulary: int) -> T5EncoderModel:
    """An untrained T5 encoder of heads of 16."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=width // 16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return T5EncoderModel(config)


def build_qwen3(kind: Any, width: int, layers: int, vocabulary: int) -> Any:
    """An untrained Qwen 3 of heads of 16; kind: Qwen3Model, or Qwen3ForCausalLM."""
    return kind(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            head_dim=16,
            initializer_range=0.1,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
        )
    )
