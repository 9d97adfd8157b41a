"""What smoothing's certificate claims around a linear net, where the radius is the distance to the border."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparring.auditing.run import Run
from sparring.certificates.smoothing import largest_radius
from sparring.core.threat import L1, L2, Linf
from sparring.data.images import Images
from sparring.defending import smoothed
from sparring.defending.bench import Bench
from sparring.defending.plan import Entry
from sparring.defending.smoothed import ALPHA, DRAWS, claim, radius
from sparring.defending.workshop import Subject
from sparring.guards.bit_depth import BitDepth
from sparring.guards.smoothing import Smoothing

SIGMA, SIDE = 0.1, 2
MOST = largest_radius(SIGMA, DRAWS, ALPHA)
FAR = (0.9, 0.9, -0.9, 0.9, 0.05, 0.3)  # of each row from the border, on the side of its class; below 0: wrong


@pytest.fixture(scope="module")
def net():
    """Class 1 where the mean pixel is above 0.5: of d pixels the border is sqrt(d) |mean - 0.5| away."""
    layer = nn.Linear(SIDE**2, 2)
    layer.weight.data, layer.bias.data = torch.stack([-torch.ones(4), torch.ones(4)]), torch.tensor([2.0, -2.0])
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def images():
    y = torch.tensor([0, 1, 1, 0, 1, 1])
    mean = 0.5 + (2 * y - 1) * torch.tensor(FAR) / 2
    return Images(
        "made", mean.view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE).clone(), y, torch.arange(6) + 40, ("a", "b")
    )


def bench(path, images, threat):
    return Bench(Run.create(path, "defend", {}), images, threat, "quick", 0, 20, "cpu", {}, lambda *_: None)


def subject(net, guard=None):
    return Subject(Entry("mine"), "standard", net, guard or Smoothing(SIGMA), ())


@pytest.mark.parametrize("threat", [L2(0.2), L1(0.2), Linf(0.1)])  # of four pixels: 0.1 in Linf lies within 0.2 in L2
def test_rows_farther_from_the_border_than_the_radius_are_claimed(threat, tmp_path, net, images):
    said = claim(bench(tmp_path, images, threat), subject(net))
    assert said.rows.tolist() == [True, True, False, True, False, True]  # 0.3 is 3 sigma: all draws but one in 700
    assert said.figures["radius"] == pytest.approx(0.2, abs=1e-5)
    assert said.figures["largest_radius"] == pytest.approx(MOST, abs=1e-6) == pytest.approx(0.246, abs=1e-3)
    assert (said.figures["certified_accuracy"], said.figures["rows"]) == (pytest.approx(4 / 6, abs=1e-6), 6)
    told = said.told(torch.tensor([True, False, False, True, True, True]))
    assert told["fell"] == 1
    assert (
        "claims that 66.6 % of 6 images keep their class within L2 0.2, with 99.9 % confidence for each image (1,000"
        in told["sentence"]
    )
    assert told["sentence"].endswith("; 1 row of these fell to the fewer draws that decide")
    assert said.told(said.rows)["sentence"].endswith("infinitely many)")


def test_nothing_is_claimed_or_asked_where_no_draws_suffice(tmp_path, net, images, monkeypatch):
    monkeypatch.setattr(smoothed, "smooth", None)
    for place, threat in enumerate((L2(MOST + 1e-4), Linf(MOST / 2 + 1e-4))):
        said = claim(bench(tmp_path / str(place), images, threat), subject(net))
        assert not said.rows.any()
        assert (said.figures["certified_accuracy"], said.figures["rows"]) == (None, 0)
        told = said.told(said.rows)["sentence"]
        assert told.startswith("smoothing's certificate claims nothing here: it would need an L2 radius of 0.246")
        assert told.endswith("1,000 draws of sigma 0.1 give 0.246 at most")


def test_the_ball_around_holds_every_legal_point():
    x = torch.full((1, 3, 4, 5), 0.5)
    for threat, eps in ((Linf(0.1), 0.1 * 60**0.5), (L2(0.3), 0.3), (L1(0.3), 0.3)):
        assert radius(threat, x) == pytest.approx(eps, rel=1e-4)
        corner = x.clone()
        corner += 0.1 if threat.norm == "linf" else 0.0
        corner[0, 0, 0, 0] += 0.0 if threat.norm == "linf" else 0.3
        assert threat.contains(corner, x).all()
        assert radius(threat, x) >= L2(1.0).distance(corner, x).item()


def test_it_is_asked_once_and_hangs_on_no_order(tmp_path, net, images, monkeypatch):
    here = bench(tmp_path / "one", images, L2(0.12))
    first = claim(here, subject(net))
    order = torch.tensor([5, 3, 0, 4, 2, 1])
    turned = claim(bench(tmp_path / "two", images.select(order), L2(0.12)), subject(net))
    assert torch.equal(turned.rows, first.rows[order])
    kept = [Run.open(tmp_path / name).tensors("smoothed--mine")["radius"] for name in ("one", "two")]
    assert torch.equal(kept[1], kept[0][order])
    assert 0 < kept[0][5] < MOST  # what hangs on the draws
    monkeypatch.setattr(smoothed, "smooth", None)
    again = claim(here, subject(net))
    assert torch.equal(again.rows, first.rows)
    assert again.figures == first.figures


def test_of_many_rows_some_are_asked(tmp_path, net, images, monkeypatch):
    monkeypatch.setattr(smoothed, "ROWS", 2)
    said = claim(bench(tmp_path, images, L2(0.2)), subject(net))
    assert said.rows.tolist() == [True, False, False, False, False, True]  # the first and the last
    assert (said.figures["rows"], said.figures["certified_accuracy"]) == (2, 1.0)


def test_what_claims_no_noise_is_not_smoothed(tmp_path, net, images):
    assert claim(bench(tmp_path, images, L2(0.2)), subject(net, BitDepth())) is None
    assert claim(bench(tmp_path, images, L2(0.2)), replace(subject(net), guard=None)) is None
    assert Run.open(tmp_path).sections == []
