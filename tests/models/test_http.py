"""Models behind a server: asked over a real socket, of a server in a process of its own that can misbehave."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise
from operator import mul

import numpy as np
import pytest
import torch

from sparring.auditing.audit import audit
from sparring.cli.main import main
from sparring.core.errors import IncompleteError, ModelError, UsageError
from sparring.core.model import Access, Prediction
from sparring.core.threat import Linf
from sparring.core.verdict import Verdict
from sparring.engine.asking import ask
from sparring.models.http import JsonModel, OutOfQueriesError, ServedModel, ServerError

pytest.importorskip("httpx")

TOKEN = "s3cret-token-0123456789"
# First pixels: of an image that the server refuses, of one that it has no number for, and of one that breaks it.
POISON, HOLLOW, FATAL = 0.125, 0.375, 0.625


def scores(weights, row):
    """The linear model, here and on the server: a row's answer has the same bits wherever it is computed."""
    return [bias + sum(map(mul, each, row)) for *each, bias in weights]


SERVER = """
import json, math, os, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import mul

weights = json.loads(sys.stdin.readline())
lock = threading.Lock()
now, seen = {}, {"busy": 0}

def begin():
    while seen["busy"]:  # the answers to an earlier test
        time.sleep(0.01)
    now.update(faults=[], lasting=None, die_at=0, shape=[-1, 64], layout="flat", form="v2", kind="logits")
    seen.update(rows=0, requests=0, times=[], most=0, auth=[], keys=[], sizes=[], last=None)

def flat(value):
    return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]

def depth(value):
    return [len(value), *depth(value[0])] if isinstance(value, list) else []

def channels_first(row, c=16):
    return [row[p * c + k] for k in range(c) for p in range(len(row) // c)]

def answer(rows):
    said = [scores(weights, row) for row in rows]
    for row, each in zip(rows, said):
        if row[0] == 0.375:
            each[1] = math.nan
    if now["kind"] == "labels":
        return [each.index(max(each)) for each in said]
    if now["kind"] == "probabilities":
        parts = [[math.exp(v - max(each)) for v in each] for each in said]
        return [[v / sum(part) for v in part] for part in parts]
    return said

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536

    def log_message(self, *_):
        pass

    def send(self, status, body, headers=(), length=None):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def do_GET(self):
        if self.path == "/stats":
            return self.send(200, seen)
        self.send(200, {"name": "m", "inputs": [{"name": "image", "datatype": "FP32", "shape": now["shape"]}],
                        "outputs": [{"name": "out", "datatype": "FP32", "shape": [-1, 10]}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/control":
            begin() if body is None else now.update(body)
            return self.send(200, {})
        if now["form"] == "v2":
            (entry,) = body["inputs"]
            last = {"shape": entry["shape"], "data": entry["data"]}
            size = entry["shape"][0]
            width = len(entry["data"]) // size
            rows = [entry["data"][k * width:(k + 1) * width] for k in range(size)]
        else:
            rows = [flat(row) for row in body["data"]["images"]]
            last = {"shape": depth(body["data"]["images"]), "data": flat(rows)}
        if now["layout"] == "nhwc":
            rows = [channels_first(row) for row in rows]
        with lock:
            seen["rows"] += len(rows)
            seen["requests"] += 1
            seen["times"].append(time.monotonic())
            seen["sizes"].append(len(rows))
            seen["last"] = last
            seen["auth"].append(self.headers.get("Authorization"))
            seen["keys"].append(self.headers.get("X-Key"))
            seen["busy"] += 1
            seen["most"] = max(seen["most"], seen["busy"])
            fault = now["faults"].pop(0) if now["faults"] else now["lasting"]
            if now["die_at"] and seen["requests"] >= now["die_at"]:
                fault = {"die": True}
        try:
            self.respond(rows, fault or {})
        finally:
            with lock:
                seen["busy"] -= 1

    def respond(self, rows, fault):
        time.sleep(fault.get("slow", 0) + fault.get("first_slow", 0) * (rows[0][0] == 0.25))
        if "status" in fault:
            retry = [("Retry-After", fault["retry"])] if "retry" in fault else []
            text = fault.get("body", "no") + (str(self.headers.get("Authorization")) if fault.get("echo") else "")
            return self.send(fault["status"], text, retry)
        if any(row[0] == 0.125 for row in rows):
            return self.send(422, {"error": "poisoned image"})
        if any(row[0] == 0.625 for row in rows):
            return self.send(500, {"error": "no room"})
        said = answer(rows)
        if "short" in fault:
            said = said[:-1]
        if "wide" in fault:
            said = [each[:-1] for each in said]
        if "nan" in fault:
            said = [[math.nan] * 10 for _ in said]
        size = [len(said), len(said[0])] if said and isinstance(said[0], list) else [len(said)]
        found = {"outputs": [{"name": "out", "datatype": "FP32", "shape": size, "data": flat(said)}]}
        if now["form"] != "v2":
            found = {"result": [{"scores": each} for each in said]}
        whole = json.dumps(found)
        if "half" in fault or "die" in fault:
            self.send(200, whole[:len(whole) // 2], length=len(whole))
            self.close_connection = True
            if "die" in fault:
                os._exit(3)
            return None
        if "bare_half" in fault:
            return self.send(200, whole[:len(whole) // 2])
        if "html" in fault:
            return self.send(200, "<html><body>It works!" + "x" * 500 + "</body></html>")
        return self.send(200, whole)

begin()
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""


class Server:
    """The process, and what it is told and asked beside the protocol."""

    def __init__(self, weights, port=0):
        command = [sys.executable, "-S", "-E", "-c", inspect.getsource(scores) + SERVER, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdin.write(json.dumps(weights) + "\n")
        self.process.stdin.flush()
        self.port = int(self.process.stdout.readline())
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v2/models/m"

    def tell(self, **settings):
        """Behave otherwise from now on; without settings, as in the beginning."""
        request = urllib.request.Request(f"{self.root}/control", json.dumps(settings or None).encode())
        with urllib.request.urlopen(request, timeout=5) as answer:
            answer.read()

    @property
    def seen(self):
        """What the server counted."""
        with urllib.request.urlopen(f"{self.root}/stats", timeout=5) as answer:
            return json.load(answer)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def serving(weights, port=0):
    server = Server(weights, port)
    try:
        yield server
    finally:
        server.stop()


class Local:
    """The same model in this process; scores only."""

    access, bounds = Access.SCORE, (0.0, 1.0)

    def __init__(self, weights):
        self.weights = weights

    def query(self, x, access):
        logits = torch.tensor([scores(self.weights, row) for row in x.flatten(1).tolist()]).float()
        return Prediction(logits.argmax(1), logits if access >= Access.SCORE else None)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (
        "SPARRING_HTTP_TOKEN",
        "SPARRING_HTTP_HEADERS",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def weights(digits):
    """The nearest mean of the digits, as a linear model."""
    x, y = digits[0][:1500].flatten(1).double(), digits[1][:1500]
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return torch.cat([4 * means, -2 * (means**2).sum(1, keepdim=True)], 1).tolist()


@pytest.fixture(scope="module")
def running(weights):
    with serving(weights) as server:
        yield server


@pytest.fixture
def server(running):
    running.tell()
    return running


@pytest.fixture(scope="module")
def local(weights):
    return Local(weights)


def images(rows=20, shape=(1, 8, 8), seed=0):
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(seed))


def marked(rows, **first):
    """Images whose first pixel is set: `marked(9, at=..., to=...)`."""
    x = images(rows)
    x[first["at"], 0, 0, 0] = first["to"]
    return x


def same(one, two):
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.logits, two.logits)


FAST = {"backoff": 0.002, "retries": 3}
PLAIN = {"input": "data.images", "output": "result.scores"}


# The same answers


def test_the_served_model_says_what_the_local_one_says(server, local):
    x = images()
    with ServedModel(server.url, batch=7) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert model.query(x, Access.DECISION).logits is None
        assert model.access == Access.SCORE
        assert model.queries == server.seen["rows"] == 40
    assert server.seen["sizes"] == [7, 7, 6] * 2


@pytest.mark.parametrize(
    ("shape", "layout"), [([-1, 16, 2, 2], "nchw"), ([-1, 2, 2, 16], "nhwc"), ([-1, 64], "flat")]
)
def test_the_layout_is_what_the_metadata_say(shape, layout, server, local):
    server.tell(shape=shape, layout=layout)
    x = images(5, (16, 2, 2))
    with ServedModel(server.url) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
    assert server.seen["last"]["shape"] == [5, *shape[1:]]
    server.tell(form="json")
    with JsonModel({"url": f"{server.root}/predict", "layout": layout, **PLAIN}) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
    assert server.seen["last"]["shape"] == [5, *shape[1:]]
    pixels = x.permute(0, 2, 3, 1) if layout == "nhwc" else x
    assert server.seen["last"]["data"] == pixels.flatten().tolist()


def test_a_fixed_batch_of_one_is_kept(server, local):
    server.tell(shape=[1, 64])
    with ServedModel(server.url) as model:
        same(model.query(images(3), Access.SCORE), local.query(images(3), Access.SCORE))
    assert server.seen["sizes"] == [1, 1, 1]


def test_probabilities_and_labels(server, local):
    x = images()
    wanted = local.query(x, Access.SCORE)
    server.tell(kind="probabilities")
    with ServedModel(server.url, kind="probabilities") as model:
        torch.testing.assert_close(model.query(x, Access.SCORE).logits, wanted.logits.log_softmax(1))
    server.tell(kind="labels")
    with ServedModel(server.url, kind="labels") as model:
        answer = model.query(x, Access.SCORE)
        assert model.access == Access.DECISION
        assert answer.logits is None
        assert torch.equal(answer.labels, wanted.labels)


def test_scale_mean_and_std_are_part_of_the_model(server, local):
    server.tell(form="json")
    x = images()
    endpoint = {"url": f"{server.root}/predict", "scale": 255, **PLAIN}
    with JsonModel(endpoint, mean=[0.25], std=[0.5]) as model:
        same(model.query(x, Access.SCORE), local.query((x - 0.25) / 0.5 * 255, Access.SCORE))
    assert server.seen["last"]["data"] == ((x - 0.25) / 0.5 * 255).flatten().tolist()


def test_equal_rows_are_sent_once(server, local):
    x = images(6)[[0, 1, 2, 2, 2, 1]]
    with ServedModel(server.url) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert model.queries == server.seen["rows"] == 3


# Several at once, within a rate and a number


def test_answers_come_in_order_however_long_each_takes(server, local):
    x = marked(40, at=0, to=0.25)  # the request with this row is the slowest
    server.tell(lasting={"first_slow": 0.4, "slow": 0.05})
    with ServedModel(server.url, batch=4, concurrency=5) as model:
        began = time.monotonic()
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert time.monotonic() - began < 0.9  # one after the other: 10 x 0.05 + 0.4
        assert model.queries == server.seen["rows"] == 40
    assert 2 <= server.seen["most"] <= 5


def test_the_rate_is_kept(server):
    with ServedModel(server.url, batch=2, concurrency=4, rate=20) as model:
        model.query(images(16), Access.SCORE)
    times = server.seen["times"]
    assert len(times) == 8
    assert times[-1] - times[0] >= 7 / 20 - 0.03
    assert times[-1] - times[0] < 2


def test_a_query_that_is_too_large_sends_nothing(server):
    with ServedModel(server.url, batch=4, max_queries=30) as model:
        model.query(images(20), Access.SCORE)
        with pytest.raises(
            OutOfQueriesError, match=r"at most 30 rows .* got 11 to send after 20; raise max_queries"
        ) as told:
            model.query(images(11, seed=1), Access.SCORE)
        assert model.queries == server.seen["rows"] == 20
        assert told.value.exit_code == 3
        assert not isinstance(told.value, ModelError)  # or it would be taken for a failing image
        model.query(images(10, seed=2), Access.SCORE)
        assert model.queries == server.seen["rows"] == 30


def test_retries_count_and_never_go_beyond_what_may_be_sent(server):
    server.tell(lasting={"status": 503})
    with ServedModel(server.url, batch=5, concurrency=8, max_queries=64, retries=8, backoff=0.001) as model:
        with pytest.raises(OutOfQueriesError):
            model.query(images(60), Access.SCORE)
        assert 60 <= model.queries == server.seen["rows"] <= 64


def test_queries_of_many_threads_stay_within_the_number(server):
    with ServedModel(server.url, batch=2, concurrency=2, max_queries=50) as model:
        model.query(images(2), Access.DECISION)

        def one(seed):
            try:
                model.query(images(4, seed=seed), Access.SCORE)
            except OutOfQueriesError:
                return 0
            return 1

        with ThreadPoolExecutor(6) as pool:
            served = sum(pool.map(one, range(1, 31)))
        assert served <= 12 < 30
        assert model.queries == server.seen["rows"] <= 50


def test_rows_that_never_left_are_not_counted(weights):
    with serving(weights) as server, ServedModel(server.url, **FAST) as model:
        model.query(images(3), Access.SCORE)
        server.stop()
        with pytest.raises(ServerError, match="tried 4 times"):
            model.query(images(4, seed=1), Access.SCORE)
        assert model.queries <= 7  # the first try may have gone out on the connection that was open


# Failures that pass


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 502},
        {"status": 503},
        {"status": 504},
        {"status": 429},
        {"half": 1},
        {"bare_half": 1},
    ],
    ids=str,
)
def test_a_failure_that_passes_is_tried_again(fault, server, local):
    server.tell(faults=[fault, fault])
    x = images(6)
    with ServedModel(server.url, **FAST) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert model.queries == server.seen["rows"] == 18


def test_the_waits_double(server):
    server.tell(faults=[{"status": 500}] * 3)
    with ServedModel(server.url, backoff=0.1, retries=3) as model:
        model.query(images(1), Access.SCORE)
    times = server.seen["times"]
    gaps = [after - before for before, after in pairwise(times)]
    assert len(gaps) == 3
    for gap, least in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert least - 0.01 <= gap < 1.5 * least + 0.3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_a_server_asks_for_is_kept_by_all(form, server, local, monkeypatch):
    class Clock(datetime):  # a date is in whole seconds: half a second before one
        @classmethod
        def now(cls, tz):
            return datetime(2026, 1, 1, 0, 0, 0, 500_000, tz)

    monkeypatch.setattr("sparring.models.line.datetime", Clock)
    wanted = format_datetime(datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC), usegmt=True)
    server.tell(faults=[{"status": 429, "retry": "0.5" if form == "seconds" else wanted}], lasting={"slow": 0.05})
    x = images(12)
    with ServedModel(server.url, batch=2, concurrency=2, **FAST) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
    times = sorted(server.seen["times"])
    early = [each for each in times if each - times[0] < 0.4]
    assert len(early) <= 3  # what was in flight when the pause began
    assert 0.475 <= times[len(early)] - times[0] < 2


def test_too_long_a_pause_ends_the_run(server, monkeypatch):
    monkeypatch.setattr("sparring.models.line.PATIENCE", 1.0)
    server.tell(lasting={"status": 429, "retry": "2"})
    with ServedModel(server.url, retries=1) as model, pytest.raises(ServerError, match="wants a pause of 2 s"):
        model.query(images(1), Access.SCORE)
    assert server.seen["requests"] == 1


def test_a_server_that_is_too_slow(server, local):
    server.tell(faults=[{"slow": 0.5}])
    x = images(3)
    with ServedModel(server.url, timeout=0.2, **FAST) as model:
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert model.queries == server.seen["rows"] == 6
        server.tell(lasting={"slow": 0.5})
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"/infer: expected an answer, got ReadTimeout.*tried 4 times"):
            model.query(images(3, seed=1), Access.SCORE)
        assert 0.8 <= time.monotonic() - began < 1.8


# Failures that last


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        ({"status": 503, "body": "overloaded"}, 4, r"/infer: status 503, body 'overloaded'; tried 4 times"),
        ({"status": 500}, 4, r"/infer: status 500, body 'no'; tried 4 times; it fails at a plain grey image"),
        ({"status": 401, "body": "who?"}, 1, r"status 401, body 'who\?'; set SPARRING_HTTP_TOKEN"),
        ({"status": 404, "body": "nothing"}, 1, r"status 404, body 'nothing'; check the URL"),
        ({"status": 307, "body": "over there"}, 1, r"status 307, body 'over there'"),
        ({"half": 1}, 4, r"expected an answer, got RemoteProtocolError .*tried 4 times"),
        ({"bare_half": 1}, 4, r"status 200, body '.*: expected JSON, got a part of it; tried 4 times"),
        ({"html": 1}, 1, r"status 200, body '<html><body>It works!x+': expected JSON; check the URL"),
        ({"short": 1}, 1, r"status 200, body '.*got numbers \(5, 10\), expected 6 rows of 2 or more logits"),
    ],
    ids=str,
)
def test_a_failure_that_lasts_ends_the_run_and_blames_no_image(fault, tries, message, server):
    server.tell(lasting=fault)
    with ServedModel(server.url, **FAST) as model:
        with pytest.raises(ServerError, match=message) as told:
            ask(model, images(6), Access.SCORE)  # a ModelError would be an answer here, with six failed rows
        grey = tries if fault.get("status", 0) >= 500 else 0  # tried as well, before it is the images' fault
        assert server.seen["sizes"] == [6] * tries + [1] * grey
        assert model.queries == server.seen["rows"] == 6 * tries + grey
    assert isinstance(told.value, IncompleteError)
    assert told.value.exit_code == 3
    assert str(told.value).startswith(f"POST {server.url}/infer: ")
    assert len(str(told.value)) < 200 + 250


def test_another_number_of_classes_ends_the_run(server):
    with ServedModel(server.url, **FAST) as model:
        model.query(images(2), Access.SCORE)
        server.tell(lasting={"wide": 1})
        with pytest.raises(ServerError, match=r"got numbers \(2, 9\), expected 2 rows of 10 logits"):
            model.query(images(2, seed=1), Access.SCORE)


@pytest.mark.parametrize(
    ("kind", "message"), [("probabilities", "are they logits"), ("labels", "a class number from 0")]
)
def test_an_output_of_another_kind_ends_the_run(kind, message, server):
    with ServedModel(server.url, kind=kind) as model, pytest.raises(ServerError, match=message):
        model.query(images(2), Access.SCORE)


def test_one_failure_stops_the_other_requests_of_a_query(server):
    server.tell(faults=[{"status": 403}], lasting={"slow": 0.1})
    with ServedModel(server.url, batch=1, concurrency=2, **FAST) as model:
        with pytest.raises(ServerError, match="status 403"):
            model.query(images(40), Access.SCORE)
        assert server.seen["requests"] <= 6


def test_a_server_gone_bad_is_not_taken_for_bad_images(server, local):
    """It refuses whatever comes; that it answered one of the images before gives it away."""
    for fault in ({"status": 400}, {"nan": 1}, {"status": 500}):
        server.tell(lasting=None)
        with ServedModel(server.url, **FAST) as model:
            same(ask(model, images(4), Access.SCORE).prediction, local.query(images(4), Access.SCORE))
            server.tell(lasting=fault)
            with pytest.raises(ServerError, match="it answered this image before"):
                ask(model, images(4, seed=1), Access.SCORE)


def test_a_server_that_fails_while_the_culprit_is_looked_for(server, local):
    batch, fine = [{"status": 500}] * 4, None
    x = images(4)
    with ServedModel(server.url, **FAST) as model:
        # It was the server's after all: the halves are answered, one of them after the pause that it asks for.
        server.tell(faults=[*batch, fine, {"status": 503, "retry": "0.1"}])
        same(model.query(x, Access.SCORE), local.query(x, Access.SCORE))
        assert server.seen["sizes"] == [4, 4, 4, 4, 1, 2, 2, 2]
        # It goes on to fail at whatever comes.
        server.tell(faults=[*batch, fine], lasting={"status": 500})
        with pytest.raises(ServerError, match="tried 4 times; it answered this image before"):
            ask(model, images(4, seed=1), Access.SCORE)
        assert model.queries == server.seen["rows"] == 23 + 4 * 4 + 1 + 2 + 4


# What is an image's own


@pytest.mark.parametrize(
    ("pixel", "why"),
    [
        (POISON, "status 422, body .*poisoned image"),
        (HOLLOW, "expected finite"),
        (FATAL, "status 500, body .*no room.*; tried 4 times, while it answers another image"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_an_image_the_server_refuses_fails_alone_and_no_answer_is_asked_for_twice(
    concurrency, pixel, why, server, local
):
    x = marked(16, at=5, to=pixel)
    with ServedModel(server.url, batch=8, concurrency=concurrency, **FAST) as model:
        answer = ask(model, x, Access.SCORE)
        assert list(answer.failed) == [5]
        with pytest.raises(ModelError, match=why):
            model.query(x[5:6], Access.SCORE)
        rest = [row for row in range(16) if row != 5]
        assert torch.equal(answer.prediction.logits[rest], local.query(x[rest], Access.SCORE).logits)
        # refused: 8 rows, then 4 + 4, 2 + 2, 1 + 1 of them; NaN comes with the answers of the others; retries are
        # for the batch and for the culprit, and after each of 4 failures the server is asked for another image
        extra = {POISON: 8 + 4 + 2, HOLLOW: 0, FATAL: 8 + 4 + 2 + 3 * 8 + 3 * 1 + 4}
        assert model.queries == server.seen["rows"] == 16 + extra[pixel]
        sent = model.queries
        same(model.query(x[rest], Access.SCORE), local.query(x[rest], Access.SCORE))
        assert model.queries == sent + 15  # an answer is not kept for longer than the search for the culprit


# Credentials


@pytest.mark.parametrize("way", ["token", "headers"])
def test_credentials_are_sent_and_told_to_nobody(way, server, monkeypatch, tmp_path):
    if way == "token":
        monkeypatch.setenv("SPARRING_HTTP_TOKEN", f"{TOKEN}\n")
    else:
        monkeypatch.setenv(
            "SPARRING_HTTP_HEADERS", json.dumps({"Authorization": f"Bearer {TOKEN}", "X-Key": "k" * 9})
        )
    with ServedModel(f"{server.url}?key={TOKEN}", **FAST) as model:
        model.query(images(2), Access.SCORE)
        assert server.seen["auth"] == [f"Bearer {TOKEN}"]
        assert server.seen["keys"] == [None if way == "token" else "k" * 9]
        told = [repr(model), str(model)]
        for fault in ({"status": 403}, {"status": 503}, {"status": 400}):
            server.tell(lasting={**fault, "body": "x" * 180, "echo": True})  # the cut falls into the token
            with pytest.raises((ServerError, ModelError)) as error:
                model.query(images(2, seed=1), Access.SCORE)
            assert "x" * 180 in str(error.value)
            told += [str(error.value), repr(error.value), str(error.getrepr(showlocals=False, chain=True))]
    assert not [text for text in told if TOKEN[:8] in text or "kkk" in text]
    assert "***" in told[2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SPARRING_HTTP_TOKEN", "s3cret\ntoken"),
        ("SPARRING_HTTP_TOKEN", "s3crét"),
        ("SPARRING_HTTP_HEADERS", "s3cret"),
        ("SPARRING_HTTP_HEADERS", '["s3cret"]'),
        ("SPARRING_HTTP_HEADERS", '{"s3cret": 1}'),
        ("SPARRING_HTTP_HEADERS", '{"s3cret key": "a"}'),
    ],
)
def test_credentials_that_cannot_be_sent_are_named_and_not_repeated(name, value, server, monkeypatch):
    monkeypatch.setenv(name, value)
    with ServedModel(server.url) as model, pytest.raises(UsageError, match="SPARRING_HTTP_") as told:
        model.query(images(1), Access.SCORE)
    assert "s3cr" not in str(told.value)
    assert server.seen["requests"] == 0


# Mistakes


def test_mistakes_are_named(server):
    with pytest.raises(UsageError, match="unknown option 'retry'; did you mean 'retries'"):
        ServedModel(server.url, retry=3)
    with pytest.raises(UsageError, match="expected batch of at least 1, got 0"):
        ServedModel(server.url, batch=0)
    with pytest.raises(UsageError, match="expected rate above 0, got 0"):
        ServedModel(server.url, rate=0)
    with pytest.raises(UsageError, match="unknown kind 'logit'; did you mean 'logits'"):
        ServedModel(server.url, kind="logit")
    with pytest.raises(UsageError, match="unknown layout 'nhcw'"):
        JsonModel({"url": server.root, "layout": "nhcw"})
    with pytest.raises(UsageError, match="unknown field of an endpoint 'outputs'; did you mean 'output'"):
        JsonModel({"url": server.root, "outputs": "x"})
    with pytest.raises(UsageError, match="expected an endpoint with a url"):
        JsonModel({"input": "x"})
    for url in ("localhost:8000", "ftp://host/x", "http://host:port/x", "http://"):
        with pytest.raises(UsageError, match="expected a URL such as"):
            ServedModel(url)
    with pytest.raises(UsageError, match="without credentials") as told:
        ServedModel("http://me:s3cret@host/v2/models/m")
    assert "s3cret" not in str(told.value)
    with ServedModel(server.url, output="probs") as model, pytest.raises(UsageError, match="unknown output 'probs'"):
        model.query(images(1), Access.SCORE)
    with (
        ServedModel(server.url) as model,
        pytest.raises(UsageError, match=r"an input of \[-1, 64\], got \(3, 8, 8\)"),
    ):
        model.query(images(1, (3, 8, 8)), Access.SCORE)
    server.tell(form="json")
    with (
        JsonModel({"url": server.root, **PLAIN, "output": "result.logits"}) as model,
        pytest.raises(ServerError, match=r"expected logits of 2 rows, got nothing at 'logits'"),
    ):
        model.query(images(2), Access.SCORE)


def test_without_httpx_the_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UsageError, match=r"pip install 'sparring\[http\]'"):
        ServedModel("http://127.0.0.1:9/v2/models/m").query(images(1), Access.SCORE)


# An audit


@pytest.fixture(scope="module")
def twenty(digits, local):
    """20 test digits, two of which the model reads wrong."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = local.query(x, Access.DECISION).labels == y
    at = torch.cat([right.nonzero()[:18], (~right).nonzero()[:2]]).squeeze(1)
    return x[at], y[at]


EPS = Linf(0.12)


@pytest.fixture(scope="module")
def whole(twenty, local, tmp_path_factory):
    """What the audit of the local model finds: every verdict, and the bytes of every image."""
    return known(audit(local, twenty, EPS, profile="quick", width=16, out=tmp_path_factory.mktemp("local")))


def known(result):
    assert result.complete
    found = result.witnesses()
    verdicts = {row: str(verdict) for row, verdict in result.verdicts().items()}
    return verdicts, {row: image.numpy().tobytes() for row, image in found.items()}, result.figures["counts"]


def test_an_audit_over_the_socket_equals_the_one_at_home(server, twenty, whole, tmp_path):
    with ServedModel(server.url, batch=16) as model:
        assert known(audit(model, twenty, EPS, profile="quick", width=16, out=tmp_path)) == whole
        assert model.queries == server.seen["rows"] > 1000
    assert set(whole[0].values()) == {Verdict.MISCLASSIFIED, Verdict.BROKEN, Verdict.UNDECIDED}


def test_an_audit_that_is_out_of_queries_and_whose_server_dies_goes_on(weights, twenty, whole, tmp_path):
    options = {"profile": "quick", "width": 16, "out": tmp_path}

    def shards():
        return {path.name: path.read_bytes() for path in (tmp_path / "evidence/rows").glob("*.json")}

    with serving(weights) as server:
        port = server.port
        with ServedModel(server.url, batch=16, max_queries=200) as model:
            with pytest.raises(OutOfQueriesError, match="raise max_queries"):
                audit(model, twenty, EPS, **options)
            assert 150 < model.queries == server.seen["rows"] <= 200
        first = shards()

        def die(stage, done, rows):
            if stage not in ("clean images", "square"):
                server.tell(die_at=server.seen["requests"] + 10)

        with (
            ServedModel(server.url, batch=16, **FAST) as model,
            pytest.raises(ServerError, match=f"127.0.0.1:{port}.*tried 4 times") as told,
        ):
            audit(model, twenty, EPS, **options, tell=die)
        assert told.value.exit_code == 3
        assert server.process.wait(5) == 3
    second = shards()
    assert {name[:2] for name in first} == {"00"}
    assert {name[:2] for name in second} >= {"00", "01"}
    assert not (tmp_path / "result.json").exists()
    with serving(weights, port) as server, ServedModel(server.url, batch=16, **FAST) as model:
        assert known(audit(model, twenty, EPS, **options)) == whole
    assert (first | second).items() <= shards().items()  # what was found before was not done again


