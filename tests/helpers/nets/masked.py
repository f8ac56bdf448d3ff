"""Attention as forwards write it, with the mask of padded tokens in every place it may stand.

Each class is called with tokens [N,T,16] and `keep` [N,T], True where a token is no padding, or
with what is made of `keep` in its `mask`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_ext

LEAST = torch.finfo(torch.float32).min
DIM, TOKENS = 16, 8


class Attention(nn.Module):
    """One head; `probabilities` is what the others replace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def mask(self, keep: Tensor) -> Any:
        """The model's second argument."""
        return keep

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 4
        return self.probabilities(scores, mask) @ self.v(x)

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        raise NotImplementedError


def additive(keep: Tensor, value: float) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, value)[:, None]


class Added(Attention):
    """The argument is the additive mask."""

    def __init__(self, value: float = LEAST) -> None:
        super().__init__()
        self.value = value

    def mask(self, keep: Tensor) -> Any:
        return additive(keep, self.value)

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return (scores + mask).softmax(-1)


class AddedInPlace(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        scores += mask
        return scores.softmax(-1)


class AddedToAView(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        scores[:, :, 2:] += mask[:, :, 2:]
        return scores.softmax(-1)


class AddedByAModule(Added):
    def __init__(self) -> None:
        super().__init__()
        self.add, self.softmax = torch_ext.Add(), nn.Softmax(-1)

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return self.softmax(self.add(scores, mask))


class Cast(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return F.softmax((scores + mask).double(), -1).to(scores.dtype)


class Clamped(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        total = (scores + mask).view(-1, TOKENS, TOKENS)
        return F.dropout(torch.clamp(total, min=-1e5), 0.1, self.training).softmax(-1)


class Capped(Added):
    """As Gemma 2: scores pass tanh before the mask is added."""

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return (torch.tanh(scores / 5) * 5 + mask).softmax(-1)


class Scaled(Added):
    """A temperature that the forward computes, after the mask."""

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return ((scores + mask) * scores.detach().abs().mean().clamp(min=1)).softmax(-1)


class Sinks(Added):
    """As gpt-oss: a column for no token at all."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(1, 1, 1))

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        sink = self.sink.expand(len(scores), TOKENS, 1)
        return torch.cat([scores + mask, sink], -1).softmax(-1)[..., :-1]


class BiasFirst(Added):
    """As T5: a learned bias by position, and the mask added to it first."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * TOKENS, 1)

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        place = torch.arange(TOKENS)
        bias = self.bias(place[:, None] - place + TOKENS)[..., 0] + mask
        scores += bias
        return scores.float().softmax(-1).type_as(scores)


class Alibi(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        place = torch.arange(TOKENS, device=scores.device)
        alibi = -0.5 * (place[:, None] - place).abs()
        return (scores + alibi + mask).softmax(-1)


class Windows(Added):
    """As Swin: a table of biases, and a mask of the windows, a slice of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * TOKENS))
        place = torch.arange(TOKENS)
        self.register_buffer("place", place[:, None] - place + TOKENS)
        self.register_buffer("windows", torch.zeros(3, TOKENS + 4, TOKENS + 4))

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        scores = scores + self.table[self.place.view(-1)].view(1, TOKENS, TOKENS)
        scores = scores.view(-1, 1, TOKENS, TOKENS) + self.windows[:1, :TOKENS, :TOKENS]
        return (scores.view(-1, TOKENS, TOKENS) + mask).softmax(-1)


class OneMinus(Attention):
    """As BERT: (1 - m) * least, of integers or floats."""

    def __init__(self, dtype: torch.dtype = torch.int64, value: float = LEAST) -> None:
        super().__init__()
        self.dtype, self.value = dtype, value

    def mask(self, keep: Tensor) -> Any:
        return keep.to(self.dtype)

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return (scores + (1.0 - mask[:, None].to(scores.dtype)) * self.value).softmax(-1)


class Outer(Attention):
    """As DeBERTa: a mask of pairs, the product of two."""

    def mask(self, keep: Tensor) -> Any:
        return keep.float()

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        queries = torch.ones_like(mask)
        pairs = queries[:, :, None] * mask[:, None]
        also = queries[:, :, None] @ mask[:, None]
        return (scores + (1 - pairs) * -1e4 + (1 - also) * -1e4).softmax(-1)


class Logarithm(Attention):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return (scores + mask[:, None].float().log()).softmax(-1)


class Filled(Attention):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)


class FilledAndAdded(Attention):
    """A sum of computed scores after the mask."""

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        filled = scores.masked_fill(~mask[:, None], -1e4)
        return (filled + scores.transpose(1, 2)).log_softmax(-1).exp()


class Chosen(Attention):
    """As GPT-2: `where` with a slice of a buffer, and with the argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(TOKENS + 4, TOKENS + 4).tril().bool())

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
        scores = torch.where(self.bias[:TOKENS, :TOKENS], scores, least)
        return torch.where(mask[:, None], scores, -1e4).softmax(-1)


class Triangle(Attention):
    """As fairseq: `triu` of the size, and the argument."""

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        size = scores.shape[-1]
        causal = torch.triu(torch.full((size, size), float("-inf")), 1)
        padded = torch.zeros_like(scores).masked_fill(~mask[:, None], float("-inf"))
        return (scores + (padded + causal)).softmax(-1)


class Sigmoid(Added):
    """No softmax: the scores pass another activation on their way to the product."""

    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        return torch.sigmoid(scores + mask - math.log(TOKENS))


class ByHand(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        total = scores + mask
        weights = (total - total.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)


@torch.jit.script
def scripted_softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


class OutOfSight(Added):
    def probabilities(self, scores: Tensor, mask: Any) -> Tensor:
        made: Tensor = scripted_softmax(scores + mask)
        return made


class Sdpa(Attention):
    def __init__(self, boolean: bool = True) -> None:
        super().__init__()
        self.boolean = boolean

    def mask(self, keep: Tensor) -> Any:
        return keep[:, None] if self.boolean else additive(keep, LEAST)

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, self.merged(mask)[:, None])[:, 0]

    def merged(self, mask: Tensor) -> Tensor:
        return mask


class SdpaOfASum(Sdpa):
    """As transformers: a causal and a padding mask, added in the forward."""

    def __init__(self) -> None:
        super().__init__(boolean=False)

    def merged(self, mask: Tensor) -> Tensor:
        causal = torch.full((TOKENS, TOKENS), LEAST).triu(1)
        both = mask.expand(-1, TOKENS, TOKENS) + mask.clamp(min=-1.0)
        return both + causal


class Einsum(Added):
    def forward(self, x: Tensor, mask: Any) -> Tensor:
        scores = torch.einsum("btd,bsd->bts", self.q(x), self.k(x))
        return torch.einsum("bts,bsd->btd", self.probabilities(scores, mask), self.v(x))


class Baddbmm(Added):
    """As BLOOM: the mask is the summand of the product."""

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        bias = mask.expand(-1, TOKENS, TOKENS) + x.mean() * 0
        scores = torch.baddbmm(bias, self.q(x), self.k(x).transpose(1, 2), alpha=0.25)
        return scores.softmax(-1) @ self.v(x)


class Pooling(nn.Module):
    """Tokens to one: weights of a layer, exponentials by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.value, self.out = nn.Linear(DIM, 1), nn.Linear(DIM, DIM), nn.Linear(DIM, 4)

    def mask(self, keep: Tensor) -> Any:
        return keep.float()

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        scores = self.score(x) + (1 - mask[..., None]) * -1e4
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        mean = (self.value(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        out: Tensor = self.out((self.value(x) * weights).sum(1) + mean)
        return out


class Multihead(nn.Module):
    def __init__(self, floating: bool = False, weights: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.floating, self.weights = floating, weights

    def mask(self, keep: Tensor) -> Any:
        return additive(keep, float("-inf"))[:, 0] if self.floating else ~keep

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        more = mask.new_zeros(TOKENS, TOKENS)
        if self.floating:
            more = more.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -1e4)
        out: Tensor = self.attention(
            x, x, x, key_padding_mask=mask, attn_mask=more, need_weights=self.weights
        )[0]
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(DIM, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def mask(self, keep: Tensor) -> Any:
        return additive(keep, float("-inf"))[:, 0]

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
        out: Tensor = self.encoder(x, causal, mask, is_causal=False)
        return out


NETS: dict[str, Any] = {
    "-inf": lambda: Added(float("-inf")),
    "-1e4": lambda: Added(-1e4),
    "-100": lambda: Added(-100.0),
    "float 1 - m": lambda: OneMinus(torch.float32, -1e4),
    "bool 1 - m": lambda: OneMinus(torch.bool),
    "sdpa, float": lambda: Sdpa(boolean=False),
    "multihead, float": lambda: Multihead(floating=True),
    "multihead, weights": lambda: Multihead(weights=True),
    "multihead, float, weights": lambda: Multihead(floating=True, weights=True),
} | {
    kind.__name__: kind
    for kind in (
        Added, AddedInPlace, AddedToAView, AddedByAModule, Cast, Clamped, Capped, Scaled, Sinks,
        BiasFirst, Alibi, Windows, OneMinus, Outer, Logarithm, Filled, FilledAndAdded, Chosen,
        Triangle, Sigmoid, ByHand, OutOfSight, Sdpa, SdpaOfASum, Einsum, Baddbmm, Pooling,
        Multihead, Encoder,
    )
}  # fmt: skip
