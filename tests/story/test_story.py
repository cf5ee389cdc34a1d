"""The story: the real loop with a made-up agent and engine, and what must hold of every night."""

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean

import pytest
from made_up import TASK, Killed, World

import loop
from autoresearch import noise
from autoresearch.files import UserError
from autoresearch.ideas import Busy, Fruitless, NeedsPerson
from autoresearch.journal.experiment import Experiment
from autoresearch.task import Task
from autoresearch.view.events import Note
from benchmarks import keep_rule


def night(world: World, task: Task = TASK, **limits: float) -> str:
    """A driver from its start to its end; how it ended."""
    study, desk = world.study(task, **limits)
    try:
        return loop.research(study, desk)  # type: ignore[arg-type]
    except UserError as error:
        return f"error: {error}"
    finally:
        check(world)


def check(world: World, task: Task = TASK) -> None:
    """What holds at every instant, also when the driver has just died."""
    tip, dry, sources, before = "start", 0, set(), list[Experiment]()
    incumbent: Mapping[int, float] = {}
    assert sorted(world.refs) == list(range(len(world.refs))), "a number is the order of verdicts"
    assert world.rows == sorted(world.refs)[: len(world.rows)], "a row follows its ref"
    for number, (parent, commit, e) in sorted(world.refs.items()):
        assert parent == tip, "kept commits are one straight line, and each experiment is on it"
        assert (e.verdict == "crash") == (not e.scores) == bool(e.crash)
        assert e.repairs <= loop.REPAIRS
        if e.description.startswith("the incumbent again"):
            assert dry and dry % loop.RENEW == 0 and e.gain is None
            assert e.seed not in incumbent and [*e.scores.items()][1:] == [*incumbent.items()][:-1]
        elif number:
            assert [*e.scores] == [*incumbent][: len(e.scores)], "paired by seed"
            check_rule(task, e, before, incumbent)
            assert e.crash or e.change.source not in sources, "no program runs twice"
            sources |= {e.change.source} if e.scores else set()
        assert e.verdict != "keep" or len(e.scores) == task.seeds, "each keep has its scores"
        assert e.verdict != "keep" or [*e.sealed] == [*e.scores], "and a sealed one for each"
        if e.verdict == "keep":
            tip, incumbent = commit, e.scores
        dry = 0 if e.verdict == "keep" else dry + 1
        before.append(e)
    assert world.tip == tip


def check_rule(
    task: Task, e: Experiment, before: list[Experiment], incumbent: Mapping[int, float]
) -> None:
    """The verdict of an experiment that ran, by the rule in other words."""
    if not e.scores:
        return
    gain = mean(incumbent[seed] - score for seed, score in e.scores.items())
    tie, shorter, all_ran = noise.tie(task, before), e.change.lines < 0, len(e.scores) == task.seeds
    assert e.gain == pytest.approx(gain)
    if e.verdict == "keep":
        assert all_ran and (gain > tie or (shorter and gain > -1.001 * tie))
    else:
        assert gain <= 1.001 * tie if all_ran else gain <= 1e-9
        assert not shorter or gain < -0.999 * tie or noise.drift(before) > 0 or not all_ran


def verdicts(world: World) -> list[str]:
    return [e.verdict for _, _, e in world.refs.values()]


def test_nights_by_chance() -> None:
    ends = set()
    for seed in range(150):
        world = World(seed)
        said = night(world, experiments=12)
        assert said == "12 experiments done" or said.startswith("error: made-up: no key")
        assert len(world.refs) == 13 or "no key" in said
        ends.add(said)
    assert len(ends) == 2


def test_killed_at_any_instant() -> None:
    """Nothing that was finished is lost, and nothing is there twice; the next driver goes on."""
    for seed in range(150):
        world = World(seed, plan=["idea"])
        lives, finished = 0, 0
        while len(world.refs) < 10 and lives < 100:
            world.kill_at = world.rng.randrange(1, 30)
            try:
                night(world, experiments=10 - len(world.refs))
            except Killed:
                lives += 1
            assert len(world.refs) >= finished
            finished = len(world.refs)
        world.kill_at = -1
        world.plan = ["idea"]
        assert night(world, experiments=1) == "1 experiment done"
        assert world.rows == sorted(world.refs) and lives


def test_a_full_disk_at_any_instant() -> None:
    """Once something was achieved it is waited out, and what has a ref is finished."""
    for instant in range(15, 28):  # after the first experiment
        world = World(seed=instant, plan=["idea", "idea"], full_at=instant)
        assert night(world, experiments=4) == "4 experiments done"
        assert world.instant > instant
        world.plan, world.full_at = ["idea"], -1
        assert night(world, experiments=1) == "1 experiment done"


