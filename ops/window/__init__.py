"""Window attention: aligned blocks, shifted blocks and strided grids of tokens."""

from .op import window_attention, window_attention_qkvpacked

__all__ = ["window_attention", "window_attention_qkvpacked"]
