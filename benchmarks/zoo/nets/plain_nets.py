"""Nets of torch's own layers, as people write them: recurrent, attention, sequence to sequence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.entry import Entry, Inputs, tokens


class Tagger(nn.Module):
    """Words in, a tag for each out, through a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase], two_ways: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(99, 24)
        self.body = kind(
            24, 32, num_layers=2, batch_first=True, bidirectional=two_ways, dropout=0.1
        )
        self.drop = nn.Dropout(0.2)
        self.tags = nn.Linear(64 if two_ways else 32, 7)

    def forward(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.words(words)
        if lengths is not None:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            out, _ = self.body(packed)
            x, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        else:
            x, _ = self.body(x)
        return self.tags(self.drop(x))  # type: ignore[no-any-return]


class CellLoop(nn.Module):
    """A GRU cell stepped by hand, with attention over what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 32)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)
        self.out = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 32)
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        seen = torch.stack(states, dim=1)
        scores = self.query(state)[:, None] @ self.key(seen).transpose(1, 2)
        context = (scores / math.sqrt(32)).softmax(-1) @ seen
        return self.out(torch.cat([state, context.squeeze(1)], dim=-1))  # type: ignore[no-any-return]


class ConvRecurrent(nn.Module):
    """A text recogniser: convolutions, then an LSTM over the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d((1, None)),
        )
        self.rnn = nn.LSTM(32, 24, bidirectional=True)
        self.head = nn.Linear(48, 11)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).squeeze(2).permute(2, 0, 1)
        out, _ = self.rnn(columns)
        return F.log_softmax(self.head(out), dim=-1)


class Translator(nn.Module):
    """nn.Transformer with masks, as the tutorial builds it."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(99, 32), nn.Embedding(99, 32)
        self.body = nn.Transformer(32, 4, 2, 2, 64, dropout=0.1, batch_first=True)
        self.out = nn.Linear(32, 99)
        self.register_buffer("places", torch.randn(64, 32) * 0.1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 98
        places: Any = self.places
        x = self.source(source) * math.sqrt(32) + places[: source.shape[1]]
        y = self.target(target) * math.sqrt(32) + places[: target.shape[1]]
        made = self.body(x, y, tgt_mask=mask, src_key_padding_mask=padding)
        return self.out(made)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        if padding is not None:
            padding = F.pad(padding, (1, 0), value=False)
        x = self.layers(x, src_key_padding_mask=padding)
        return {"logits": self.head(x[:, 0]), "tokens": x}


class HandMade(nn.Module):
    """Attention and a gated feed-forward written with functions and one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(8)
        scores = scores.masked_fill(~causal, float("-inf"))
        mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, c))
        gated = F.silu(self.gate(x)) * self.up(x)
        made = self.down(gated)
        made += x
        return made  # type: ignore[no-any-return]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 16, 32)
        self.down = nn.ModuleList(self._block(a, b) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, b // 2, 2, stride=2) for b in (32, 16))
        self.merge = nn.ModuleList(self._block(b, b // 2) for b in (32, 16))
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _block(a: int, b: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)  # type: ignore[no-any-return]


def _words() -> Inputs:
    return (tokens(),), {}


def _padded() -> Inputs:
    return (tokens(), torch.tensor([12, 9])), {}


def _steps(length: int = 10, width: int = 16) -> Inputs:
    return (torch.randn(2, length, width),), {}


def _masked() -> Inputs:
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 7:] = True
    return (torch.randn(2, 10, 32), padding), {}


def entries() -> list[Entry]:
    found: list[tuple[str, Any, Any]] = [
        ("lstm_tagger", lambda: Tagger(nn.LSTM), _words),
        ("lstm_packed", lambda: Tagger(nn.LSTM), _padded),
        ("gru_tagger", lambda: Tagger(nn.GRU, two_ways=False), _words),
        ("rnn_tagger", lambda: Tagger(nn.RNN), _words),
        ("gru_cell_loop", CellLoop, _steps),
        ("conv_lstm", ConvRecurrent, lambda: ((torch.randn(2, 3, 16, 48),), {})),
        ("nn_transformer", Translator, lambda: ((tokens(), tokens(length=9)), {})),
        ("encoder", Encoder, lambda: _steps(width=32)),
        ("encoder_padded", Encoder, _masked),
        ("encoder_norm_first", lambda: Encoder(norm_first=True), _masked),
        ("attention_by_hand", HandMade, lambda: _steps(width=32)),
        ("unet", UNet, lambda: ((torch.randn(2, 3, 32, 32),), {})),
    ]
    return [Entry(f"plain/{name}", make, inputs) for name, make, inputs in found]
