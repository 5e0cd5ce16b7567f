"""What a tracking store takes: points a second, how long a batch and a step wait, uploads, and the list of runs.

    python benchmarks/tracking_server.py --out tracking.json
    python benchmarks/tracking_server.py --stores server --runs 16 --steps 1000 --no-list

Two stores: `sqlite`, a file; `server`, MLflow with users (passwords checked once a minute, or for each request with
--check-always) on PostgreSQL that waits for the disk, artifacts through the server to S3 (moto, in memory), all on this
machine. Each of 1, 4 and 16 runs is a process with the tracker that training uses; it logs `--steps` steps of 15
metrics as fast as it can. A point counts once MLflow has accepted it: the time is from the first step to the last
delivery of the slowest. Needs PostgreSQL's programs and the extra `test`; no Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METRICS = 15
PARAMS = 60
LISTED = (100, 1000)
UPLOADS, UPLOAD_MB = 10, 8
EXPERIMENT = "benchmark"


def write(uri: str, folder: str, name: str, runs: int, steps: int) -> int:
    """Fork the runs, which start together; each leaves its times in a file. Returns the worst exit code."""
    import mlflow  # noqa: F401 - once for all of them

    gate, opener = os.pipe()
    children = []
    for number in range(runs):
        if (child := os.fork()) == 0:
            os.close(opener)
            os.read(gate, 1)
            log_run(uri, folder, f"{name}-{number}", steps)
            os._exit(0)
        children.append(child)
    os.close(opener)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def log_run(uri: str, folder: str, name: str, steps: int) -> None:
    """Log one run; its file says when it began and ended, and how long each batch and each call took."""
    from mlflow import MlflowClient

    from cosa_ray.tracking.store import Store, Tracking
    from cosa_ray.tracking.tracker import Tracker

    batches: list[float] = []
    send = MlflowClient.log_batch

    def timed(self: Any, run_id: str, metrics: Sequence[Any] = (), *rest: Any, **more: Any) -> Any:
        began = time.perf_counter()
        answer = send(self, run_id, metrics, *rest, **more)
        if metrics:
            batches.append(time.perf_counter() - began)
        return answer

    MlflowClient.log_batch = timed
    began = time.time()
    tracker = Tracker(Tracking(Store(uri, EXPERIMENT), name, f"{folder}/{name}", f"{folder}/{name}/spool"))
    calls = []
    for step in range(steps):
        values = {f"train/loss_{n}": step + n / 7 for n in range(METRICS)}
        before = time.perf_counter()
        tracker.log(values, step)
        calls.append(time.perf_counter() - before)
        time.sleep(0.001)  # a step: without one, nothing is gathered while the first batch is on its way
    tracker.finish("FINISHED", 600)
    left = len(list(Path(folder, name).glob("spool/*")))
    found = {"began": began, "ended": time.time(), "batches": batches, "calls": calls, "left": left}
    Path(folder, f"{name}.json").write_text(json.dumps(found))


def measured_runs(uri: str, folder: Path, runs: int, steps: int) -> dict[str, float]:
    """Points a second and waits of so many concurrent runs."""
    name = f"runs{runs}"
    words = [sys.executable, __file__, "write", uri, str(folder), name, str(runs), str(steps)]
    # A run's client waits as long as it does by itself, not as long as this process.
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_HTTP_REQUEST_TIMEOUT"}
    subprocess.run(words, check=True, env=environment)
    found = [json.loads((folder / f"{name}-{number}.json").read_text()) for number in range(runs)]
    seconds = max(each["ended"] for each in found) - min(each["began"] for each in found)
    batches = sorted(time for each in found for time in each["batches"])
    calls = sorted(time for each in found for time in each["calls"])
    return {
        "runs": runs,
        "points": runs * steps * METRICS,
        "seconds": seconds,
        "points_a_second": runs * steps * METRICS / seconds,
        "batches": len(batches),
        "batch_median_s": statistics.median(batches),
        "batch_p95_s": batches[int(0.95 * (len(batches) - 1))],
        "log_median_s": statistics.median(calls),
        "log_p95_s": calls[int(0.95 * (len(calls) - 1))],
        "log_max_s": calls[-1],
        "segments_left": sum(each["left"] for each in found),
    }


def measured_upload(uri: str, folder: Path) -> float:
    """Megabytes a second of files that do not compress, one after the other."""
    from cosa_ray.tracking.store import Store

    store = Store(uri, EXPERIMENT)
    client = store.client()
    run = client.create_run(store.experiment_id(client)).info.run_id
    file = folder / "upload.bin"
    file.write_bytes(os.urandom(UPLOAD_MB * 1_000_000))
    client.log_artifact(run, str(file), "warm")
    began = time.perf_counter()
    for number in range(UPLOADS):
        client.log_artifact(run, str(file), str(number))
    return UPLOADS * UPLOAD_MB / (time.perf_counter() - began)


def measured_list(uri: str, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Seconds of the first page of an experiment's runs (100, as the pages ask for) and of all of them."""
    from mlflow.entities import Metric, Param

    from cosa_ray.tracking.store import Store

    store = Store(uri, "benchmark list")
    client = store.client()
    experiment = store.experiment_id(client)
    params = [Param(f"setting.{n}", str(n)) for n in range(PARAMS)]
    found, made = {}, 0
    for count in LISTED:
        say(f"making {count} runs")
        for number in range(made, count):
            run = client.create_run(experiment, run_name=f"listed-{number}", tags={"cosa_ray.kind": "run"})
            now = time.time_ns() // 1_000_000
            metrics = [Metric(f"val/metric_{n}", number + n, now, 1) for n in range(METRICS)]
            client.log_batch(run.info.run_id, metrics=metrics, params=params)
        made = count
        found[str(count)] = {
            "page_s": median_of(lambda: client.search_runs([experiment], max_results=100)),
            "all_s": median_of(lambda count=count: client.search_runs([experiment], max_results=count)),
        }
    return found


