"""Tasks and stages: what attacks share, and what has to be read first."""

import dataclasses

import numpy as np
import pytest

from sama_jax import attacks
from sama_jax.arrays import ProbePlan
from sama_jax.config import AuditSettings, SamaSettings
from sama_jax.engine.plans import ReplayedPlans
from sama_jax.engine.tasks import passes, stages, tasks_of
from sama_jax.errors import UsageError

SETTINGS = AuditSettings(sama=SamaSettings(steps=4, subsets=8), max_length=64)
KEYS = {"target": "t", "reference": "r"}


def made(*names: str):
    return tasks_of(attacks.select(names), SETTINGS, KEYS)


def test_attacks_on_the_same_passes_share_a_task():
    tasks = made("loss", "zlib", "ratio")
    assert len(tasks.all) == 1
    assert tasks.first("loss") == tasks.first("ratio")
    # Loss asks for the target alone, Ratio for both.
    assert set(tasks.all[0].channels) == {"target", "reference"}
    assert set(made("loss").all[0].channels) == {"target"}


def test_channels_are_joined_in_the_order_of_the_attacks():
    one, both = made("mink").all[0], made("mink", "mink++").all[0]
    assert one.channels["target"] == ("nll",)
    assert both.channels["target"][0] == "nll"
    assert set(both.channels["target"]) > {"nll"}
    assert both.identity == one.identity


def test_a_guide_stands_in_an_earlier_stage_than_what_it_guides():
    tasks = made("all")
    found = stages(tasks)
    place = {(t.view, t.identity): i for i, stage in enumerate(found) for t in stage}
    assert sorted(place) == sorted((t.view, t.identity) for t in tasks.all)
    guided = [t for t in tasks.all if t.guide is not None]
    assert guided
    for task in guided:
        assert place[task.guide.view, task.guide.identity] < place[task.view, task.identity]


def test_without_guides_there_is_one_stage():
    assert len(stages(made("sama", "loss"))) == 1


def test_passes_count_each_model_and_the_guides():
    (its,) = attacks.select(["its"])
    (loss,) = attacks.select(["loss"])
    assert passes(loss, SETTINGS) == {"target": SETTINGS.likelihood_passes, "reference": 0}
    query = its.queries(SETTINGS)
    assert passes(its, SETTINGS)["target"] >= sum(q.passes for q in query.values())


def test_another_seed_names_other_losses():
    other = dataclasses.replace(SETTINGS, seed=SETTINGS.seed + 1)
    names = {t.identity for t in made("sama", "loss").all}
    again = tasks_of(attacks.select(["sama", "loss"]), other, KEYS).all
    assert names.isdisjoint(t.identity for t in again)


def test_a_replay_without_sama_is_refused():
    masks = np.ones((1, 2, 64), bool)
    plan = ProbePlan(masks, masks, np.ones((1, 2), np.float32), np.zeros((1, 2, 0, 1), np.int32))
    replayed = ReplayedPlans("plan-x", plan, [0])
    with pytest.raises(UsageError, match="sama is not among"):
        tasks_of(attacks.select(["loss"]), SETTINGS, KEYS, replayed)
    tasks = tasks_of(attacks.select(["sama", "loss"]), SETTINGS, KEYS, replayed)
    assert tasks.first("sama").identity == "plan-x"
    assert tasks.first("loss").identity != "plan-x"
