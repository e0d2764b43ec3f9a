"""Photos from a tar and from a prepared data set: which ones, their labels, and the crop."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.data import datasets as data
from experiments.imagenet import photos as imagenet_data
from tests.experiments.small_imagenet import write_tar


def test_photos_are_spread_over_the_tar_in_the_order_of_names(tmp_path):
    path = tmp_path / "some.tar"
    write_tar(path, [0, 7, 999, 3, 4])
    assert whole(imagenet_data.read_tar(path, None, 8))[1].tolist() == [0, 7, 999, 3, 4]
    pixels, labels = whole(imagenet_data.read_tar(path, 2, 8))
    assert labels.tolist() == [0, 999]
    assert pixels.shape == (2, 8, 8, 3) and pixels.dtype == np.uint8
    assert labels.dtype == np.int32


def whole(photos):
    return photos.read(range(len(photos)))


def test_photos_are_decoded_when_they_are_asked_for_and_then_kept(tmp_path, monkeypatch):
    path = tmp_path / "some.tar"
    write_tar(path, [0, 7, 999, 3, 4])
    decoded, crop = [], imagenet_data.crop

    def counted(image, size):
        decoded.append(1)
        return crop(image, size)

    monkeypatch.setattr(imagenet_data, "crop", counted)
    photos = imagenet_data.read_tar(path, None, 8)
    some = photos.part([3, 1, 4])
    assert len(some) == 3 and not decoded
    first = some.read([2, 0])
    assert first[1].tolist() == [4, 3] and len(decoded) == 2
    again = photos.read([4, 3])
    np.testing.assert_array_equal(first[0], again[0])
    assert len(decoded) == 2


def test_the_square_is_cut_out_of_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 3), np.uint8)
    np.testing.assert_array_equal(imagenet_data.crop(Image.fromarray(pixels), 4), pixels[3:7, 4:8])


def test_grey_and_small_photos_become_rgb_squares():
    small = Image.fromarray(np.full((3, 5), 100, np.uint8))
    got = imagenet_data.crop(small, 6)
    assert got.shape == (6, 6, 3) and (got == 100).all()


@pytest.mark.parametrize(
    ("labels", "number", "message"),
    [
        ([1, 2], 3, "3 photos are wanted, and .* has 2"),
        ([1, 1000], None, "0001_1000.jpg, expected"),
        (["x"], None, "0000_x.jpg, expected"),
    ],
)
def test_a_tar_of_other_photos_is_refused(tmp_path, labels, number, message):
    write_tar(tmp_path / "some.tar", labels)
    with pytest.raises(ValueError, match=message):
        imagenet_data.read_tar(tmp_path / "some.tar", number, 8)


@pytest.mark.parametrize("content", ["no tar", "no photo"])
def test_a_broken_tar_is_named(tmp_path, content):
    path = tmp_path / "some.tar"
    path.write_bytes(b"nonsense")
    if content == "no photo":
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("0000_1.jpg")
            info.size = 8
            tar.addfile(info, io.BytesIO(b"nonsense"))
    told = {"no tar": "can't be read as a tar of photos", "no photo": "has 0000_1.jpg, which is no"}
    with pytest.raises(ValueError, match=f"some.tar {told[content]}"):
        whole(imagenet_data.read_tar(path, None, 8))


def test_a_missing_tar_or_data_set_is_named_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHLEG_SHARED", str(tmp_path))
    for data_dir, what in ((None, "calibration.tar"), (tmp_path, "imagenet2012")):
        with pytest.raises(ValueError, match=what) as caught:
            imagenet_data.load(data_dir, calibration=1, validation=1, size=8)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def fake_imagenet(tmp_path_factory):
    """`imagenet2012` as TFDS prepares it, of a few photos in three shapes."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    photos = {}

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("5.1.0")
        pkg_dir_path = folder

        def _info(self):
            features = {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=1000),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="fake",
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "validation")}

        def _generate_examples(self, split):
            rng = np.random.default_rng(len(split))
            for i in range(6):
                pixels = rng.integers(0, 256, [(300, 400, 3), (500, 260, 3)][i % 2], np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG")
                photos[split, i] = Image.open(stream)
                stream = io.BytesIO(stream.getvalue())
                yield i, {"file_name": f"{i}.jpg", "image": stream, "label": 100 * i + 5}

    Prepared.name = "imagenet2012"
    Prepared(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder, photos


def test_a_prepared_data_set_is_read(fake_imagenet):
    folder, photos = fake_imagenet
    source = imagenet_data.load(folder, calibration=3, validation=None, size=224)
    assert whole(source.calibration)[1].tolist() == [5, 205, 405]
    pixels, labels = whole(source.validation)
    assert labels.tolist() == [5, 105, 205, 305, 405, 505]
    assert pixels.shape == (6, 224, 224, 3)
    # the second photo: 500 x 260, so that the shorter side becomes 256
    scaled = photos["validation", 1].resize((256, 492))
    expected = np.asarray(scaled.crop((16, 134, 240, 358)), int)
    assert np.abs(pixels[1] - expected).mean() < 2


def test_a_half_prepared_imagenet_is_missing(fake_imagenet, tmp_path):
    folder, _ = fake_imagenet
    assert data.prepared("imagenet2012", folder, splits=("train", "validation")).name == "5.1.0"
    with pytest.raises(ValueError, match="no imagenet2012 prepared"):
        data.prepared("imagenet2012", folder, splits=("train", "test"))
