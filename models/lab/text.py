"""Text side of the training: captions as rows of a compact token table, and the encoder's forward with gradients."""

import random

import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPTextModel_
from comfy.ldm.modules.attention import attention_basic
from comfy.ops import disable_weight_init

from . import common
from .captions import parse, phrases, random_phrases
from .load import TEXT, LabSDTokenizer
from .portrait import FACTORS, Portrait

LENGTH = 77
FOREIGN = ("masterpiece", "quality", "photo", "detailed", "dog", "sunset", "studio", "very")  # any unknown word


class Vocabulary:
    """Host token ids <-> rows of the compact table; the last row is for every token no caption uses."""

    def __init__(self):
        self.tokenizer = LabSDTokenizer()
        self.cache = {}
        captions = [f", {part}" for seed in range(2000) for part in phrases(Portrait.from_seed(seed))]
        self.ids = sorted({i for text in set(captions) for i in self._ids(text)} | {self.start, self.end})
        self.rows = {i: row for row, i in enumerate(self.ids)}

    @property
    def start(self):
        return self.tokenizer.start_token

    @property
    def end(self):
        return self.tokenizer.end_token

    def _ids(self, text):
        return self.tokenizer.tokenizer(text)["input_ids"][1:-1]

    def encode(self, parts):
        """Caption parts -> 77 rows, padded with the end token as the host does; phrases are tokenised once."""
        rows = [self.rows[self.start]]
        for i, part in enumerate(parts):
            text = (", " if i else "") + part
            if text not in self.cache:
                self.cache[text] = [self.rows.get(token, len(self.ids)) for token in self._ids(text)]
            rows += self.cache[text]
        return (rows + [self.rows[self.end]] * LENGTH)[:LENGTH]

    def batch(self, portraits, rng, drop=0.1):
        """Random captions -> [B, 77] rows; a share `drop` is the empty prompt."""
        parts = [[] if rng.random() < drop else random_phrases(p, rng, FOREIGN) for p in portraits]
        return torch.tensor([self.encode(p) for p in parts])


class Encoder(torch.nn.Module):
    """The host's CLIP text transformer around the compact table. Same numbers as the host, but differentiable:
    the host's layers add in place, which autograd refuses."""

    def __init__(self, rows):
        super().__init__()
        config = {**TEXT, "hidden_act": "quick_gelu", "max_position_embeddings": LENGTH, "eos_token_id": 49407}
        self.host = CLIPTextModel_(config, torch.float32, "cpu", disable_weight_init)
        self.host.embeddings.token_embedding = torch.nn.Embedding(rows, TEXT["hidden_size"])
        for name, p in self.host.named_parameters():
            if "norm" in name:
                torch.nn.init.constant_(p, float(name.endswith("weight")))
            elif p.ndim == 2:
                torch.nn.init.normal_(p, std=0.02 if "embedding" in name else p.shape[1] ** -0.5)
            else:
                torch.nn.init.zeros_(p)
        self.register_buffer("causal", torch.full((LENGTH, LENGTH), -1e4).triu_(1), persistent=False)

    def forward(self, rows):
        """[B, 77] rows -> [B, 77, D], the host's "last" layer."""
        host = self.host
        x = host.embeddings.token_embedding(rows) + host.embeddings.position_embedding.weight
        for layer in host.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), self.causal, attention_basic)
            x = x + layer.mlp(layer.layer_norm2(x))
        return host.final_layer_norm(x)


def train(work, steps=500, batch=128, lr=2e-3, seed=0):
    """Stage "text": teach the encoder its words before the UNet listens -> `work`/text.ckpt.

    The end token must tell the value of every factor the caption names, or that it is unsaid. A minute or two here
    spare the UNet from learning language from noisy pictures; both are trained on together afterwards.
    """
    path = work / "text.ckpt"
    if path.exists():
        return
    torch.manual_seed(seed)
    rng, vocabulary, device = random.Random(seed), Vocabulary(), common.device()
    encoder = Encoder(len(vocabulary.ids) + 1).to(device)
    sizes = [len(values) + 1 for values in FACTORS.values()]
    head = torch.nn.Linear(TEXT["hidden_size"], sum(sizes)).to(device)
    named = [*encoder.named_parameters(), *((f"head.{k}", p) for k, p in head.named_parameters())]
    optimiser = common.Muon(*common.split(named, ("embedding", "head.")), lr=lr)
    log = common.Log("text", steps, batch=batch)
    for step in range(1, steps + 1):
        portraits = [Portrait.from_seed(rng.randrange(2**31)) for _ in range(batch)]
        parts = [random_phrases(p, rng, FOREIGN) for p in portraits]
        rows = torch.tensor([vocabulary.encode(p) for p in parts]).to(device)
        targets = torch.tensor([labels(part) for part in parts]).to(device)
        lengths = (rows != vocabulary.rows[vocabulary.end]).sum(1)
        with common.autocast():
            logits = head(encoder(rows)[torch.arange(batch), lengths]).float().split(sizes, 1)
        loss = sum(F.cross_entropy(x, targets[:, i]) for i, x in enumerate(logits)) / len(sizes)
        optimiser.set_rate(lr * common.schedule(step / (steps + 1), warm=0.04))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        log.tick(step)
        if step % 50 == 0:
            right = torch.stack([x.argmax(1) == targets[:, i] for i, x in enumerate(logits)]).float().mean()
            log.write(step, loss=loss.item(), accuracy=right.item())
    common.save(path, model=encoder.state_dict())


def labels(parts):
    """Index of each factor the caption names; one past the last value where it is left unsaid."""
    said = parse(", ".join(parts))
    return [values.index(said[name]) if name in said else len(values) for name, values in FACTORS.items()]
