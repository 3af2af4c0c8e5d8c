"""Fused maths of visual GRPO: Gaussian steps, shift moments and their gradients. Needs torch; triton on GPUs."""
