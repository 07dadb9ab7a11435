"""The published network and training step in plain PyTorch, run eagerly: what the JAX version is timed against.

Written for that comparison alone, from the formulas of docs/models/perturbdiff.md; parameter names are the official ones, so
that both sides run on the same weights. Not part of the package.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int):
        """Weight of ones."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Joint attention."""

    def __init__(self, width: int, heads: int):
        """Of a joint width."""
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, W)."""
        b, s, w = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(b, s, w))


class MLP(nn.Module):
    """H -> 4H -> H."""

    def __init__(self, width: int):
        """Of a width."""
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Inner(nn.Module):
    """One block."""

    def __init__(self, width: int, heads: int):
        """Of a width."""
        super().__init__()
        self.attn, self.mlp, self.control_mlp = Attention(2 * width, heads), MLP(width), MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.control_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams."""
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c).chunk(6, -1)
        t1, l1, h1, t2, l2, h2 = self.control_adaLN_modulation(c).chunk(6, -1)
        dx, dy = self.attn(torch.cat([modulate(x, s1, k1), modulate(y, t1, l1)], -1)).chunk(2, -1)
        return (
            x + g1 * dx + g2 * self.mlp(modulate(x, s2, k2)),
            y + h1 * dy + h2 * self.control_mlp(modulate(y, t2, l2)),
        )


class Block(nn.Module):
    """The published nesting of names."""

    def __init__(self, width: int, heads: int):
        """Of a width."""
        super().__init__()
        self.block = Inner(width, heads)


class Head(nn.Module):
    """Tokens to genes."""

    def __init__(self, width: int, genes: int):
        """Of a width."""
        super().__init__()
        self.linear = nn.Linear(width, genes)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, S, H) to (B, S, G)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return F.relu(self.linear(modulate(x, shift, scale)))


def vectors(**parameters: Tensor) -> nn.Module:
    """A module that only holds parameters `weight`."""
    holder = nn.Module()
    for name, value in parameters.items():
        child = nn.Module()
        child.weight = nn.Parameter(value)
        holder.add_module(name, child)
    return holder


class Network(nn.Module):
    """The denoiser."""

    def __init__(self, genes: int, width: int, depth: int, heads: int):
        """Of the sizes given."""
        super().__init__()
        self.x_embedder, self.x_control_embedder = nn.Linear(2 * genes, width), nn.Linear(2 * genes, width)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.gene_embedding = vectors(null_emb=torch.zeros(1, width))
        self.gene_embedding.layer_norm = nn.LayerNorm(width)
        self.class_embedding = vectors(null_emb=torch.zeros(1, width))
        self.class_embedding.emb = nn.Linear(genes, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer, self.control_final_layer = Head(width, genes), Head(width, genes)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, cov: Tensor | None) -> Tensor:
        """x, y (B, S, 2G), t (B,), cov (B, S, G) or None."""
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = t.float()[:, None] * frequency
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], -1))[:, None]
        token = self.gene_embedding.null_emb.weight
        x, y = self.x_embedder(x) + token, self.x_control_embedder(y) + token
        c = c + (
            self.class_embedding.null_emb.weight if cov is None else self.class_embedding.emb(F.silu(cov))
        )
        for block in self.blocks:
            x, y = block.block(x, y, c)
        self.control_final_layer(y, c)  # computed as published, used by nothing
        return self.final_layer(x, c)


class Covariates(nn.Module):
    """One-hot labels of every cell."""

    def __init__(self, genes: int, perturbations: int, types: int, batches: int, width: int):
        """Of the sizes given."""
        super().__init__()
        self.pert_encoder = nn.Embedding(perturbations + 1, width)
        self.celltype_encoder, self.batch_encoder = nn.Embedding(types, width), nn.Embedding(batches, width)
        self.transform = nn.Linear(3 * width, genes)

    def forward(self, perturbation: Tensor, kind: Tensor, batch: Tensor) -> Tensor:
        """(B, S) ids to (B, S, G)."""
        parts = self.pert_encoder(perturbation + 1), self.celltype_encoder(kind), self.batch_encoder(batch)
        return self.transform(torch.cat(parts, -1))


