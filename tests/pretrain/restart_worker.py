"""Run by torchrun with arguments of `recipes/pretrain_3b.py`. The first attempt is killed after its fourth step."""

import os
import signal
from typing import Any
from unittest.mock import patch

from hf_nexus.pretrain.run import main
from hf_nexus.trainer.mixin import NexusTrainer

after_a_step = NexusTrainer._maybe_log_save_evaluate


def be_killed(trainer: NexusTrainer, *args: Any, **kwargs: Any) -> None:
    after_a_step(trainer, *args, **kwargs)
    if trainer.state.global_step == 4 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with patch.object(NexusTrainer, "_maybe_log_save_evaluate", be_killed):
        main()
