"""Write the packed files of the generated sources."""

import lzma
from pathlib import Path

import hf_nexus.mixture.builtin

from . import PROBLEMS, corpus

FOLDER = Path(hf_nexus.mixture.builtin.__file__).parent
for source in PROBLEMS:
    packed = lzma.compress("\0".join(corpus(source)).encode(), preset=9 | lzma.PRESET_EXTREME)
    (FOLDER / f"{source}.txt.xz").write_bytes(packed)
