"""The nets of a run: who is trained on what, and what it cost."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.data.images import Dataset
from sparring.defending.plan import Entry
from sparring.defending.workshop import Workshop
from sparring.guards.detector import Detector
from sparring.guards.median import Median
from sparring.training.fit import Settings


@pytest.fixture(scope="module")
def workshop(digits_set, tmp_path_factory):
    train = digits_set.train.take(120)
    data = Dataset("digits", train, digits_set.test.take(20))
    made = Workshop(tmp_path_factory.mktemp("nets"), data, Settings("dense", 4), Linf(0.1), "cpu", lambda *_: None)
    made.subject(Entry("undefended"))
    return made


def test_a_sixth_is_kept_from_every_net(workshop, digits_set):
    assert workshop.trained_on.train.ids.tolist() == list(range(100))
    assert workshop.held_out.ids.tolist() == list(range(100, 120))
    assert workshop.made["standard"].card["plan"]["data_sha256"] == digits_set.train.take(100).digest()


def test_a_detector_flags_one_in_twenty_of_the_images_kept(workshop):
    subject = workshop.subject(Entry("fs", guard="feature_squeezing"))
    assert subject.net is workshop.made["standard"].net
    said = subject.judged(1).query(workshop.held_out.x, Access.DECISION)
    assert int(said.flagged.sum()) == 1
    mine = subject.guard.fitted(subject.net, workshop.held_out.x, 0.5)
    kept = workshop.subject(Entry("own", guard=mine)).guard  # a threshold that is set stays
    assert kept.threshold == mine.threshold != subject.guard.threshold


@dataclass(frozen=True)
class Noisy(Detector):
    """Draws from two generators for each image that it looks at."""

    name: ClassVar[str] = "noisy"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = True

    def score(self, x, logits, again):
        return torch.rand(len(x)) + random.random()


def test_the_threshold_of_a_random_detector_hangs_on_the_seed_alone(workshop):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        found.append(workshop.subject(Entry("noisy", guard=Noisy())).guard.threshold)
    assert found[0] == found[1]
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(2))


def test_an_ensemble_is_of_nets_of_other_seeds(workshop):
    subject = workshop.subject(Entry("ensemble", guard="ensemble"))
    assert subject.others == ("standard-1", "standard-2")
    assert str(subject.guard) == "Ensemble(others=2 nets)"
    nets = [subject.net, *subject.guard.others]
    x = workshop.held_out.x
    with torch.no_grad():
        said = [net(x).softmax(1) for net in nets]
        together = subject.deployed(x).exp()
    assert len({float(p[0, 0]) for p in said}) == 3
    torch.testing.assert_close(together, sum(said) / 3)
    seeds = [workshop.made[key].card["seed"] for key in ("standard", *subject.others)]
    assert len(set(seeds)) == 3


def test_a_guard_around_a_hardened_net(workshop):
    subject = workshop.subject(Entry("median+fast", recipe="fast", guard=Median(2)))
    x = workshop.held_out.x
    assert torch.equal(subject.deployed(x), workshop.made["fast"].net(Median(2).transform(x)))


def test_what_the_training_cost(workshop):
    def cost(entry):
        subject = workshop.subject(entry)
        for place, key in enumerate(workshop.made):
            workshop.made[key].card["cost_of_plain"] = 2.0**place
        return subject, workshop.cost(subject)

    assert cost(Entry("undefended"))[1] == cost(Entry("m", guard=Median(2)))[1] == 1.0
    student, distilled = cost(Entry("distillation", recipe="distillation:temperature=5"))
    cards = {key: one.card for key, one in workshop.made.items()}
    (teacher,) = student.others
    assert cards[teacher]["plan"]["recipe"]["options"] == "Temperature(temperature=5.0)"
    assert distilled == cards["distillation:temperature=5"]["cost_of_plain"] + cards[teacher]["cost_of_plain"]
    assert cost(Entry("ensemble", guard="ensemble"))[1] == 3.0  # three plain nets
    together, several = cost(Entry("fasts", recipe="fast", guard="ensemble"))
    nets = ("fast", *together.others)
    assert several == sum(workshop.made[key].card["cost_of_plain"] for key in nets)


def test_every_net_is_trained_once(workshop, monkeypatch):
    monkeypatch.setattr("sparring.defending.workshop.fit", None)
    assert workshop.subject(Entry("again", guard=Median(2))).key == "standard"
