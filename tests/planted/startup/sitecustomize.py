"""Plants the mutant of $MINIDPO_MUTANT in each process that a test starts. See tests/planted/mutant.py."""

import json
import os

from tests.planted.mutant import Mutant, plant_on_import

if "MINIDPO_MUTANT" in os.environ:
    plant_on_import(Mutant(**json.loads(os.environ["MINIDPO_MUTANT"])))
