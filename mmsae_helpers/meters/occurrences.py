"""Which images retrieve which features (paper A, section 1, METHODS A.1)."""

import numpy as np

from mmsae_helpers.meters.features import Once


class OccurrenceCounter:
    """Counts, per class and feature, the images whose tokens retrieve the feature; whole samples per ``add``.

    ``labels`` [samples]: class of every sample id. ``counts`` [n_classes, d_sae] int64.
    """

    def __init__(self, labels, n_classes: int, d_sae: int):
        self.labels = np.asarray(labels, np.int64)
        self.counts = np.zeros((n_classes, d_sae), np.int64)
        self._seen = Once()

    def add(self, top1, sample) -> None:
        """``top1`` [tokens] from `retrieve_top1` (-1 is no feature), ``sample`` [tokens] sample ids."""
        top1, sample = np.asarray(top1, np.int64), np.asarray(sample, np.int64)
        self._seen(np.unique(sample))
        d = self.counts.shape[1]
        pairs = np.unique((sample * d + top1)[top1 >= 0])  # an image retrieves a feature or does not
        np.add.at(self.counts, (self.labels[pairs // d], pairs % d), 1)

    @property
    def images_per_feature(self) -> np.ndarray:
        """Number of images, of any class, that retrieve each feature [d_sae]."""
        return self.counts.sum(axis=0)


def clean(counts, max_images: int) -> np.ndarray:
    """Paper A's cleaning: bool [d_sae], False for features that more than ``max_images`` images retrieve."""
    counts = np.asarray(counts)
    return (counts.sum(axis=0) if counts.ndim == 2 else counts) <= max_images
