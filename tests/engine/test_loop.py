"""The loop: what it counts, when it stops, and that width, order and memory do not change what it finds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from sparring import catalog
from sparring.attacks.apgd import APGD
from sparring.attacks.ddn import DDN
from sparring.attacks.fgsm import FGSM
from sparring.attacks.pgd import PGD
from sparring.core.errors import AttackError, ModelError, UsageError
from sparring.core.judge import Judge
from sparring.core.model import Access, Prediction
from sparring.core.threat import L2, Linf, Unbounded, threat
from sparring.engine import process
from sparring.engine.loop import run
from sparring.engine.width import automatic, narrower, same_bits

LIMIT = Linf(0.08)
EPS = {"linf": 0.08, "l2": 0.4, "l1": 1.0, "l0": 2.0, "ssim": 0.05}


def identical(one, two, *names):
    for name in names or [field.name for field in fields(one)]:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(catalog.attacks()))
def test_passes_are_counted_exactly(name, counting, rows):
    """One row at width 1: what the ledger says is what the model was asked, but for checks and replays."""
    kind = catalog.attacks()[name]
    attack = kind(**({"steps": 12} if "steps" in {field.name for field in fields(kind)} else {}))
    norm = attack.norms[0]
    limit = Unbounded() if norm == "unbounded" else threat(norm, EPS[norm])
    for row in range(4):
        x, y = rows[0][row : row + 1], rows[1][row : row + 1]
        targets = (y[:, None] + 1) % 10
        before = len(counting.widths)
        counting.pulls.clear()
        got = run(counting, attack, limit, x, y, targets=targets, width=1)
        # Three checks before, one look at the clean image, one at what was found.
        asked = len(counting.widths) - before - 3 - 1 - int(got.found | got.moved)
        assert got.forward.tolist() == [asked]
        assert got.backward.tolist() == [len(counting.pulls)]
        assert asked >= 1


@pytest.mark.parametrize(
    ("attack", "forward", "backward"),
    [(PGD(steps=7), 8, 7), (FGSM(), 2, 1), (APGD(steps=9), 10, 9), (DDN(steps=5), 6, 5)],
)
def test_a_failing_attack_costs_its_steps_and_one_look(attack, forward, backward, counting, rows):
    limit = L2(1e-4)
    got = run(counting, attack, limit, *rows, width=8)
    assert not got.found.any()
    assert got.forward.tolist() == [forward] * 20
    assert got.backward.tolist() == [backward] * 20


def test_a_row_stops_at_its_first_success(model, rows):
    got = run(model, PGD(steps=40, random_start=False), Linf(0.3), *rows, width=8)
    assert got.found.all()
    assert (got.forward < 41).all()
    assert torch.equal(got.backward, got.forward - 1)


def test_rows_that_are_wrong_already_cost_nothing(model, rows):
    x, y = rows
    wrong = (y + 1) % 10
    got = run(model, PGD(), LIMIT, x, torch.where(torch.arange(20) < 5, wrong, y), width=8)
    assert got.clean.tolist() == [True] * 5 + [False] * 15
    assert got.found[:5].all()
    assert not got.forward[:5].any()
    assert not got.distance[:5].any()
    assert torch.equal(got.best[:5], x[:5])


@pytest.mark.parametrize("attack", [PGD(steps=10), APGD(steps=10), DDN(steps=20)])
def test_order_and_company_do_not_matter(attack, model, rows):
    x, y = rows
    norm = "linf" if "linf" in attack.norms else "l2"
    limit, ids = threat(norm, EPS[norm]), torch.arange(20) + 7
    whole = run(model, attack, limit, x, y, sample=ids, width=8, restarts=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = run(model, attack, limit, x[order], y[order], sample=ids[order], width=8, restarts=2)
    identical(whole.take(order), shuffled, "found", "best", "distance", "label")
    some = order[:3]
    identical(whole.take(some), run(model, attack, limit, x[some], y[some], sample=ids[some], width=8, restarts=2),
              "found", "best", "distance", "label")  # fmt: skip
    assert whole.found.any()


def test_the_seed_matters(model, rows):
    one, two, again = (run(model, PGD(steps=3), LIMIT, *rows, seed=s, width=8) for s in (1, 2, 1))
    identical(one, again)
    assert not torch.equal(one.best, two.best)


def test_restarts_find_more_and_cost_more(model, rows):
    one = run(model, PGD(steps=3), Linf(0.06), *rows, width=8)
    five = run(model, PGD(steps=3), Linf(0.06), *rows, width=8, restarts=5)
    assert (five.found | ~one.found).all()
    assert int(five.found.sum()) >= int(one.found.sum())
    assert torch.equal(five.best[one.found], one.best[one.found])
    assert (five.forward[~five.found] == 5 * 4).all()
    assert bool((~five.found).any())


@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_the_lowest_rank_wins_whatever_the_width(width, model, rows):
    wanted = run(model, PGD(steps=3), Linf(0.07), *rows, width=16, restarts=4)
    got = run(model, PGD(steps=3), Linf(0.07), *rows, width=width, restarts=4)
    assert torch.equal(got.found, wanted.found)
    torch.testing.assert_close(got.best, wanted.best, rtol=0, atol=1e-6)


def test_a_success_cancels_its_siblings(model, rows):
    """With every try seated at once, nobody goes on after the first one has won."""
    x, y = rows[0][:1], rows[1][:1]
    one = run(model, FGSM(), Linf(0.5), x, y, width=8)
    eight = run(model, FGSM(), Linf(0.5), x, y, width=8, restarts=8)
    assert one.found.all()
    assert one.forward.tolist() == [2]
    assert eight.forward.tolist() == [16]
    assert eight.backward.tolist() == [8]
    twice = run(model, PGD(steps=40), Linf(0.3), x, y, width=1, restarts=8)
    assert int(twice.forward) < 41  # one seat: the other tries never sat down


def test_targets_with_any_wrong(model, rows):
    x, y = rows
    targets = torch.stack([(y + k) % 10 for k in (1, 2, 3)], 1)
    every = run(model, PGD(steps=10), LIMIT, x, y, targets=targets, judge=Judge(any_wrong=True), width=8)
    single = [run(model, PGD(steps=10), LIMIT, x, y, targets=targets[:, k : k + 1], width=8) for k in range(3)]
    assert (every.label[every.found] != y[every.found]).all()
    for k, one in enumerate(single):
        assert (one.label[one.found] == targets[one.found, k]).all()
    assert (every.found | ~torch.stack([one.found for one in single]).any(0)).all()
    with pytest.raises(AttackError, match="expected one target a row"):
        run(model, PGD(), LIMIT, x, y, targets=targets)


def test_eight_bit_images_are_on_the_lattice_and_judged_there(counting, rows):
    x = (rows[0] * 255).round() / 255
    right = counting.query(x, Access.DECISION).labels == rows[1]
    x, y = x[right], rows[1][right]
    judged, honest = [], Judge.adversarial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "adversarial", lambda *args: (judged.append(args[2]), honest(*args))[1])
        got = run(counting, PGD(steps=10), Linf(20 / 255), x, y, width=8, eight_bit=True)
    assert len(judged) > 20
    assert torch.equal((got.best * 255).round().to(torch.uint8).float() / 255, got.best)
    assert got.found.any()
    assert not got.moved.any()
    fooled = counting.query(got.best, Access.DECISION).labels != y
    assert torch.equal(fooled, got.found)
    assert ((got.best - x).abs().amax((1, 2, 3)) * 255).round().max() <= 20
    for looked in judged:
        assert torch.equal((looked * 255).round() / 255, looked)


@pytest.mark.parametrize("widest", [1, 3, 8])
def test_too_little_memory_halves_the_width_and_changes_nothing(widest, limited, rows):
    x, y = rows[0][:6], rows[1][:6]
    attack, limit = PGD(steps=6), Linf(0.08)
    ample, tight = limited(1000), limited(widest)
    tight.model.query(x, Access.SCORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparring.engine.preflight.check_model", lambda model, x, needs: 10)
        wanted = run(ample, attack, limit, x, y, width=32, restarts=2)
        got = run(tight, attack, limit, x, y, width=32, restarts=2)
    assert max(tight.widths) <= widest
    assert torch.equal(got.found, wanted.found)
    torch.testing.assert_close(got.best, wanted.best, rtol=0, atol=1e-6)


def test_too_little_memory_in_the_backward_pass(model, rows):
    class Greedy:
        access, bounds = Access.GRADIENT, (0.0, 1.0)

        def query(self, x, access):
            answer = model.query(x, access)

            def vjp(cotangent, *, keep=False):
                if len(x) > 8:
                    raise torch.OutOfMemoryError("no room")
                return answer.vjp(cotangent, keep=keep)

            return Prediction(answer.labels, answer.logits, vjp)

    got = run(Greedy(), PGD(steps=5), LIMIT, *rows, width=32)
    wanted = run(model, PGD(steps=5), LIMIT, *rows, width=8)
    assert torch.equal(got.found, wanted.found)
    torch.testing.assert_close(got.best, wanted.best, rtol=0, atol=1e-6)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, rows):
    class Broken:
        access, bounds, calls = Access.GRADIENT, (0.0, 1.0), 0

        def query(self, x, access):
            self.calls += 1
            if self.calls > 8:
                raise RuntimeError("a loose wire")
            return model.query(x, access)

    with pytest.raises(RuntimeError, match="a loose wire"):
        run(Broken(), PGD(), LIMIT, *rows, width=8)


def test_one_row_alone_that_does_not_fit_is_an_error(limited, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparring.engine.preflight.check_model", lambda model, x, needs: 10)
        with pytest.raises(torch.OutOfMemoryError):
            run(limited(0), PGD(), LIMIT, *rows, width=8)


def test_the_tail_narrows_where_the_bits_agree(counting, rows):
    wide = run(counting, PGD(steps=20), Linf(1e-4), rows[0][:5], rows[1][:5], width=32)
    assert set(counting.widths[4:]) >= {32, 8}
    assert wide.forward.tolist() == [21] * 5


def test_a_model_whose_bits_depend_on_the_width_is_never_narrowed(model, rows):
    class Wobbling:
        access, bounds = Access.GRADIENT, (0.0, 1.0)

        def __init__(self):
            self.widths = []

        def query(self, x, access):
            answer = model.query(x, access)
            self.widths.append(len(x))
            logits = None if answer.logits is None else answer.logits + 1e-6 * len(x)
            return Prediction(answer.labels, logits, answer.vjp)

    wobbling = Wobbling()
    got = run(wobbling, PGD(steps=20), Linf(1e-4), rows[0][:5], rows[1][:5], width=32)
    asked = wobbling.widths[4:]
    assert asked.count(8) == 1  # the one question whether it could
    assert set(asked) == {32, 8}
    assert got.forward.tolist() == [21] * 5
    assert same_bits(model, rows[0], 4, Access.GRADIENT)
    assert not same_bits(wobbling, rows[0], 4, Access.SCORE)


def test_widths():
    assert [narrower(live, 200) for live in (1, 4, 5, 33, 64, 65, 129, 199)] == [4, 4, 8, 40, 64, 80, 160, 200]
    assert [narrower(live, 7) for live in (3, 5)] == [4, 7]
    assert all(live <= narrower(live, 512) < 1.25 * live + 4 for live in range(1, 513))
    assert automatic(torch.zeros(1, 28, 28)) == 256
    assert automatic(torch.zeros(3, 2000, 2000)) == 4


def test_one_row_and_two_classes(rows):
    from sparring.testing import linear

    case = linear("linf", (1, 3, 3), 1, distance=0.2)
    got = run(case.model, PGD(steps=10), Linf(0.25, case.model.bounds), case.x, case.y)
    assert got.found.tolist() == [True]
    assert got.label.tolist() == [1]


def test_where_nothing_is_found_the_last_point_of_the_first_try_is_kept(model, rows):
    one = run(model, PGD(steps=4), Linf(1e-3), *rows, width=8)
    three = run(model, PGD(steps=4), Linf(1e-3), *rows, width=8, restarts=3)
    assert not three.found.any()
    identical(one, three, "best", "distance")
    assert (one.distance > 0).all()


def test_a_minimising_attack_keeps_the_nearest(model, rows):
    got = run(model, DDN(steps=40), L2(5.0), *rows, width=8)
    short = run(model, DDN(steps=10), L2(5.0), *rows, width=8)
    assert got.found.all()
    assert (got.forward == 41).all()
    assert float(got.distance.mean()) < float(short.distance.mean())
    wrong = model.query(got.best, Access.DECISION).labels
    assert torch.equal(wrong, got.label)
    assert (wrong != rows[1]).all()


def test_confidence_asks_for_more(model, rows):
    sure = run(model, PGD(steps=20), Linf(0.15), *rows, width=8, judge=Judge(confidence=0.99))
    plain = run(model, PGD(steps=20), Linf(0.15), *rows, width=8)
    assert (sure.confidence[sure.found] >= 0.99).all()
    assert sure.found.any()
    assert float(plain.confidence[plain.found].min()) < 0.99
    assert int(sure.forward.sum()) > int(plain.forward.sum())


def test_progress_ends_with_everybody_settled(model, rows):
    told = []
    run(model, PGD(steps=5), LIMIT, *rows, width=8, restarts=2, on_progress=lambda done, of: told.append((done, of)))
    assert told[-1] == (20, 20)
    assert all(0 <= done <= of == 20 for done, of in told)


def test_progress_never_promises_more_than_is_done(model, rows):
    told = []
    run(model, PGD(steps=5), Linf(1e-3), *rows, width=4, on_progress=lambda done, of: told.append(done))
    assert told == sorted(told)
    assert told[0] == 0


@pytest.mark.parametrize(("restarts", "width"), [(0, 8), (1, 0), (-1, 8)])
def test_numbers_that_make_no_sense(restarts, width, model, rows):
    with pytest.raises(UsageError, match="at least 1"):
        run(model, PGD(), LIMIT, *rows, restarts=restarts, width=width)


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_rows_that_the_model_cannot_answer_fail_alone(kind, model, rows):
    class Fragile:
        access, bounds = Access.GRADIENT, (0.0, 1.0)

        def query(self, x, access):
            answer = model.query(x, access)
            marked = (x[:, 0, 0, 0] > 0.005).nonzero().squeeze(1)
            if kind == "raises" and len(marked):
                raise ModelError(f"cannot read {len(marked)} of these")
            logits = answer.logits
            if logits is not None and len(marked):
                logits = logits.index_fill(0, marked, torch.nan)
            return Prediction(answer.labels, logits, answer.vjp)

    x, y = rows[0].clone(), rows[1]
    x[:, 0, 0, 0] = 0.0
    x[2, 0, 0, 0] = x[17, 0, 0, 0] = 0.004  # below the mark when untouched, and above it once attacked
    x[11, 0, 0, 0] = 0.5
    limit = L2(1e-3)  # nothing falls, so every row goes its whole way
    for width in (1, 8, 32):
        got = run(Fragile(), PGD(steps=5, step_size=0.02), limit, x, y, width=width)
        usual = run(model, PGD(steps=5, step_size=0.02), limit, x, y, width=width)
        fine = ~got.failed
        assert got.failed[11]
        assert set(got.failed.nonzero().squeeze(1).tolist()) <= {2, 11, 17}
        assert not got.found[got.failed].any()
        assert torch.equal(got.best[fine], usual.best[fine]) or kind == "raises"
        assert torch.equal(got.forward[fine], usual.forward[fine])


def test_a_model_that_fails_on_every_row_is_an_error(model, rows):
    class Dead:
        access, bounds = Access.GRADIENT, (0.0, 1.0)

        def query(self, x, access):
            raise ModelError("no such layer")

    with pytest.raises(ModelError, match="no such layer; no image tried has an answer"):
        run(Dead(), PGD(steps=5), LIMIT, *rows, width=8)


class Wavering:
    """Fooled when it is asked for gradients, and not when it is asked again for scores."""

    access, bounds = Access.GRADIENT, (0.0, 1.0)

    def query(self, x, access):
        n = len(x)
        second = access == Access.GRADIENT
        logits = torch.tensor([[0.0, 2.0] if second else [2.0, 0.0]]).repeat(n, 1)
        return Prediction(logits.argmax(1), logits, (lambda v, keep=False: torch.ones_like(x)) if second else None)


def test_what_is_not_confirmed_is_not_found(monkeypatch):
    x, y = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr("sparring.engine.preflight.check_model", lambda model, x, needs: 2)
    got = run(Wavering(), PGD(steps=3), Linf(0.1), x, y)
    assert got.found.tolist() == [False] * 3
    assert got.moved.tolist() == [True] * 3
    assert not got.clean.any()


def test_label_and_confidence_are_those_of_the_point_kept_also_where_nothing_was_found(net, model, rows):
    x, y = rows
    lost = 0
    for offset in range(1, 10):
        got = run(model, FGSM(), Linf(0.25), x, y, targets=(y[:, None] + offset) % 10)
        probability = net(got.best).detach().double().softmax(1)
        assert torch.equal(got.label, probability.argmax(1))
        torch.testing.assert_close(got.confidence, probability.amax(1), rtol=0, atol=1e-5)
        lost += int((~got.found & (got.label != got.clean_label)).sum())
    assert lost  # some rows end in a third class, which is what this test is about


@pytest.mark.parametrize("fails", [False, True])
def test_torch_leaves_the_cores_to_a_model_that_another_framework_computes(model, rows, fails):
    seen = []

    class Elsewhere:
        access, bounds = model.access, model.bounds

        def query(self, x, access):
            process.yield_cores()
            seen.append(torch.get_num_threads())
            if fails and len(seen) > 8:
                raise KeyboardInterrupt
            return model.query(x, access)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
            run(Elsewhere(), PGD(steps=20), Linf(1e-6), *rows)
        after = torch.get_num_threads()
        process.yield_cores()  # outside of a run
        assert torch.get_num_threads() == after == 3
    finally:
        torch.set_num_threads(before)
    assert seen.count(1) > 4
    assert seen[0] == 3  # before the search nothing is taken
