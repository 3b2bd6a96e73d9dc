"""Attention over heads, as far as all encoders share it."""

from torch import Tensor
from torch.nn import functional


def split(x: Tensor, heads: int) -> Tensor:
    """Cut by heads: float [..., T, H] to [..., N, T, D]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(-3, -2)


def merge(context: Tensor) -> Tensor:
    """Put heads together again: float [B, N, T, D] to [B, T, H]."""
    return context.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, training: bool) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: float [B, N, R, D].
        key: float [B, N, T, D].
        value: float [B, N, T, D].
        bias: added to the scores, float, broadcast to [B, N, R, T].
        training: whether gradients are wanted.

    Returns:
        float [B, N, R, D].
    """
    # The fused kernel trains up to twice as fast; written out, the graph has fewer nodes.
    if training:
        return functional.scaled_dot_product_attention(query, key, value, bias.to(query.dtype))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias  # [B, N, R, T]
    context: Tensor = scores.softmax(-1) @ value  # [B, N, R, D]
    return context
