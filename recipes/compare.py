# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus[plots]"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Compare Nexus with its controls over several seeds: held-out losses, downstream scores and minima distances.

The comparison that is shipped with the package, seven arms over three seeds on the built-in corpus, in five minutes on
two cores:

    python recipes/compare.py

A comparison of your own, from a copy of hf_nexus/compare/configs/compare.yaml:

    python recipes/compare.py mine.yaml --output_dir runs/mine

Start one process only. It distributes the runs over the available devices. The same command resumes an interrupted
comparison and adds new arms and seeds: finished runs are skipped.
"""

import sys

from hf_nexus.cli.app import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
