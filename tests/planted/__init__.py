"""The catalogue of planted bugs, by room. See tests/mutants.py."""

from tests.planted import (
    answers,
    data,
    experiments,
    folders,
    log,
    loops,
    objectives,
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
    experiments, log,
)  # fmt: skip
MUTANTS = [mutant for room in ROOMS for mutant in room.MUTANTS]
