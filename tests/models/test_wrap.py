"""What is wrapped by which adapter, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import sparring
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access
from sparring.models.sklearn import SklearnModel
from sparring.models.spec import open_model
from sparring.models.torch import TorchModel

Rows = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def logistic(digits: Rows) -> LogisticRegression:
    return LogisticRegression(max_iter=500).fit(digits[0][:500].flatten(1).numpy(), digits[1][:500].numpy())


def test_modules_functions_and_estimators_find_their_adapters(net, logistic, digits):
    assert isinstance(sparring.wrap(net), TorchModel)
    assert isinstance(sparring.wrap(lambda x: net(x)), TorchModel)
    assert isinstance(sparring.wrap(logistic), SklearnModel)
    model = sparring.wrap(net, bounds=(-1.0, 1.0))
    assert model.bounds == (-1.0, 1.0)
    assert sparring.wrap(model) is model
    with pytest.raises(ModelError, match="no options for TorchModel"):
        sparring.wrap(model, bounds=(0.0, 1.0))


@pytest.mark.parametrize("thing", [3, "somewhere", [nn.ReLU()], None])
def test_what_no_adapter_takes_is_an_error_that_names_it(thing):
    with pytest.raises(ModelError, match=thing if isinstance(thing, str) else type(thing).__name__):
        sparring.wrap(thing)


def test_an_onnx_file_is_opened_from_the_command_line(net, digits, tmp_path):
    pytest.importorskip("onnx")
    import warnings

    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (digits[0][:1],), path, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    named = open_model(str(path))
    assert named.model.access == Access.GRADIENT
    wanted = TorchModel(net).query(digits[0][:50], Access.SCORE).logits
    torch.testing.assert_close(named.model.query(digits[0][:50], Access.SCORE).logits, wanted, rtol=0, atol=1e-5)
    other = path.with_name("other.onnx")
    other.write_bytes(path.read_bytes())
    assert open_model(str(other)).digest == named.digest
    other.write_bytes(path.read_bytes().replace(b"pytorch", b"PyTorch"))
    assert open_model(str(other)).digest != named.digest


def test_an_endpoint_is_described_by_a_mapping_or_its_file(tmp_path):
    pytest.importorskip("httpx")
    from sparring.models.http import JsonModel, ServedModel

    mapping = {"url": "http://localhost:1/predict", "output": "scores"}
    path = tmp_path / "served.json"
    path.write_text(json.dumps(mapping))
    for source in (mapping, path, str(path)):
        with sparring.wrap(source) as model:
            assert isinstance(model, JsonModel)
            assert model.endpoint.output == "scores"
    with open_model("http://localhost:1/v2/models/m", max_queries=5).model as model:
        assert isinstance(model, ServedModel)
    named = open_model("http://localhost:1/v2/models/m:predict?key=secret")
    with named.model as model:
        assert isinstance(model, ServedModel)
    assert named.name == "http://localhost:1/v2/models/m:predict"
    assert "secret" not in named.digest


def test_a_function_may_return_a_model_of_any_kind(tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(
        "import torch\n"
        "from sklearn.dummy import DummyClassifier\n"
        "def estimator():\n"
        "    return DummyClassifier(strategy='prior').fit([[0.0] * 4] * 3, [0, 1, 1])\n"
        "def words():\n"
        "    return 'net'\n"
    )
    source = Path(tmp_path / "models_of_mine.py")
    model = open_model(f"{source}:estimator").model
    assert isinstance(model, SklearnModel)
    assert model.query(torch.zeros(2, 1, 2, 2), Access.SCORE).labels.tolist() == [1, 1]
    with pytest.raises(ModelError, match="expected a model, got str"):
        open_model(f"{source}:words")
    with pytest.raises(UsageError, match="no such file"):
        open_model(str(tmp_path / "none.onnx"))


def test_an_estimator_is_audited_without_gradients(logistic, digits):
    rows = (digits[0][500:530], digits[1][500:530])
    found = sparring.audit(logistic, rows, sparring.Linf(0.2), profile="quick")
    assert found.counts["broken"] > 10
    assert found.figures["backward_passes"] == 0
    labels = logistic.predict(torch.stack(list(found.witnesses().values())).flatten(1).numpy())
    assert (labels != rows[1][list(found.witnesses())].numpy()).all()