def test_an_audit_is_not_taken_up_with_another_server(server, twenty, tmp_path):
    options = {"profile": "quick", "width": 16, "out": tmp_path}
    for url in (server.url, f"{server.url}?key={TOKEN}"):  # a new key is no other model
        with ServedModel(url, max_queries=100) as model, pytest.raises(OutOfQueriesError):
            audit(model, twenty, EPS, **options)
    with (
        ServedModel(f"{server.root}/v2/models/n", max_queries=100) as model,
        pytest.raises(UsageError, match=r"another model_digest .*models/m'.*, now .*models/n'.*another --out"),
    ):
        audit(model, twenty, EPS, **options)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


# On the command line


@pytest.fixture
def folder(twenty, tmp_path):
    """Two data sets: eight of the twenty images, and the same with one that breaks the server as the last."""
    x, y = twenty
    fatal = x[:8].clone()
    fatal[7, 0, 0, 0] = FATAL
    for name, test in (("fine", x[:8]), ("fatal", fatal)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "train.npz", x=x, y=y)
        np.savez(tmp_path / name / "test.npz", x=test, y=y[:8])
    return tmp_path


def counts(whole, rows):
    """How many of the first rows have which verdict."""
    verdicts = [whole[0][row] for row in range(rows)]
    return {verdict: verdicts.count(verdict) for verdict in whole[2]}


