"""A script on ranks that stand for several nodes, or that a plain launcher has started. See test_nodes.py.

    forked("tests.nodes", "nodes", "train_dpo", …, ranks=2)      each rank: a node with a cache of its own
    forked("tests.nodes", PORT, "train_dpo", …, ranks=2)         RANK and WORLD_SIZE without torchrun
"""

import importlib
import os
import sys

from errors import run_script

if __name__ == "__main__":
    how, script, *arguments = sys.argv[1:]
    if how == "nodes":
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ["MINIDPO_CACHE"] = os.path.join(os.environ["MINIDPO_CACHE"], os.environ["RANK"])
    else:
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        os.environ["MASTER_PORT"] = how
    run_script(lambda: importlib.import_module(script).main(arguments))
