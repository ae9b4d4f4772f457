# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-nexus"]
#
# [tool.uv.sources]
# hf-nexus = { path = "..", editable = true }
# ///
"""
Pretrain a language model of 3 billion parameters on text, mathematics, code and reasoning with the Nexus update.

Print the plan, which needs neither a GPU nor a network, and train on one machine with 8 GPUs:

    accelerate launch recipes/pretrain_3b.py --dry_run
    accelerate launch --multi_gpu --num_processes 8 recipes/pretrain_3b.py --config 1b

Train on 8 machines with 8 accelerators each:

    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint $HOST:29500 recipes/pretrain_3b.py

Train the demo on a laptop, in four minutes:

    accelerate launch recipes/pretrain_3b.py --config demo --inner_lr 0.1

Every field of the configuration is also a flag. `--resume_from_checkpoint last` resumes an interrupted run.
"""

import sys

from hf_nexus.terminal import quieten

if __name__ == "__main__":
    quieten()  # before heavy packages are imported
    from hf_nexus.cli.app import main as command
    from hf_nexus.pretrain.run import main

    if {"-h", "--help"} & {*sys.argv[1:]}:
        print("Flags: --config CONFIG, and those below but --devices and --accelerate_config", flush=True)
        command(["train", "--help"])
    main()
