"""Super-token attention (STViT): pixels attend through a small grid of learned-by-association tokens."""

from .op import super_token_attention, super_token_mapping, super_token_sampling

__all__ = ["super_token_attention", "super_token_mapping", "super_token_sampling"]
