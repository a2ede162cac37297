"""The embedded digits are the ones that version 0.1.0 read from scikit-learn."""

import hashlib

import numpy as np

from moh_dit.data.digits import load_digit_images, load_digit_scans


def test_images_and_labels_keep_their_bytes():
    images, labels = load_digit_images()
    assert (images.shape, images.dtype) == ((1797, 32, 32, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.int64)
    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "f4373c2691e98e9058dd74fac064b73170f58e0e4cd53e35b340e6b22ebbf1e6"
    )
    assert hashlib.sha256(labels.tobytes()).hexdigest() == (
        "a3c91c262eddcf7ba8f0e37507c30284493c9b20412ffe4af30d536401f7ba21"
    )


def test_scans_have_their_original_size():
    scans, labels = load_digit_scans()
    assert (scans.shape, scans.dtype, scans.max()) == ((1797, 8, 8), np.uint8, 16)
    np.testing.assert_array_equal(
        np.bincount(labels), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )
