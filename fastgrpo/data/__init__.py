"""Prompts, and which of them an iteration draws."""

from fastgrpo.data.prompts import Prompt, available, load_prompts

__all__ = ["Prompt", "available", "load_prompts"]
