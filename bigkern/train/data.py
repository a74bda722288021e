"""The data sets, and the way from their images to the model's input."""

import gzip
import math
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.train.config import IMAGE_SIZE, NUM_CLASSES, CnnConfig
from bigkern.train.errors import UserError, require

IDX_DIMENSIONS = {
    "train-images-idx3-ubyte": 3,
    "train-labels-idx1-ubyte": 1,
    "t10k-images-idx3-ubyte": 3,
    "t10k-labels-idx1-ubyte": 1,
}


@dataclass
class LabeledImages:
    images: Tensor  # [N, 1, 28, 28] uint8 in [0, 255] or float32 in [0, 1]
    labels: Tensor  # [N] int64 in [0, 10)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ImageData:
    train: LabeledImages
    test: LabeledImages
    mean: float  # of the training pixels, scaled to [0, 1]: what `normalize` takes off
    std: float


def load_data(config: CnnConfig) -> ImageData:
    """Load the data set that `config` names. Raises UserError where files are missing or bad."""
    if config.data == "digits":
        return load_digits()
    return load_mnist(Path(config.data_dir), config.download)


def load_digits() -> ImageData:
    """Load the bundled handwritten digits: 1,437 to train on, 360 to test on, in [0, 1].

    They are the 1,797 8x8 images of "Optical Recognition of Handwritten Digits" by E. Alpaydin and
    C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0),
    as scikit-learn's `load_digits` ships them, resized to 28x28. Every fifth image of those sorted
    by class is a test image, so each class is split alike. They need no normalization.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        images = torch.from_numpy(archive["images"])  # [1797, 8, 8] uint8 in [0, 16]
        labels = torch.from_numpy(archive["labels"]).long()  # [1797]
    images = resize(images.unsqueeze(1) / 16)  # [1797, 1, 28, 28] float32
    by_class = labels.argsort(stable=True)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[by_class[::5]] = True
    return ImageData(
        train=LabeledImages(images[~is_test], labels[~is_test]),
        test=LabeledImages(images[is_test], labels[is_test]),
        mean=0.0,
        std=1.0,
    )


def load_mnist(data_dir: Path, download: bool = False) -> ImageData:
    """Load MNIST, or any set in its format, with torchvision.

    The four IDX files, plain or as .gz, lie in data_dir/MNIST/raw (where `download` puts them) or
    in data_dir itself. Raises UserError for a file that is missing, cut short or out of range.
    """
    mnist = require("torchvision.datasets", "the data set mnist").MNIST
    raw = data_dir / "MNIST" / "raw"
    if download and not all((raw / name).is_file() for name in IDX_DIMENSIONS):
        try:
            mnist(data_dir, download=True)
        except (RuntimeError, URLError, OSError) as error:
            raise UserError(f"cannot download MNIST to {data_dir}: {error}") from error
    with tempfile.TemporaryDirectory() as staging:
        root = Path(staging)
        sources = stage_idx_files(data_dir, root / "MNIST" / "raw")
        train, test = (mnist(root, train=is_train) for is_train in (True, False))
    mean, std = pixel_mean_and_std(train.data)
    if std == 0:
        raise UserError(f"{sources[0]}: all pixels are equal")
    return ImageData(
        train=_labeled(train.data, train.targets, *sources[:2]),
        test=_labeled(test.data, test.targets, *sources[2:]),
        mean=mean,
        std=std,
    )


def stage_idx_files(data_dir: Path, raw: Path) -> list[Path]:
    """Link or unpack the four IDX files into `raw`, check them, and return where they came from."""
    folder = data_dir / "MNIST" / "raw"
    if not folder.is_dir():
        folder = data_dir
    raw.mkdir(parents=True)
    sources = []
    for name, dimensions in IDX_DIMENSIONS.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.is_file():
            (raw / name).symlink_to(plain.resolve())
        elif packed.is_file():
            try:
                with gzip.open(packed) as source, open(raw / name, "wb") as target:
                    shutil.copyfileobj(source, target)
            except (OSError, EOFError) as error:
                raise UserError(f"{packed}: cannot be unpacked ({error})") from error
        else:
            raise UserError(
                f"{plain} is missing: data_dir must hold the four files "
                f"{', '.join(IDX_DIMENSIONS)} (plain or .gz), or MNIST/raw with them; "
                "where there is a network, --download fetches them"
            )
        sources.append(plain if plain.is_file() else packed)
        check_idx_file(raw / name, dimensions, sources[-1])
    return sources


def check_idx_file(path: Path, dimensions: int, source: Path) -> None:
    """Raise a UserError naming `source` unless `path` is a whole IDX file of bytes.

    The format: two zero bytes, the type (8 for uint8), the number of dimensions, each dimension as
    a big-endian 32-bit number, and then the data.
    """
    header_size = 4 + 4 * dimensions
    with open(path, "rb") as file:
        header = file.read(header_size)
    if len(header) < header_size or header[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{source}: not an IDX file of {dimensions}-dimensional uint8 data")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    expected, size = header_size + math.prod(shape), path.stat().st_size
    if size != expected:
        raise UserError(
            f"{source}: {'cut short' if size < expected else 'too long'}: "
            f"shape {list(shape)} takes {expected} bytes, the file has {size}"
        )
    if shape[0] == 0 or shape[1:] not in ((), (IMAGE_SIZE, IMAGE_SIZE)):
        raise UserError(f"{source}: needs images of 28x28 and at least one, got {list(shape)}")


def _labeled(images: Tensor, labels: Tensor, images_path: Path, labels_path: Path) -> LabeledImages:
    if len(images) != len(labels):
        raise UserError(f"{len(images)} images in {images_path}, {len(labels)} in {labels_path}")
    if labels.max() >= NUM_CLASSES:
        index = int((labels >= NUM_CLASSES).nonzero()[0])
        raise UserError(
            f"{labels_path}: labels must be in 0..9, label {index} is {int(labels[index])}"
        )
    return LabeledImages(images.unsqueeze(1), labels)


def pixel_mean_and_std(images: Tensor) -> tuple[float, float]:
    """Return both for uint8 images scaled to [0, 1], from exact counts of the 256 values."""
    counts = torch.bincount(images.flatten(), minlength=256).double()  # [256]
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ values) / counts.sum()
    variance = counts @ (values - mean) ** 2 / counts.sum()
    return mean.item(), variance.sqrt().item()


def resize(images: Tensor) -> Tensor:
    """Resize float images [N, 1, H, W] to [N, 1, 28, 28], bilinear, keeping their range."""
    return F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """Return images, uint8 or float32 in [0, 1], as the float32 (images - mean) / std."""
    if images.dtype == torch.uint8:
        images = images / 255
    return (images - mean) / std


def augmentation() -> Callable[[Tensor], Tensor]:
    """Return a function that shifts (up to 10 %) and rotates (up to 10 degrees) images at random.

    It maps [N, 1, 28, 28], uint8 or float32, to the same, draws one shift and one angle per image
    from torch's global generator, and fills with black.
    """
    transforms = require("torchvision.transforms", "augment")
    affine = transforms.RandomAffine(
        degrees=10, translate=(0.1, 0.1), interpolation=transforms.InterpolationMode.BILINEAR
    )
    return lambda images: torch.stack([affine(image) for image in images])
