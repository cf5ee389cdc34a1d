"""An experiment as a commit message: what an earlier version wrote is read as it was meant, and what is written is
read back."""

from dataclasses import replace
from pathlib import Path

import pytest

from autoresearch.ideas import Change, Usage
from autoresearch.journal.experiment import Experiment, message, parse_message
from autoresearch.task import Arena, Machine

# As tests/golden/night.txt had them when it was first written, with values in the place of its stars
KEEP = """\
crashes once

It is worth a try: crashes once.

Experiment: 4
Status: keep
Val-bpb: 0.930000
Val-bpb-upstream: 0.930000
Sealed-bpb: 1.030000
Incumbent: 0.950100
Memory-gb: 0.5
Training-seconds: 1.0
Total-seconds: 0.2
Run-seconds: 0.3
Evaluation-seconds: 0.1
Referee-seconds: 0.4
Tokens-M: 0.500
Steps: 10
Tokens-per-second: 500000
Parameters-M: 0.100
Changes: VAL_BPB 0.9501 -> 0.93
Source: 40908a33ffc971a9
Lines-added: 1
Lines-removed: 1
Repairs: 1
Agent: "$PYTHON" "$GOLDEN/agent.py"
Agent-seconds: 0.2
Agent-calls: 2
Seed: 42
Arena: demo
Budget-seconds: 1
Data: d0
Torch: 2.15.0+cpu
Program: 8c7e5a667f1b771847fe88c01c3de34413a1b220
Tag: t
Finished: 2026-11-24T22:00:00.000001+00:00
"""
CRASH = """\
crashes for good

It is worth a try: crashes for good.

Experiment: 5
Status: crash
Incumbent: 0.930000
Crash: ValueError: again 2
Run-seconds: 0.1
Changes: VAL_BPB 0.93 -> 0.92; top-level
Source: 1908bcb88bc8b8c9
Lines-added: 2
Lines-removed: 1
Repairs: 2
Agent: "$PYTHON" "$GOLDEN/agent.py"
Agent-seconds: 0.3
Agent-calls: 3
Seed: 42
Arena: demo
Budget-seconds: 1
Data: d0
Torch: 2.15.0+cpu
Program: 8c7e5a667f1b771847fe88c01c3de34413a1b220
Tag: t
Finished: 2026-11-24T22:06:00.000001+00:00
"""
# Every trailer that there was, in the order of that time
EVERY = """\
halve the batch

More steps in the same time, since the batch of 2**19 tokens is far above
what the gradient's noise needs: so it should learn more.

Experiment: 17
Status: keep
Val-bpb: 0.981234
Val-bpb-upstream: 0.991111
Sealed-bpb: 0.985432
Incumbent: 0.983456
Crash: an odd one
Memory-gb: 40.1
Training-seconds: 300.2
Total-seconds: 345.6
Run-seconds: 350.4
Evaluation-seconds: 12.3
Referee-seconds: 25.7
Tokens-M: 54.001
Steps: 953
Tokens-per-second: 181234
Mfu-percent: 41.25
Parameters-M: 50.332
Curve: 11% 4.250 181k/s, 20% 3.900 182k/s
Changes: BATCH 2**19 -> 2**18; GPT.forward
Source: 1908bcb88bc8b8c9
Lines-added: 3
Lines-removed: 5
Repairs: 1
Agent: claude
Agent-seconds: 63.5
Model: opus-9
Agent-calls: 2
Agent-turns: 7
Agent-tokens-in: 30000
Agent-tokens-cached: 12000
Agent-tokens-out: 1500
Cost-usd: 0.2500
Seed: 42
Arena: climbmix
Budget-seconds: 300
Data: climbmix-5f3c
Gpu: NVIDIA H100 80GB HBM3
Gpu-driver: 570.1
Gpu-mhz: 1755
Gpu-watts: 641
Gpu-slowed-percent: 3
Gpu-usd-per-hour: 2.4900
Torch: 2.15.0+cu130
Program: 8c7e5a667f1b771847fe88c01c3de34413a1b220
Tag: nov24
Finished: 2026-11-24T23:59:59.123456+00:00
"""
PROGRAM = "8c7e5a667f1b771847fe88c01c3de34413a1b220"
AGENT = '"$PYTHON" "$GOLDEN/agent.py"'
READ = {
    KEEP: Experiment(
        number=4,
        verdict="keep",
        description="crashes once",
        reason="It is worth a try: crashes once.",
        scores={42: 0.93},
        sealed={42: 1.03},
        incumbent=0.9501,
        facts={
            "val_bpb_upstream": 0.93, "sealed_bpb": 1.03, "memory_gb": 0.5, "training_seconds": 1.0,
            "total_seconds": 0.2, "run_seconds": 0.3, "evaluation_seconds": 0.1, "referee_seconds": 0.4,
            "tokens_M": 0.5, "steps": 10, "tokens_per_second": 500_000, "parameters_M": 0.1,
        },
        change=Change("VAL_BPB 0.9501 -> 0.93", "40908a33ffc971a9", added=1, removed=1),
        repairs=1,
        agent=AGENT,
        usage=Usage(0.2, calls=2),
        seed=42,
        arena=Arena("demo", 1.0, "d0"),
        machine=Machine(torch="2.15.0+cpu"),
        program=PROGRAM,
        tag="t",
        finished="2026-11-24T22:00:00.000001+00:00",
    ),
    CRASH: Experiment(
        number=5,
        verdict="crash",
        description="crashes for good",
        reason="It is worth a try: crashes for good.",
        incumbent=0.93,
        crash="ValueError: again 2",
        facts={"run_seconds": 0.1},
        change=Change("VAL_BPB 0.93 -> 0.92; top-level", "1908bcb88bc8b8c9", added=2, removed=1),
        repairs=2,
        agent=AGENT,
        usage=Usage(0.3, calls=3),
        seed=42,
        arena=Arena("demo", 1.0, "d0"),
        machine=Machine(torch="2.15.0+cpu"),
        program=PROGRAM,
        tag="t",
        finished="2026-11-24T22:06:00.000001+00:00",
    ),
    EVERY: Experiment(
        number=17,
        verdict="keep",
        description="halve the batch",
        reason="More steps in the same time, since the batch of 2**19 tokens is far above what the gradient's noise "
        "needs: so it should learn more.",
        scores={42: 0.981234},
        sealed={42: 0.985432},
        incumbent=0.983456,
        crash="an odd one",
        facts={
            "val_bpb_upstream": 0.991111, "sealed_bpb": 0.985432, "memory_gb": 40.1, "training_seconds": 300.2,
            "total_seconds": 345.6, "run_seconds": 350.4, "evaluation_seconds": 12.3, "referee_seconds": 25.7,
            "tokens_M": 54.001, "steps": 953, "tokens_per_second": 181_234, "mfu_percent": 41.25,
            "parameters_M": 50.332, "gpu_mhz": 1755, "gpu_watts": 641, "gpu_slowed_percent": 3,
            "gpu_usd_per_hour": 2.49,
        },
        curve="11% 4.250 181k/s, 20% 3.900 182k/s",
        change=Change("BATCH 2**19 -> 2**18; GPT.forward", "1908bcb88bc8b8c9", added=3, removed=5),
        repairs=1,
        agent="claude",
        usage=Usage(63.5, "opus-9", 2, 7, 30_000, 12_000, 1500, 0.25),
        seed=42,
        arena=Arena("climbmix", 300.0, "climbmix-5f3c"),
        machine=Machine("NVIDIA H100 80GB HBM3", "570.1", "2.15.0+cu130"),
        program=PROGRAM,
        tag="nov24",
        finished="2026-11-24T23:59:59.123456+00:00",
    ),
}  # fmt: skip


