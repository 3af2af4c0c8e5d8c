"""The step functions in plain PyTorch, term by term as their papers write them, in the dtype of their inputs."""

import math

import torch


def mean_over_elements(t):
    return t.flatten(1).mean(1)


def gaussian_log_density(y, mean, std):
    return mean_over_elements(-(((y - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2)


def columns(x, *values):
    return [torch.as_tensor(v).to(x).reshape(-1, *[1] * (x.ndim - 1)) for v in values]


def dance(v, x, eta, sigma, sigma_next, sde):
    """DanceGRPO: drift v - (η²/2)·score, score = -(x - (1 - σ)·x̂0)/σ². Gives (mean, std, x̂0)."""
    sigma, sigma_next = columns(x, sigma, sigma_next)
    clean = x - sigma * v
    drift = v
    if sde:
        score = -(x - (1 - sigma) * clean) / sigma**2
        drift = v - eta**2 / 2 * score
    return x + (sigma_next - sigma) * drift, eta * (sigma - sigma_next).sqrt(), clean


def flow_sde(v, x, level, sigma, sigma_next, sigma_max):
    """Flow-GRPO, eq. 9: dx = [v + η²/(2σ)·(x + (1 - σ)·v)]dσ + η·dw. Gives (mean, std, η)."""
    sigma, sigma_next, sigma_max = columns(x, sigma, sigma_next, sigma_max)
    eta = level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    drift = v + eta**2 / (2 * sigma) * (x + (1 - sigma) * v)
    step = sigma_next - sigma
    return x + drift * step, eta * (-step).sqrt(), eta


def flow_cps(v, x, level, sigma, sigma_next):
    """Flow-CPS: (1 - σ')·x̂0 + √(σ'² - s²)·x̂1, s = σ'·sin(πn/2). Gives (mean, s)."""
    sigma, sigma_next = columns(x, sigma, sigma_next)
    std = sigma_next * math.sin(math.pi * level / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * clean + (sigma_next**2 - std**2).clamp_min(0).sqrt() * noise, std


def ddim(v, x, eta, alpha, alpha_next, prediction):
    """DDIM, eq. 12 and 16. Gives (mean, std)."""
    alpha, alpha_next = columns(x, alpha, alpha_next)
    if prediction == "epsilon":
        noise, clean = v, (x - (1 - alpha).sqrt() * v) / alpha.sqrt()
    elif prediction == "sample":
        noise, clean = (x - alpha.sqrt() * v) / (1 - alpha).sqrt(), v
    else:
        noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        clean = alpha.sqrt() * x - (1 - alpha).sqrt() * v
    std = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
    return alpha_next.sqrt() * clean + (1 - alpha_next - std**2).sqrt() * noise, std
