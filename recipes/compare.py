"""
Compare arms over seeds: is Nexus better than its controls, and were the minima closer?

In minutes on two CPU cores, with the comparison that comes with the package:

    python recipes/compare.py

One of your own, from a copy of hf_nexus/compare/configs/compare.yaml:

    python recipes/compare.py mine.yaml --output_dir runs/mine

One process is enough: it spreads the runs over the devices that there are. What is done already is not done again, so
that the same command goes on with a comparison that was interrupted, or to which arms or seeds were added.
"""

from hf_nexus.cli.compare import main

if __name__ == "__main__":
    main()