@pytest.mark.parametrize(
    ("plan", "found", "pauses"),
    [
        (["idea", "idea"], ["run", "run"], []),
        (["crash", "idea", "idea"], ["run", "run"], []),  # mended
        (["crash", "crash", "crash", "idea"], ["crash", "run"], []),  # twice at most
        (["crash", "nothing", "idea"], ["crash", "run"], []),  # given up
        (["crash", "hopeless", "idea"], ["crash", "run"], []),
        (["crash", "busy", "idea", "idea"], ["run", "run"], [Busy]),  # mended after a while
        (["fault", "idea", "idea"], ["run", "run"], []),
        (["foreign", "idea"], ["crash", "run"], []),  # never run, and never mended
        (["nothing", "failed", "idea", "idea"], ["run", "run"], []),
        (["repeat", "idea", "idea"], ["run", "run"], []),  # asked again at once
        (["repeat", "repeat", "idea", "idea"], ["run", "run"], []),
        (["idea", *5 * ["nothing"], "idea"], ["run", "run"], [Fruitless]),
        (["idea", "hopeless", "idea"], ["run", "run"], [NeedsPerson]),
        (["busy", "cut short", "busy", "idea", "idea"], ["run", "run"], [Busy, Busy, Busy]),
    ],
)
def test_what_calls_bring(plan: list[str], found: list[str], pauses: list[type]) -> None:
    world = World(plan=[*plan])
    assert night(world, experiments=len(found)) == f"{len(found)} experiments done"
    assert world.plan == [], "no call too few"
    assert len(world.requests) == len(plan), "and none too many"
    assert ["crash" if v == "crash" else "run" for v in verdicts(world)[1:]] == found
    assert [type(trouble) for trouble, _ in world.pauses] == pauses
    assert [count for _, count in world.pauses] == [*range(1, len(pauses) + 1)]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (["hopeless"], "error: made-up: no key"),
        (["busy", "hopeless"], "error: made-up: no key"),
        (5 * ["failed"], "error: made-up brought nothing 5 times in a row: a fruit"),
    ],
)
def test_a_person_is_still_at_the_keyboard(plan: list[str], said: str) -> None:
    world = World(plan=[*plan])
    assert night(world, experiments=1) == said
    assert verdicts(world) == ["keep"]  # the baseline
    world.plan = ["idea"]
    assert night(world, experiments=1) == "1 experiment done"


def test_what_an_agent_is_told() -> None:
    world = World(plan=["failed", "idea", "repeat", "crash", "idea"])
    night(world, experiments=2)
    first, after_failure, afresh, after_repeat, repair = world.requests
    assert "# Your last call" not in first and "# Your last call" not in afresh
    assert "a fruit (call 1 in a row that brought nothing)" in after_failure
    assert "the program was, but for comments and layout, the one of experiment" in after_repeat
    assert "crashed: it crashed" in repair


def test_the_baseline_must_run() -> None:
    world = World(truth={"start": float("nan")})
    said = "error: there is no baseline, since `python train.py` does not run as it is: it crashed"
    assert night(world).startswith(said)
    assert not world.refs


def test_no_experiments_are_the_baseline_alone() -> None:
    world = World()
    assert night(world, experiments=0) == "0 experiments done"
    assert verdicts(world) == ["keep"] and not world.requests


def test_a_goal() -> None:
    world = World(seed=1)
    assert night(world, until=0.95) == "the goal of 0.95 is reached"
    scores = [e.score for _, _, e in world.refs.values() if e.verdict == "keep"]
    assert scores[-1] <= 0.95 < scores[-2]
    assert night(world, until=0.95) == "the goal of 0.95 is reached"  # at once


def test_keeps_are_believable() -> None:
    """Over nights of made-up ideas: most keeps are gains, and what is claimed is nearly true."""
    one, two = (keep_rule.nights(replace(keep_rule.OURS, seeds=n), 12, 200) for n in (1, 2))
    assert two.false < 0.4 and two.bias < 0.0008 and two.bias < one.bias / 2
    assert two.second < 0.25 and two.rate > one.rate


@pytest.mark.parametrize(
    ("before", "took", "said"),
    [
        (40.0, 90.0, "idea [start-up of 90 s, before 40 s]"),
        (40.0, 80.0, "idea"),  # not more than twice as long
        (4.0, 13.9, "idea"),  # three times, and no 10 s more
        (4.0, 14.0, "idea [start-up of 14 s, before 4 s]"),
    ],
)
@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_a_long_start_is_named(gain: float, before: float, took: float, said: str) -> None:
    """No budget limits it, and it costs the night: of a keep or not, the record says so."""
    world = World(plan=["idea"], gain=lambda rng: gain, startups=[before, before, took])
    night(world, experiments=1)
    assert world.refs[1][2].headline == said


def test_a_first_start_is_held_against_nothing() -> None:
    world = World(plan=["idea"], startups=[90.0])
    night(world, experiments=1)
    assert [e.note for _, _, e in world.refs.values()] == ["", ""]


@pytest.mark.parametrize(
    ("slow", "runs", "void"),
    [
        ([False, False, False, True, False], 5, 1),  # the second run of an idea, and once more
        ([False, False, False, True, True], 5, 1),  # once, and not again and again
        ([False, True, False, False, False], 5, 1),  # of the baseline, too
        ([False, False, True], 3, 0),  # a first run has nothing to be compared with
    ],
)
def test_a_slow_machine(slow: list[bool], runs: int, void: int) -> None:
    world = World(plan=["idea"], slow=slow, gain=lambda rng: 0.1, error=0.0)
    assert night(world, experiments=1) == "1 experiment done"
    assert world.slow == []
    made = sum(e.facts["run_seconds"] for _, _, e in world.refs.values())
    assert made == runs
    assert sum(e.facts.get("void_runs", 0.0) for _, _, e in world.refs.values()) == void
    notes = [e.text for e in world.events if isinstance(e, Note)]
    assert len(notes) == void
