"""Several attacks on the same rows, and how results show themselves in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

import sparring
from sparring.attacks.pgd import PGD
from sparring.core.errors import UsageError
from sparring.core.showing import table
from sparring.core.threat import L2, Linf


class Cells(HTMLParser):
    """The texts of a table's cells, row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def rows(digits):
    return digits[0][1500:1560], digits[1][1500:1560]


@pytest.fixture(scope="module")
def compared(net, rows):
    return sparring.compare(net, *rows, ["fgsm", PGD(steps=5), "pgd:steps=20"], Linf(0.1), seed=3)


def test_each_attack_is_the_one_that_runs_alone(net, rows, compared):
    assert [entry.name for entry in compared.entries] == ["fgsm", "pgd", "pgd:steps=20"]
    for entry, outcome, attack in zip(
        compared.entries, compared.outcomes, ["fgsm", "pgd:steps=5", "pgd:steps=20"], strict=True
    ):
        alone = sparring.attack(net, *rows, attack, Linf(0.1), seed=3)
        assert torch.equal(alone.best, outcome.best)
        assert entry.success == pytest.approx(alone.success_rate, abs=1e-6)
        assert (entry.forward, entry.backward) == (int(alone.forward.sum()), int(alone.backward.sum()))
        fell = alone.found & ~alone.clean
        moved = L2(1.0).distance(alone.best[fell], rows[0][fell])
        assert entry.mean_l2 == pytest.approx(moved.mean().item(), abs=1e-6)
        assert 0 < entry.mean_linf <= 0.1 + 1e-6
        assert entry.confidence == pytest.approx(alone.confidence[fell].mean().item(), abs=1e-6)


def test_the_worst_of_all_counts(compared):
    held = [not any(o.found[i] for o in compared.outcomes) for i in range(60)]
    assert compared.robust_accuracy == pytest.approx(sum(held) / 60)
    assert compared.robust_accuracy < min(1 - o.found.double().mean().item() for o in compared.outcomes[:1])


def test_what_is_said_while_it_runs(net, rows):
    heard = []
    found = sparring.compare(net, *rows, ["fgsm", "pgd"], Linf(0.1), tell=lambda *said: heard.append(said))
    right = int((~found.outcomes[0].clean).sum())
    assert [said for said in heard if said[1] == right] == [("fgsm", right, right), ("pgd", right, right)]
    with pytest.raises(UsageError, match="pgd"):
        sparring.compare(net, *rows, ["pdg"], Linf(0.1))


def test_a_comparison_shows_itself(compared):
    head, *lines = Cells(compared._repr_html_()).rows
    assert head[:3] == ["attack", "threat model", "success"]
    assert [line[0] for line in lines] == ["fgsm", "pgd", "pgd:steps=20"]
    assert float(lines[0][2].split()[0]) == pytest.approx(100 * compared.entries[0].success, abs=0.01)
    passes = (compared.entries[2].forward + compared.entries[2].backward) / 60
    assert float(lines[2][head.index("passes/row")]) == pytest.approx(passes, abs=0.05)


def test_an_audit_and_a_checkpoint_show_themselves(net, rows):
    audit = sparring.audit(net, rows, Linf(0.1), profile="quick")
    page = Cells(audit._repr_html_())
    shown = {line[0]: int(line[1]) for line in page.rows[1:]}
    assert shown == audit.counts
    assert sum(shown.values()) == 60
    assert all(warning in page.text for warning in audit.warnings)
    done = sparring.train("dense", sparring.load("digits"), steps=20)
    cells = dict(Cells(done._repr_html_()).rows[1:])
    assert cells["accuracy"].startswith(f"{int(100 * done.card['accuracy'])}.")
    assert "20 steps" in cells["trained on"]


def test_what_is_put_in_is_escaped():
    page = table("<b>", ["<i>"], [["<script>"]], "a & b")
    assert "<script>" not in page
    assert Cells(page).rows == [["<i>"], ["<script>"]]
    assert Cells(page).text.endswith("a & b")
