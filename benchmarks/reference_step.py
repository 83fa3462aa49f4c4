"""The training step of DINOv2's public code, transcribed in plain torch, to be measured against.

Written from its description (arXiv:2304.07193; `train/ssl_meta_arch.py`, `layers/`, `loss/` of
facebookresearch/dinov2) for one device without xFormers: global and local crops run one after the
other, targets and losses are dense fp32 matrices, and the masked patches fill a buffer up to their
bound. Attention is torch's fused one, which is faster than the products that the public code falls
back to without xFormers. Nothing is compiled, as there.

Precision is that of its FSDP settings: weights are cast once a forward, and all between the pixels
and the logits is 16 bits. The names of the parameters are ours, so weights go over by `load`.

B images, V = 2 B global views, L local crops, P patches, N tokens, D width, K prototypes, M masked
patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pipeline.model.groups import apply_values, parameter_groups
from pipeline.model.pair import HeadSpec
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.views.batch import Views

EPS = 1e-6  # of its layer norms
STUDENT_TEMPERATURE, CENTRE_MOMENTUM, KOLEO_WEIGHT, CLIP = 0.1, 0.9, 0.1, 3.0


@dataclass(frozen=True)
class Collated:
    """What its collate function makes on the host: a micro batch with its masked patches."""

    views: Views
    places: Tensor  # int64 [M], flat in [V * P]
    weights: Tensor  # float32 [M], 1 / masked patches of the view
    bound: int  # rows of the buffer that they are copied into

    @classmethod
    def of(cls, views: Views, ratio: tuple[float, float] = (0.1, 0.5)) -> Collated:
        """From views on their device. The bound is of a batch in which half of the views are
        masked, each bin of `ratio` at its upper edge.
        """
        masks = views.masks
        patches, masked_views = masks.shape[1], len(masks) // 2
        edges = torch.linspace(*ratio, masked_views + 1)[1:]
        places = masks.flatten().nonzero().squeeze(1)
        weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
        bound = max(len(places), int((edges * patches).int().sum()))
        return cls(views, places, weights, bound)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        views, tokens, width = x.shape
        qkv = self.qkv(x).reshape(views, tokens, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(views, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        inner = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Scale(nn.Module):
    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Stochastic depth runs a branch on some of the views above a rate of 0.1, and multiplies by a
    mask up to it.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        width, hidden = spec.width, int(spec.width * spec.mlp_ratio)
        self.rate = spec.drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, spec.heads)
        self.mlp = SwiGlu(width, hidden) if spec.ffn == "swiglu" else Mlp(width, hidden)
        self.ls1, self.ls2 = Scale(width, spec.layer_scale), Scale(width, spec.layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self._branch(x, self.norm1, self.attn, self.ls1)
        return self._branch(x, self.norm2, self.mlp, self.ls2)

    def _branch(self, x: Tensor, norm: nn.Module, layer: nn.Module, scale: nn.Module) -> Tensor:
        if not self.training or self.rate == 0:
            return x + scale(layer(norm(x)))
        views = len(x)
        if self.rate > 0.1:
            kept = max(int(views * (1 - self.rate)), 1)
            chosen = torch.randperm(views, device=x.device)[:kept]
            residual = scale(layer(norm(x[chosen])))
            flat = x.flatten(1).index_add(
                0, chosen, residual.flatten(1).to(x.dtype), alpha=views / kept
            )
            return flat.view_as(x)
        keep = torch.rand(views, 1, 1, device=x.device) < 1 - self.rate
        return x + scale(layer(norm(x))) * (keep / (1 - self.rate)).to(x.dtype)


class Backbone(nn.Module):
    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec, self.side = spec, spec.image_size // spec.patch_size
        width = spec.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(
            spec.in_channels, width, spec.patch_size, stride=spec.patch_size
        )
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normed CLS `[V, D]` and patches `[V, P, D]` of views of one size."""
        side = x.shape[-1] // self.spec.patch_size
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token, patches)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1)
        tokens = tokens + self._position(side).to(tokens.dtype)
        if self.spec.registers:
            registers = self.register_tokens.expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1 + self.spec.registers :]

    def _position(self, side: int) -> Tensor:
        if side == self.side:
            return self.pos_embed
        table = self.pos_embed[:, 1:].float()
        table = table.reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        offset = self.spec.interpolate_offset
        where = {"scale_factor": ((side + offset) / self.side,) * 2} if offset else {"size": side}
        antialias = self.spec.interpolate_antialias
        table = F.interpolate(table, mode="bicubic", antialias=antialias, **where)
        return torch.cat([self.pos_embed[:, :1].float(), table.flatten(2).transpose(1, 2)], 1)


