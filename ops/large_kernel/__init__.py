"""Large kernel attention (VAN)."""

from .op import large_kernel_attention

__all__ = ["large_kernel_attention"]