@pytest.fixture
def sparring(monkeypatch, capsys):
    """The program: words in; exit code, standard output and standard error out."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sparring", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


AUDIT = ("--eps", "0.12", "--profile", "quick", "--width", "16", "--json")


def test_an_audit_out_of_queries_goes_on_with_more(server, folder, whole, sparring):
    words = ("audit", f"{server.url}?key={TOKEN}", "--data", folder / "fine", *AUDIT, "--out", folder / "r")
    code, out, err = sparring(*words, "--max-queries", "150")
    assert (code, out) == (3, "")
    assert 130 < server.seen["rows"] <= 150
    assert f"{server.seen['rows']} images sent to {server.url}, retries included" in err
    assert f"the same command with --out {folder / 'r'} goes on" in " ".join(err.split())
    assert "raise max_queries (--max-queries)" in err
    server.tell()
    code, out, _ = sparring(*words, "--max-queries", "100000")
    said = json.loads(out)
    assert code == 0
    assert said["counts"] == counts(whole, 8)
    assert said["queries"] == server.seen["rows"] > 1000
    events = [json.loads(line) for line in (folder / "r" / "events.jsonl").read_text().splitlines()]
    sent = [event["sent"] for event in events if event["event"] == "queries"]
    assert sent[0] <= 150 < sent[1] == said["queries"]
    files = [path for path in (folder / "r").rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_an_image_that_breaks_the_server_has_no_verdict_and_the_others_do(server, folder, whole, sparring):
    served = f"from sparring.models.http import ServedModel\nserved = lambda: ServedModel({server.url!r}, **{FAST})"
    (folder / "net.py").write_text(served)
    words = ("audit", f"{folder / 'net.py'}:served", "--data", folder / "fatal", *AUDIT, "--out", folder / "r")
    code, out, err = sparring(*words, "--max-queries", "100000")
    said = json.loads(out)
    assert code == 3
    assert said["counts"] == {**counts(whole, 7), "error": 1}
    assert list(said["errors"]) == ["7"]
    assert "status 500" in said["errors"]["7"]
    assert "1 of 8 rows have no verdict" in err
    assert said["queries"] == server.seen["rows"]


def test_an_attack_stays_within_its_queries(server, folder, sparring):
    words = ("attack", server.url, "--attack", "square", "--data", folder / "fine", "--eps", "0.12", "--width", "16")
    code, _, err = sparring(*words, "--max-queries", "130", "--out", folder / "r")
    assert code == 3
    assert "expected to send at most 130 rows" in err
    assert 110 < server.seen["rows"] <= 130


def test_what_a_served_model_cannot_do_is_told(server, folder, sparring):
    server.tell(form="json", kind="labels")
    endpoint = {"url": f"{server.root}/predict", "kind": "labels", **PLAIN}
    (folder / "served.json").write_text(json.dumps(endpoint))
    (folder / "net.py").write_text("def net():\n    import torch\n    return torch.nn.Flatten()")
    shared = ("--data", folder / "fine", "--eps", "0.1")
    cases = (
        (("attack", folder / "served.json", "--attack", "square"), 4, "square needs SCORE access"),
        (("attack", folder / "served.json", "--attack", "pgd"), 4, "the model gives DECISION"),
        (("audit", folder / "served.json"), 4, "an audit needs at least scores"),
        (("attack", f"{folder}/net.py:net", "--attack", "pgd", "--max-queries", 9), 2, "expected a served model for"),
        (("audit", f"{folder}/net.py:net", "--max-queries", 9), 2, "expected a served model for --max-queries, got"),
    )
    for number, (words, status, message) in enumerate(cases):
        code, _, err = sparring(*words, *shared, "--out", folder / str(number))
        assert (code, message in err) == (status, True), err
