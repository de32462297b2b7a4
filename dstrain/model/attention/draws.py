"""Where the attention kinds get their chance from: private generators named by what they are for.

The same words give the same numbers on every rank, on every device, before and after a resume; the global generator is
never touched. Everything is drawn on the CPU, because CUDA generators give other numbers on other devices.
"""

from __future__ import annotations

import hashlib

import torch


def generator(*words: object) -> torch.Generator:
    """A CPU generator seeded by the words, such as `generator("favor", seed, layer, redraw)`."""
    digest = hashlib.blake2b(" ".join(map(str, words)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