def trailers(text: str) -> list[str]:
    return sorted(text.rstrip().rpartition("\n\n")[2].splitlines())


@pytest.mark.parametrize("text", READ, ids=["keep", "crash", "every trailer"])
def test_an_old_message(text: str) -> None:
    """Of an earlier version: the same values, and written again the same trailers."""
    found = parse_message(text)
    assert found == READ[text]
    again = message(found)
    assert parse_message(again) == found
    assert [line for line in trailers(again) if line != "Metric: lower val_bpb"] == trailers(text)


def test_what_follows_from_it() -> None:
    e = parse_message(EVERY)
    assert e.score == 0.981234 and e.gain == pytest.approx(0.002222) and e.change.lines == -2
    assert e.headline == "halve the batch [an odd one]"
    assert e.minutes == pytest.approx((63.5 + 350.4 + 25.7) / 60)
    crash = parse_message(CRASH)
    assert crash.score is None and crash.gain is None and crash.minutes == pytest.approx(0.4 / 60)


def test_a_fact_that_is_new() -> None:
    """A number that no version knew before has a trailer of its own."""
    facts = {"loss_at_half": 3.25, "steps": 953.0, "layers_8x": 1e-7, "depth": -12.0}
    e = replace(parse_message(KEEP), facts=facts, sealed={})
    text = message(e)
    assert {
        "Fact-loss_at_half: 3.25",
        "Fact-layers_8x: 1e-07",
        "Fact-depth: -12",
        "Steps: 953",
    } < set(trailers(text))
    assert parse_message(text) == e


