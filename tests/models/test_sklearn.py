"""The adapter for scikit-learn: any classifier, its labels as places, and plain words for what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.linear_model import LogisticRegression, Perceptron, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from sparring.attacks.square import Square
from sparring.auditing.audit import audit
from sparring.core.errors import AttackError, ModelError, UsageError
from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.models.sklearn import SklearnModel

FRUIT = np.array(["fig", "apple", "plum"])


@pytest.fixture(scope="module")
def rows(digits):
    """Digits to train on and to test on: features (n, 64) and labels, images (m, 1, 8, 8) and labels."""
    x, y = digits
    return x[:600].flatten(1).double().numpy(), y[:600].numpy(), x[1500:1560], y[1500:1560]


def fitted(estimator, rows, keep=10, names=None):
    """`estimator` fitted on the digits below `keep`, under other names if some are given."""
    x, y = rows[0][rows[1] < keep], rows[1][rows[1] < keep]
    return estimator.fit(x, y if names is None else np.asarray(names)[y])


def features(x):
    return x.flatten(1).double().numpy()


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=300),
        RandomForestClassifier(20, random_state=0),
        KNeighborsClassifier(3),
        make_pipeline(StandardScaler(), PCA(20), LogisticRegression(max_iter=300)),
        GridSearchCV(LogisticRegression(max_iter=300), {"C": [0.1, 1.0]}, cv=2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_probabilities_become_logits(estimator, rows):
    estimator, x = fitted(estimator, rows), rows[2]
    model = SklearnModel(estimator)
    answer = model.query(x, Access.SCORE)
    wanted = estimator.predict_proba(features(x))
    assert model.access == Access.SCORE
    assert answer.logits.dtype == torch.float32
    assert answer.logits.isfinite().all()  # also where a forest or neighbours say 0
    np.testing.assert_allclose(answer.logits.double().exp().numpy(), wanted, atol=1e-6)
    assert answer.labels.tolist() == estimator.predict(features(x)).tolist()


@pytest.mark.parametrize(
    "estimator",
    [LinearSVC(), RidgeClassifier(), SVC(), SVC(decision_function_shape="ovr", break_ties=True)],
    ids=["linear", "ridge", "svc", "svc, ties broken"],
)
def test_a_decision_function_serves_as_logits(estimator, rows):
    estimator, x = fitted(estimator, rows), rows[2]
    answer = SklearnModel(estimator).query(x, Access.SCORE)
    np.testing.assert_allclose(answer.logits.numpy(), estimator.decision_function(features(x)), rtol=1e-5)
    assert answer.labels.tolist() == estimator.predict(features(x)).tolist()


def test_one_column_is_the_logistic_of_the_second_class(rows):
    estimator = fitted(LogisticRegression(), rows, keep=2, names=FRUIT[:2])
    x = rows[2]
    answer = SklearnModel(estimator, method="decision_function").query(x, Access.SCORE)
    assert answer.logits.shape == (len(x), 2)
    wanted = estimator.predict_proba(features(x))
    np.testing.assert_allclose(answer.logits.double().softmax(1).numpy(), wanted, atol=1e-6)
    assert [("apple", "fig")[place] for place in answer.labels.tolist()] == estimator.predict(features(x)).tolist()
    assert 0 < answer.labels.sum() < len(x)  # both come


@pytest.mark.parametrize("method", ["predict_proba", "decision_function", "predict"])
@pytest.mark.parametrize("names", [FRUIT, np.array([7, -3, 100])], ids=["texts", "numbers"])
def test_labels_are_places_in_classes(names, method, rows):
    estimator, x = fitted(LogisticRegression(), rows, keep=3, names=names), rows[2]
    model = SklearnModel(estimator, method=method)
    said = model.query(x, Access.DECISION)
    assert said.logits is None
    assert model.classes == tuple(str(name) for name in sorted(names.tolist()))
    assert [model.classes[place] for place in said.labels] == [str(s) for s in estimator.predict(features(x))]
    assert said.labels.dtype == torch.int64
    assert model.access == (Access.DECISION if method == "predict" else Access.SCORE)


def test_what_only_predicts_gives_labels(rows):
    voters = [("line", Perceptron()), ("ridge", RidgeClassifier()), ("svc", LinearSVC())]
    estimator = fitted(VotingClassifier(voters), rows)  # it counts votes, so that there are no scores
    model = SklearnModel(estimator)
    answer = model.query(rows[2], Access.SCORE)
    assert model.access == Access.DECISION
    assert answer.logits is None
    assert answer.labels.tolist() == estimator.predict(features(rows[2])).tolist()
    with pytest.raises(AttackError, match="needs SCORE access, the model gives DECISION"):
        run(model, Square(steps=2), Linf(0.1), rows[2], rows[3])


def test_pairs_of_classes_are_refused_and_the_remedy_works(rows):
    for keep in (3, 10):  # with three classes there are three pairs too: the shape alone does not tell
        pairs = fitted(make_pipeline(StandardScaler(), SVC(decision_function_shape="ovo")), rows, keep)
        with pytest.raises(ModelError, match=r"one for each pair; call set_params\(decision_function_shape='ovr'\)"):
            SklearnModel(pairs)
        pairs[-1].set_params(decision_function_shape="ovr")
        assert SklearnModel(pairs).query(rows[2], Access.SCORE).logits.shape == (len(rows[2]), keep)
    two = fitted(SVC(decision_function_shape="ovo"), rows, 2)
    assert SklearnModel(two).query(rows[2], Access.SCORE).logits.shape == (len(rows[2]), 2)


def test_mean_and_std_are_part_of_the_model(rows):
    x, channels = rows[2].expand(-1, 2, -1, -1) * torch.tensor([1.0, 0.5]).view(2, 1, 1), 2
    inner = np.concatenate([rows[0], rows[0]], 1)
    estimator = LogisticRegression(max_iter=300).fit(inner, rows[1])
    mean, std = (0.1, 0.3), (0.5, 0.25)
    got = SklearnModel(estimator, mean=mean, std=std).query(x, Access.SCORE)
    moved = (x.double().numpy() - np.reshape(mean, (channels, 1, 1))) / np.reshape(std, (channels, 1, 1))
    wanted = estimator.predict_log_proba(moved.reshape(len(x), -1))
    np.testing.assert_allclose(got.logits.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_a_row_is_answered_alike_in_any_company(rows):
    model = SklearnModel(fitted(LogisticRegression(max_iter=300), rows))
    whole = model.query(rows[2], Access.SCORE).logits
    alone = torch.cat([model.query(rows[2][at : at + 1], Access.SCORE).logits for at in range(len(rows[2]))])
    torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


def test_one_fitted_on_a_table_is_asked_without_names(rows):
    estimator = fitted(LogisticRegression(max_iter=300), rows)
    estimator.feature_names_in_ = np.array([f"p{number}" for number in range(64)], dtype=object)
    assert len(SklearnModel(estimator).query(rows[2], Access.SCORE).labels) == len(rows[2])  # warnings are errors


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (LogisticRegression(), r"got LogisticRegression without classes_; call its fit"),
        (make_pipeline(StandardScaler(), SVC()), r"got Pipeline without classes_; call its fit"),
        (LogisticRegression, r"got the class LogisticRegression; make one, fit it"),
        (Ridge(), "got Ridge without classes_"),
        (KMeans(2), "got KMeans without classes_"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_no_fitted_classifier_is_refused(estimator, message):
    with pytest.raises(ModelError, match=message):
        SklearnModel(estimator)


def test_other_mistakes_are_named(rows):
    estimator = fitted(LogisticRegression(max_iter=300), rows)
    with pytest.raises(ModelError, match=r"expected images of 64 numbers.*got \(3, 8, 8\), which is 192; resize"):
        SklearnModel(estimator).query(torch.rand(2, 3, 8, 8), Access.SCORE)
    with pytest.raises(UsageError, match="unknown method 'predict_prob'; did you mean 'predict_proba'"):
        SklearnModel(estimator, method="predict_prob")
    with pytest.raises(
        ModelError, match="expected an estimator with predict_proba, got LinearSVC with decision_function"
    ):
        SklearnModel(fitted(LinearSVC(), rows), method="predict_proba")
    several = RandomForestClassifier(2).fit(rows[0], np.stack([rows[1], rows[1] % 2], 1))
    with pytest.raises(ModelError, match="expected one label a row, got RandomForestClassifier with 2"):
        SklearnModel(several)
    with pytest.raises(
        ModelError, match=r"KNeighborsClassifier.predict_proba failed on images \(2, 1, 8, 8\): ValueError"
    ):
        SklearnModel(fitted(KNeighborsClassifier(3), rows)).query(torch.full((2, 1, 8, 8), torch.nan), Access.SCORE)


def test_an_audit_of_a_forest(rows):
    model = SklearnModel(fitted(RandomForestClassifier(10, random_state=0), rows))
    x, y = rows[2][:8], rows[3][:8]
    result = audit(model, (x, y), Linf(0.15), profile="quick", width=8)
    assert result.complete
    clean = model.query(x, Access.DECISION).labels == y
    assert result.counts["misclassified"] == int((~clean).sum())
    found = result.witnesses()
    assert found
    for row, image in found.items():
        assert model.query(image[None], Access.DECISION).labels.item() != y[row]
        assert (image - x[row]).abs().max() <= 0.15 + 1e-6
