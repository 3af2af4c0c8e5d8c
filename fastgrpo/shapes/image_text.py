"""The processor of Qwen's vision-language models without that of videos, which needs torchvision.

Of tiny pipelines, and of published ones.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Of images and text; for Qwen 3 VL, of text alone."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        template = chat_template or tokenizer.chat_template
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    @classmethod
    def of_directory(cls, path: str) -> ImageTextProcessor:
        """That of a pipeline's directory or hub id."""
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, subfolder="processor")
        return cls(image_processor, AutoTokenizer.from_pretrained(path, subfolder="processor"))
