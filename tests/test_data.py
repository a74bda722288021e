"""The bundled digits, MNIST's files whole and broken, and the preprocessing."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bigkern.cli import main
from bigkern.train.config import CnnConfig
from bigkern.train.data import (
    augmentation,
    load_data,
    load_digits,
    load_mnist,
    normalize,
    pixel_mean_and_std,
    resize,
)
from bigkern.train.errors import UserError


def write_idx(path, array, opener=open):
    with opener(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape))
        file.write(array.astype(np.uint8).tobytes())


def write_mnist(folder, num_train=12, num_test=5, opener=open, suffix=""):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, n in ("train", num_train), ("t10k", num_test):
        arrays[f"{split}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = np.arange(n, dtype=np.uint8) % 10
    for name, array in arrays.items():
        write_idx(folder / (name + suffix), array, opener)
    return arrays


# The digits


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn has the original")
    expected = datasets.load_digits()
    data = load_digits()
    by_class = np.argsort(expected.target, kind="stable")
    is_test = np.isin(np.arange(1797), by_class[::5])
    for part, mask in (data.train, ~is_test), (data.test, is_test):
        images = torch.from_numpy(expected.images[mask]).float().unsqueeze(1) / 16
        assert torch.equal(part.labels, torch.from_numpy(expected.target[mask]).long())
        torch.testing.assert_close(
            part.images, F.interpolate(images, (28, 28), mode="bilinear"), rtol=0, atol=1e-6
        )


def test_digits_split_is_fixed_disjoint_and_stratified():
    data, again = load_digits(), load_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert torch.equal(data.train.images, again.train.images)
    total = torch.bincount(data.train.labels) + torch.bincount(data.test.labels)
    assert total.sum() == 1797
    assert ((torch.bincount(data.test.labels) - total / 5).abs() < 1).all()
    train = {image.numpy().tobytes() for image in data.train.images}
    assert not any(image.numpy().tobytes() in train for image in data.test.images)


def test_digits_are_the_input_that_the_model_takes():
    data = load_digits()
    assert data.train.images.shape == (1437, 1, 28, 28)
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.min() == 0
    assert 0.99 < data.train.images.max() <= 1
    assert torch.equal(normalize(data.train.images, data.mean, data.std), data.train.images)


# MNIST


@pytest.fixture
def mnist(tmp_path):
    pytest.importorskip("torchvision", reason="it reads MNIST")
    write_mnist(tmp_path / "MNIST" / "raw")
    return tmp_path


@pytest.mark.parametrize(
    ("where", "opener", "suffix"),
    [("MNIST/raw", open, ""), (".", open, ""), (".", gzip.open, ".gz")],
    ids=["torchvision", "flat", "gz"],
)
def test_mnist_files_are_found_and_read(tmp_path, where, opener, suffix):
    pytest.importorskip("torchvision", reason="it reads MNIST")
    arrays = write_mnist(tmp_path / where, opener=opener, suffix=suffix)
    before = sorted(tmp_path.rglob("*"))
    data = load_data(CnnConfig(data="mnist", data_dir=str(tmp_path)))
    for part, split in (data.train, "train"), (data.test, "t10k"):
        images = torch.from_numpy(arrays[f"{split}-images-idx3-ubyte"])
        assert torch.equal(part.images, images.unsqueeze(1))
        assert part.labels.tolist() == arrays[f"{split}-labels-idx1-ubyte"].tolist()
    scaled = arrays["train-images-idx3-ubyte"] / 255
    assert data.mean == pytest.approx(scaled.mean(), rel=1e-12)
    assert data.std == pytest.approx(scaled.std(), rel=1e-12)
    assert sorted(tmp_path.rglob("*")) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def as_text(path):
    path.write_text("not found")


BAD_FILES = [
    ("train-images-idx3-ubyte", lambda path: path.unlink(), "is missing: .*--download fetches"),
    ("t10k-labels-idx1-ubyte", lambda path: path.unlink(), "is missing"),
    ("train-images-idx3-ubyte", cut, r"cut short: shape \[12, 28, 28\] takes 9424 bytes.*9423"),
    ("t10k-labels-idx1-ubyte", lengthen, "too long"),
    ("train-labels-idx1-ubyte", as_text, "not an IDX file of 1-dimensional"),
    ("t10k-images-idx3-ubyte", lambda path: path.write_bytes(b""), "not an IDX file of 3-dim"),
    ("train-labels-idx1-ubyte", lambda p: write_idx(p, np.full(12, 10)), "label 0 is 10"),
    ("t10k-labels-idx1-ubyte", lambda p: write_idx(p, np.array([1, 2, 3, 4, 255])), "4 is 255"),
    ("train-labels-idx1-ubyte", lambda p: write_idx(p, np.zeros(7)), "12 images in .* 7 in"),
    ("train-images-idx3-ubyte", lambda p: write_idx(p, np.zeros((12, 8, 8))), "of 28x28"),
    ("train-images-idx3-ubyte", lambda p: write_idx(p, np.zeros((0, 28, 28))), "at least one"),
    ("train-images-idx3-ubyte", lambda p: write_idx(p, np.ones((12, 28, 28))), "all pixels"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD_FILES)
def test_bad_mnist_files_are_named(mnist, name, spoil, message):
    spoil(mnist / "MNIST" / "raw" / name)
    with pytest.raises(UserError, match=f"(?s){name}.*{message}|{message}.*{name}"):
        load_mnist(mnist)


def test_a_damaged_gz_is_named(tmp_path):
    pytest.importorskip("torchvision", reason="it reads MNIST")
    write_mnist(tmp_path, opener=gzip.open, suffix=".gz")
    cut(tmp_path / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz: cannot be unpacked"):
        load_mnist(tmp_path)


def test_download_keeps_what_is_there_and_explains_a_failure(mnist, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="it downloads MNIST")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert len(load_mnist(mnist, download=True).train) == 12
    with pytest.raises(UserError, match=r"cannot download MNIST to .*empty"):
        load_mnist(tmp_path / "empty", download=True)


def test_mnist_without_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match="mnist needs torchvision: pip install torchvision"):
        load_mnist(tmp_path)


def test_evaluate_and_predict_normalize_as_the_training_did(mnist, tmp_path, capsys, monkeypatch):
    """Whatever the training set has become since."""
    image = pytest.importorskip("PIL.Image", reason="it reads pictures")
    run, moved = str(tmp_path / "run"), tmp_path / "moved"
    options = ["--data", "mnist", "--data-dir", str(mnist), "--batch-size", "4", "--device", "cpu"]
    assert main(["train", "cnn", *options, "--epochs", "1", "--augment", "--out", run]) == 0
    (mnist / "MNIST").rename(moved)
    assert main(["evaluate", run]) == 1
    assert f"{mnist}/train-images-idx3-ubyte is missing" in capsys.readouterr().err
    assert main(["evaluate", run, "--data-dir", str(moved / "raw")]) == 0
    assert "5 held-out images" in capsys.readouterr().out

    expected = load_mnist(moved / "raw")
    write_idx(moved / "raw" / "train-images-idx3-ubyte", np.eye(28)[None].repeat(12, axis=0))
    used = []
    monkeypatch.setattr(
        "bigkern.train.predict.report", lambda model, data: used.append((data.mean, data.std))
    )
    assert main(["evaluate", run, "--data-dir", str(moved / "raw")]) == 0
    monkeypatch.setattr(
        "bigkern.train.predict.classify",
        lambda model, images, mean, std: used.append((mean, std)) or torch.full((1, 10), 0.1),
    )
    picture = tmp_path / "digit.png"
    image.fromarray(np.zeros((28, 28), np.uint8)).save(picture)
    assert main(["predict", run, str(picture)]) == 0
    assert used == [(expected.mean, expected.std)] * 2
    assert expected.mean == pytest.approx(0.5, abs=0.05)


# Preprocessing


def test_normalize_scales_bytes_and_keeps_floats():
    images = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    expected = torch.tensor([[[[-0.5, 1.5]]]])
    torch.testing.assert_close(normalize(images, 0.25, 0.5), expected)
    torch.testing.assert_close(normalize(images / 255, 0.25, 0.5), expected)


def test_pixel_mean_and_std_are_exact():
    images = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)
    assert pixel_mean_and_std(images) == (0.5, 0.5)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (1, 1), (100, 37)])
def test_resize_keeps_the_range_and_constant_images(size):
    noise = resize(torch.rand(2, 1, *size))
    assert noise.shape == (2, 1, 28, 28)
    assert noise.min() >= 0
    assert noise.max() <= 1 + 1e-6
    torch.testing.assert_close(
        resize(torch.full((1, 1, *size), 0.3)), torch.full((1, 1, 28, 28), 0.3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_augmentation_follows_the_seed_and_differs_between_images(dtype):
    pytest.importorskip("torchvision", reason="it augments")
    images = torch.zeros(3, 1, 28, 28, dtype=dtype)
    images[..., 10:18, 12:16] = 1 if dtype == torch.float32 else 255
    augment = augmentation()
    torch.manual_seed(1)
    first = augment(images)
    torch.manual_seed(1)
    assert torch.equal(augment(images), first)
    assert not torch.equal(augment(images), first)
    assert first.shape == images.shape
    assert first.dtype == dtype
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar"}, "data must be one of digits, mnist, got 'cifar'"),
        ({"data": "mnist"}, "mnist needs data_dir"),
        ({"data_dir": "x"}, "options of the data set mnist"),
        ({"download": True}, "options of the data set mnist"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("inf")}, "lr must be"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"log_every": 0}, "log_every"),
        ({"save_every": 0}, "save_every"),
        ({"seed": -1}, "seed must be in"),
        ({"optimizer": "lion"}, "optimizer must be one of bigkern, torch, sgd"),
        ({"momentum": 0.9}, "option of the optimizer sgd"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be in"),
        ({"optimizer": "torch", "backend": "native"}, "option of the optimizer bigkern"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CnnConfig(**options)
