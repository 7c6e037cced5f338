"""Decoders built from mixers: configuration, presets, state, generation."""

from gdn2.models.config import ModelConfig
from gdn2.models.decoder import Decoder
from gdn2.models.describe import describe
from gdn2.models.observe import Observed, observe
from gdn2.models.presets import PRESETS, preset
from gdn2.models.state import State

__all__ = ["PRESETS", "Decoder", "ModelConfig", "Observed", "State", "describe", "observe", "preset"]
