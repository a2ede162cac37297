"""Write broken files of features and statistics. Importing this module adds them to ``KINDS``."""

import numpy as np
import torch
from safetensors.torch import save_file

from .broken_sets import kind, savez


def safetensors(path, **tensors):
    save_file(tensors, path / "set.safetensors")
    return path / "set.safetensors"


@kind(r"pool has dtype torch.float32 and shape \(\)")
def features_without_dimensions(path):
    return safetensors(path, pool=torch.tensor(1.0))


@kind("pool has dtype torch.float32 and shape")
def features_with_three_dimensions(path):
    return safetensors(path, pool=torch.zeros(4, 5, 6))


@kind("pool has dtype torch.complex64")
def features_of_complex_numbers(path):
    return safetensors(path, pool=torch.zeros(4, 64, dtype=torch.complex64))


@kind("pool has dtype torch.bool")
def features_of_booleans(path):
    return safetensors(path, pool=torch.zeros(4, 64, dtype=torch.bool))


@kind("pool has dtype torch.float32 and shape")
def features_without_rows(path):
    return safetensors(path, pool=torch.zeros(0, 64))


@kind("labels has dtype torch.int64 and shape")
def features_with_one_hot_labels(path):
    return safetensors(path, pool=torch.zeros(4, 64), labels=torch.zeros(4, 3, dtype=torch.int64))


@kind("without pool")
def spatial_features_only(path):
    save_file(
        {"mu": torch.zeros(2), "sigma": torch.eye(2), "spatial": torch.zeros(4, 5)},
        path / "set.safetensors",
    )
    return path / "set.safetensors"


@kind("mu has dtype complex64")
def statistics_of_complex_numbers(path):
    mean = torch.zeros(64, dtype=torch.complex64)
    return safetensors(path, mu=mean, sigma=torch.eye(64))


@kind("sigma is not a covariance: it is not symmetric")
def statistics_that_are_not_symmetric(path):
    sigma = np.eye(64)
    sigma[3, 4] = 0.5
    return savez(path, mu=np.zeros(64), sigma=sigma)


@kind("sigma is not a covariance: the variance in row 5 is negative")
def statistics_with_a_negative_variance(path):
    sigma = np.eye(64)
    sigma[5, 5] = -1
    return savez(path, mu=np.zeros(64), sigma=sigma)


@kind("sigma is not a covariance: it has negative eigenvalues")
def statistics_with_negative_eigenvalues(path):
    sigma = np.eye(64)
    sigma[3, 4] = sigma[4, 3] = 2
    return savez(path, mu=np.zeros(64), sigma=sigma)


@kind("sigma has dtype <U3")
def statistics_of_text(path):
    return savez(path, mu=np.zeros(64), sigma=np.full((64, 64), "one"))