def median_of(call: Callable[[], Any], times: int = 5) -> float:
    """Median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextmanager
def opened(kind: str, folder: Path, check_always: bool) -> Iterator[str]:
    """A store of a kind, with this process its client; yields its URI."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    from tests.integration.team_server import TeamServer

    with TeamServer(folder, durable=True, remember=0 if check_always else 60) as team:
        team.user("benchmark")
        with team.client_of("benchmark"):
            yield team.url


def show(found: Mapping[str, Any]) -> None:
    """Print what was measured as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    names = ("store", "runs", "points/s", "batch median", "batch p95", "log median", "log p95", "log max")
    table = Table(*names, title=f"{found['steps']} steps of {METRICS} metrics a run")
    for store, each in found["stores"].items():
        for row in each["runs"]:
            batch = [f"{1000 * row[f'batch_{key}_s']:,.0f} ms" for key in ("median", "p95")]
            log = [f"{1000 * row[f'log_{key}_s']:.3f} ms" for key in ("median", "p95", "max")]
            table.add_row(store, str(row["runs"]), f"{row['points_a_second']:,.0f}", *batch, *log)
    console.print(table)
    table = Table("store", "upload", *(f"{what} of {n:,} runs" for n in LISTED for what in ("first page", "all")))
    for store, each in found["stores"].items():
        lists = [each["list"].get(str(n), {}).get(key) for n in LISTED for key in ("page_s", "all_s")]
        cells = [f"{1000 * seconds:,.0f} ms" if seconds is not None else "-" for seconds in lists]
        table.add_row(store, f"{each['upload_mb_a_second']:,.0f} MB/s", *cells)
    console.print(table)


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        uri, folder, name, runs, steps = sys.argv[2:]
        sys.exit(write(uri, folder, name, int(runs), int(steps)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", nargs="+", default=["sqlite", "server"], choices=["sqlite", "server"])
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--no-list", action="store_true", help="leave out the list of runs, which takes minutes")
    parser.add_argument("--check-always", action="store_true", help="the server checks the password of each request")
    parser.add_argument("--out", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "60"

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found: dict[str, Any] = {"steps": given.steps, "cpus": os.cpu_count(), "stores": {}}
    for kind in given.stores:
        with tempfile.TemporaryDirectory(prefix="cosa-ray-tracking-") as temporary:
            folder = Path(temporary)
            with opened(kind, folder, given.check_always) as uri:
                from cosa_ray.tracking.store import Store, check_store

                check_store(Store(uri, EXPERIMENT))
                rows = []
                for runs in given.runs:
                    say(f"{kind}: {runs} runs")
                    rows.append(measured_runs(uri, folder, runs, given.steps))
                say(f"{kind}: uploads")
                upload = measured_upload(uri, folder)
                listed = {} if given.no_list else measured_list(uri, lambda text, kind=kind: say(f"{kind}: {text}"))
                found["stores"][kind] = {"runs": rows, "upload_mb_a_second": upload, "list": listed}
        if given.out is not None:
            given.out.write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
