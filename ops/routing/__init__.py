"""Bi-level routing attention (BiFormer)."""

from .op import routing_attention, routing_index

__all__ = ["routing_attention", "routing_index"]
