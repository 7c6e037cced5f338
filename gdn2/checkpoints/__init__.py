"""Checkpoints of every format that our mixers compute: one table of key names each, strict in both directions."""

from gdn2.checkpoints.formats import listing
from gdn2.checkpoints.loading import Description, Loaded, Options, describe, open_model, open_tokenizer

__all__ = ["Description", "Loaded", "Options", "describe", "listing", "open_model", "open_tokenizer"]