def test_a_second_seed() -> None:
    """The seed that decided has `Val-bpb`, each other a `Score-<seed>`."""
    e = replace(parse_message(KEEP), scores={42: 0.93, 43: 0.9312345, 7: 0.929})
    text = message(e)
    assert {"Val-bpb: 0.930000", "Score-43: 0.931234", "Score-7: 0.929000"} < set(trailers(text))
    found = parse_message(text)
    assert found.scores == {42: 0.93, 43: 0.931234, 7: 0.929} and found.score == 0.93
    without = replace(e, scores={43: 0.9})  # whose own seed has none, as where it crashed
    assert parse_message(message(without)).scores == {43: 0.9} and without.score is None


def test_sealed_scores() -> None:
    """That of the first seed is a fact, by either name; each other has a trailer of its own."""
    e = replace(parse_message(KEEP), scores={42: 0.93, 43: 0.94}, sealed={42: 1.03, 43: 1.04})
    assert {"Sealed-bpb: 1.030000", "Sealed-43: 1.040000"} < set(trailers(message(e)))
    assert parse_message(message(e)) == e
    digits = 0.123456789012
    foreign = replace(
        e, goal="higher ndcg", facts={"guard_sealed": digits}, sealed={42: digits, 43: digits}
    )
    assert "Fact-guard_sealed: 0.123456789012" in message(foreign)
    assert parse_message(message(foreign)) == foreign


def test_a_note() -> None:
    e = replace(parse_message(KEEP), note="slow to start")
    assert parse_message(message(e)) == e and e.headline == "crashes once [slow to start]"


def test_an_empty_value_has_no_trailer() -> None:
    e = replace(
        parse_message(CRASH),
        crash="",
        reason="",
        incumbent=None,
        change=Change(),
        machine=Machine(),
    )
    text = message(e)
    names = {line.partition(":")[0] for line in trailers(text)}
    assert not names & {
        "Crash",
        "Incumbent",
        "Changes",
        "Source",
        "Torch",
        "Gpu",
        "Cost-usd",
        "Model",
        "Val-bpb",
    }
    assert {"Lines-added", "Repairs", "Agent-seconds"} < names  # 0 is a value
    assert text.startswith("crashes for good\n\nExperiment: 5\n")
    assert parse_message(text) == e


@pytest.mark.parametrize(
    "text",
    [
        "",
        "my own commit\n\nwith a body\n",
        KEEP.replace("Seed: 42\n", ""),
        KEEP.replace("Tag: t\n", ""),
        KEEP.replace("Val-bpb: 0.93", "Val-bpb: low"),
        KEEP.replace("Steps: 10", "Steps: many"),
        KEEP.replace("Seed: 42\n", "Seed: 42\nScore-x: 0.9\n"),
        KEEP.replace("Seed: 42\n", "Seed: 42\nSealed-x: 0.9\n"),
        KEEP.partition("Experiment")[0],
    ],
)
def test_any_other_commit(text: str) -> None:
    with pytest.raises(ValueError, match="not the commit of an experiment"):
        parse_message(text)


def test_the_old_messages_are_those_of_the_golden_night() -> None:
    """But for what varies, so that nobody mends the record by mending this test."""
    night = (Path(__file__).parent / "golden/night.txt").read_text().splitlines()
    for text in (KEEP, CRASH):
        stars = ("-seconds", "Torch", "Program", "Finished", "Source")
        known = [line for line in text.splitlines() if not line.partition(":")[0].endswith(stars)]
        assert set(known) <= set(night)
