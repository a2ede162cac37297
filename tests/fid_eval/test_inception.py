"""Evaluate with random Inception weights and compare with torch-fidelity's network."""

import io

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from fid_eval import EvaluationError, evaluate
from fid_eval.networks.inception import FusedConv, Inception, resize_like_tensorflow
from fid_eval.networks.weight_files import load_state
from fid_eval.sets.hashing import file_sha256

COUNT = 7


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Make random weights: (their path, torch-fidelity's network with them)."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    buffer.seek(0)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        layers = ["2048", "logits_unbiased"]
        net = FeatureExtractorInceptionV3("inception-v3-compat", layers, buffer)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path, net


@pytest.fixture(scope="module")
def sets():
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2, COUNT, 6, 6, 3)).astype(np.uint8)
    return coarse.repeat(8, 2).repeat(8, 3)


@pytest.fixture(scope="module")
def features(network, sets):
    """Read pool, spatial and logits of each set from torch-fidelity's network with a hook."""
    _, net = network
    found = []
    for images in sets:
        caught = []
        hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, out: caught.append(out))  # noqa: B023
        with torch.inference_mode():
            pool, logits = net(torch.from_numpy(images).permute(0, 3, 1, 2))
        hook.remove()
        spatial = caught[0][:, :7].permute(0, 2, 3, 1).reshape(COUNT, -1)
        found.append({"pool": pool, "spatial": spatial, "logits": logits})
    return found


@pytest.fixture(scope="module")
def result(network, sets):
    path, _ = network
    return evaluate(
        sets[0], sets[1], weights=path, weights_sha256=file_sha256(path), batch_size=4, quiet=True
    )


LABEL = "inception_"


def value(result, start):
    (found,) = [v for k, v in result.metrics.items() if k.startswith(f"{start}_{LABEL}")]
    return found


@pytest.mark.parametrize(("name", "layer"), [("fd", "pool"), ("sfd", "spatial")])
def test_frechet_distances(result, features, name, layer):
    a, b = (f[layer].double().numpy() for f in features)
    cross = np.linalg.norm((a - a.mean(0)) @ (b - b.mean(0)).T, "nuc") / (COUNT - 1)
    traces = np.var(a, 0, ddof=1).sum() + np.var(b, 0, ddof=1).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * cross
    assert value(result, name) == pytest.approx(expected, rel=1e-5)


def test_class_score(result, features):
    p = features[1]["logits"].double().softmax(1)
    kl = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert value(result, "class_score") == pytest.approx(float(kl.exp()), rel=1e-5)


def test_precision_and_recall(result, features):
    a, b = (f["pool"].double() for f in features)

    def inside(points, centres):
        radii = torch.cdist(centres, centres).fill_diagonal_(torch.inf).kthvalue(3).values
        return float((torch.cdist(points, centres) <= radii).any(1).double().mean())

    assert value(result, "precision") == inside(b, a)
    assert value(result, "recall") == inside(a, b)


def test_results_of_other_weights_never_have_the_published_names(result, network):
    path, _ = network
    label = f"inception_{file_sha256(path)[:8]}"
    assert all(key.endswith(label) for key in result.metrics)
    assert result.extractors["inception"]["sha256"] == file_sha256(path)


def test_unpublished_weights_are_refused_unless_named(network, sets):
    path, _ = network
    with pytest.raises(EvaluationError, match=r"published weights have 6726825d.*--weights_sha256"):
        evaluate(sets[0], sets[1], weights=path)
    with pytest.raises(EvaluationError, match="but --weights_sha256 is 0000"):
        evaluate(sets[0], sets[1], weights=path, weights_sha256="00" * 32)


def test_weights_with_other_objects_than_tensors_are_not_unpickled(tmp_path, sets):
    path = tmp_path / "evil.pth"
    torch.save({"a": print}, path)
    with pytest.raises(EvaluationError, match="not a file that holds only tensors"):
        evaluate(sets[0], sets[1], weights=path, weights_sha256=file_sha256(path), quiet=True)


def test_without_network_or_weights_the_message_says_where_to_put_them(sets, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(EvaluationError, match=r"no route to host.*--weights.*weights-inception"):
        evaluate(sets[0], sets[1], quiet=True)


@pytest.mark.parametrize("size", [(256, 256), (32, 32), (299, 299), (512, 300), (1, 1)])
def test_the_resize_is_bit_identical_to_torch_fidelity(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), (299, 299), align_corners=False
    )
    assert torch.equal(resize_like_tensorflow(images, 299), expected)


def test_folded_convolutions_equal_convolution_and_normalization(network):
    net = Inception(load_state(network[0])).eval()
    layers = [module for module in net.modules() if isinstance(module, FusedConv)]
    assert len(layers) == 94
    generator = torch.Generator().manual_seed(0)
    for layer in layers[::10]:
        for name in (
            "running_mean",
            "running_var",
        ):  # the random weights have mean 0 and variance 1
            getattr(layer.bn, name).uniform_(0.5, 2, generator=generator)
        conv = layer.conv
        x = torch.randn(1, conv.in_channels, 9, 9, generator=generator)
        weight, bias = layer.fold()
        folded = torch.nn.functional.conv2d(
            x.double(), weight.double(), bias.double(), conv.stride, conv.padding
        ).relu()
        separate = layer.double()(x.double())
        assert (folded - separate).norm() <= 1e-7 * separate.norm()
