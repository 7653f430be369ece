"""Optimizers of Linen models that hold a `SparseCoreEmbed`: see `embax.linen.embed_optimizer`."""

from embax.linen.embed_optimizer import apply_updates_for_sc_model as apply_updates_for_sc_model
from embax.linen.embed_optimizer import create_optimizer_for_sc_model as create_optimizer_for_sc_model
