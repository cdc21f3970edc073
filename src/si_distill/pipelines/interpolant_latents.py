"""What lies between a VAE's own pixels and latents and those of a network: the one definition, in both directions.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentScaling:
    """
    A network's latents x of a VAE's latents z, and its pixels in [-1, 1] of the VAE's:

        x = (z − shift_factor − latents_mean) / latents_std · scaling_factor

    Args:
        scaling_factor, shift_factor, latents_mean, latents_std (`float` or `tuple` of C `float`): for all channels, or one
            for each.
        pixel_min (`float`): the darkest of the VAE's pixels, −1 or 0; the brightest is 1.
    """

    scaling_factor: float | tuple[float, ...] = 1.0
    shift_factor: float | tuple[float, ...] = 0.0
    latents_mean: float | tuple[float, ...] = 0.0
    latents_std: float | tuple[float, ...] = 1.0
    pixel_min: float = -1.0

    @classmethod
    def of(cls, vae: torch.nn.Module, pixel_min: float = -1.0) -> "LatentScaling":
        """What the config of a VAE says; what it leaves out changes nothing."""
        values = {}
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            value = vae.config.get(name)
            if value is not None:
                values[name] = float(value) if isinstance(value, (int, float)) else tuple(map(float, value))
        return cls(**values, pixel_min=float(pixel_min))

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """The network's latents of the VAE's, (…, C, h, w)."""
        latents = latents - self._of("shift_factor", latents) - self._of("latents_mean", latents)
        return latents / self._of("latents_std", latents) * self._of("scaling_factor", latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents of the network's, (…, C, h, w)."""
        latents = latents / self._of("scaling_factor", latents) * self._of("latents_std", latents)
        return latents + self._of("latents_mean", latents) + self._of("shift_factor", latents)

    def encode_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """The VAE's pixels of those in [-1, 1]."""
        darkest = self.pixel_min
        return images if darkest == -1 else (images + 1) * ((1 - darkest) / 2) + darkest

    def decode_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] of the VAE's."""
        darkest = self.pixel_min
        return images if darkest == -1 else (images - darkest) * (2 / (1 - darkest)) - 1

    def _of(self, name: str, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_tensor(getattr(self, name)).view(-1, 1, 1)
