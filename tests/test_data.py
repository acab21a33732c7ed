"""`ddpn_fx.data`: scaling, splits, batches, and errors that say what is wanted."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpn_fx.data import FOLDER_VARIABLE, IMAGES, Dataset, load


def write(folder, name, *, shape=(5, 6), train=12, test=4, **changes):
    """A small file of the real layout."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": rng.integers(0, 10, train, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": rng.integers(0, 10, test, dtype=np.uint8),
    } | changes
    np.savez(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return arrays


@pytest.mark.parametrize(("name", "samples", "shape"), [("digits", 1797, (1, 8, 8)), ("wine", 178, (13,))])
def test_tables_of_scikit_learn(name, samples, shape):
    data = load(name)
    assert len(data.x_train) + len(data.x_test) == samples
    assert data.x_train.shape[1:] == data.x_test.shape[1:] == shape
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == data.y_test.dtype == torch.int64
    assert data.classes == len(data.y_test.unique())
    rest = [dim for dim in range(data.x_train.ndim) if dim != 1]
    torch.testing.assert_close(data.x_train.mean(rest), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.x_train.std(rest, correction=0), torch.ones(shape[0]), atol=1e-5, rtol=0)


def test_the_split_is_fixed():
    assert torch.equal(load("digits").x_test, load("digits").x_test)


def test_flat_is_the_same_numbers():
    assert torch.equal(load("digits", flat=True).x_train, load("digits").x_train.flatten(1))


@pytest.mark.parametrize(("shape", "channels_first"), [((5, 6), (1, 5, 6)), ((5, 6, 3), (3, 5, 6))])
def test_image_files(tmp_path, shape, channels_first):
    arrays = write(tmp_path, "cifar10", shape=shape)
    data = load("cifar10", tmp_path)
    assert data.x_train.shape == (12, *channels_first)
    assert data.x_test.shape == (4, *channels_first)
    assert data.x_train.is_contiguous()
    raw = arrays["x_test"].reshape(4, 5, 6, -1).transpose(0, 3, 1, 2).astype("float32")
    train = arrays["x_train"].reshape(12, 5, 6, -1).astype("float32")
    mean, deviation = train.mean((0, 1, 2)), train.std((0, 1, 2))
    expected = (raw - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(data.x_test, torch.as_tensor(expected), atol=1e-4, rtol=1e-4)
    assert data.y_test.tolist() == arrays["y_test"].tolist()


def test_a_constant_channel_is_zero(tmp_path):
    write(tmp_path, "mnist", x_train=np.full((12, 5, 6), 7, np.uint8), x_test=np.full((4, 5, 6), 7, np.uint8))
    assert torch.equal(load("mnist", tmp_path).x_test, torch.zeros(4, 1, 5, 6))


def test_a_part_of_a_set_carries_its_size_in_its_name(tmp_path):
    write(tmp_path, "svhn", shape=(1, 1, 3), train=9082, test=2001)
    assert load("svhn", tmp_path).name == "SVHN-11k"
    write(tmp_path, "mnist", shape=(1, 1), train=60_000, test=10_000)
    assert load("mnist", tmp_path).name == "MNIST"


def test_the_folder_comes_from_the_argument_before_the_variable(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", "mnist", train=12)
    write(tmp_path / "b", "mnist", train=9)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "a"))
    assert len(load("mnist").x_train) == 12
    assert len(load("mnist", tmp_path / "b").x_train) == 9


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("given_folder", [True, False])
def test_a_missing_file_is_named_with_the_way_out(tmp_path, monkeypatch, name, given_folder):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError) as error:
        load(name, tmp_path if given_folder else None)
    for part in (f"{name}.npz", "DDPN_FX_DATA", "x_train", IMAGES[name].site):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"y_test": None}, "no array 'y_test'"),
        ({"y_train": np.zeros(11, np.uint8)}, "with 11 labels"),
        ({"x_test": np.zeros((4, 30), np.uint8)}, r"x_test of shape \(4, 30\)"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, changes, named):
    write(tmp_path, "mnist", **changes)
    with pytest.raises(ValueError, match=named):
        load("mnist", tmp_path)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'imagenet'.*digits, wine, mnist, fashion_mnist, cifar10, svhn"):
        load("imagenet")


def test_missing_scikit_learn_says_how_to_install_it(monkeypatch):
    def without(name, *rest):
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError, match=r'scikit-learn is not installed: pip install "ddpn-fx\[demo\]"'):
        load("digits")


def rows(samples):
    """A data set whose samples are their own numbers."""
    x, y = torch.arange(samples).float()[:, None], torch.arange(samples) % 3
    return Dataset("rows", x, y, x, y)


@given(samples=st.integers(1, 30), batch=st.integers(1, 30), steps=st.integers(0, 12), seed=st.integers(0, 99))
def test_batches(samples, batch, steps, seed):
    data = rows(samples)
    if batch > samples:
        with pytest.raises(ValueError, match=f"batch_size={batch}"):
            next(data.batches(batch, steps))
        return
    batches = list(data.batches(batch, steps, seed=seed))
    assert [x.shape for x, _ in batches] == [(batch, 1)] * steps
    assert all(torch.equal(y, x[:, 0].long() % 3) for x, y in batches)
    again = [x for x, _ in data.batches(batch, steps, seed=seed)]
    assert all(torch.equal(x, x_again) for (x, _), x_again in zip(batches, again, strict=True))
    per_epoch = samples // batch
    for start in range(0, steps, per_epoch):
        seen = torch.cat([x for x, _ in batches[start : start + per_epoch]])
        assert len(seen.unique()) == len(seen)


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    list(rows(9).batches(3, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_repr_is_short():
    assert repr(rows(1500)) == "Dataset('rows', 1,500 train + 1,500 test samples of 1)"
