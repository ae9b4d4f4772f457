"""
Run a command with a Hub on this machine, then load the pushed model.

    python -m tests.support.hub.demo alice/nexus-demo runs/nexus-demo -- python recipes/pretrain_3b.py --config demo \\
        --push_to_hub True --hub_strategy checkpoint
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.hub.server import ALICE, HubServer

_LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
repo_id, folder = sys.argv[1:]
model, local = (AutoModelForCausalLM.from_pretrained(name) for name in (repo_id, folder))
weights, saved = model.state_dict(), local.state_dict()
assert weights.keys() == saved.keys() and all((weights[name] == saved[name]).all() for name in saved)
assert AutoTokenizer.from_pretrained(repo_id).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
print(f"from_pretrained({repo_id!r}) gives the {model.num_parameters():,} parameters of {folder}, to the bit.")
"""


def main() -> None:
    """Run the command, then the check. The exit status is that of the first failure."""
    parser = argparse.ArgumentParser(description="Run a command against a local Hub, then load what it pushed.")
    parser.add_argument("repo_id", help="What the command pushes to; the Hub's only writer is called alice.")
    parser.add_argument("folder", help="Its output_dir.")
    parser.add_argument("command", nargs="+", help="After --.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, HubServer(Path(scratch, "hub")) as hub:
        print(f"A Hub listens at {hub.endpoint}, for as long as this command runs.", flush=True)
        told = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": ALICE, "HF_HUB_OFFLINE": "0"}
        for command, more in (
            (options.command, {}),
            ([sys.executable, "-c", _LOAD, options.repo_id, options.folder], {"HF_HOME": scratch}),
        ):
            status = subprocess.run(command, env={**os.environ, **told, **more}, check=False).returncode
            if status:
                raise SystemExit(status)
        titles = [commit["title"] for commit in reversed(hub.history(options.repo_id))]
        print(f"Its commits: {'; '.join(titles)}. Its files: {', '.join(hub.files(options.repo_id))}.")


if __name__ == "__main__":
    main()
