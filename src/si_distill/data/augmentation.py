"""Augmentation that does not leak: a network that is told what was done to an image can be asked for none of it.

Karras et al. 2022, "EDM", appendix F.2, after Karras et al. 2020, "Training Generative Adversarial Networks
with Limited Data" (ADA): flips and geometry, with nine labels. Teachers of EDM are trained with it, critics of SiD and SiDA
too; what is generated has labels of zero.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

#: Labels per sample: flips 2, scale 1, rotation 2, anisotropy 2, translation 2.
AUGMENT_LABELS = 9
#: Standard normal numbers that decide about one sample; the first nine serve as uniform ones.
AUGMENT_NUMBERS = 13
#: Standard deviations: log2 of the scale and of the anisotropy, translation in widths of the image (EDM).
LOG2_SCALE_STD, LOG2_ANISOTROPY_STD, TRANSLATION_STD = 0.2, 0.2, 0.125


@dataclass(frozen=True)
class Augmentation:
    """One transformation for each sample, in this order; fields have the shape (B,), `shift` (B, 2).

    Args:
        flip_x, flip_y: whether left and right, top and bottom change places.
        scale: s; the image grows by 2^(0.2 s).
        angle: rotation in radians, counter-clockwise.
        anisotropy: n; the image grows by 2^(0.2 n) along an axis and shrinks as much across it.
        axis: angle of this axis in radians, counter-clockwise from the row.
        shift: (right, down) in eighths of the width.
    """

    flip_x: torch.Tensor
    flip_y: torch.Tensor
    scale: torch.Tensor
    angle: torch.Tensor
    anisotropy: torch.Tensor
    axis: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def draw(cls, numbers: torch.Tensor, probability: float) -> "Augmentation":
        """Random transformations.

        Left and right change places in half of the samples whatever the probability, top and bottom in p/2, each of the
        others is applied with p; the axis of anisotropy is the row in half of the cases (EDM's public settings).

        Args:
            numbers: (B, AUGMENT_NUMBERS) independent standard normal numbers.
            probability: p in [0, 1]; EDM uses 0.12 (CIFAR-10) and 0.15 (FFHQ, AFHQv2).
        """
        u, normal = torch.special.ndtr(numbers[:, :9]).unbind(1), numbers[:, 9:]

        def sometimes(gate: int, value: torch.Tensor) -> torch.Tensor:
            return torch.where(u[gate] < probability, value, 0.0)

        return cls(
            flip_x=u[0] < 0.5,
            flip_y=u[1] < 0.5 * probability,
            scale=sometimes(2, normal[:, 0]),
            angle=sometimes(3, math.pi * (2 * u[4] - 1)),
            anisotropy=sometimes(5, normal[:, 1]),
            axis=torch.where(u[6] < 0.5, math.pi * (2 * u[7] - 1), 0.0),
            shift=torch.stack([sometimes(8, normal[:, 2]), sometimes(8, normal[:, 3])], 1),
        )

    @property
    def labels(self) -> torch.Tensor:
        """(B, 9) labels in EDM's order: zeros if, and only if, nothing was done."""
        return torch.stack(
            [
                self.flip_x.to(self.scale.dtype),
                self.flip_y.to(self.scale.dtype),
                self.scale,
                self.angle.cos() - 1,
                self.angle.sin(),
                self.anisotropy * self.axis.cos(),
                self.anisotropy * self.axis.sin(),
                *self.shift.unbind(1),
            ],
            dim=1,
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The transformed images, (B, C, S, S).

        Bicubic, mirrored about the centres of the outermost pixels as in EDM's code (which filters at twice the resolution);
        what is only flipped, or not moved at all, is exact.
        """
        images = torch.where(_per_image(self.flip_x), images.flip(3), images)
        images = torch.where(_per_image(self.flip_y), images.flip(2), images)
        grid = F.affine_grid(self._output_to_input().to(images.dtype), list(images.shape), align_corners=False)
        grid = grid * (images.shape[-1] / (images.shape[-1] - 1))  # ±1 at the centres of these pixels
        moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
        return torch.where(_per_image(self.labels[:, 2:].any(1)), moved, images)

    def _output_to_input(self) -> torch.Tensor:
        """(B, 2, 3): where in the flipped image (edges at ±1, y down) a place of the result comes from."""
        shrink = torch.exp2(-LOG2_SCALE_STD * self.scale)
        stretch = torch.exp2(-LOG2_ANISOTROPY_STD * self.anisotropy)
        along_axis = _rotation(-self.axis) @ torch.diag_embed(torch.stack([stretch, 1 / stretch], 1))
        linear = shrink[:, None, None] * _rotation(self.angle) @ along_axis @ _rotation(self.axis)
        return torch.cat([linear, -linear @ (2 * TRANSLATION_STD * self.shift)[:, :, None]], 2)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """(B, 2, 2) matrices that rotate (x, y) from x towards y."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).unflatten(1, (2, 2))


def _per_image(flags: torch.Tensor) -> torch.Tensor:
    return flags[:, None, None, None]
