"""What a run on many GPUs and a sweep of many trials would take: a step model and a discrete-event simulation.

Nothing here measures anything or imports the project: `scaling.py` measures the constants, this file reckons with them.
Times are in seconds, sizes in bytes, rates in bytes a second.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

CHECKPOINTS_AT_ONCE = 3  # of a running trial: the last, the best, and the one that is being written


@dataclass(frozen=True)
class Constants:
    """What the simulation reckons with; `scaling.py` says where each default comes from."""

    train_image_s: float = 0.46
    eval_image_s: float = 1.0
    decode_image_s: float = 0.035
    state_bytes: float = 1.5e9
    gradient_bytes: float = 0.37e9
    serialise_rate: float = 250e6
    startup_s: float = 18.0
    collective_s: float = 50e-6
    overlap: float = 0.2
    driver_event_s: float = 0.01
    journal_put_s: float = 0.004
    suggest_s: float = 0.02
    suggest_trial_s: float = 2e-4
    display_trial_s: float = 5e-5
    monitor_call_s: float = 1e-3
    monitor_calls_a_second: float = 3.0
    mlflow_batch_s: float = 0.03
    mlflow_point_s: float = 0.00054
    mlflow_open_s: float = 1.1
    final_trial_s: float = 0.01


@dataclass(frozen=True)
class Scenario:
    """A machine park and what is to be done on it. `batch`: the global batch of a run; `mtbf_hours`: of one node."""

    gpus: int = 8
    gpus_a_node: int = 8
    gpus_a_trial: int = 1
    batch: int = 4
    steps: int = 32_000
    eval_every: int = 2_000
    eval_images: int = 1_449
    checkpoint_every: int = 1_000
    log_every: int = 50
    points_a_log: int = 25
    loaders: int = 2
    dataset_bytes: float = 2e9
    trials: int = 0
    mlflow_workers: int = 2
    network_rate: float = 3e9
    link_rate: float = 2e10
    storage_rate: float = 1e9
    mtbf_hours: float = 1_000.0
    suggests: bool = True

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.gpus_a_node)


@dataclass
class Station:
    """A queue before `servers` that serve in the order of arrival; counts what a test can check."""

    clock: Clock
    servers: int = 1
    busy: int = 0
    busy_s: float = 0.0
    arrived: int = 0
    served: int = 0
    longest: int = 0
    waits: list[float] = field(default_factory=list)
    _queue: deque[tuple[float, float, Callable[[], None]]] = field(default_factory=deque)

    def ask(self, service: float, then: Callable[[], None] = lambda: None) -> None:
        """Have something served that takes so long, and go on with `then`."""
        self.arrived += 1
        self._queue.append((self.clock.now, service, then))
        self.longest = max(self.longest, len(self._queue))
        self._serve()

    def _serve(self) -> None:
        while self._queue and self.busy < self.servers:
            since, service, then = self._queue.popleft()
            self.busy += 1
            self.busy_s += service
            self.waits.append(self.clock.now - since)
            self.clock.after(service, lambda then=then: self._served(then))  # type: ignore[misc]

    def _served(self, then: Callable[[], None]) -> None:
        self.busy -= 1
        self.served += 1
        then()
        self._serve()

    def wait(self, share: float | None = None) -> float:
        """Mean wait before service, or the quantile `share` of it."""
        if not self.waits:
            return 0.0
        if share is None:
            return sum(self.waits) / len(self.waits)
        return sorted(self.waits)[int(share * (len(self.waits) - 1))]

    def used(self) -> float:
        """Share of the time that the servers worked."""
        return self.busy_s / (self.servers * self.clock.now) if self.clock.now else 0.0


class Link:
    """A rate that all transfers share evenly, each at most at its own: what everyone has got so far is one number."""

    def __init__(self, clock: Clock, rate: float, each: float = math.inf) -> None:
        self._clock, self._rate, self._each = clock, rate, each
        self._got = self._since = 0.0
        self._open: list[tuple[float, int, float, Callable[[], None]]] = []
        self._order, self._version = itertools.count(), 0
        self.bytes = 0.0
        self.seconds: list[float] = []

    def send(self, size: float, then: Callable[[], None]) -> None:
        """Transfer so many bytes, and go on with `then`."""
        self._advance()
        self.bytes += size
        heapq.heappush(self._open, (self._got + size, next(self._order), self._clock.now, then))
        self._plan()

    def _speed(self) -> float:
        return min(self._each, self._rate / len(self._open)) if self._open else 0.0

    def _advance(self) -> None:
        self._got += self._speed() * (self._clock.now - self._since)
        self._since = self._clock.now

    def _plan(self) -> None:
        self._version += 1
        if self._open:
            version = self._version
            left = max(0.0, self._open[0][0] - self._got) / self._speed()
            self._clock.after(left, lambda: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return  # something was sent since this was planned
        self._advance()
        _, _, began, then = heapq.heappop(self._open)
        self.seconds.append(self._clock.now - began)
        self._plan()
        then()


class Clock:
    """The time, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen so many seconds from now."""
        heapq.heappush(self._events, (self.now + seconds, next(self._order), event))

    def run(self) -> None:
        """Let everything happen."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


