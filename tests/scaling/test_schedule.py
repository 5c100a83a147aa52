"""The simulated schedule of a cluster against schedules by hand, a plain list schedule and closed forms."""

import math
from heapq import heapify, heappop, heappush

import numpy as np
import pytest

from saescale.scaling.planning.schedule import Cluster, Job, best_interval, courses, simulate
from saescale.storage.errors import SaescaleError

RNG = np.random.default_rng(0)


def test_a_schedule_by_hand() -> None:
    """Two devices: 4 and 3 begin, the second 3 follows the first at 3, 2 follows 4 at 4: both end at 6."""
    found = simulate([Job(4), Job(3), Job(3), Job(2)], Cluster(2), RNG)
    assert found.spans == ((0, 4), (0, 3), (3, 6), (4, 6))
    assert (found.seconds, found.lost_s, found.failures) == (6, 0, 0)
    # A gang of three waits for the whole cluster of 4 while one that needs one device passes it by.
    gang = simulate([Job(5, 2), Job(2, 3), Job(1, 1)], Cluster(4, per_node=2), RNG)
    assert gang.spans == ((0, 5), (5, 7), (0, 1))


def test_without_failures_it_is_the_list_schedule() -> None:
    seconds = sorted(RNG.exponential(100, 60), reverse=True)
    ends = [0.0] * 7
    heapify(ends)
    for each in seconds:
        heappush(ends, heappop(ends) + each)
    found = simulate([Job(each) for each in seconds], Cluster(7, per_node=3), RNG)
    assert found.seconds == pytest.approx(max(ends))


def test_checkpoints_take_their_time() -> None:
    found = simulate([Job(600, checkpoint_s=2.0)], Cluster(1, checkpoint_every_s=100), RNG)
    assert found.seconds == 600 + 5 * 2


@pytest.mark.parametrize(("every", "restart"), [(100.0, 0.0), (100.0, 40.0), (400.0, 40.0)])
def test_lost_work_is_that_of_the_closed_form(every: float, restart: float) -> None:
    """Exponential failures have no memory, so each stretch up to a checkpoint is a renewal of its own (Daly 2006, whose
    attempts all begin with a restart; here those do that follow a failure)."""
    mtbf, segments, cost = 500.0, 20, 5.0

    def stretch(length: float) -> float:
        again = mtbf * math.expm1((length + restart) / mtbf)
        return -math.expm1(-length / mtbf) * (mtbf + again)

    expected = (segments - 1) * stretch(every + cost) + stretch(every)
    cluster = Cluster(8, 8, mtbf, restart, 0.0, every)
    took = np.array([found.seconds for found in courses([Job(segments * every, 8, cost)], cluster, 1500)])
    assert abs(took.mean() - expected) < 4 * took.std() / math.sqrt(len(took))


def test_a_failure_loses_what_followed_the_last_checkpoint() -> None:
    """On the average what an exponential time of failure within a period leaves; a checkpoint is no work."""
    mtbf, every, cost, gpus = 300.0, 100.0, 20.0, 8
    cluster = Cluster(gpus, gpus, mtbf, 0.0, 0.0, every)
    found = courses([Job(100 * every, gpus, cost)], cluster, 200)
    assert all(0 < each.lost_s < each.failures * every * gpus for each in found)

    seconds = np.linspace(0, every + cost, 100_001)
    density = np.exp(-seconds / mtbf)
    expected = np.trapezoid(np.minimum(seconds, every) * density) / np.trapezoid(density)
    lost = np.array([each.lost_s / gpus / each.failures for each in found])
    assert abs(lost.mean() - expected) < 4 * lost.std() / math.sqrt(len(lost))


def test_youngs_interval_is_the_best_one() -> None:
    """Among intervals of half and twice as long, by simulation."""
    best = best_interval(4.0, 20_000.0)
    assert best == 400.0

    def mean(every: float) -> float:
        cluster = Cluster(1, 1, 20_000.0, 0.0, 0.0, every)
        return float(np.mean([c.seconds for c in courses([Job(200_000, 1, 4.0)], cluster, 600)]))

    assert mean(best) < min(mean(best / 4), mean(best * 4))


def test_a_node_takes_all_of_its_jobs_and_is_away_for_its_repair() -> None:
    """Four jobs on one node of four: what one failure loses, all of them lose; nothing runs while it is away."""
    jobs, cluster = [Job(1000.0)] * 4, Cluster(4, 4, 800.0, 0.0, 300.0, 50.0)
    for found in courses(jobs, cluster, 50):
        assert found.failures % 4 == 0
        repairs = found.failures / 4
        assert found.seconds == pytest.approx(1000 + found.lost_s / 4 + 300 * repairs)
    assert courses(jobs, cluster, 3) == courses(jobs, cluster, 3)
    assert courses(jobs, cluster, 3) != courses(jobs, cluster, 3, seed=1)


def test_what_never_ends_is_said() -> None:
    with pytest.raises(SaescaleError, match="mesh of 9 GPUs and the cluster has 8"):
        courses([Job(1, 9)], Cluster(8), 1)
    with pytest.raises(SaescaleError, match="a node of it fails every 25 s: it gets nowhere"):
        courses([Job(1e6, 16)], Cluster(16, 8, 50.0, checkpoint_every_s=600), 1)
