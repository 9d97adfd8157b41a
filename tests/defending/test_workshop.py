"""The nets of a run: who is trained on what, and what it cost."""

from __future__ import annotations

import pytest
import torch

from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.data.images import Dataset
from sparring.defending.plan import Entry
from sparring.defending.workshop import Workshop
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
    together, several = cost(Entry("ensemble", guard="ensemble"))
    assert several == sum(cards[key]["cost_of_plain"] for key in ("standard", *together.others))


def test_every_net_is_trained_once(workshop, monkeypatch):
    monkeypatch.setattr("sparring.defending.workshop.fit", None)
    assert workshop.subject(Entry("again", guard=Median(2))).key == "standard"