class Peer(nn.Module):
    """Both, by their official names."""

    def __init__(
        self, genes: int, width: int, depth: int, heads: int, labels: tuple[int, int, int], branch: int
    ):
        """Of the sizes given."""
        super().__init__()
        self.model, self.cov_encoder = Network(genes, width, depth, heads), Covariates(genes, *labels, branch)

    def estimate(
        self, x_t: Tensor, previous: Tensor, control: Tensor, t: Tensor, cov: Tensor | None
    ) -> Tensor:
        """One network evaluation."""
        zero = torch.zeros_like(control)
        return self.model(torch.cat([x_t, previous], -1), torch.cat([control, zero], -1), t, cov)


def energy(x: Tensor, y: Tensor) -> Tensor:
    """Half the energy distance of each set."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        square = a.square().sum(-1)[:, :, None] - 2 * a @ b.transpose(1, 2) + b.square().sum(-1)[:, None]
        return square.clamp_min(1e-8).sqrt().mean((1, 2))

    return distance(x, y) - 0.5 * (distance(x, x) + distance(y, y))


def alpha_bar() -> Tensor:
    """Signal variances of the linear schedule."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()


class Trainer:
    """The published optimiser around a peer."""

    def __init__(self, peer: Peer, rate: float, max_steps: int = 200_000):
        """AdamW, clipping, average of the weights every ten steps, warm-up and cosine of `max_steps`."""
        self.peer, self.number, self.max_steps = peer, 0, max_steps
        decayed = [p for n, p in peer.named_parameters() if not n.endswith(".bias")]
        spared = [p for n, p in peer.named_parameters() if n.endswith(".bias")]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": spared, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8)
        self.average = [p.detach().clone() for p in peer.parameters()]
        self.signal = alpha_bar()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self.ratio)

    def ratio(self, n: int) -> float:
        """Multiplier of the learning rate at step n."""
        flat = 200 + 0.1 * self.max_steps
        if n < flat:
            return min(1.0, n / 200)
        return max(0.1, 0.5 * (1 + math.cos(math.pi * (n - flat) / (self.max_steps - flat))))

    def step(self, x0: Tensor, control: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
        """One step on (B, S, G) cells; squared error and energy."""
        t = torch.randint(0, 1000, (len(x0),))
        a = self.signal[t][:, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
        cov = self.peer.cov_encoder(*ids) if torch.rand(()) < 0.5 else None
        previous = torch.zeros_like(x0)
        if torch.rand(()) < 0.5:
            with torch.no_grad():
                previous = self.peer.estimate(x_t, previous, control, t, cov)
        estimate = self.peer.estimate(x_t, previous, control, t, cov)
        error, distance = (x0 - estimate).square().mean(), energy(x0, estimate).mean()
        self.optimiser.zero_grad()
        (error + distance).backward()
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        if self.number % 10 == 0:
            with torch.no_grad():
                for mean, p in zip(self.average, self.peer.parameters(), strict=True):
                    mean.lerp_(p, 0.01 if self.number else 1.0)
        self.number += 1
        return float(error.detach()), float(distance.detach())


@torch.no_grad()
def sample(
    peer: Peer, start: Tensor, control: Tensor, ids: tuple[Tensor, Tensor, Tensor], steps: int = 100
) -> Tensor:
    """DDIM over the last `steps` indices with guidance 1, as published."""
    signal = torch.cat([torch.ones(1), alpha_bar()])
    x, previous, cov = start, torch.zeros_like(start), peer.cov_encoder(*ids)
    for i in reversed(range(steps)):
        t = torch.full((len(x),), i)
        x0 = 2 * peer.estimate(x, previous, control, t, cov) - peer.estimate(x, previous, control, t, None)
        x0 = torch.where(x0 < 1e-4, 0.0, x0)
        now, following = signal[i + 1], signal[i]
        noise = (x - now.sqrt() * x0) / (1 - now).sqrt()
        x, previous = following.sqrt() * x0 + (1 - following).sqrt() * noise, x0
    return x
