"""Blocked attention with a halo (HaloNet)."""

from .op import halo_attention

__all__ = ["halo_attention"]
