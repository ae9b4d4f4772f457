"""
Pretrain a language model of 3 billion parameters on text, mathematics, code and reasoning with the Nexus update.

On one machine, first only the plan, which needs neither GPU nor network:

    accelerate launch recipes/pretrain_3b.py --dry_run
    accelerate launch --multi_gpu --num_processes 8 recipes/pretrain_3b.py --config 1b

On 8 machines with 8 accelerators each:

    torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint $HOST:29500 recipes/pretrain_3b.py

On a laptop, in four minutes:

    accelerate launch recipes/pretrain_3b.py --config demo --inner_lr 0.1

Any field of the configuration can follow as a flag. `--resume_from_checkpoint last` continues an interrupted run.
"""

from hf_nexus.pretrain.run import main

if __name__ == "__main__":
    main()