class Head(nn.Module):
    def __init__(self, width: int, spec: HeadSpec) -> None:
        super().__init__()
        sizes = [width, *[spec.hidden] * (spec.layers - 1), spec.bottleneck]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(spec.prototypes, 1))
        self.last_layer.weight_v = nn.Parameter(torch.empty(spec.prototypes, spec.bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, D]` to `[N, K]`."""
        x = self.mlp(x)
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        last = self.last_layer
        return F.linear(x, torch._weight_norm(last.weight_v, last.weight_g, 0))


class Network(nn.Module):
    def __init__(self, spec: BackboneSpec, dino: HeadSpec, ibot: HeadSpec | None) -> None:
        super().__init__()
        self.backbone = Backbone(spec)
        self.dino_head = Head(spec.width, dino)
        self.ibot_head = Head(spec.width, ibot) if ibot else None

    def forward(
        self, batch: Collated, teacher: bool, half: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CLS tokens `[V, D]` of the global views, their logits (and behind them those of the local
        ones, for the student), and logits of the masked patches `[bound, K]`.
        """
        views = batch.views
        hidden = None if teacher else views.masks
        cls, patches = self.backbone(_cast(views.global_views, half), hidden)
        rows = patches.new_zeros(batch.bound, patches.shape[-1])
        rows[: len(batch.places)] = patches.flatten(0, 1).index_select(0, batch.places)
        tokens = [cls]
        if not teacher and len(views.local_views):
            tokens.append(self.backbone(_cast(views.local_views, half))[0])
        if self.ibot_head is not None:
            return cls, self.dino_head(torch.cat(tokens)), self.ibot_head(rows)
        logits = self.dino_head(torch.cat([*tokens, rows]))
        return cls, logits[: -batch.bound], logits[-batch.bound :]


class Reference:
    """Student, teacher, centres and optimizer, and the step over them."""

    def __init__(
        self,
        spec: BackboneSpec,
        heads: tuple[HeadSpec, HeadSpec | None],
        sinkhorn: bool = False,
        layerwise_decay: float = 0.9,
        half: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Heads of DINO and iBOT, None where they share one. `half`: the 16-bit type."""
        self.student = Network(spec, *heads).to(device).train()
        self.teacher = Network(spec, *heads).to(device).eval().requires_grad_(False)
        self.sinkhorn, self.half = sinkhorn, half
        self.centres = {name: torch.zeros(1, device=device) for name in ("dino", "ibot")}
        self.means: dict[str, Tensor] = {}
        groups = parameter_groups(self.student, layerwise_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    def load(self, state: dict[str, Tensor]) -> None:
        """The student's weights, for student and teacher."""
        self.student.load_state_dict(state)
        self.teacher.load_state_dict(state)

    def step(self, batch: Collated, values: StepValues) -> dict[str, Tensor]:
        """One update; the terms of the loss."""
        apply_values(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        targets = self._targets(batch, values.teacher_temperature)
        cls, logits, patches = self._run(self.student, batch, teacher=False)
        terms = losses(cls, logits, patches, targets, batch)
        total = terms["dino_global"] + terms["dino_local"] + terms["ibot"]
        (total + KOLEO_WEIGHT * terms["koleo"]).backward()
        for module in self.student.children():
            torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            student, teacher = list(self.student.parameters()), list(self.teacher.parameters())
            torch._foreach_mul_(teacher, values.teacher_momentum)
            torch._foreach_add_(teacher, student, alpha=1 - values.teacher_momentum)
        if any(math.isnan(float(x.detach())) for x in terms.values()):  # its check of each term
            raise RuntimeError("NaN")
        return terms

    def _run(
        self, network: Network, batch: Collated, teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = {name: _cast(x, self.half) for name, x in network.named_parameters()}
        return functional_call(network, weights, (batch, teacher, self.half))

    @torch.no_grad()
    def _targets(self, batch: Collated, temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities of the global views, each crop that of the other, and of the patches."""
        _, cls, patches = self._run(self.teacher, batch, teacher=True)
        patches = patches[: len(batch.places)]
        first, second = cls.chunk(2)
        cls = torch.cat([second, first])
        if self.sinkhorn:
            return sinkhorn(cls, temperature), sinkhorn(patches, temperature)
        return self._centred("dino", cls, temperature), self._centred("ibot", patches, temperature)

    def _centred(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """The mean of a step moves the centre when the next one asks for it."""
        if name in self.means:
            centre = self.centres[name] * CENTRE_MOMENTUM
            self.centres[name] = centre + self.means[name] * (1 - CENTRE_MOMENTUM)
        self.means[name] = logits.float().mean(0, keepdim=True)
        return F.softmax((logits.float() - self.centres[name]) / temperature, dim=-1)


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """`[N, K]` to probabilities, alternately of equal prototypes and equal rows."""
    q = torch.exp(logits.float() / temperature).t()
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= rows
    return (q * rows).t()


def losses(
    cls: Tensor,
    logits: Tensor,
    patches: Tensor,
    targets: tuple[Tensor, Tensor],
    batch: Collated,
) -> dict[str, Tensor]:
    """The four terms; those of DINO share one number of pairs as their denominator."""
    views, local_crops = len(cls), batch.views.local_crops
    pairs = 2 + 2 * local_crops
    swapped, masked = targets
    global_logits, local_logits = logits[:views], logits[views:]
    local = cls.new_zeros((), dtype=torch.float32)
    for crop in local_logits.chunk(local_crops) if local_crops else ():
        log_student = F.log_softmax(crop.float() / STUDENT_TEMPERATURE, dim=-1)
        for target in swapped.chunk(2):
            local = local - (target * log_student).sum(-1).mean()
    log_student = F.log_softmax(global_logits.float() / STUDENT_TEMPERATURE, dim=-1)
    whole = -(swapped * log_student).sum(-1).mean()
    log_patches = F.log_softmax(patches[: len(masked)].float() / STUDENT_TEMPERATURE, dim=-1)
    ibot = -((masked * log_patches).sum(-1) * batch.weights).sum() / views
    return {
        "dino_global": whole * 2 / pairs,
        "dino_local": local / pairs,
        "ibot": ibot,
        "koleo": torch.stack([koleo(x) for x in cls.chunk(2)]).sum(),
    }


def koleo(features: Tensor) -> Tensor:
    x = F.normalize(features.float(), dim=-1, eps=1e-8)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


def _cast(x: Tensor, half: torch.dtype | None) -> Tensor:
    return x if half is None else x.to(half)
