"""Plants the mutant of $MINIDPO_MUTANT in each process that a test starts. See tests/planted/mutant.py."""

import json
import os

from tests.planted.mutant import Mutant, force_bf16, plant_on_import

if "MINIDPO_TEST_BF16" in os.environ:
    force_bf16(os.environ["MINIDPO_TEST_BF16"])
if "MINIDPO_MUTANT" in os.environ:
    plant_on_import(Mutant(**json.loads(os.environ["MINIDPO_MUTANT"])))
