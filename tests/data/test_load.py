from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from sparring import data as datasets
from sparring.core.errors import DataError, UsageError
from sparring.data.fashion_mnist import FASHION_MNIST
from sparring.data.mnist import MNIST


def test_the_named_data_sets_are_found_by_folder():
    assert datasets.names() == ["digits", "fashion_mnist", "mnist"]
    assert list(datasets.summaries()) == datasets.names()
    assert all(line and "\n" not in line for line in datasets.summaries().values())


def test_one_new_file_is_one_new_data_set(tmp_path, monkeypatch):
    (tmp_path / "extra.py").write_text(
        "from sparring.data.digits import Digits\nEXTRA = Digits('extra', 'the same digits again')\n"
    )
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "sparring.data.extra", None)
    monkeypatch.delitem(sys.modules, "sparring.data.extra")
    assert datasets.summaries()["extra"] == "the same digits again"
    assert datasets.load("extra").test.name == "extra/test"


def test_digits_are_the_1797_in_order():
    from sklearn.datasets import load_digits

    data = datasets.load("digits", download=False)
    images = torch.from_numpy(load_digits().images).float()
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert torch.equal(data.train.x[:, 0] * 16, images[:1437])
    assert torch.equal(data.test.x[:, 0] * 16, images[1437:])
    assert data.test.y.tolist() == load_digits().target[1437:].tolist()
    assert data.test.ids.tolist() == list(range(360))
    assert (float(data.train.x.min()), float(data.train.x.max())) == (0, 1)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(UsageError, match="unknown data set 'fashon_mnist'; did you mean 'fashion_mnist'"):
        datasets.load("fashon_mnist")
    with pytest.raises(UsageError, match="unknown data set"):
        datasets.load("")
    with pytest.raises(UsageError, match="unknown data set"):
        datasets.available("mnits")


def test_a_path_to_nothing_is_a_data_error(tmp_path):
    for spec in (tmp_path / "none", tmp_path / "none.npz"):
        with pytest.raises(DataError, match=r"none.*: expected an \.npz file or a folder"):
            datasets.load(str(spec))
        assert not datasets.available(str(spec))


def test_available_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARRING_OFFLINE", "1")
    assert datasets.available("digits")
    assert not datasets.available("mnist", tmp_path)
    for file in MNIST.files:
        assert not datasets.available("mnist", tmp_path)
        (tmp_path / file.name).touch()
    assert datasets.available("mnist", tmp_path)
    np.savez(tmp_path / "some.npz")
    assert datasets.available(str(tmp_path / "some.npz"))


def test_published_sets_have_two_mirrors_and_checksums_of_their_own():
    for named in (MNIST, FASHION_MNIST):
        assert len(set(named.mirrors)) >= 2
        assert all(mirror.endswith("/") for mirror in named.mirrors)
        assert len(named.classes) == 10
    assert len({file.sha256 for named in (MNIST, FASHION_MNIST) for file in named.files}) == 8


def test_importing_costs_no_heavy_package():
    code = "import sys, sparring.data as d; d.names(); print({'sklearn', 'pooch', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
