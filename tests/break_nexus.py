"""
Breaks the update in `hf_nexus/nexus.py`, one way at a time, and checks that tests/test_nexus.py notices.

    python -m tests.break_nexus
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BREAKS = {
    "wrong sign of the inner step": ("-self._gamma / length, usable", "self._gamma / length, usable"),
    "inner step not normalized": ("-self._gamma / length, usable", "-self._gamma * (length / length), usable"),
    "pseudo-gradient not divided by k": ("self._gamma * self.steps_taken)  # (3)", "self._gamma)  # (3)"),
    "pseudo-gradient not divided by gamma": ("self._gamma * self.steps_taken)  # (3)", "self.steps_taken)  # (3)"),
    "sum not divided by k": ("torch._foreach_div_(pseudo_gradient, self.steps_taken)", "pass"),
    "no path: gradients all taken at theta_0": (
        "            add_scaled_(params",
        "            1 or add_scaled_(params",
    ),
    "no restore": ("self._snapshot.restore()\n", "pass\n"),
    "restore only once": ("self.restore()  # again", "pass  # again"),
    "never marked as displaced": ("self._displaced = True", "self._displaced = False"),
    "marked as displaced before the copy": (
        "            self._snapshot.save()",
        "            self._displaced = True\n            self._snapshot.save()",
    ),
    "skipped steps counted in k": ("return sum(self.taken)", "return len(self.taken)"),
    "unusable steps walked": ("usable = norm.isfinite() & (norm > 0)", "usable = norm == norm"),
    "gradients accumulate": ("self._met.append(met)\n        self._clear_gradients()", "self._met.append(met)"),
    "stale gradients enter the window": ("self._open = True\n        self._clear_gradients()", "self._open = True"),
    "an exception leaves gradients": ("self._clear_gradients()\n                raise", "raise"),
    "path cosine without its correction": ("** 2 - 1) / (k - 1)", "** 2) / (k - 1)"),
}


def main() -> int:
    """Return how many breaks went unnoticed."""
    source = (ROOT / "hf_nexus" / "nexus.py").read_text()
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in ("hf_nexus", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for name, (right, wrong) in BREAKS.items():
            assert source.count(right) == 1, f"{name}: {right!r} is in nexus.py {source.count(right)} times"
            Path(folder, "hf_nexus", "nexus.py").write_text(source.replace(right, wrong))
            command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_nexus.py", "-p", "no:cacheprovider"]
            env = {**os.environ, "PYTHONPATH": folder}
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
            caught = failed[0].split("::", 1)[1].split(" - ")[0] if failed else "NOT NOTICED"
            unnoticed += not failed
            print(f"{name:50} {caught}", flush=True)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
