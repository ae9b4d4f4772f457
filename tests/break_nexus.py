"""
Break the update in one way at a time, and check that its tests notice each break.

    python -m tests.break_nexus
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_nexus.py", "tests/test_controls.py", "tests/test_tensors.py"]
# Per file of the package: name of the break, the right text (once in the file) and the wrong text.
BREAKS = {
    "nexus.py": {
        "wrong sign of the inner step": ("-self._inner_lr / norm", "self._inner_lr / norm"),
        "inner step not normalized": ("-self._inner_lr / norm", "-self._inner_lr * (norm / norm)"),
        "pseudo-gradient not divided by k": ("self._inner_lr * steps)", "self._inner_lr)"),
        "pseudo-gradient not divided by gamma": ("self._inner_lr * steps)", "steps)"),
        "no path: all gradients taken at theta_0": ("        add_scaled_(self.", "        1 or add_scaled_(self."),
        "no snapshot": ("snapshot.save()  # (1)", "snapshot.values"),
        "the path of an inner_lr of 0": ("self._start_control() or GradientPath", "GradientPath"),
        "no restore": ("self._snapshot.restore()\n", "pass\n"),
        "restored only once": ("self.restore()  # again", "pass  # again"),
        "skipped steps counted in k": ("= sum(self.taken), None", "= len(self.taken), None"),
        "unusable steps taken": ("usable = norm.isfinite() & (norm > 0)", "usable = norm == norm"),
        "gradients accumulate": (
            "self._indices.append(indices)\n        clear_gradients(self.params)",
            "self._indices.append(indices)",
        ),
        "old gradients enter the window": ("clear_gradients(self.params)\n                self._path", "self._path"),
        "an exception leaves gradients": ("clear_gradients(self.params)\n                raise", "raise"),
        "gradients where all steps were skipped": ("if taken for i in step", "for i in step"),
        "path cosine without its correction": ("norm**2 - 1) / (k - 1)", "norm**2) / (k - 1)"),
        "outer steps not counted": ("self.outer_step += 1", "pass"),
    },
    "controls.py": {
        "sum not divided by k": ("torch._foreach_div_(p, steps)", "pass"),
        "sum of gradients that are not normalized": (
            "gradients, 1 / norm, usable)",
            "gradients, norm / norm, usable)",
        ),
        "sum not cleared": ("        total.zero()\n", "        total.values\n"),
        "random directions not normalized": ("-self._inner_lr / length", "-self._inner_lr * (length / length)"),
        "random directions along the gradient": (
            "            fill_normal_([",
            "            1 or fill_normal_([",
        ),
        "the same direction at each inner step": ("self._steps += 1", "pass"),
        "the same directions at each outer step": ("[(*key, self.outer_step) for key in self._keys]", "self._keys"),
        "random path without a snapshot": ("        snapshot.save()\n", "        snapshot.values\n"),
        "steps below the rounding floor taken": ("if self.inner_lr >= self.min_inner_lr else 0.0", ""),
    },
    "tensors.py": {
        "never marked as saved": ("self._displaced = range(len(self.values))", "self._displaced = ()"),
        "marked as saved before the copy": (
            "        if not self.offloaded:\n            torch._foreach_copy_(self.values",
            "        self._displaced = range(len(self.values))\n        if not self.offloaded:\n"
            "            torch._foreach_copy_(self.values",
        ),
        "marked as restored before the copy": (
            "        if displaced := self._displaced:\n",
            "        if displaced := self._displaced:\n            self._displaced = ()\n",
        ),
        "marked as restored before the difference": (
            "        differences = []\n",
            "        differences, self._displaced = [], ()\n",
        ),
        "restored before the difference": (
            "            differences.append(start - tensor)\n            tensor.copy_(start)\n",
            "            tensor.copy_(start)\n            differences.append(start - tensor)\n",
        ),
        "unusable steps multiplied by zero": ("found_inf=(~apply).to(torch.float32)", "found_inf=torch.zeros(())"),
        "moved before an offloaded snapshot is complete": ("            self._side.wait()", "            pass"),
    },
}


def failed_test(folder: str) -> str | None:
    """The name of the first test that fails with the package in `folder`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS, "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": folder}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].split("::", 1)[1].split(" - ")[0] if failed else None


def main() -> int:
    """Return the number of breaks that no test noticed."""
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        for package in ("hf_nexus", "tests"):
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
        for name, breaks in BREAKS.items():
            path = Path(folder, "hf_nexus", name)
            source = path.read_text()
            for description, (right, wrong) in breaks.items():
                assert source.count(right) == 1, f"{description}: {right!r} is in {name} {source.count(right)} times"
                path.write_text(source.replace(right, wrong))
                test = failed_test(folder)
                unnoticed += test is None
                print(f"{description:50} {test or 'NOT NOTICED'}", flush=True)
            path.write_text(source)
    return unnoticed


if __name__ == "__main__":
    sys.exit(main())
