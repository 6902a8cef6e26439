"""The catalogue of planted bugs, by room. See tests/mutants.py."""

from tests.planted import (
    answers,
    data,
    experiments,
    folders,
    lessons,
    log,
    loops,
    objectives,
    playground,
    resume,
    reward,
    rounds,
    shard,
    speed,
    stream,
    transformer,
)

ROOMS = (
    stream, transformer, objectives, reward, rounds, answers, data, loops, folders, resume, shard, speed,
    experiments, log, playground, lessons,
)  # fmt: skip
MUTANTS = [mutant for room in ROOMS for mutant in room.MUTANTS]
