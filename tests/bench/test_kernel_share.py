"""The planned share of an iteration that the kernels can save, as docs/kernels.md opens with it."""

import torch

from fastgrpo.commands.bench import load

share = load("kernel_share")


def test_the_document_shows_the_table():
    assert share.document() == share.DOCUMENT.read_text(encoding="utf-8")


def test_what_an_iteration_does_is_read_of_its_shape():
    flux = {"model": "flux", "shape": "720x720, 2x4 samples, 16 steps, 3 trained, batch 8, bfloat16 lora 64"}
    assert share.work_of(flux) == (2025 * 64, 16, 16 * 8, 3, 24)
    wan = {"model": "wan", "shape": "480x832x33, 2x4 samples, 20 steps, 4 trained, batch 3, bfloat16 full"}
    assert share.work_of(wan) == (16 * 9 * 60 * 104, 20 * 3, 20 * 8, 11, 32)
    sd = {"model": "stable_diffusion", "shape": "512x512, 2x4 samples, 25 steps, 8 trained, batch 16, bfloat16 full"}
    assert share.work_of(sd).elements == 4 * 64 * 64
    ltx = {"model": "ltx2", "shape": "512x768x49, 2x4 samples, 20 steps, 4 trained, batch 2, bfloat16 lora 64"}
    assert share.work_of(ltx).elements == 128 * 7 * 16 * 24


def test_bytes_are_those_read_and_written():
    x = torch.empty(3, 4, device="meta")
    with share._Traffic() as traffic:
        y = x.view(4, 3) * 2.0
        (y + y).sum()
    # A product reads and writes 48 bytes, a sum of two reads twice and writes, a sum reads and writes a number.
    assert (traffic.launches, traffic.moved) == (3, 96 + 144 + 52)
