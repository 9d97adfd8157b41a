"""Every proof of a run made again, from the model and the images that its plan names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.auditing.evidence import Evidence, Shard
from sparring.auditing.proofs import PREFIX, is_proof
from sparring.auditing.provers import METHODS, Provable, provable
from sparring.auditing.radii import NAME
from sparring.auditing.run import Run
from sparring.auditing.standing import CERTIFIED, STATES
from sparring.core.errors import DataError, ModelError, UsageError
from sparring.core.model import Model
from sparring.core.threat import Threat, threat
from sparring.data.images import Images
from sparring.models.spec import digest_of

_CHUNK = 32  # rows at once
_ROUNDING = 1e-6  # of a bound, by which another machine may come out lower
_FIXED = ("linear", "ibp", "crown-ibp", "crown")  # others climb on as long as a neighbour in the batch needs it


@dataclass(frozen=True)
class Claim:
    """One proof that a run says it has."""

    id: int
    method: str
    eps: float
    bound: float | None  # None: only that there is one
    shard: str


@dataclass(frozen=True)
class Rechecked:
    """What became of the proofs of a run."""

    proofs: int
    failed: tuple[Claim, ...]

    @property
    def figures(self) -> dict[str, Any]:
        """For `--json`."""
        failed = [{"id": claim.id, "method": claim.method, "eps": claim.eps, "shard": claim.shard}
                  for claim in self.failed]  # fmt: skip
        return {"proofs": self.proofs, "hold": self.proofs - len(self.failed), "failed": failed}


def recheck(run: Run, model: Model, images: Images, device: str = "cpu") -> Rechecked:
    """Make every proof of `run` again: a row's holds if its method proves it, with the bound that was told."""
    plan = run.plan
    if plan.get("kind") not in ("audit", "certify"):
        raise UsageError(f"expected the run of an audit or of certify, got one of {plan.get('kind')}: {run.path}")
    images = images.take(plan["rows"]["test"])
    if images.digest() != plan["data_digest"]:
        raise DataError(f"{run.path} was made with other images than {images.name} holds; name its own with --data")
    if digest_of(model) != plan["model_digest"]:
        raise ModelError(f"{run.path} was made with another model than this; name its own, {plan['model']}")
    claims = list(_claims(run))
    if not claims:
        return Rechecked(0, ())
    limits = threat(plan["norm"], plan["eps"], model.bounds)
    found = provable(model, limits, tuple(images.x.shape[1:]), device)
    if isinstance(found, str):
        raise ModelError(found)
    failed: list[Claim] = []
    for method, eps in dict.fromkeys((claim.method, claim.eps) for claim in claims):
        mine = [claim for claim in claims if (claim.method, claim.eps) == (method, eps)]
        for start in range(0, len(mine), _CHUNK):
            part = mine[start : start + _CHUNK]
            failed += _failing(found, part, replace(limits, eps=eps), images, device)
    return Rechecked(len(claims), tuple(failed))


def _claims(run: Run) -> list[Claim]:
    """All proofs that the shards tell of; a radius of 0 claims nothing."""
    eps, found = run.plan["eps"], []
    for name, shard in Evidence(run).shards():
        if not shard.complete:
            continue
        if shard.radius is not None:
            found += [Claim(row, shard.name.removeprefix(NAME), radius, None, name)
                      for row, radius in zip(shard.ids, shard.radius, strict=True) if radius > 0]  # fmt: skip
        elif STATES[CERTIFIED] in shard.state and shard.nearer is None and eps > 0:
            found += _certified(name, shard, eps)
    return found


def _certified(name: str, shard: Shard, eps: float) -> list[Claim]:
    """The rows that a shard calls certified; each must say by what."""
    method = shard.name.removeprefix(PREFIX) if is_proof(shard.name) else ""
    if method not in METHODS:
        raise DataError(f"evidence/rows/{name}.json calls rows certified and names no proof: {shard.name!r}")
    bounds: Sequence[float | None] = shard.bound or [None] * len(shard.ids)
    told = zip(shard.ids, shard.state, bounds, strict=True)
    return [Claim(row, method, eps, bound, name) for row, state, bound in told if state == STATES[CERTIFIED]]


def _failing(found: Provable, claims: list[Claim], limits: Threat, images: Images, device: str) -> list[Claim]:
    """Those of `claims`, of one method and eps, that are not proved again."""
    place = {row: at for at, row in enumerate(images.ids.tolist())}
    known = [claim for claim in claims if claim.id in place]
    strange = [claim for claim in claims if claim.id not in place]
    if not known:
        return strange
    at = torch.tensor([place[claim.id] for claim in known])
    proof = found.prove(known[0].method, images.x[at].to(device), images.y[at].to(device), limits)
    bound, certified = proof.bound.cpu(), proof.certified.cpu()
    told = torch.tensor([-torch.inf if claim.bound is None else claim.bound for claim in known], dtype=torch.float64)
    holds: Tensor = certified
    if known[0].method in _FIXED:
        holds = certified & (told <= bound + _ROUNDING * (1 + bound.abs()))
    return strange + [claim for claim, held in zip(known, holds.tolist(), strict=True) if not held]
