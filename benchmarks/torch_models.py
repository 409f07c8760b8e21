"""The paper's two networks in plain PyTorch, written for these comparisons: one side of every ratio against PyTorch.

Weights have the names that `selfreg_jax.from_pytorch` and `to_pytorch` know, so that both sides compute with the same.
Images are (B, C, H, W); tapped maps too, in `Taps`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import torch
import torch.nn.functional as F  # noqa: N812, as in PyTorch's own documentation
from torch import Tensor, nn

from benchmarks.measuring import NotComparableError
from selfreg_jax.models.swin_unet import PATCH, relative_position_index, shift_mask


def device() -> torch.device:
  """PyTorch's device of the kind on which JAX computes; raises NotComparableError where it has none."""
  platform = jax.default_backend()
  if platform == "cpu":
    return torch.device("cpu")
  if platform == "gpu" and torch.cuda.is_available():
    return torch.device("cuda")
  raise NotComparableError(
    f"JAX computes on a {platform}, for which this PyTorch is not built; install one that is, or set JAX_PLATFORMS=cpu"
  )


@dataclasses.dataclass
class Taps:
  """The maps that the self-regularization looks at, each (B, C, h, w).

  Attributes:
    encoder: stages from shallow to deep, each the list of its blocks' outputs.
    decoder: stages from deep to shallow, likewise.
    final: the map before the head.
  """

  encoder: list[list[Tensor]]
  decoder: list[list[Tensor]]
  final: Tensor

  def positions(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(encoder maps, decoder maps) at each block position: the only one, or the first and the last."""
    several = max(map(len, self.encoder + self.decoder)) > 1
    for index in (0, -1) if several else (0,):
      yield [stage[index] for stage in self.encoder], [stage[index] for stage in self.decoder]


class DoubleConv(nn.Module):
  """(3x3 convolution, BatchNorm, ReLU) twice."""

  def __init__(self, inputs: int, middle: int, outputs: int):
    super().__init__()
    self.double_conv = nn.Sequential(
      nn.Conv2d(inputs, middle, 3, padding=1, bias=False),
      nn.BatchNorm2d(middle),
      nn.ReLU(inplace=True),
      nn.Conv2d(middle, outputs, 3, padding=1, bias=False),
      nn.BatchNorm2d(outputs),
      nn.ReLU(inplace=True),
    )

  def forward(self, x: Tensor) -> Tensor:
    """(B, inputs, H, W) -> (B, outputs, H, W)."""
    return self.double_conv(x)


class Down(nn.Module):
  """2x2 maximum, then a `DoubleConv`."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs, outputs))

  def forward(self, x: Tensor) -> Tensor:
    """(B, inputs, H, W) -> (B, outputs, H/2, W/2)."""
    return self.maxpool_conv(x)


class Up(nn.Module):
  """Bilinear upsampling with aligned corners, joined to the skip, then a `DoubleConv`."""

  def __init__(self, inputs: int, outputs: int):
    super().__init__()
    self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    self.conv = DoubleConv(inputs, inputs // 2, outputs)

  def forward(self, deeper: Tensor, skip: Tensor) -> Tensor:
    """Joins (B, c, h, w) and (B, C, 2h, 2w), c + C = inputs."""
    return self.conv(torch.cat([skip, self.up(deeper)], dim=1))


class OutConv(nn.Module):
  """The head."""

  def __init__(self, inputs: int, classes: int):
    super().__init__()
    self.conv = nn.Conv2d(inputs, classes, 1)

  def forward(self, x: Tensor) -> Tensor:
    """(B, inputs, H, W) -> (B, classes, H, W)."""
    return self.conv(x)


class UNet(nn.Module):
  """The bilinear UNet; the sides of the images must be multiples of 2 ** (stages below the stem).

  Args:
    num_classes: classes, background included.
    channels: of the images.
    widths: channels of the stem and of each down stage.
  """

  def __init__(self, num_classes: int, channels: int = 1, widths: Sequence[int] = (64, 128, 256, 512, 512)):
    super().__init__()
    self.depth = len(widths) - 1
    self.inc = DoubleConv(channels, widths[0], widths[0])
    for i in range(1, self.depth + 1):
      setattr(self, f"down{i}", Down(widths[i - 1], widths[i]))
    deeper = widths[-1]
    for i, skip in enumerate(reversed(widths[:-1]), 1):
      outputs = widths[max(self.depth - 1 - i, 0)]
      setattr(self, f"up{i}", Up(deeper + skip, outputs))
      deeper = outputs
    self.outc = OutConv(deeper, num_classes)

  def forward(self, images: Tensor) -> tuple[Tensor, Taps]:
    """(B, channels, H, W) -> logits (B, classes, H, W) and the tapped maps."""
    x = self.inc(images)
    skips, encoder, decoder = [], [], []
    for i in range(1, self.depth + 1):
      skips.append(x)
      x = getattr(self, f"down{i}")(x)
      encoder.append([x])
    for i in range(1, self.depth + 1):
      x = getattr(self, f"up{i}")(x, skips.pop())
      decoder.append([x])
    return self.outc(x), Taps(encoder, decoder[:-1], x)


class DropPath(nn.Module):
  """Drops a residual branch of a sample with probability `rate` and scales what is kept to the same expectation.

  Attributes:
    factors: (B,) what to multiply the samples by instead of drawing; None draws.
  """

  def __init__(self, rate: float):
    super().__init__()
    self.rate = rate
    self.factors: Tensor | None = None

  def forward(self, x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...)."""
    if self.rate == 0 or not self.training:
      return x
    factors = self.factors
    if factors is None:
      factors = torch.empty(len(x), device=x.device).bernoulli_(1 - self.rate) / (1 - self.rate)
    return x * factors.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class WindowAttention(nn.Module):
  """Attention inside (shifted) windows with a learned bias for each relative position; maps are (B, H, W, C)."""

  def __init__(self, channels: int, heads: int, window: int, shift: int, size: int):
    super().__init__()
    self.heads, self.window, self.shift = heads, window, shift
    self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
    nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
    self.qkv = nn.Linear(channels, 3 * channels)
    self.proj = nn.Linear(channels, channels)
    index = torch.tensor(relative_position_index(window), dtype=torch.long)
    self.register_buffer("index", index, persistent=False)
    mask = torch.tensor(shift_mask(size, size, window, shift)) if shift else None
    self.register_buffer("mask", mask, persistent=False)

  def forward(self, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)."""
    batch, height, width, channels = x.shape
    window, rows, columns = self.window, height // self.window, width // self.window
    if self.shift:
      x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    x = x.reshape(batch, rows * columns, window**2, channels)

    qkv = self.qkv(x).view(batch, rows * columns, window**2, 3, self.heads, channels // self.heads)
    query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, windows, heads, tokens, head_dim)
    bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)  # (heads, tokens, tokens)
    if self.mask is not None:
      bias = bias + self.mask[:, None]  # (windows, heads, tokens, tokens)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
    x = logits.softmax(dim=-1).to(value.dtype) @ value
    x = self.proj(x.transpose(2, 3).reshape(batch, rows * columns, window**2, channels))

    x = x.view(batch, rows, columns, window, window, channels).transpose(2, 3).reshape(batch, height, width, channels)
    return torch.roll(x, (self.shift, self.shift), dims=(1, 2)) if self.shift else x


class Mlp(nn.Module):
  """Linear, GELU, linear."""

  def __init__(self, channels: int):
    super().__init__()
    self.fc1 = nn.Linear(channels, 4 * channels)
    self.fc2 = nn.Linear(4 * channels, channels)

  def forward(self, x: Tensor) -> Tensor:
    """(..., C) -> (..., C)."""
    return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
  """Window attention and MLP, each as a residual branch."""

  def __init__(self, channels: int, heads: int, window: int, shift: int, size: int, drop_path: float):
    super().__init__()
    self.norm1 = nn.LayerNorm(channels)
    self.attn = WindowAttention(channels, heads, window, shift, size)
    self.drop_path1 = DropPath(drop_path)
    self.norm2 = nn.LayerNorm(channels)
    self.mlp = Mlp(channels)
    self.drop_path2 = DropPath(drop_path)

  def forward(self, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)."""
    x = x + self.drop_path1(self.attn(self.norm1(x)))
    return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
  """Patches of 4x4 pixels to tokens."""

  def __init__(self, channels: int, features: int):
    super().__init__()
    self.proj = nn.Conv2d(channels, features, PATCH, stride=PATCH)
    self.norm = nn.LayerNorm(features)

  def forward(self, images: Tensor) -> Tensor:
    """(B, channels, H, W) -> (B, H/4, W/4, features)."""
    return self.norm(self.proj(images).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
  """Halves rows and columns, doubles the channels."""

  def __init__(self, channels: int):
    super().__init__()
    self.norm = nn.LayerNorm(4 * channels)
    self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

  def forward(self, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H/2, W/2, 2C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
    return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * channels)))


class PatchExpanding(nn.Module):
  """A cell of scale x scale pixels from each one."""

  def __init__(self, channels: int, features: int, scale: int):
    super().__init__()
    self.features, self.scale = features, scale
    self.expand = nn.Linear(channels, scale**2 * features, bias=False)
    self.norm = nn.LayerNorm(features)

  def forward(self, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, scale H, scale W, features)."""
    batch, height, width, _ = x.shape
    x = self.expand(x).view(batch, height, width, self.scale, self.scale, self.features).transpose(2, 3)
    return self.norm(x.reshape(batch, height * self.scale, width * self.scale, self.features))


class Stage(nn.Module):
  """The blocks of one resolution, and the step to the next one, which the network applies itself."""

  def __init__(self, blocks: Sequence[SwinBlock], **resampling: nn.Module):
    super().__init__()
    self.blocks = nn.ModuleList(blocks)
    for name, module in resampling.items():
      self.add_module(name, module)

  def forward(self, x: Tensor) -> list[Tensor]:
    """(B, H, W, C) -> the outputs of all blocks."""
    outputs = []
    for block in self.blocks:
      x = block(x)
      outputs.append(x)
    return outputs


class SwinUNet(nn.Module):
  """Swin-Unet.

  Args:
    num_classes: classes, background included.
    size: pixels a side of the images.
    embed_dim: channels of the first stage.
    depths: blocks of each stage.
    heads: attention heads of each stage.
    window: tokens a side of a window.
    drop_path: highest drop-path rate.
  """

  def __init__(
    self,
    num_classes: int,
    size: int = 224,
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    drop_path: float = 0.2,
  ):
    super().__init__()
    self.stages = len(depths)
    widths = [embed_dim * 2**i for i in range(self.stages)]
    rates = torch.linspace(0, drop_path, sum(depths)).split(list(depths))

    def blocks(i: int) -> list[SwinBlock]:
      side = size // PATCH // 2**i
      shifts = [window // 2 if j % 2 and side > window else 0 for j in range(depths[i])]
      return [
        SwinBlock(widths[i], heads[i], window, shift, side, float(rate))
        for shift, rate in zip(shifts, rates[i], strict=True)
      ]

    self.patch_embed = PatchEmbed(3, embed_dim)
    last = self.stages - 1
    self.layers = nn.ModuleList(
      Stage(blocks(i), **({"downsample": PatchMerging(widths[i])} if i < last else {})) for i in range(self.stages)
    )
    self.norm = nn.LayerNorm(widths[-1])
    expansions = [PatchExpanding(widths[i], widths[i] // 2, 2) for i in range(last, 0, -1)]
    self.layers_up = nn.ModuleList([expansions[0]])
    self.concat_back_dim = nn.ModuleList([nn.Identity()])
    for d in range(1, self.stages):
      width = widths[last - d]
      self.concat_back_dim.append(nn.Linear(2 * width, width))
      self.layers_up.append(Stage(blocks(last - d), **({"upsample": expansions[d]} if d < last else {})))
    self.norm_up = nn.LayerNorm(embed_dim)
    self.up = PatchExpanding(embed_dim, embed_dim, PATCH)
    self.output = nn.Conv2d(embed_dim, num_classes, 1, bias=False)

  def forward(self, images: Tensor) -> tuple[Tensor, Taps]:
    """(B, 1 or 3, size, size) -> logits (B, classes, size, size) and the tapped maps."""
    x = self.patch_embed(images.expand(-1, 3, -1, -1))
    skips, encoder, decoder = [], [], []
    for i, stage in enumerate(self.layers):
      skips.append(x)
      encoder.append(stage(x))
      x = encoder[-1][-1]
      if i < self.stages - 1:
        x = stage.downsample(x)
    x = self.layers_up[0](self.norm(x))
    for d in range(1, self.stages):
      stage = self.layers_up[d]
      x = self.concat_back_dim[d](torch.cat([x, skips[self.stages - 1 - d]], dim=-1))
      decoder.append(stage(x))
      x = decoder[-1][-1]
      if d < self.stages - 1:
        x = stage.upsample(x)
    final = _channels_first(self.up(self.norm_up(x)))
    taps = Taps(*([[_channels_first(x) for x in stage] for stage in side] for side in (encoder, decoder)), final)
    return self.output(final), taps

  def drop_paths(self) -> list[DropPath]:
    """All of them, in the order of computation."""
    return [module for module in self.modules() if isinstance(module, DropPath)]


def _channels_first(x: Tensor) -> Tensor:
  # A view: what stood as (B, H, W, C) lies in memory as PyTorch's channels_last wants it.
  return x.permute(0, 3, 1, 2)
