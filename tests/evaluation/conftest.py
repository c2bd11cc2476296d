"""Fixtures: a model, images, the codes of these images, codes of queries, and an index of images."""

import pytest

from hashengine.evaluation import ImageIndex, encode_folder
from tests.helpers.tiny_images import make_images, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), per_class=7)


@pytest.fixture(scope="module")
def codes(images, model):
    return encode_folder(images, model)


@pytest.fixture(scope="module")
def queries(tmp_path_factory, model):
    return encode_folder(make_images(tmp_path_factory.mktemp("queries"), per_class=2, seed=1), model)


@pytest.fixture
def index(codes, tmp_path):
    return ImageIndex.build(codes, tmp_path / "index")
