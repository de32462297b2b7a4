"""The kinds of attention. This union is their only registry: a new kind is one file and one line here.

Every kind's settings have `kind`, `tied_qk` (the block passes its queries as keys) and
`build(num_heads, head_dim, layer, seed)`, which gives a module with
`forward(q_THD, k_THD, v_THD, sequences) -> out_THD`, `set_step(step)`, `adapt(q_THD, k_THD, sequences)` (called with
real queries and keys at the start of a stage), `kernel` (what runs here, and why) and `flops(lengths)`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dstrain.model.attention.favor import FavorSettings
from dstrain.model.attention.lsh import LshSettings
from dstrain.model.attention.sdpa import SdpaSettings

AttentionSettings = Annotated[SdpaSettings | FavorSettings | LshSettings, Field(discriminator="kind")]
"""What `encoder.attention` may be."""
