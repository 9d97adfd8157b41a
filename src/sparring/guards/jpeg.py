"""JPEG compression: what the eye does not see is left out, and with it some perturbations."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparring.core.errors import UsageError
from sparring.guards.guard import Transform


@dataclass(frozen=True)
class JPEG(Transform):
    """Written as an 8-bit JPEG of this `quality` (1 to 95) and read again: Das et al. 2017, Guo et al. 2018."""

    quality: int = 75

    name: ClassVar[str] = "jpeg"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Das et al. 2017, arXiv:1705.02900; Guo et al. 2018, arXiv:1711.00117"
    differentiable: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what the codec does not know."""
        if not 1 <= self.quality <= 95:
            raise UsageError(f"expected a quality of 1 to 95, got {self.quality}")

    def transform(self, x: Tensor) -> Tensor:
        """(n, c, h, w) the decoded images, of 1 or 3 channels."""
        if x.shape[1] not in (1, 3):
            raise UsageError(f"expected images of 1 or 3 channels for JPEG, got {x.shape[1]}")
        pixels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        again = np.stack([self._again(image) for image in pixels])
        return torch.from_numpy(again).to(x).permute(0, 3, 1, 2) / 255

    def _again(self, image: np.ndarray) -> np.ndarray:  # of bytes, (h, w, c)
        file = BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file)).reshape(image.shape)
