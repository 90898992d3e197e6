"""Neighborhood attention in 1-D and 2-D: every query attends to the kernel_size keys around it."""

from .op import neighborhood_attention, neighborhood_attention_qkvpacked

__all__ = ["neighborhood_attention", "neighborhood_attention_qkvpacked"]
