"""The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparring.data.images import Dataset, Images, Raw
from sparring.data.named import Named, Request

TRAIN_ROWS = 1437


class Digits(Named):
    """The first 1,437 digits to train on, the last 360 to test on; needs no file."""

    def available(self, data_dir: Path | None) -> bool:
        return True

    def load(self, request: Request) -> Dataset:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        raw = Raw("scikit-learn's digits", (bunch.images / 16).astype(np.float32), bunch.target)
        whole = Images.checked(self.name, raw)
        return Dataset.split(whole, torch.arange(len(whole)) >= TRAIN_ROWS)


DIGITS = Digits("digits", "1,797 digits, 8 x 8 grey, 10 classes; comes with scikit-learn, works offline")
