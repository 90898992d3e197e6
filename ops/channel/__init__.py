"""Channel attention: the channels of a head attend to each other over all positions."""

from .op import channel_attention, channel_attention_qkvpacked

__all__ = ["channel_attention", "channel_attention_qkvpacked"]
