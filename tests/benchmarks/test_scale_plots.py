"""Plots of the placement simulation: valid XML, one mark per policy in each panel, equal from equal seeds."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks import scale_plots, scale_simulation

SVG = "{http://www.w3.org/2000/svg}"


def played() -> dict[str, scale_simulation.Result]:
    digests, times = scale_simulation.demand(200, 1200, 4)
    every = scale_simulation.policies()
    return {name: scale_simulation.simulate(policy, digests, times, 4, 20) for name, policy in every.items()}


def test_each_policy_has_its_marks_in_each_panel() -> None:
    results = played()
    text = scale_plots.render(results)
    hits, imbalance, over_time = ElementTree.fromstring(text).findall(f"{SVG}svg")
    assert len(hits.findall(f"{SVG}rect")) == 2 * len(results)  # its hit rate, and the best one
    assert len(imbalance.findall(f"{SVG}circle")) == len(results)
    assert len(over_time.findall(f"{SVG}rect")) == scale_simulation.PARTS * len(results)
    for panel in (hits, imbalance, over_time):
        assert set(results) <= {own.text for own in panel.findall(f"{SVG}text")}
    assert scale_plots.render(played()) == text
