"""Provide images, labels and sample sets."""

import numpy as np
import pytest
from helpers.image_sources import COUNT, SIDE
from helpers.projection_extractor import draw


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def labels():
    return np.sort(np.random.default_rng(1).integers(0, 3, COUNT))


@pytest.fixture(scope="module")
def sets():
    return draw(90, 0), draw(120, 1)
