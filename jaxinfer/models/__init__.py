"""The decoder as pure functions over a parameter tree."""

from jaxinfer.models.decoder import forward, logits
from jaxinfer.models.served import Decoder, make_decoder

__all__ = ["Decoder", "forward", "logits", "make_decoder"]
