"""References of other programs: their layouts, their extractors, and files that hold code."""

import pickle
import pickletools

import numpy as np
import pytest
import torch
from helpers.projection_extractor import Projection, draw, features_of, options

from fid_eval import EvaluationError, evaluate
from fid_eval.array_pickles import load_array_pickle, load_torch_arrays
from fid_eval.foreign_references import open_foreign
from fid_eval.metrics.adm import frechet_distance_of_features
from fid_eval.networks import extractors


@pytest.fixture(scope="module")
def rows():
    return features_of(draw(90, 0)[0]).numpy()


@pytest.fixture
def networks(monkeypatch):
    """Replace published networks by random projections."""

    def fake(name, weights, sha256):
        extractor = extractors.wrap_extractor(Projection(), name)
        extractor.name, extractor.label = name, None if name == "inception" else name
        return extractor

    for name in ("inception", "dinov2"):
        monkeypatch.setitem(extractors.EXTRACTORS, name, fake)


def statistics(rows):
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def dump(path, content, protocol=None):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def run(path, **more):
    return evaluate(path, draw(120, 1)[0], device="cpu", quiet=True, **more)


def expected(rows):
    return frechet_distance_of_features(rows, features_of(draw(120, 1)[0]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_edm2_pickles_hold_statistics_of_two_extractors(networks, rows, tmp_path, protocol):
    content = {"num_images": 90, "fid": statistics(rows), "fd_dinov2": statistics(rows + 1)}
    path = dump(tmp_path / "img512.pkl", content, protocol)
    result = run(path, metrics=["fid", "fd_dinov2"])
    assert result["fid"] == pytest.approx(expected(rows), rel=1e-6)
    assert result["fd_dinov2"] == pytest.approx(expected(rows + 1), rel=1e-6)
    assert result.reference["statistics_count"] == 90
    assert any("antialiased bicubic filter for dinov2" in text for text in result.warnings)
    assert not any("bicubic" in text for text in run(path, metrics=["fid"]).warnings)


def stylegan(rows, **more):
    x = rows.astype(np.float64)
    return {
        "capture_all": False, "capture_mean_cov": True, "max_items": None, "num_items": len(x),
        "num_features": x.shape[1], "all_features": None, "raw_mean": x.sum(0),
        "raw_cov": x.T @ x, **more,
    }  # fmt: skip


def test_stylegan_sums_give_the_unbiased_covariance(networks, rows, tmp_path):
    path = dump(tmp_path / "ffhq-inception-2015-12-05-1234.pkl", stylegan(rows))
    assert run(path, metrics=["fid"])["fid"] == pytest.approx(expected(rows), rel=1e-6)
    unnamed = dump(tmp_path / "ffhq.pkl", stylegan(rows))
    with pytest.raises(EvaluationError, match="add --reference_extractor NAME"):
        run(unnamed, metrics=["fid"])
    named = run(unnamed, metrics=["fid"], reference_extractor="inception")
    assert named["fid"] == pytest.approx(expected(rows), rel=1e-6)
    with pytest.raises(EvaluationError, match="holds features of dinov2"):
        run(unnamed, metrics=["fid"], reference_extractor="dinov2")


def test_stylegan_features_allow_every_metric(networks, rows, tmp_path):
    parts = [rows[:50], rows[50:]]
    content = stylegan(rows, all_features=parts, raw_mean=None, raw_cov=None)
    path = dump(tmp_path / "x-inception-2015-12-05.pkl", content)
    metrics = ["fid", "kid", "precision"]
    result = run(path, metrics=metrics, distances="fp32")
    alike = evaluate(draw(90, 0)[0], draw(120, 1)[0], metrics=metrics, **options())
    assert list(result.metrics.values()) == pytest.approx(list(alike.metrics.values()), rel=1e-5)


def test_clean_fid_names_its_mode_in_the_file_name(networks, rows, tmp_path):
    for mode, warned in (("clean", True), ("legacy_tensorflow", False)):
        path = tmp_path / f"mine_{mode}_custom_na.npz"
        np.savez_compressed(path, **statistics(rows))
        result = run(path, metrics=["fid"])
        assert result["fid"] == pytest.approx(expected(rows), rel=1e-6)
        assert any("Pillow's bicubic" in text for text in result.warnings) == warned
    np.savez_compressed(tmp_path / "mine_clean_custom_na_kid.npz", feats=rows)
    assert "kid" in run(tmp_path / "mine_clean_custom_na_kid.npz", metrics=["kid"]).metrics
    np.savez_compressed(tmp_path / "renamed.npz", feats=rows)
    with pytest.raises(EvaluationError, match="file of clean-fid does not name the extractor"):
        run(tmp_path / "renamed.npz", metrics=["kid"])


def test_statistics_without_origin_say_which_resizing_is_assumed(networks, rows, tmp_path):
    np.savez(tmp_path / "pytorch_fid.npz", **statistics(rows))
    result = run(tmp_path / "pytorch_fid.npz", metrics=["fid"])
    assert any("does not tell how its images were resized" in text for text in result.warnings)


def test_the_cache_of_torch_fidelity_holds_features_and_statistics(networks, rows, tmp_path):
    torch.save(statistics(rows), tmp_path / "data-inception-v3-compat-stat-fid-2048.pt")
    torch.save(torch.from_numpy(rows), tmp_path / "my-data-inception-v3-compat-features-2048.pt")
    for name in ("data-inception-v3-compat-stat-fid-2048.pt",
                 "my-data-inception-v3-compat-features-2048.pt"):  # fmt: skip
        result = run(tmp_path / name, metrics=["fid"])
        assert result["fid"] == pytest.approx(expected(rows), rel=1e-5)
    other = tmp_path / "data-inception-v3-compat-features-768.pt"
    torch.save(torch.zeros(9, 768), other)
    with pytest.raises(EvaluationError, match="does not name the extractor"):
        run(other, metrics=["fid"])


class Code:
    """Unpickling this object would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    content = {"fid": {"mu": np.zeros(2), "sigma": Code(trace)}}
    with pytest.raises(EvaluationError, match=r"evil.pkl: refers to (io|_io).open; only NumPy"):
        open_foreign(dump(tmp_path / "evil.pkl", content), "evil")
    torch.save({"mu": np.zeros(2), "sigma": Code(trace)}, tmp_path / "evil.pt")
    with pytest.raises(EvaluationError, match="not a file of tensors and NumPy arrays"):
        open_foreign(tmp_path / "evil.pt", "evil")
    assert not trace.exists()


@pytest.mark.parametrize(
    "globals_", ["os\nsystem", "builtins\neval", "numpy\nload", "numpy.core.multiarray\nfromfile"]
)
def test_only_what_arrays_need_can_be_named(tmp_path, globals_):
    text = f"c{globals_}\n(S'x'\ntR.".encode()
    assert [code.name for code, *_ in pickletools.genops(text)][-2:] == ["REDUCE", "STOP"]
    (tmp_path / "x.pkl").write_bytes(text)
    with pytest.raises(EvaluationError, match="only NumPy arrays are loaded"):
        load_array_pickle(tmp_path / "x.pkl")


def test_damaged_files_and_other_contents_are_refused(tmp_path):
    whole = pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.eye(3)}}, 2)
    for content, message in (
        (b"", "damaged"),
        (whole[:-20], "damaged"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"a": 1}), "it needs statistics of EDM2"),
        (pickle.dumps({"fid": {"mu": np.zeros(3)}}), "no mu and sigma"),
        (pickle.dumps({"fid": {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}}), "has shape"),
        (pickle.dumps({"fid": {"mu": np.zeros(1), "sigma": np.array([[object]])}}), "refers to"),
        (pickle.dumps({"num_items": 5}), "neither sums"),
        (pickle.dumps({"num_items": "x"}), "cannot be read"),
        (pickle.dumps({"num_items": 5, "all_features": 3}), "cannot be read"),
    ):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(EvaluationError, match=message):
            open_foreign(tmp_path / "x.pkl", "x")
    (tmp_path / "x.pt").write_bytes(whole)
    with pytest.raises(EvaluationError, match="not a file of tensors"):
        load_torch_arrays(tmp_path / "x.pt")