def step_parts(known: Constants, at: Scenario, workers: int) -> dict[str, float]:
    """Seconds of a step of one run on so many GPUs, by part, what happens now and then shared out over the steps.

    The gradients go round a ring, hidden behind the backward pass as far as that lasts; the global batch stays as it
    is, so that workers get fewer images each, and the slowest has the rounded-up share.
    """
    if not 1 <= workers <= at.batch:
        raise ValueError(f"a global batch of {at.batch} has work for 1 to {at.batch} GPUs, not for {workers}")
    images = -(-at.batch // workers)
    compute = images * known.train_image_s
    rate = at.link_rate if workers <= at.gpus_a_node else at.network_rate
    rounds = math.ceil(math.log2(workers)) if workers > 1 else 0
    ring = 2 * (workers - 1) / workers * known.gradient_bytes / rate + 2 * rounds * known.collective_s
    # Flags, pixel counts and histograms: kilobytes, so their time is latency.
    small = 4 * 2 * rounds * known.collective_s
    every_image = images * known.decode_image_s
    data = max(0.0, every_image / at.loaders - compute) if at.loaders else every_image
    most = -(-at.eval_images // workers)  # images of the rank that has most
    writes = known.state_bytes * (1 / known.serialise_rate + 1 / min(at.storage_rate, at.network_rate))
    kept = 1 / at.checkpoint_every + (1 / at.eval_every if at.eval_every % at.checkpoint_every else 0)
    parts = {
        "compute": compute,
        "gradients": max(0.0, ring - known.overlap * compute),
        "small sums": small,
        "data wait": data,
        "evaluation": most * known.eval_image_s / at.eval_every,
        "checkpoints": writes * kept,
    }
    step = sum(parts.values())
    # A failure of a node costs a start and, on average, half of the steps between two checkpoints.
    failures = -(-workers // at.gpus_a_node) * step / (3600 * at.mtbf_hours)
    return {**parts, "failures": failures * (known.startup_s + at.checkpoint_every * step / 2)}


def cache_seconds(at: Scenario) -> float:
    """Seconds until every node has its copy of the dataset, all at once from the same storage."""
    return at.dataset_bytes / min(at.network_rate, at.storage_rate / at.nodes)


@dataclass(frozen=True)
class SweepOutcome:
    """What a simulated sweep came to; shares are of the time, waits in seconds. `ideal`: if nothing ever waited."""

    trials: int
    at_once: int
    hours: float
    ideal_hours: float
    driver_used: float
    driver_wait: float
    driver_p95: float
    monitor_used: float
    mlflow_used: float
    mlflow_p95: float
    mlflow_behind_s: float
    storage_used: float
    upload_s: float
    gpu_idle: float
    final_s: float
    display_used: float
    checkpoint_bytes: float

    @property
    def first(self) -> str:
        """What is nearest to its limit."""
        used = {
            "driver": self.driver_used,
            "monitor": self.monitor_used,
            "MLflow": self.mlflow_used,
            "storage": self.storage_used,
        }
        most = max(used, key=lambda name: used[name])
        return f"{most} ({100 * used[most]:.0f} %)"


def simulate_sweep(known: Constants, at: Scenario, bundles: int = 1) -> SweepOutcome:
    """Run a sweep's trials through its driver, the MLflow server and the storage.

    A trial starts (search, journal, Tune), takes `startup_s`, and then in turns trains, evaluates, writes a checkpoint
    while its workers wait, and reports. Logged points go to MLflow beside that; between two evaluations they go in
    `bundles`, whose service is that of the requests in them.
    """
    clock = Clock()
    driver, mlflow = Station(clock), Station(clock, at.mlflow_workers)
    storage = Link(clock, at.storage_rate, at.network_rate)
    workers = min(at.gpus_a_trial, at.batch)
    parts = step_parts(known, at, workers)
    pace = sum(parts[name] for name in ("compute", "gradients", "small sums", "data wait", "failures"))
    rounds = -(-at.steps // at.eval_every)
    evaluation = parts["evaluation"] * at.eval_every
    serialise = known.state_bytes / known.serialise_rate
    slots = max(1, min(at.trials, at.gpus // at.gpus_a_trial))
    logs = at.steps / at.log_every / rounds
    request = known.mlflow_batch_s + known.mlflow_point_s * at.points_a_log
    count = {"started": 0, "last": 0.0}
    kept = max(1, round(at.eval_every / at.checkpoint_every))
    upload_alone = known.state_bytes / min(at.storage_rate, at.network_rate)
    # Without waiting a trial takes this long; its start's and end's own service by the driver is part of it.
    begins, ends = 2 * known.journal_put_s + known.driver_event_s, known.journal_put_s + known.driver_event_s
    useful = rounds * (at.eval_every * pace + evaluation + kept * (serialise + upload_alone))
    alone = known.startup_s + begins + ends + useful

    def drive(service: float, then: Callable[[], None] = lambda: None) -> None:
        # The display's thread looks at all trials each second, under the lock that every event takes.
        driver.ask(service * (1 + known.display_trial_s * count["started"]), then)

    def start() -> None:
        if count["started"] >= at.trials:
            return
        number = count["started"]
        count["started"] += 1
        service = begins + (known.suggest_s + known.suggest_trial_s * number if at.suggests else 0.0)
        drive(service, lambda: clock.after(known.startup_s, lambda: opened()))

    def opened() -> None:
        mlflow.ask(known.mlflow_open_s)
        turn(rounds)

    def turn(left: int) -> None:
        if not left:
            drive(ends, end)
            return
        seconds = at.eval_every * pace + evaluation
        for bundle in range(bundles):
            clock.after((bundle + 1) * seconds / bundles, lambda: mlflow.ask(request * logs / bundles))
        clock.after(seconds, lambda: checkpoint(left, kept))

    def checkpoint(left: int, more: int) -> None:
        if not more:
            drive(known.driver_event_s + known.journal_put_s)
            turn(left - 1)
            return
        clock.after(serialise, lambda: storage.send(known.state_bytes, lambda: checkpoint(left, more - 1)))

    def end() -> None:
        count["last"] = clock.now
        start()

    for _ in range(slots):
        start()
    clock.run()
    total = count["last"]
    ideal = alone * -(-at.trials // slots)
    return SweepOutcome(
        trials=at.trials,
        at_once=slots,
        hours=total / 3600,
        ideal_hours=ideal / 3600,
        driver_used=driver.used(),
        driver_wait=driver.wait(),
        driver_p95=driver.wait(0.95),
        monitor_used=slots * known.monitor_calls_a_second * known.monitor_call_s,
        mlflow_used=mlflow.used(),
        mlflow_p95=mlflow.wait(0.95),
        mlflow_behind_s=max(0.0, clock.now - total),
        storage_used=storage.bytes / at.storage_rate / total if total else 0.0,
        upload_s=sum(storage.seconds) / len(storage.seconds) if storage.seconds else 0.0,
        gpu_idle=1 - at.trials * useful / (slots * total) if total else 0.0,
        display_used=(looks := known.display_trial_s * at.trials) / (1 + looks),
        final_s=known.final_trial_s * at.trials,
        # Those that have ended keep the weights, half of a state, of the last and the best.
        checkpoint_bytes=(slots * CHECKPOINTS_AT_ONCE + max(0, at.trials - slots)) * known.state_bytes,
    )


def simulate_server(known: Constants, runs: int, points: int, batch: int, workers: int) -> dict[str, float]:
    """Runs that hand over all their points as fast as MLflow takes them: points a second and the median of a batch."""
    clock = Clock()
    mlflow = Station(clock, workers)
    took: list[float] = []

    def send(left: int) -> None:
        if left <= 0:
            return
        size, began = min(batch, left), clock.now

        def done() -> None:
            took.append(clock.now - began)
            send(left - size)

        mlflow.ask(known.mlflow_batch_s + size * known.mlflow_point_s, done)

    for _ in range(runs):
        mlflow.ask(known.mlflow_open_s, lambda: send(points))
    clock.run()
    return {"points_a_second": runs * points / clock.now, "batch_median_s": sorted(took)[len(took) // 2]}


def validate(known: Constants) -> dict[str, dict[str, float]]:
    """What was measured before (README, docs/tracking.md) beside what the simulation says of it."""
    found: dict[str, dict[str, float]] = {}
    for runs, measured in ((1, 1_031), (4, 2_104), (16, 1_960)):
        said = simulate_server(known, runs, 3_000, 500, 2)["points_a_second"]
        found[f"MLflow, {runs} runs, points a second"] = {"measured": measured, "simulated": said}
    # Two trials share two cores: Tune with a trainer that does nothing took 18.0 s each, so 36 s a trial's own time.
    tiny = replace(known, startup_s=36.0, state_bytes=0.5e6, train_image_s=0.01, eval_image_s=0.02, decode_image_s=0.0)
    # The driver had two cores with them, and MLflow was a SQLite file: one request at a time.
    here = Scenario(gpus=2, gpus_a_node=2, steps=8, eval_every=8, eval_images=11, checkpoint_every=8, log_every=1)
    out = simulate_sweep(tiny, replace(here, trials=100, mlflow_workers=1, suggests=False))
    found["sweep of 100 trials, seconds a trial"] = {"measured": 20.1, "simulated": 3600 * out.hours / 100}
    for name, each in found.items():
        off = each["simulated"] / each["measured"] - 1
        print(f"{name}: measured {each['measured']:,}, simulated {each['simulated']:,.1f} ({100 * off:+.0f} %)")
    return found
