"""Prepared views of MLflow's pages: what their tags hold, and that nobody's own are touched."""

from __future__ import annotations

import base64
import json
import zlib
from types import SimpleNamespace

from cosa_ray.tracking import views
from cosa_ray.tracking.views import PREFIX, View, experiment_views, missing_views, new_experiment_tags, sweep_view


def state(value: str) -> dict:
    """The state in a tag, unpacked as MLflow's pages unpack it."""
    kind, _, packed = json.loads(value)["state"].partition(";")
    assert kind == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_a_new_experiment_has_its_views_in_tags_that_every_server_takes() -> None:
    tags = new_experiment_tags()
    runs, best = (state(tags[view.tag]) for view in experiment_views())
    # Trials are folded under their sweep only in this order and without a filter.
    assert (runs["orderByKey"], runs["orderByAsc"], runs.get("searchFilter", "")) == (
        "attributes.start_time",
        False,
        "",
    )
    assert best["orderByKey"] == "metrics.`val/miou`"
    for each in (runs, best):
        assert {"metrics.`val/miou`", "metrics.`val/miou_labels_given`", "tags.`cosa_ray.kind`"} <= set(
            each["selectedColumns"]
        )
        assert set(each["selectedColumns"]) < set(each["columnOrder"])
        assert list(each["columnWidths"]) == each["columnOrder"]
        sections = {section["uuid"] for section in each["compareRunSections"]}
        cards = each["compareRunCharts"]
        assert {card["metricSectionId"] for card in cards} <= sections
        assert len({card["uuid"] for card in cards}) == len(cards)
    assert max(len(value) for value in tags.values()) < 5000, "what older servers take"


def test_a_sweeps_view_shows_what_it_varied_and_sorts_by_its_first_metric() -> None:
    names = [f"losses.of_number_{number}" for number in range(30)]
    view = sweep_view("night", {"val/error": "min", "cost/gpu_hours": "min"}, names, steps=600)
    found = state(view.value())
    assert found["searchFilter"] == "tags.`cosa_ray.sweep` = 'night' and tags.`cosa_ray.kind` = 'trial'"
    assert (found["orderByKey"], found["orderByAsc"]) == ("metrics.`val/error`", True)
    assert {f"params.`{name}`" for name in names} <= set(found["selectedColumns"])
    assert found["selectedColumns"].count("metrics.`cost/gpu_hours`") == 1
    (parallel,) = [card for card in found["compareRunCharts"] if card["type"] == "PARALLEL"]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (names, ["val/error", "cost/gpu_hours"])
    pictures = [card for card in found["compareRunCharts"] if card["type"] == "IMAGE"]
    assert {(card["step"], card["showRunParams"]) for card in pictures} == {(600, False)}
    assert len(view.value()) < 5000
    bare = state(sweep_view("x", {"a": "max"}, [], 1).value())
    assert "PARALLEL" not in [card["type"] for card in bare["compareRunCharts"]]


class Client:
    """An experiment's tags, as MLflow's client gives and takes them."""

    def __init__(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def get_experiment(self, number: str) -> SimpleNamespace:
        return SimpleNamespace(tags=dict(self.tags))

    def set_experiment_tag(self, number: str, key: str, value: str) -> None:
        self.tags[key] = value

    def delete_experiment_tag(self, number: str, key: str) -> None:
        del self.tags[key]


def test_views_are_given_once_and_a_deleted_one_stays_away() -> None:
    mine = {PREFIX + "1795597794553abc": '{"name": "Mine", "createdAt": 1, "state": "{}"}', "mlflow.note.content": "x"}
    client = Client(dict(mine))
    views.offer_views(client, "1")
    assert {view.tag for view in experiment_views()} <= set(client.tags)
    assert missing_views(client.tags) == {}
    assert mine.items() <= client.tags.items(), "what was there stays, the note too"
    gone = experiment_views()[0].tag
    del client.tags[gone]
    views.offer_views(client, "1")
    assert gone not in client.tags
    client.tags["cosa_ray.views"] = "of another making"
    assert gone in missing_views(client.tags)


def test_the_oldest_sweeps_views_make_room_and_no_others(monkeypatch) -> None:
    mine = {f"{PREFIX}{number}": '{"name": "Mine", "createdAt": 1, "state": "{}"}' for number in range(20)}
    mine[f"{PREFIX}old-link"] = "deflate;whatever"
    client = Client(dict(mine))
    clock = iter(range(1, 1000))
    monkeypatch.setattr(views, "time", SimpleNamespace(time=lambda: next(clock)))
    for number in range(views.SWEEPS_KEPT + 3):
        views.offer_views(client, "1", [sweep_view(f"s{number}", {"val/miou": "max"}, [], 10)])
    kept = {key.removeprefix(PREFIX + views.SWEEP) for key in client.tags if key.startswith(PREFIX + views.SWEEP)}
    assert kept == {f"s{number}" for number in range(3, views.SWEEPS_KEPT + 3)}
    assert mine.items() <= client.tags.items()


def test_a_server_that_lets_nobody_change_an_experiment_ends_nothing() -> None:
    class Closed(Client):
        def set_experiment_tag(self, number: str, key: str, value: str) -> None:
            raise PermissionError("no")

    client = Closed({})
    views.offer_views(client, "1", [View("a", "A", {})])
    assert client.tags == {}
